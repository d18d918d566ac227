"""What breaks in a night: the disk, the power, two at once. Real signals, real file systems."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from unittest import mock

import pytest
import torch
from conftest import ONE_SHARD, every_byte, score, snapshot, start, uniform, wait_for

import prepare
from harness.journal import read_journal


def refused(words, function, *arguments):
    """The command would end in one line, with these words."""
    with pytest.raises(SystemExit, match=words) as stop:
        function(*arguments)
    assert len(str(stop.value).splitlines()) == 1


# --------------------------------------
# Disk


@contextlib.contextmanager
def full_disk(size):
    """The system refuses to write beyond so many bytes of a file. (Python would leave .pyc files truncated.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with mock.patch("sys.dont_write_bytecode", True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_preparing(hub, home, book):
    for size, arguments in ((20_000, book), (30_000, ONE_SHARD)):
        with full_disk(size):
            refused("fix it and run this again", prepare.main, arguments)
    assert not (home / "current").exists()
    prepare.main(book)
    assert every_byte()
    prepare.main(ONE_SHARD)
    assert every_byte() and snapshot(home / "downloads" / "climbmix") == hub.files


@pytest.mark.parametrize("journal_size", [0, 99_990])
def test_a_full_disk_while_recording(own, journal_size, capsys):
    """The weights don't fit, or not even the line in the journal: the score is not lost without a word."""
    (own.path / "journal.jsonl").write_text("\n" * journal_size)
    model = uniform()
    model.weight = torch.nn.Parameter(torch.zeros(512, 512))
    with full_disk(100_000):
        if journal_size:
            refused(r"scored, val_bpb \d", score, own, model)
        else:
            score(own, model)
            assert "best.pt was not saved" in capsys.readouterr().out and len(read_journal(own.path)) == 1
    assert not list(own.path.glob("best.*"))
    score(own, uniform())  # once there is space again, the next line stands by itself
    assert read_journal(own.path)[-1]["val_bpb"] > 0


@pytest.fixture
def disk(home):
    """`home` on a file system of its own; call it to mount that with other options. For root on Linux."""

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", home], capture_output=True)

    home.mkdir()
    if shutil.which("mount") is None or mount("size=64m").returncode:
        pytest.skip("may not mount a file system")
    yield lambda *options: mount("remount", *options)
    subprocess.run(["umount", "-l", home], check=True)


def test_a_file_system_that_is_full_or_read_only(disk, home, book):
    def fill():
        with contextlib.suppress(OSError), open(home / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def nothing_begins(words):
        refused(words, prepare.TrainingClock, benchmark, "cpu")
        refused(words, prepare.main, [*book, "--seq-len", "16"])

    prepare.main(book)
    benchmark = prepare.load_benchmark()
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    clock.stop()
    fill()
    refused(r"scored, val_bpb \d.*No space left.*fix it", prepare.evaluate_bpb, uniform(300), benchmark, 8, clock)
    disk("ro")
    nothing_begins("Read-only file system")
    disk("rw")
    fill()
    nothing_begins("No space left on device")


def test_a_home_that_is_no_folder(home, book):
    home.write_text("")
    refused(str(home), prepare.main, book)


# --------------------------------------
# Killed


def processes(leader):
    """Those of its session that still live."""
    return subprocess.run(["ps", "-s", str(leader.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize("moment", ["write_rows", "install"])
def test_an_interrupted_build(home, book, moment):
    """Killed when it starts to pack, or when all is packed."""
    code = "import os, prepare, sys\n"
    code += "setattr(prepare, sys.argv.pop(1), lambda *arguments: os.kill(os.getpid(), 9))\nprepare.main()"
    process = start("-c", code, moment, *book)
    process.communicate(timeout=60)
    assert process.returncode == -9 and not (home / "current").exists() and (home / ".building").exists()
    prepare.main(book)
    assert every_byte() and not (home / ".building").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_training_that_is_stopped_while_it_compiles(own, tmp_path, kind):
    """No row, no lock, nothing half-written; the compiler's processes end too."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    before = snapshot(own.path)
    process = start("train.py", environment=environment, start_new_session=True)
    wait_for(lambda: list((tmp_path / "cache").rglob("*.cpp")))
    process.send_signal(kind)
    process.communicate(timeout=100)
    wait_for(lambda: not processes(process))
    assert process.returncode in (-kind, 1, 130) and snapshot(own.path) == before
    score(own, uniform())


# --------------------------------------
# Two at once


def test_two_prepare_the_same(home, book):
    both = [start("prepare.py", *book) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("prepared in" in output for output in outputs) == 1
    assert len(list(home.glob("*/benchmark.json"))) == 1 and every_byte()


def test_prepare_while_a_training_runs(own, book):
    """The run is scored on the benchmark that it began with, although another has become the current one."""
    clock = prepare.TrainingClock(own, "cpu")
    clock.start()
    prepare.main(book)
    clock.stop()
    assert prepare.load_benchmark().id != own.id
    prepare.evaluate_bpb(uniform(), own, 8, clock)
    assert read_journal(own.path)[-1]["benchmark"] == own.id


def test_two_devices_are_two_locks(benchmark):
    for lock in [prepare.DeviceLock(torch.device(kind)) for kind in ("cpu", "mps")]:
        lock.release()


def test_two_runs_are_recorded_one_after_the_other(own):
    """Or lines of the journal could be torn, and best.pt that of the worse."""
    with ThreadPoolExecutor(1) as pool, prepare.FileLock(own.path / "journal.lock"):
        run = pool.submit(score, own, uniform())
        assert wait([run], timeout=1).not_done and not read_journal(own.path)
    assert len(read_journal(own.path)) == 1


# --------------------------------------
# Many in a row, and what a machine may lack


def test_many_runs_leave_nothing_behind(own):
    """20 runs in one process: no more open files, threads or memory than after the first few."""

    def resources():
        pages = int((prepare.Path("/proc/self/statm").read_text()).split()[1])
        return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * 4096 / 2**20

    for number in range(20):
        clock = prepare.TrainingClock(own, "cpu")
        loader = prepare.make_dataloader(own, "train", 8, "cpu")
        clock.start()
        next(loader)
        clock.stop()
        prepare.evaluate_bpb(uniform(), own, 8, clock)
        if number == 4:
            early = resources()
    files, threads, memory = resources()
    assert files <= early[0] and threads <= early[1] and memory < early[2] + 50
    assert len(read_journal(own.path)) == 20


@pytest.mark.long
def test_without_a_compiler(own, tmp_path):
    """No g++: one line, and the training goes on without torch.compile."""
    environment = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train.py", environment=environment)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count("COMPILE: torch.compile does not work, going on without") == 1 and "\nval_bpb: " in output


@pytest.mark.long
def test_fifty_trainings_in_a_row(own):
    """Real ones of 3 seconds: after the first, no file, process or lock is left but 49 more rows."""
    sizes = []
    for _ in range(50):
        process = start("train.py", start_new_session=True)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert not processes(process)
        files = {path for path in prepare.HOME.rglob("*") if "compiled" not in path.parts}
        compiled = {path for path in prepare.HOME.rglob("compiled/**/*")}
        sizes.append((len(files), len(compiled), float(re.search(r"^peak_vram_mb: +(\S+)", output, re.M)[1])))
    assert {size[:2] for size in sizes[1:]} == {sizes[-1][:2]}
    assert max(memory for *_, memory in sizes[-10:]) < 1.1 * max(memory for *_, memory in sizes[1:11])
    runs = read_journal(own.path)
    assert len(runs) == 50 and all(run["val_bpb"] < 5 for run in runs)

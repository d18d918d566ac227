"""What breaks in a night: the disk, the power, two at once. Real signals, real file systems."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from conftest import ONE_SHARD, ROOT, TINY, every_byte, replace, score, snapshot, start, uniform

import prepare


def refused(*command, **options):
    """The one line in which a command fails."""
    process = start(*command, **options)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and len(errors.splitlines()) == 1, errors
    return errors


# --------------------------------------
# Disk


def full_disk(size):
    """The system refuses to write beyond so many bytes of a file. (Python would leave .pyc files truncated.)"""
    code = "import resource, sys, prepare; sys.dont_write_bytecode = True\n"
    return code + f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"


def test_a_full_disk_while_preparing(hub, home, book):
    assert "fix it and run this again" in refused("-c", full_disk(20_000) + "prepare.main()", *book)
    assert "fix it and run this again" in refused("-c", full_disk(30_000) + "prepare.main()", *ONE_SHARD)
    assert not (home / "current").exists()
    prepare.main(book)
    assert every_byte()
    prepare.main(ONE_SHARD)
    assert every_byte() and snapshot(home / "downloads" / "climbmix") == snapshot(hub.folder)


SCORE = """
import prepare, torch
benchmark = prepare.load_benchmark()
clock = prepare.TrainingClock(benchmark, "cpu")
clock.start(); clock.stop()
class Uniform(torch.nn.Embedding):
    def forward(self, inputs):
        return torch.zeros(*inputs.shape, 512)
print("score", prepare.evaluate_bpb(Uniform(512, 512), benchmark, 8, clock))
"""


@pytest.mark.parametrize("journal_size", [0, 99_990])
def test_a_full_disk_while_recording(own, journal_size):
    """The weights don't fit, or not even the line in the journal: the score is not lost without a word."""
    (own.path / "journal.jsonl").write_text("\n" * journal_size)
    process = start("-c", full_disk(100_000) + SCORE)
    output, errors = process.communicate()
    assert not list(own.path.glob("best.*"))
    if journal_size:
        assert process.returncode == 1 and errors.startswith("scored, val_bpb ") and len(errors.splitlines()) == 1
    else:
        assert process.returncode == 0 and len(prepare.read_journal(own.path)) == 1
        assert "best.pt was not saved" in output
    score(own, uniform())  # once there is space again, the next line stands by itself
    assert prepare.read_journal(own.path)[-1]["val_bpb"] > 0


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
    filler = home / "filler"
    filler.write_bytes(bytes(64 * 2**20 - 100_000))
    assert "No space left on device" in refused("prepare.py", *book)
    filler.unlink()
    prepare.main(book)
    assert every_byte()
    loaded = prepare.load_benchmark()

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    fill()
    assert "No space left on device" in refused("train.py")
    filler.unlink()
    clock = prepare.TrainingClock(loaded, "cpu")
    clock.start()
    clock.stop()
    fill()
    with pytest.raises(SystemExit, match=r"scored, val_bpb \d.*No space left.*fix it"):
        prepare.evaluate_bpb(uniform(loaded.vocab_size), loaded, 8, clock)
    filler.unlink()
    score(loaded, uniform(loaded.vocab_size))
    assert len(prepare.read_journal(loaded.path)) == 1

    disk("ro")
    assert "Read-only file system" in refused("train.py")
    assert "Read-only file system" in refused("prepare.py", *book, "--seq-len", "16")


def test_a_home_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("prepare.py", *TINY, environment={"AUTORESEARCH_HOME": str(tmp_path / "file" / "home")})
    assert str(tmp_path) in line


# --------------------------------------
# Killed


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


@pytest.mark.parametrize(
    ("kind", "spot"),
    [(signal.SIGINT, "rehearse(rows"), (signal.SIGTERM, "clock.start()"), (signal.SIGKILL, "evaluate_bpb(model")],
)
def test_a_training_that_is_stopped(own, tmp_path, kind, spot):
    """At any point: no row, no lock, nothing half-written; the next training runs."""
    shutil.copy(ROOT / "train.py", tmp_path)
    stop = f"import signal; os.kill(os.getpid(), {int(kind)})"
    replace(tmp_path / "train.py", (rf"^( +)(?=.*{re.escape(spot)})", rf"\1{stop}\n\1"))
    before = snapshot(own.path)
    process = start(str(tmp_path / "train.py"), environment={"TORCHDYNAMO_DISABLE": "1"})
    process.communicate(timeout=100)
    assert process.returncode in (-kind, 1, 130) and snapshot(own.path) == before
    score(own, uniform())


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_it_compiles(own, tmp_path, kind):
    """The compiler's processes end too, and the next run finds no half-written cache."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train.py", environment=environment, start_new_session=True)
    for _ in range(600):
        if list((tmp_path / "cache").rglob("*.cpp")):
            break
        time.sleep(0.1)
    process.send_signal(kind)
    process.communicate()
    for _ in range(300):
        session = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        if not session.strip():
            break
        time.sleep(0.1)
    assert not session.strip()
    score(own, uniform())


def test_the_lock_of_a_killed_process_does_not_block(own):
    code = "import prepare, os; c = prepare.TrainingClock(prepare.load_benchmark(), 'cpu'); os.kill(os.getpid(), 9)"
    process = start("-c", code)
    process.communicate()
    assert process.returncode == -9
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
    assert prepare.read_journal(own.path)[-1]["benchmark"] == own.id


def test_two_devices_are_two_locks(benchmark):
    first = prepare.lock_device(torch.device("cpu"))
    second = prepare.lock_device(torch.device("mps"))
    with pytest.raises(SystemExit, match=f"pid {os.getpid()}"):
        prepare.lock_device(torch.device("cpu"))
    first.release()
    second.release()


RECORD = """
import prepare, sys, types
benchmark = prepare.load_benchmark()
clock = types.SimpleNamespace(origin={"prepare_sha256": "", "commit": sys.argv[1] * 4000}, elapsed=1.0, rows=0,
                              slow_steps_percent=0.0, ticks=[], device=prepare.torch.device("cpu"))
for number in range(25):
    prepare.record_run(None, clock, benchmark, val_bpb=1000.0 + number)
"""


def test_lines_of_two_writers_stay_whole(own):
    both = [start("-c", RECORD, name) for name in "ab"]
    assert [process.communicate()[1] for process in both] == ["", ""]
    runs = prepare.read_journal(own.path)
    assert sorted(run["commit"][0] for run in runs) == ["a"] * 25 + ["b"] * 25
    assert all(set(run["commit"]) in ({"a"}, {"b"}) for run in runs)


# --------------------------------------
# Many in a row, and what a machine may lack


def test_many_runs_leave_nothing_behind(own):
    """30 runs in one process: no more open files, threads or memory than after the first few."""

    def resources():
        pages = int((prepare.Path("/proc/self/statm").read_text()).split()[1])
        return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * 4096 / 2**20

    for number in range(30):
        clock = prepare.TrainingClock(own, "cpu")
        loader = prepare.make_dataloader(own, "train", 8, "cpu")
        clock.start()
        next(loader)
        clock.stop()
        prepare.evaluate_bpb(uniform(), own, 8, clock)
        if number == 9:
            early = resources()
    files, threads, memory = resources()
    assert files <= early[0] and threads <= early[1] and memory < early[2] + 50
    assert len(prepare.read_journal(own.path)) == 30


@pytest.mark.long
def test_without_a_compiler(own, tmp_path):
    """No g++: one line, and the training goes on without torch.compile."""
    environment = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train.py", environment=environment)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count("COMPILE: torch.compile does not work here, going on without") == 1 and "\nval_bpb: " in output


@pytest.mark.long
def test_fifty_trainings_in_a_row(own):
    """Real ones of 3 seconds: after the first, no file, process or lock is left but 49 more rows."""
    sizes = []
    for number in range(50):
        process = start("train.py", start_new_session=True)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        session = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        assert not session.strip()
        files = {path for path in prepare.HOME.rglob("*") if "compiled" not in path.parts}
        compiled = {path for path in prepare.HOME.rglob("compiled/**/*")}
        sizes.append((len(files), len(compiled), float(re.search(r"^peak_vram_mb: +(\S+)", output, re.M)[1])))
    assert {size[:2] for size in sizes[1:]} == {sizes[-1][:2]}
    assert max(memory for *_, memory in sizes[-10:]) < 1.1 * max(memory for *_, memory in sizes[1:11])
    runs = prepare.read_journal(own.path)
    assert len(runs) == 50 and all(run["val_bpb"] < 5 for run in runs)

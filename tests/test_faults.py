"""
Checks that a full disk, a home that goes away, a kill, and two at once lose no score without a word, that no half is
taken for whole, and that no lock, process or file is left behind.
"""

import contextlib
import functools
import http.server
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from unittest import mock

import pytest
import torch
from conftest import ONE_SHARD, ROOT, every_byte, refused, score, snapshot, start, timed, uniform, wait_for

import prepare
from harness.common import NOT_RECORDED
from harness.journal import NotRecorded, read_journal

# --------------------------------------
# Disk

WAY_OUT = "; fix it, or set AUTORESEARCH_HOME to another folder on a local disk, and run this again"


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


def test_a_full_disk_while_preparing(mirror, home, book):
    for size, arguments in ((20_000, book), (30_000, ONE_SHARD)):
        with full_disk(size):
            assert WAY_OUT in refused(prepare.main, arguments)
        assert not (home / "current").exists()
    for arguments in (book, ONE_SHARD):
        prepare.main(arguments)
        assert every_byte()
    assert snapshot(home / "downloads" / "climbmix") == mirror.files


def test_a_full_disk_while_recording(own, capsys):
    """There is no space for a run; then for the weights; then for a line of the journal, which is torn."""
    journal = own.path / "journal.jsonl"
    model = uniform()
    model.weight = torch.nn.Parameter(torch.zeros(512, 512))
    with full_disk(0):
        line = refused(prepare.TrainingClock, own, "cpu")
        assert re.search("cannot write to AUTORESEARCH_HOME: .*fix it", line)
    with full_disk(100_000):
        score(own, model)
        assert "best.pt was not saved" in capsys.readouterr().out and len(read_journal(own.path)) == 1
        journal.write_text("\n" * 99_990)
        assert re.search(r"scored, val_bpb \d.*not recorded: .*fix it", refused(score, own, model))
    assert not list(own.path.glob("best.*")) and not journal.read_text().endswith("\n")
    score(own, uniform())  # once there is space again, the next line stands by itself
    assert read_journal(own.path)[-1]["val_bpb"] > 0


def test_a_home_that_goes_away(own, capsys):
    """In mid-run: no fault of train.py, so the runner has it run again."""
    away = own.path.with_name("away")
    clock = timed(own)
    own.path.rename(away)
    with pytest.raises(NotRecorded) as lost:
        prepare.evaluate_bpb(uniform(), own, 8, clock)
    assert lost.value.code == NOT_RECORDED and "cannot write to AUTORESEARCH_HOME" in capsys.readouterr().err
    away.rename(own.path)
    score(own, uniform())
    assert len(read_journal(own.path)) == 1


def test_a_home_that_is_no_folder(home, book):
    """Or cannot be written to, as of a user without a home, in a container."""
    home.write_text("")
    said = refused(prepare.main, book)
    assert str(home) in said and WAY_OUT in said


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
    errors = process.communicate(timeout=100)[1]
    wait_for(lambda: not processes(process))
    assert process.returncode == -kind and "Traceback" not in errors and snapshot(own.path) == before
    score(own, uniform())


def test_ctrl_c_leaves_no_traceback_but_errors_do():
    kill = "import os; from harness import common; os.kill(os.getpid(), 2); input()"
    error = "from harness import common; 1 / 0"
    for code, end in ((kill, (-signal.SIGINT, False)), (error, (1, True))):
        process = start("-c", code, stdin=subprocess.PIPE)
        assert (process.wait(), "Traceback" in process.stderr.read()) == end


# --------------------------------------
# Two at once, and many in a row


def test_two_at_once_take_turns(own, book):
    """Or builds could mix, lines of the journal be torn, and best.pt be that of the worse."""
    preparing = (prepare.HOME / "prepare.lock", prepare.main, book)
    recording = (own.path / "journal.lock", score, own, uniform())
    for lock, *work in (preparing, recording):
        with ThreadPoolExecutor(1) as pool, prepare.FileLock(lock):
            job = pool.submit(*work)
            assert wait([job], timeout=1).not_done
        job.result()


def test_prepare_while_a_training_runs(own, book):
    """The run is scored on the benchmark that it began with, although another has become the current one."""
    clock = prepare.TrainingClock(own, "cpu")
    clock.start()
    prepare.main(book)
    clock.stop()
    assert prepare.load_benchmark().id != own.id
    prepare.evaluate_bpb(uniform(), own, 8, clock)
    assert read_journal(own.path)[-1]["benchmark"] == own.id


@pytest.mark.long
def test_fifty_trainings_in_a_row(own):
    """Real ones of 3 seconds: after the first, no file, process or lock is left but 49 more rows."""
    files, megabytes = [], []
    for _ in range(50):
        process = start("train.py", start_new_session=True)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert not processes(process)
        files.append(len(list(prepare.HOME.rglob("*"))))
        megabytes.append(float(re.search(r"^peak_vram_mb: +(\S+)", output, re.M)[1]))
    assert set(files[1:]) == {files[-1]} and max(megabytes[-10:]) < 1.1 * max(megabytes[1:11])
    assert len(read_journal(own.path)) == 50


# --------------------------------------
# The package index


def add_package(index, name, version):
    """An empty wheel, on the page of an index."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (index / name).mkdir(exist_ok=True)
    with zipfile.ZipFile(index / name / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def test_a_mirror_without_dates(tmp_path):
    """README's way past exclude-newer; the pages of this index are listings of folders."""
    index, clone = tmp_path / "index", tmp_path / "clone"
    index.mkdir()
    clone.mkdir()
    project = (ROOT / "pyproject.toml").read_text()
    (clone / "pyproject.toml").write_text(project)
    lists = re.findall(r"^\w+ = \[(.*?)\]$", project.partition("[tool.uv]")[0], re.M | re.S)
    packages = re.findall(r'"([\w-]+)(?:\[\w+\])?(?:==([\d.]+))?"', "".join(lists))
    assert {"torch", "filelock", "pytest", "pandas", "ray"} <= {name for name, _ in packages}
    for name, version in packages:
        add_package(index, name.replace("_", "-"), version or "1.0")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=index)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"PATH": os.environ["PATH"], "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_PYTHON": sys.executable}
        environment["UV_DEFAULT_INDEX"] = f"http://127.0.0.1:{server.server_port}"
        lock = ["uv", "lock", "--no-progress"]
        options = dict(cwd=clone, capture_output=True, text=True)
        refused = subprocess.run(lock, env=environment, **options)
        assert refused.returncode != 0 and "filtered by `exclude-newer`" in refused.stderr
        name, value = re.search(r"`export (UV_EXCLUDE_NEWER)=(\w+)`", (ROOT / "README.md").read_text()).groups()
        subprocess.run(lock, env=environment | {name: value}, check=True, **options)
        server.shutdown()
    assert 'name = "torch"\nversion = "2.11.0"' in (clone / "uv.lock").read_text()

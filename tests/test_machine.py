"""What a machine may be like: homes, users, cores, and file systems without locks."""

import errno
import fcntl
import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import CPU, run, score, uniform

import prepare
from harness import journal, machine

NOBODY = """
import os, pwd
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""


@pytest.mark.parametrize(
    ("named", "before", "words"),
    [("~nobody-here", "", "~nobody-here: there is no such home"), ("", NOBODY, "~/.cache/autoresearch: there is no")],
    ids=["another user's", "none at all"],
)
def test_a_home_that_is_not_there(named, before, words):
    result = run("-c", f"{before}\nimport prepare", AUTORESEARCH_HOME=named)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert words in result.stderr and "set AUTORESEARCH_HOME to a folder on a local disk" in result.stderr


def test_a_user_without_a_name(tmp_path):
    """As with docker --user: torch asks for the name when it compiles, and would go on without compiling."""
    code = "\nimport prepare\nfrom torch._inductor.runtime.cache_dir_utils import default_cache_dir as folder"
    result = run("-c", f"{NOBODY}{code}\nprint(folder())")
    assert result.stdout.strip().endswith("torchinductor_nobody"), result.stderr


def test_to_import_prepare_does_nothing(tmp_path):
    """No file, no thread, no hook; torch finds the folder for what it compiles when it is imported."""
    code = """
import os, sys, threading
sys.addaudithook = None
del os.environ["TORCHINDUCTOR_CACHE_DIR"]

class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))

sys.meta_path.insert(0, Finder)
import prepare, torch
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
"""
    result = run("-c", code, AUTORESEARCH_HOME=str(tmp_path / "home"))
    assert result.stdout == f"{tmp_path}/home/compiled\n", result.stderr
    assert not list(tmp_path.iterdir())


def no_locks(monkeypatch):
    def flock(file, operation):
        if operation != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks(home, book, monkeypatch):
    no_locks(monkeypatch)
    with pytest.raises(SystemExit, match="No locks available: .* set AUTORESEARCH_HOME to a folder on a local disk"):
        prepare.main(book)
    with pytest.raises(SystemExit, match="cannot lock cpu: .*No locks available; .* set TMPDIR to a local folder"):
        machine.DeviceLock(CPU)


def test_a_score_is_not_lost_where_there_are_no_locks(own, monkeypatch):
    clock = prepare.TrainingClock(own, "cpu")
    clock.start()
    clock.stop()
    no_locks(monkeypatch)
    with pytest.raises(SystemExit, match=r"^scored, val_bpb \d.*, but not recorded: .*set AUTORESEARCH_HOME"):
        prepare.evaluate_bpb(uniform(), own, 8, clock)


def test_locks_are_for_all_users_and_all_homes(home, monkeypatch):
    umask = os.umask(0o077)
    try:
        lock = machine.DeviceLock(torch.device("mps"))
    finally:
        os.umask(umask)
    files = Path(tempfile.gettempdir(), "autoresearch-locks")
    assert stat.S_IMODE(files.stat().st_mode) == 0o777
    assert stat.S_IMODE(Path(lock.lock.lock_file).stat().st_mode) == 0o666
    monkeypatch.setattr(prepare, "HOME", home / "another")
    with pytest.raises(SystemExit, match=f"another training is running on mps .pid {os.getpid()}."):
        machine.DeviceLock(torch.device("mps"))
    lock.release()
    machine.DeviceLock(torch.device("mps")).release()


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [(8, None, 8), (8, "max 100000", 8), (8, "200000 100000", 2), (2, "800000 100000", 2), (8, "50000 100000", 1)],
)
def test_cores_that_this_process_may_use(tmp_path, monkeypatch, affinity, quota, cores):
    """Of taskset or a container: a score of fewer cores must not be called one of the whole machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.usable_cores() == cores
    assert prepare.device_name(CPU).endswith(f" x{cores}")


# --------------------------------------
# What is run


def git(folder, *words):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_any_file_of_the_harness_changes_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "ROOT", tmp_path)
    (tmp_path / "harness").mkdir()
    hashes = []
    for name in ("prepare.py", "harness/probe.py", "harness/new.py"):
        (tmp_path / name).write_text("x")
        if (tmp_path / "prepare.py").exists():
            hashes.append(journal.harness_sha256())
    (tmp_path / "harness" / "probe.py").write_text("y")
    hashes.append(journal.harness_sha256())
    assert len(set(hashes)) == 4


def test_the_train_py_of_a_commit_is_read(tmp_path, monkeypatch):
    """Also in a folder of a larger repository."""
    folder = tmp_path / "inner"
    folder.mkdir()
    monkeypatch.setattr(journal, "ROOT", folder)
    git(tmp_path, "init", "-q")
    (folder / "train.py").write_text("import threading\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "threads")
    (folder / "train.py").write_text("pass\n")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert journal.suspects_of_commit(commit) == ["train.py:1 starts threads or processes: import threading"]
    assert journal.suspects_of_commit("0" * 40) == []


def test_a_benchmark_of_an_older_version_is_read(own):
    """Its record has the hash of prepare.py alone, and so have the lines of its journal."""
    path = own.path / "benchmark.json"
    record = prepare.json.loads(path.read_text())
    record["prepare_sha256"] = record.pop("harness_sha256")
    path.write_text(prepare.json.dumps(record))
    old = '{"time": "2026-11-01T00:00:00+00:00", "same_prepare": true, "val_bpb": 0.5}\n'
    (own.path / "journal.jsonl").write_text(old)
    score(prepare.load_benchmark(), uniform())
    before, run = journal.read_journal(own.path)
    assert before["same_harness"] is True and run["same_harness"] is False
    assert "the harness was not the one" in journal.flags(run)[0]
    assert not (own.path / "best.pt").exists()

"""
Checks unusual machines: homes, users, cores, paths with spaces, file systems without locks; and that to import is only
to import.
"""

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, refused, run, start, timed, uniform

import prepare
from harness import machine
from harness.common import DEVICE_TAKEN, find_home

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


def test_to_import_prepare_does_nothing(tmp_path):
    """
    No file, no thread. torch finds the folder for what it compiles when it is imported, and a name where the user has
    none, as with docker --user: it asks when it compiles, and would go on without compiling.
    """
    code = """
import sys, threading
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)

class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))

sys.meta_path.insert(0, Finder)
import prepare, torch
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
assert not os.path.exists(os.environ["AUTORESEARCH_HOME"])
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
print(default_cache_dir())
"""
    result = run("-c", NOBODY + code, AUTORESEARCH_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    compiled, default = result.stdout.splitlines()
    assert compiled == f"{tmp_path}/home/compiled" and default.endswith("torchinductor_nobody")


COMPILED = """
import prepare, torch
import torch._inductor.cpu_vec_isa as instructions
instructions.VecISA.check_build = lambda *arguments: print("tried") or True
print(torch.__file__, prepare.runtime.set_up(torch.device("cpu"), None, 32, 1, True).compiled)
"""


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs a virtual environment, to link it")
@pytest.mark.long  # another torch may break it, nothing else
def test_torch_compiles_in_a_path_with_a_space_and_tries_nothing(tmp_path, environment):
    """
    The path of the environment and of the home, where torch has its cache elsewhere. No instruction set is tried, which
    takes 5 s each in every run, and no CUDA_HOME is missed, which a CPU does not need.
    """
    home = tmp_path / "a b"
    home.mkdir()
    (home / ".venv").symlink_to(sys.prefix)
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    environment |= {"AUTORESEARCH_HOME": str(home), "CUDA_HOME": str(tmp_path), "TORCHDYNAMO_DISABLE": "0"}
    command = [home / ".venv" / "bin" / "python", "-c", COMPILED]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith(f"{home}/.venv/lib/"), result.stderr
    assert result.stdout.endswith("__init__.py True\n") and result.stdout.count("\n") == 1
    assert "CUDA_HOME" not in result.stderr and not list(home.glob("compiled"))


def test_a_file_system_without_locks(own, book, monkeypatch):
    """Nothing begins, and a score is not lost."""

    def flock(file, operation):
        if operation != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    clock = timed(own)
    monkeypatch.setattr(fcntl, "flock", flock)
    said = refused(prepare.evaluate_bpb, uniform(), own, 8, clock)
    assert re.search(r"^scored, val_bpb \d.*, but not recorded: .*set AUTORESEARCH_HOME", said)
    assert "No locks available; fix it, or set AUTORESEARCH_HOME to another folder" in refused(prepare.main, book)
    assert re.search("cannot lock cpu: .*No locks available;.* set AUTORESEARCH_HOME", refused(machine.DeviceLock, CPU))


TAKE = "import torch; from harness import machine; machine.DeviceLock(torch.device('mps')).release()"


@pytest.mark.parametrize("elsewhere", ["AUTORESEARCH_HOME", "AUTORESEARCH_LOCKS"])
def test_locks_are_for_all_users_homes_and_processes(elsewhere, tmp_path, monkeypatch):
    """Clients give each session a TMPDIR of its own, and some sandboxes a /tmp: what is left keeps trainings apart."""
    monkeypatch.setenv("AUTORESEARCH_LOCKS", str(tmp_path / "locks"))
    umask = os.umask(0o077)
    try:
        lock = machine.DeviceLock(torch.device("mps"))
    finally:
        os.umask(umask)
    machine.DeviceLock(CPU).release()  # two devices are two locks
    paths = [Path(held.lock_file) for held in lock.locks]
    assert [path.parent for path in paths] == [find_home() / "locks", tmp_path / "locks"]
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in paths} == {0o777}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o666}
    environment = {"TMPDIR": str(tmp_path), "AUTORESEARCH_HOME": str(find_home())} | {elsewhere: str(tmp_path / "new")}
    second = start("-c", TAKE, environment=environment)
    errors = second.communicate()[1]
    taken = paths[elsewhere == "AUTORESEARCH_HOME"]
    message = f"another training is running on mps (pid {os.getpid()}): wait for it or end it; lock {taken}\n"
    assert (second.returncode, errors) == (DEVICE_TAKEN, message)
    lock.release()
    assert machine.DeviceLock(torch.device("mps")).held


def test_no_tmpdir_moves_the_locks(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_LOCKS")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert machine.lock_folder() == Path("/tmp/autoresearch-locks")


def test_where_others_cannot_be_seen_only_runs_of_this_home_are_kept_apart(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTORESEARCH_LOCKS", str(tmp_path / "file" / "locks"))
    lock = machine.DeviceLock(torch.device("mps"))
    said = capsys.readouterr().out
    assert "Not a directory" in said and "runs of another home may use mps at once" in said
    assert lock.held
    lock.release()


CORES = {  # of the affinity, quota (of cgroup v2, or the two files of v1), threads of torch -> in the device's name
    "no limit": (8, "", 8, 8),
    "no quota": (8, "max 100000", 8, 8),
    "a quota": (8, "200000 100000", 8, 2),
    "taskset": (2, "800000 100000", 8, 2),
    "half a core": (8, "50000 100000", 8, 1),
    "a quota of v1": (8, "200000\n100000", 8, 2),
    "no quota of v1": (8, "-1\n100000", 8, 8),
    "OMP_NUM_THREADS": (8, "max 100000", 1, 1),
}


@pytest.mark.parametrize("name", CORES)
def test_cores_that_this_process_may_use(name, tmp_path, monkeypatch):
    """A score of fewer cores must not be called one of the whole machine."""
    affinity, quota, threads, cores = CORES[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(machine, "THREADS", threads)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "cpu").mkdir()
    files = machine.CPU_QUOTAS["\n" in quota]
    for file, text in zip(files, quota.splitlines(), strict=False):
        (tmp_path / file).write_text(text + "\n")
    assert prepare.device_name(CPU).endswith(f" x{cores}")
    assert not prepare.device_name(torch.device("mps")).endswith(f" x{cores}")

"""
One training of one commit: its files and its keeper.

`ledger.py run` begins a run and waits. A keeper, a process in a session of its own, holds run.lock, starts the
training, waits for it and writes how it ended into run.json. The training holds the lock, too. So it makes no
difference who began a run, or whether that process lives: when the lock is free, the run is over, and any command of
the ledger settles it.

Sections: Begin, Keep, Logs. ends.py judges how a run has ended.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

from harness import common
from harness.common import DEVICE_TAKEN, call_git, find_home, now, write_atomically
from harness.journal import refuse_unwritable
from night.record import read_run

KEEPER_SECONDS = 20 * 60  # beside the budget: the harness ends a run that hangs before that
INTERRUPT_SECONDS = 10  # that a training gets to end after Ctrl-C
LOG_BYTES = 200_000  # of a log's end that are searched for a reason

# --------------------------------------
# Begin


def is_running(place):
    """Whether a keeper or a training holds the lock of this night's runs."""
    with open(place / "run.lock", "a") as file:
        try:
            # shared, so that two processes may ask at once
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def begin(place, night, training):
    """Start the keeper of a training, and return its process. The caller holds the lock of the record."""
    commit = training.commit
    state = new_state(night, place, training)  # raises SystemExit where the benchmark is not
    refuse_unwritable(find_home() / night.benchmark)

    # the lock is held before anything says that a run goes on
    store(commit)
    lock = open(place / "run.lock", "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    write_files(place / "run", commit)
    state |= {"log": str(common.ROOT / "run.log"), "python": sys.executable}
    write_atomically(place / "run.json", json.dumps(state))
    (common.ROOT / "run.log").write_text("")

    # the keeper, and then the training, inherit the lock: it is free when both have ended
    os.set_inheritable(lock.fileno(), True)
    command = [sys.executable, "-m", "night.runner", str(place), str(lock.fileno())]
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keeper = subprocess.Popen(command, cwd=common.ROOT, pass_fds=[lock.fileno()], start_new_session=True, **streams)
    lock.close()
    return keeper


def store(commit):
    """Keep a commit as a try, which git does not forget."""
    call_git("update-ref", f"refs/tries/{commit[:7]}", commit)


def load_budget(night):
    """The seconds of a run. Raises SystemExit where the night's benchmark is not."""
    path = find_home() / night.benchmark / "benchmark.json"
    try:
        return json.loads(path.read_text())["settings"]["time_budget"]
    except (OSError, ValueError, KeyError):
        raise SystemExit(
            f"the benchmark of this night, {night.benchmark}, is not in {find_home()}: set AUTORESEARCH_HOME to where "
            "it was prepared, or prepare it again as it was"
        ) from None


def new_state(night, place, training):
    """What is known of a run before it begins."""
    return {
        "run": f"{training.commit[:7]}-{training.seed}-{secrets.token_hex(4)}",
        "commit": training.commit,
        "seed": training.seed,
        "role": training.role,
        "benchmark": night.benchmark,
        "limit": load_budget(night) + KEEPER_SECONDS,
        "time": now(),
        "host": platform.node(),
        "folder": str(place),
    }


def write_files(folder, commit):
    """The files of a commit, in a folder that has nothing else. Raises SystemExit if git can't give them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    plain = ("-c", "core.autocrlf=false", "-c", "core.eol=lf")  # the very bytes of the commit
    call_git(*plain, "archive", "--format=tar", f"--output={archive}", commit)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()


# --------------------------------------
# Keep


class Keeper:
    """The process that waits for a training. SIGINT ends the training; the other signals end only the keeper."""

    def __init__(self, place, lock):
        self.place = place
        self.lock = lock  # a descriptor that the training inherits
        self.state = read_run(place)
        self.process = None
        self.interrupted = False
        self.patience = math.inf  # until when a training may go on after an interrupt
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        self.interrupted = True
        self.patience = min(self.patience, time.monotonic() + INTERRUPT_SECONDS)
        if self.process:
            kill_group(self.process, signal.SIGINT)

    def keep(self):
        with open(self.state["log"], "wb") as log:
            end = self.train(log)
            while end["exit"] == DEVICE_TAKEN and not self.interrupted:
                self.wait_for_device()
                if not self.interrupted:
                    end = self.train(log)
        if self.interrupted:
            end = {"exit": -signal.SIGINT, "ended": "Ctrl-C"}
        self.write(**end)

    def write(self, **values):
        self.state |= values
        write_atomically(self.place / "run.json", json.dumps(self.state))

    def train(self, log):
        """Train once: {"exit": code, or minus the signal} and, where the keeper ended it, why."""
        state = self.state

        # what the harness and load_benchmark() read
        names = {"RUN": state["run"], "COMMIT": state["commit"], "SEED": str(state["seed"])}
        names["BENCHMARK"] = state["benchmark"]
        names["HOME"] = str(find_home())  # which may be relative to the folder of the repository
        environment = os.environ | {f"AUTORESEARCH_{name}": value for name, value in names.items()}
        environment["PYTHONUNBUFFERED"] = "1"  # so that the last line of the log is what was printed last
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[self.lock])
        command = [state["python"], "train.py"]
        self.process = subprocess.Popen(command, cwd=self.place / "run", start_new_session=True, **options)
        self.write(pid=self.process.pid)
        end = self.wait()
        kill_group(self.process, signal.SIGKILL)  # what it has left behind
        return end

    def wait(self):
        """Wait for the end of the training, at most its limit, or INTERRUPT_SECONDS after an interrupt."""
        deadline = time.monotonic() + self.state["limit"]
        while time.monotonic() < min(deadline, self.patience):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return {"exit": self.process.wait(0.2)}
        kill_group(self.process, signal.SIGKILL)
        return {"exit": self.process.wait(), "ended": f"not over after {self.state['limit']:.0f} s"}

    def wait_for_device(self):
        """Wait for the lock that the training has named, without starting Python again and again."""
        line = last_line(read_log(self.state["log"]))
        path = line.rpartition("; lock ")[2]
        self.write(waiting=line)
        while not self.interrupted:
            with contextlib.suppress(Timeout), FileLock(path, timeout=1, mode=0o666):
                break
        self.write(waiting="")


def kill_group(process, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


# --------------------------------------
# Logs


def read_log(path):
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - LOG_BYTES))
        return file.read().decode(errors="replace")
    return ""


def last_line(log):
    return re.split(r"[\r\n]+", log.strip())[-1].strip()


if __name__ == "__main__":
    Keeper(Path(sys.argv[1]), int(sys.argv[2])).keep()

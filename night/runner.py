"""
One training of one commit: its files, its keeper, and how it ended.

`ledger.py run` begins a run and waits. A keeper, a process in a session of its own, holds run.lock, starts the
training, waits for it and writes how it ended into run.json. The training holds the lock, too. So it makes no
difference who began a run, or whether that process lives: when the lock is free, the run is over, and any command of
the ledger settles it.

Sections: Begin, Keep, Settle, Reasons.
"""

import contextlib
import fcntl
import json
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
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from harness import common
from harness.common import DEVICE_TAKEN, call_git, find_home, git, now, printable, write_atomically
from harness.journal import SLOW_FLAG
from night import rules
from night.record import append, read_jobs, read_run

KEEPER_SECONDS = 20 * 60  # beside the budget: the harness ends a run that hangs before that
INTERRUPT_SECONDS = 10  # that a training gets to end after Ctrl-C
SLOW_RUN = 0.5  # of the most steps that a counted run of the same commit has made
LOG_BYTES = 200_000  # of a log's end that are searched for a reason

# --------------------------------------
# Begin


def is_running(place):
    """Whether a keeper or a training holds the lock of this night's runs."""
    with open(place / "run.lock", "a") as file:
        try:
            # shared, so that two processes that look at once do not meet
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def begin(place, night, training, budget):
    """Start the keeper of a training, and return its process. The caller holds the lock of the record."""
    commit = training.commit

    # git forgets no try, and the lock is held before anything says that a run goes on
    git("update-ref", f"refs/tries/{commit[:7]}", commit)
    lock = open(place / "run.lock", "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    write_files(place / "run", commit)
    state = new_state(night, place, training, budget)
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


def new_state(night, place, training, budget):
    """What is known of a run before it begins."""
    return {
        "run": f"{training.commit[:7]}-{training.seed}-{secrets.token_hex(4)}",
        "commit": training.commit,
        "seed": training.seed,
        "role": training.role,
        "benchmark": night.benchmark,
        "limit": budget + KEEPER_SECONDS,
        "time": now(),
        "host": platform.node(),
        "folder": str(place),
    }


def write_files(folder, commit):
    """The files of a commit, in a folder that has nothing else. Raises SystemExit if git can't give them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    call_git("archive", "--format=tar", f"--output={archive}", commit)
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
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        self.interrupted = True
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
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[self.lock])
        command = [state["python"], "train.py"]
        self.process = subprocess.Popen(command, cwd=self.place / "run", start_new_session=True, **options)
        self.write(pid=self.process.pid)
        end = wait(self.process, lambda: self.interrupted, state["limit"])
        kill_group(self.process, signal.SIGKILL)  # what it has left behind
        return end

    def wait_for_device(self):
        """Wait for the lock that the training has named, without starting Python again and again."""
        line = last_line(read_log(self.state["log"]))
        path = line.rpartition("; lock ")[2]
        self.write(waiting=line)
        while not self.interrupted:
            with contextlib.suppress(Timeout), FileLock(path, timeout=1, mode=0o666):
                break
        self.write(waiting="")


def wait(process, is_interrupted, limit):
    """Wait for the end of a training, at most `limit` seconds, or INTERRUPT_SECONDS after an interrupt."""
    deadline = time.monotonic() + limit
    patience = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return {"exit": process.wait(0.2)}
        if is_interrupted() and patience is None:
            patience = time.monotonic() + INTERRUPT_SECONDS
        if time.monotonic() > min(deadline, patience or deadline):
            kill_group(process, signal.SIGKILL)
            return {"exit": process.wait(), "ended": f"not over after {limit:.0f} s"}


def kill_group(process, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


# --------------------------------------
# Settle


def settle(place, night, journal, running):
    """
    Record the runs that are over, and what is decided by them. Each step may have been done before: it is told by the
    run's id. `running` was asked before the journal was read. The caller holds the lock of the record.
    """
    scored = {line["run"]: line for line in journal if line.get("run")}

    # a score beats what was recorded before it was seen
    late = [run for run in night.runs.values() if run.state == "interrupted" and run.run in scored]
    for run in late:
        append(place, night, *scored_lines(vars(run), scored[run.run], night))

    # what is over: jobs of a wave, and the run here
    over = {path: job for path, job in read_jobs(place).items() if "exit" in job}
    if night.going_on and not running:
        over[place / "run.json"] = night.going_on
        night.going_on = None
    for state in over.values():
        if state["run"] not in night.runs and (is_ours(state, place) or state["run"] in scored):
            append(place, night, *end_lines(state, scored.get(state["run"]), night))
    for decision in rules.due_decisions(night):
        append(place, night, {"kind": "decision", "time": now(), **as_line(decision)})
    for path in over:
        path.unlink(missing_ok=True)


def is_ours(state, place):
    """Whether a run was not brought along by a copy of this folder, made in mid-run: that one is dropped."""
    return (state["host"], state["folder"]) == (platform.node(), str(place))


def as_line(item):
    """A Decision as the values of a line, without those that say nothing."""
    return {name: value for name, value in vars(item).items() if value not in (None, "") and name != "time"}


def end_lines(state, scored, night):
    """The lines of a run that is over."""
    if scored:
        return scored_lines(state, scored, night)
    return [run_line(state, night) | judge_end(state, night)]


def run_line(state, night):
    """What is known of every run."""
    commit = state["commit"]
    parent = git("rev-parse", f"{commit}^").output
    train = git("rev-parse", f"{commit}:train.py").output
    subject = git("log", "-1", "--format=%s", commit).output
    values = {name: state[name] for name in ("run", "commit", "role", "seed")} | {"parent": parent, "train": train}
    values |= {"benchmark": night.benchmark, "device": night.device, "exit": state.get("exit")}
    description = "baseline" if commit == night.start else printable(subject, 500) or "no subject"
    return {"kind": "run", "time": now(), **values, "description": description}


def scored_lines(state, scored, night):
    """The lines of a run that the harness has scored; and of earlier ones that it shows to be disturbed."""
    seconds = scored.get("training_seconds") or 1
    line = run_line(state, night) | {
        "time": scored["time"],
        "device": scored["device"],
        "state": "scored",
        "val_bpb": scored["val_bpb"],
        "memory_gb": round(scored["peak_memory_mb"] / 1024, 2),
        "steps": scored["steps"],
        "tokens_per_second": round(scored["tokens"] / seconds, 1),
        "slow_steps_percent": scored["slow_steps_percent"],
        "losses": scored.get("losses", []),
    }
    others = [run for run in night.attempt(state["commit"]).runs.values() if run.counts]
    most = max((run.steps for run in others), default=0)

    # what does not compare, and then what was disturbed: this run, or earlier ones
    if scored["device"] != (night.device or scored["device"]):
        return [line | {"state": "elsewhere", "reason": f"on {scored['device']}, the night is on {night.device}"}]
    if scored["slow_steps_percent"] > SLOW_FLAG:
        return [disturbed(line, f"{scored['slow_steps_percent']:.0f}% of the time in slow steps", night)]
    if scored["steps"] < SLOW_RUN * most:
        return [disturbed(line, f"{scored['steps']} steps, another run of it made {most}", night)]
    slower = [run for run in others if run.steps < SLOW_RUN * scored["steps"]]
    reason = "under half the steps of a later run"
    return [line, *({"kind": "run", **vars(run), "state": "disturbed", "reason": reason} for run in slower)]


def disturbed(line, reason, night):
    """A run that something else has slowed down. Its seed runs again; the third time it is a crash."""
    earlier = [run for run in same_seed(line, night) if run.state == "disturbed"]
    if len(earlier) + 1 < rules.MOST_DISTURBED:
        return line | {"state": "disturbed", "reason": reason}
    return line | {"state": "crash", "reason": f"disturbed {rules.MOST_DISTURBED} times: {reason}"}


def same_seed(state, night):
    """The runs of the same commit, role and seed."""
    return [run for run in night.attempt(state["commit"]).of_role(state["role"]) if run.seed == state["seed"]]


def judge_end(state, night):
    """State and reason of a run without a score."""
    code = state.get("exit")
    log = read_log(state["log"])
    if code is None:
        end = state.get("lost") or f"ended from outside, with its keeper, after {seconds_of(state):.0f} s"
        most = rules.MOST_INTERRUPTED
    elif code == -signal.SIGKILL and not state.get("ended"):
        end, most = "killed: did memory run out?", rules.MOST_KILLED
    elif state.get("ended") == "Ctrl-C":
        return {"state": "interrupted", "reason": "ended with Ctrl-C"}
    else:
        return {"state": "crash", "reason": state.get("ended") or find_reason(log, code)}
    earlier = [run for run in same_seed(state, night) if run.state == "interrupted" and run.exit == code]
    if len(earlier) + 1 < most:
        return {"state": "interrupted", "reason": end}
    return {"state": "crash", "reason": f"{most} times {end}"}


def seconds_of(state):
    """How long a run went on whose end nobody saw: until it last wrote into its log."""
    try:
        return max(0.0, os.path.getmtime(state["log"]) - datetime.fromisoformat(state["time"]).timestamp())
    except OSError:
        return 0.0


# --------------------------------------
# Reasons


def read_log(path):
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def last_line(log):
    return re.split(r"[\r\n]+", log.strip())[-1].strip()


def find_reason(log, code):
    """Why a training has ended without a score: at most 200 characters."""
    hang = re.search(r"^Timeout \([\d:.]+\)!$", log, re.M)
    if hang:
        frames = re.findall(r'^  File "([^"]*)", line (\d+) in (\S+)', log[hang.end() :], re.M)
        own = [frame for frame in frames if frame[0].endswith("train.py")] or frames or [("?", "?", "?")]
        path, number, function = own[0]
        return printable(f"hung in {function}, {Path(path).name}:{number}", 200)

    # of a chain the exception that came last; torch.compile's has the cause first, and advice at its end
    chain = re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", log, re.M)
    if chain and code == 1:
        is_compiler = chain[-1].startswith(("torch._dynamo", "torch._inductor"))
        return printable(chain[0] if is_compiler else chain[-1], 200)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return printable(f"exit code {code}: {last_line(log)}", 200)


def fallbacks(log):
    """The lines of a log in which train.py reports a fallback, or a parameter without a gradient."""
    said = r"^(?:CPU|COMPILE|DEVICE_BATCH_SIZE): .*|^attention: \w+ not used.*|^\S+ has no gradient.*"
    return re.findall(said, log, re.M)


if __name__ == "__main__":
    Keeper(Path(sys.argv[1]), int(sys.argv[2])).keep()

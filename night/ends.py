"""
How a run has ended: what is recorded of it, and why it has no score.

Sections: Settle, Reasons.
"""

import math
import os
import platform
import re
import signal
import statistics
from datetime import datetime
from pathlib import Path

from harness.common import CRASHED, NOT_RECORDED, git, now, printable, resolve
from harness.journal import SLOW_FLAG
from night import rules
from night.record import append, read_jobs
from night.runner import last_line, read_log
from night.state import HIGHEST_SCORE

SLOW_RUN = 0.5  # of the most steps that a counted run of the same commit has made
SLOW_MACHINE = 0.85  # of the usual speed
LEAST_SPEEDS = 3  # runs that tell what is usual

# A step's seconds grow as a product's (harness/pace.py) to this power. Fits on two shared cores: 1.58 in 13 runs of
# three models (97% of the variance of a model's steps), 1.3 in 25 others (94 to 98%)
STEP_POWER = 1.5

# --------------------------------------
# Settle


def settle(place, night, journal, running):
    """
    Record the runs that have ended, and the decisions that follow. Calling it again records nothing twice, because runs
    have ids. Ask for `running` before reading the journal. The caller holds the lock of the record.
    """
    scored = {line["run"]: line for line in journal if line.get("run")}

    # runs that were recorded as interrupted, and whose score is in the journal by now
    late = [run for run in night.runs.values() if run.state == "interrupted" and run.run in scored]
    for run in late:
        append(place, night, *scored_lines(vars(run), scored[run.run], night))

    # what is over: jobs of a wave, and the run here
    over = {path: job for path, job in read_jobs(place).items() if "exit" in job}
    if night.going_on and not running:
        if is_ours(night.going_on, place) or night.going_on["run"] in scored:
            over[place / "run.json"] = night.going_on
        else:
            (place / "run.json").unlink()
        night.going_on = None
    for state in over.values():
        if state["run"] not in night.runs:
            append(place, night, *end_lines(state, scored.get(state["run"]), night))
    night.out = [job for job in night.out if job["run"] not in night.runs]
    for decision in rules.due_decisions(night):
        append(place, night, {"kind": "decision", **vars(decision), "time": now()})
    for path in over:
        path.unlink(missing_ok=True)


def is_ours(state, place):
    """Whether the run began in this folder on this machine. A folder copied in mid-run has its run.json, too."""
    return (state["host"], state["folder"]) == (platform.node(), str(place))


def end_lines(state, scored, night):
    """The lines of a run that is over."""
    if scored:
        return scored_lines(state, scored, night)
    return [run_line(state, night) | judge_end(state, night)]


def run_line(state, night):
    """What is known of every run."""
    commit = state["commit"]
    subject = git("log", "-1", "--format=%s", commit).output
    description = printable(subject, 500) or "no subject"
    if commit == night.start:
        description = "baseline"
    return {
        "kind": "run",
        "run": state["run"],
        "time": now(),
        "commit": commit,
        "parent": resolve(f"{commit}^"),
        "train": resolve(f"{commit}:train.py"),
        "role": state["role"],
        "seed": state["seed"],
        "benchmark": night.benchmark,
        "device": night.device,
        "exit": state.get("exit"),
        "description": description,
    }


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
        "product_ms": scored.get("product_ms"),
        "losses": scored.get("losses", []),
    }
    others = [run for run in night.attempt(state["commit"]).runs.values() if run.counts]
    most = max((run.steps for run in others), default=0)

    # a score out of range is a crash; one on another device cannot be compared
    if not 0 < scored["val_bpb"] < HIGHEST_SCORE:
        reason = f"val_bpb {scored['val_bpb']:g} is out of range"
        return [line | {"state": "crash", "val_bpb": None, "reason": reason}]
    if scored["device"] != (night.device or scored["device"]):
        reason = f"on {scored['device']}, the night is on {night.device}"
        return [line | {"state": "elsewhere", "reason": reason}]

    # disturbed runs: this one, or earlier ones; one that recompiled had slow steps of its own
    slow, steps = scored["slow_steps_percent"], scored["steps"]
    if slow > SLOW_FLAG and not scored.get("recompiled"):
        return [disturbed(line, f"{slow:.0f}% of the time in slow steps", night)]
    if steps < SLOW_RUN * most:
        return [disturbed(line, f"{steps} steps, another run of it made {most}", night)]

    # a slow hour may go on, and costs no idea: the third run of a seed counts
    usual = [run for run in night.runs.values() if run.product_ms and run.device == line["device"]]
    speed = machine_speed(line["product_ms"], usual)
    is_known = len(usual) >= LEAST_SPEEDS and not scored.get("recompiled")
    is_last = times_disturbed(line, night) >= rules.MOST_DISTURBED - 1
    if speed < SLOW_MACHINE and is_known and not is_last:
        return [line | {"state": "disturbed", "reason": f"the machine ran at {speed:.2f} of its usual speed"}]
    found = [line]
    for run in others:
        if run.steps < SLOW_RUN * steps:
            reason = "under half the steps of a later run"
            found.append({"kind": "run", **vars(run), "state": "disturbed", "reason": reason})
    return found


def disturbed(line, reason, night):
    """A run that something else has slowed down. Its seed runs again; the third time it is a crash."""
    if times_disturbed(line, night) < rules.MOST_DISTURBED - 1:
        return line | {"state": "disturbed", "reason": reason}
    return line | {"state": "crash", "reason": f"disturbed {rules.MOST_DISTURBED} times: {reason}"}


def times_disturbed(line, night):
    return sum(run.state == "disturbed" for run in same_seed(line, night))


def machine_speed(product_ms, runs):
    """
    The speed of the machine in a run, as a share of its median in other runs: the ratio of the steps that one train.py
    would make (harness/pace.py). NaN where that is not known, as on a GPU.
    """
    known = [run.product_ms for run in runs if run.product_ms]
    if not product_ms or not known:
        return math.nan
    return (statistics.median(known) / product_ms) ** STEP_POWER


def same_seed(state, night):
    """The runs of the same commit, role and seed."""
    runs = night.attempt(state["commit"]).of_role(state["role"])
    return [run for run in runs if run.seed == state["seed"]]


def judge_end(state, night):
    """State and reason of a run without a score."""
    code, ended = state.get("exit"), state.get("ended")
    if code is None:
        seconds = seconds_of(state)
        end = state.get("lost") or f"ended from outside, with its keeper, after {seconds:.0f} s"
        most = rules.MOST_INTERRUPTED
    elif code == -signal.SIGKILL and not ended:
        end = "killed: did memory run out?"
        most = rules.MOST_KILLED
    elif code == NOT_RECORDED:
        end = last_line(read_log(state["log"]))[:200]
        most = rules.MOST_INTERRUPTED
    elif ended == "Ctrl-C":
        return {"state": "interrupted", "reason": "ended with Ctrl-C"}
    else:
        log = read_log(state["log"])
        return {"state": "crash", "reason": ended or find_reason(log, code)}

    # if this has happened `most` times, train.py itself is to blame
    earlier = [run for run in same_seed(state, night) if run.state == "interrupted"]
    if len([run for run in earlier if run.exit == code]) + 1 < most:
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


def find_reason(log, code):
    """Why a training has ended without a score: at most 200 characters."""
    hang = re.search(r"^Timeout \([\d:.]+\)!$", log, re.M)
    if hang:
        frames = re.findall(r'^  File "([^"]*)", line (\d+) in (\S+)', log[hang.end() :], re.M)
        own = [frame for frame in frames if frame[0].endswith("train.py")] or frames or [("?", "?", "?")]
        path, number, function = own[0]
        return printable(f"hung in {function}, {Path(path).name}:{number}", 200)

    crashed = re.findall(f"^{CRASHED}(.*)", log, re.M)
    if crashed and code == 1:
        return printable(crashed[-1], 200)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return printable(f"exit code {code}: {last_line(log)}", 200)


def fallbacks(log):
    """The lines of a log in which train.py reports a fallback, or a parameter without a gradient."""
    said = r"^(?:CPU|COMPILE|DEVICE_BATCH_SIZE): .*|^attention: \w+ not used.*|^\S+ has no gradient.*"
    return re.findall(said, log, re.M)

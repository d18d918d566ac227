"""
One training of a wave: what runs on a node, and how its end is judged. wave.py sends it, as

    python swarm/job.py <benchmark id> <seed> <arguments of prepare.py>

in a clone of the commit, with the Python that Ray has there. So it imports the standard library and filelock alone. All
jobs of a node share AUTORESEARCH_HOME: in it one environment, the benchmark, and the lock under which both are made.

Sections: On the node, Judgement.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent.parent))  # Python has put swarm/ there

from harness.journal import ROOT, find_home, first_line, git, read_journal

TRAINING = "training with seed"  # begins the line after which what fails is train.py, not the node
RESULT = "RESULT "  # begins the last line of a scored run
REASON_CHARACTERS = 160

# --------------------------------------
# On the node


def run(benchmark, seed, arguments):
    """Train, in an environment and on a benchmark that are made here if they are missing. Raises SystemExit."""
    home = find_home()
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to 1
    os.environ.pop("VIRTUAL_ENV", None)  # Ray's own
    os.environ |= {"UV_PROJECT_ENVIRONMENT": str(home / "venv"), "UV_PYTHON": sys.executable, "UV_NO_SYNC": "1"}
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "wave.lock"):
        make_environment(home)
        if current(home) != benchmark:
            call("uv", "run", "prepare.py", *shlex.split(arguments))
    if current(home) != benchmark:
        raise SystemExit(f"prepare.py {arguments} makes {current(home)} on this node, not {benchmark}")

    # the journal tells whether it was scored, whatever it prints
    earlier = len(read_journal(home / benchmark))
    print(f"{TRAINING} {seed} on {platform.node()}", flush=True)
    os.environ["AUTORESEARCH_SEED"] = seed
    code = subprocess.run(["uv", "run", "train.py"]).returncode
    commit = git("rev-parse", "HEAD")
    for line in reversed(read_journal(home / benchmark)[earlier:]):
        if line["commit"] == commit and line["seed"] == int(seed):
            print(RESULT + json.dumps(line), flush=True)
            return
    if code < 0:
        raise SystemExit(f"train.py was ended by signal {-code}")
    raise SystemExit(code or "train.py ended without a score")


def make_environment(home):
    """Install what pyproject.toml asks for, unless that was done. The lock file of uv is in no clone."""
    project = (ROOT / "pyproject.toml").read_text()
    installed = home / "venv" / "installed.toml"
    if not installed.exists() or installed.read_text() != project:
        call("uv", "sync", "-q", "--no-default-groups")
        installed.write_text(project)


def current(home):
    """The benchmark that train.py would take; "" if there is none."""
    try:
        return (home / "current").read_text().strip()
    except FileNotFoundError:
        return ""


def call(*command):
    """Run a command, whose output goes to the log. Raises SystemExit if it fails."""
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(f"{shlex.join(command)} failed with exit code {code}")


# --------------------------------------
# Judgement


def judge(exit_code, message, log):
    """
    How a job has ended: {"state": "scored"} and the run's line of the journal, or "crash" or "lost" with the reason.

    A crash is a fault of train.py. A job is lost where the node or the device failed it: it may be sent again. The exit
    code is None where Ray has not seen the end.
    """
    last = log.strip().rpartition("\n")[2].strip()
    if last.startswith(RESULT):
        return json.loads(last.removeprefix(RESULT)) | {"state": "scored"}
    last = last[:REASON_CHARACTERS]

    # Ray, or somebody else, has ended the job itself
    if exit_code is None or exit_code < 0:
        return {"state": "lost", "reason": f"its node went: {first_line(message)}"}
    if re.search("^another training is running", log, re.M):
        return {"state": "lost", "reason": f"its device was taken: {last}"}
    if not re.search(f"^{TRAINING}", log, re.M):
        return {"state": "lost", "reason": f"its node was not ready: {last}"}
    return {"state": "crash", "reason": last}


if __name__ == "__main__":
    run(*sys.argv[1:])

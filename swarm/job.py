"""
One training of a wave: what runs on a node of the cluster. wave.py sends it, as

    python swarm/job.py <json of the run>

in a folder with the files of the commit, with the Python that Ray has there. So it imports the standard library and
filelock alone. All jobs of a node share AUTORESEARCH_HOME: in it an environment for each pyproject.toml, the
benchmarks, and a folder for each training.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent.parent))  # Python has put swarm/ there

from harness.common import ROOT, find_home, write_atomically
from harness.journal import read_journal
from night.record import read_run
from night.runner import Keeper, read_log

RESULT = "RESULT "  # begins the line with the end of a training


def run(state, arguments):
    """
    Train with a keeper, as on one machine, and print how that ended. `state` is what run.json has before a run begins,
    `arguments` are those with which prepare.py makes the benchmark.
    """
    home = find_home()

    # what Ray sets for itself
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.pop("VIRTUAL_ENV", None)

    # one job makes what all of this node need
    place = home / "jobs" / state["training"]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "jobs.lock"):
        python = make_environment(home)
        make_benchmark(home, python, state["benchmark"], arguments)
    with open(place / "run.lock", "a") as lock:
        # a training whose job was lost may still go on here, or have ended: it is not made twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        earlier = read_run(place)
        if not earlier or not is_this(home, earlier, state):
            train(state | {"log": str(place / "run.log"), "python": python}, place, lock)
        end = read_run(place)
        scored = find_score(home, end)

        # the log first: whoever reads the job takes its last line
        print(read_log(end["log"]))
        scored = scored and scored | {"run": state["run"]}
        print(RESULT + json.dumps({"exit": end.get("exit"), "ended": end.get("ended"), "scored": scored}), flush=True)
        write_atomically(place / "run.json", json.dumps(end | {"told": True}))


def is_this(home, earlier, state):
    """Whether an earlier training here can serve as this run: the same run, ended; or one with an unreported score."""
    if earlier["run"] == state["run"]:
        return "exit" in earlier or find_score(home, earlier) is not None
    return "told" not in earlier and find_score(home, earlier) is not None


def train(state, place, lock):
    # Ray may give this folder to another job
    shutil.rmtree(place / "run", ignore_errors=True)
    shutil.copytree(ROOT, place / "run")
    write_atomically(place / "run.json", json.dumps(state))
    keeper = Keeper(place, lock.fileno())
    signal.signal(signal.SIGTERM, keeper.interrupt)  # `ray job stop`
    keeper.keep()


def find_score(home, state):
    """The line of this node's journal about a run; None if it has none."""
    return next((line for line in read_journal(home / state["benchmark"]) if line.get("run") == state["run"]), None)


def make_environment(home):
    """Install what pyproject.toml asks for, unless that was done. Returns the path of its Python."""
    project = (ROOT / "pyproject.toml").read_bytes()
    folder = home / f"venv-{hashlib.sha256(project).hexdigest()[:8]}"
    if not (folder / "installed").exists():
        environment = {"UV_PROJECT_ENVIRONMENT": str(folder), "UV_PYTHON": sys.executable}
        call(["uv", "sync", "-q", "--no-default-groups"], environment)
        (folder / "installed").touch()
    return str(folder / "bin" / "python")


def make_benchmark(home, python, benchmark, arguments):
    """Prepare the benchmark of the night, unless that was done; what is current here stays so."""
    if not (home / benchmark / "benchmark.json").exists():
        call([python, "prepare.py", *arguments], {"AUTORESEARCH_BENCHMARK": benchmark})


def call(command, environment):
    """Run a command, whose output goes to the log. Raises SystemExit if it fails."""
    code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, env=os.environ | environment).returncode
    if code:
        raise SystemExit(f"{shlex.join(command)} failed with exit code {code}")


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))

"""
How runs end: `ledger.py run` in a real repository, with processes that crash, hang, are killed, wait for each other or
die between two writes. Where no harness is needed the trainings are scripts without it, and write its line themselves.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import LINE, ROOT, TRAIN, Agent, new_repository, start, wait_for
from filelock import FileLock

from night.runner import is_running

CHILD = """
import os, subprocess
from pathlib import Path

child = subprocess.Popen(["sleep", "600"])
Path(os.environ["AUTORESEARCH_HOME"], "child").write_text(str(child.pid))
"""
CLOCK = """
import time
import torch
import prepare

def stuck():
    while True:
        time.sleep(1)

prepare.SETUP_SECONDS, prepare.HANG_SECONDS = SECONDS
benchmark = prepare.load_benchmark()
clock = prepare.TrainingClock(benchmark, "cpu")
"""
SCORE = """
class Uniform(torch.nn.Module):
    def forward(self, inputs):
        return torch.zeros(*inputs.shape, benchmark.vocab_size)

clock.start()
clock.tick(3.0)
clock.stop()
prepare.evaluate_bpb(Uniform(), benchmark, 8, clock)
"""


class Clone(Agent):
    """A repository on the branch of a night, whose trainings write line.json into the journal."""

    def __init__(self, folder, environment, home):
        super().__init__(folder, environment)
        self.home = home
        self.place = folder / ".git" / "autoresearch" / "test"
        self.record = self.place / "record.jsonl"

    def scores_next(self, **changes):
        (self.home / "line.json").write_text(json.dumps(changes))

    def idea(self, *parts):
        (self.folder / "train.py").write_text("\n".join(parts))
        self.git("commit", "-qm", "an idea", "--", "train.py")
        return self.head()

    def start(self, *words):
        return start("ledger.py", *words, cwd=self.folder, environment=self.environment)

    def hold(self):
        """Start a run whose training holds on: (process, pid of the keeper, pid of the training)."""
        (self.home / "hold").touch()
        process = self.start("run")
        training = wait_for(lambda: self.state().get("pid"))
        return process, int(ps("ppid", training)), training

    def release(self):
        (self.home / "hold").unlink()

    def state(self):
        path = self.place / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def cut_record(self, lines):
        """The record with so many lines after the first four: start, and three runs of the baseline."""
        self.record.write_text("".join(self.record.read_text().splitlines(keepends=True)[: 4 + lines]))

    def recorded(self):
        """The lines after the first four, without times."""
        lines = [json.loads(text) for text in self.record.read_text().splitlines()[4:]]
        return [{name: value for name, value in line.items() if name != "time"} for line in lines]

    def runs(self):
        return [line for line in self.recorded() if line["kind"] == "run"]

    def states(self):
        """State and seed of each run, as they stand."""
        return [(line["state"], line["seed"]) for line in {line["run"]: line for line in self.runs()}.values()]

    def reasons(self):
        return [(line["state"], line["reason"]) for line in self.runs()]

    def assert_one_score(self):
        journal = next(self.home.glob("*/journal.jsonl")).read_text()
        assert self.states() == [("scored", 1)] and len(self.runs()) == journal.count("\n") == 1


def ps(name, pid):
    return subprocess.run(["ps", "-o", f"{name}=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


def is_alive(pid):
    return ps("stat", pid)[:1] not in ("", "Z")


@pytest.fixture
def clone(tmp_path_factory, tmp_path, own, environment):
    """A copy of a night that has started and whose baseline has run, with a home of its own."""
    home, night = own.path.parent, tmp_path_factory.getbasetemp() / "night"  # one for all tests of this process
    environment |= {"AUTORESEARCH_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"CXX": sys.executable}  # some program: nothing is compiled
    if not night.exists():
        first = Clone(new_repository(night, environment), environment, home)
        first.idea(TRAIN)
        first.ledger("start", "test", "--until", "never")
        for _ in range(3):
            assert "scored 1.000000" in first.ledger("run")
        (own.path / "journal.jsonl").unlink()
    clone = Clone(shutil.copytree(night, tmp_path / "clone"), environment, home)
    yield clone
    (home / "hold").unlink(missing_ok=True)
    wait_for(lambda: not is_running(clone.place))


@pytest.fixture
def held(clone):
    """An idea whose training holds on: (clone, process, keeper, training)."""
    clone.idea(CHILD, TRAIN)
    return clone, *clone.hold()


# --------------------------------------
# How it ends

PREPARE = "from harness import common"
TORCH = """
import os
os.environ.pop("TORCHDYNAMO_DISABLE")
import torch
from harness import common
from torch import nn
"""
WRONG_SHAPE = """
model = nn.Sequential(nn.Linear(4, 5), nn.Linear(4, 4))
model.compile()
model(torch.ones(4, 4))
"""
NO_COMPILER = """
def fail(graph, inputs):
    raise ValueError("C++ compile error\\n\\nOutput:\\nmain.cpp:1: error: no such type\\n")
torch.compile(lambda x: 2 * x, backend=fail)(torch.ones(4))
"""
SPARSE = """
table = nn.Embedding(4, 4, sparse=True)
table(torch.tensor([1])).sum().backward()
nn.utils.clip_grad_norm_(table.parameters(), 1.0)
"""
NO_NORM = "NotImplementedError: Could not run 'aten::linalg_vector_norm' with arguments from the 'SparseCPU' backend"
HANG = [CLOCK.replace("SECONDS\n", "(600, -2.5)\n"), "clock.start()", "stuck()"]
SETUP = [CLOCK.replace("SECONDS\n", "(1, 60)\n"), "stuck()"]
CRASHES = {
    "exception": ([PREPARE, "raise ValueError('no')"], "ValueError: no, train.py:2"),
    "exception before prepare is imported": (["raise ValueError('no')"], "exit code 1: ValueError: no"),
    "chain": ([PREPARE, "try:\n    1 / 0\nfinally:\n    {}['no']"], "KeyError: 'no', train.py:5"),
    "words": (["raise SystemExit('no\\nnot at all')"], "exit code 1: not at all"),
    "syntax": (["x = (1"], "exit code 1: SyntaxError: '(' was never closed"),
    "code": (["print('that')", "import os", "os._exit(3)"], "exit code 3: that"),
    "no score": (["print('done')"], "exit code 0: done"),
    "signal": (["import os", "os.kill(os.getpid(), 11)"], "ended by SIGSEGV"),
    "a shape in compiled code": ([TORCH, WRONG_SHAPE], "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "compiler": ([TORCH, NO_COMPILER], "ValueError: C++ compile error, train.py:10"),
    "sparse": ([TORCH, SPARSE], NO_NORM),
    "hung in training": (HANG, "hung in stuck, train.py:8"),
    "hung in compiling": (SETUP, "hung in stuck, train.py:8"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_crash(name, clone):
    parts, reason = CRASHES[name]
    commit = clone.idea(*parts)
    assert f"decision: discard {commit}, crashed: {reason}" in clone.ledger("run")
    assert clone.states() == [("crash", 1)] and clone.reasons()[0][1].startswith(reason)
    assert "train.py:" in clone.reasons()[0][1] or TORCH not in parts
    assert clone.rows()[4:] == [[commit, "0.000000", "0.0", "crash", "an idea, seed 1"]]


def test_the_keeper_ends_a_training_without_a_watchdog(clone):
    clone.edit(("^KEEPER_SECONDS = .*", "KEEPER_SECONDS = -2"), file="night/runner.py")
    clone.idea("import time", "time.sleep(600)")
    clone.ledger("run")
    assert clone.reasons() == [("crash", "not over after 1 s")]


def test_out_of_memory_once_and_twice(clone):
    clone.idea("import os", "os.kill(os.getpid(), 9)")
    assert "next: uv run ledger.py run" in clone.ledger("run")
    assert clone.states() == [("interrupted", 1)] and len(clone.rows()) == 4
    assert "crashed: 2 times killed: did memory run out?" in clone.ledger("run")
    assert clone.states() == [("interrupted", 1), ("crash", 1)]


KILLED_ONCE = """
import os
from pathlib import Path

mark = Path(os.environ["AUTORESEARCH_HOME"], "seed-" + os.environ["AUTORESEARCH_SEED"])
if not mark.exists():
    mark.touch()
    os.kill(os.getpid(), 9)
"""


def test_each_seed_may_be_killed_once(clone):
    clone.idea(KILLED_ONCE, TRAIN)
    clone.scores_next(val_bpb=0.9)
    for _ in range(4):
        clone.ledger("run")
    assert clone.states() == [("interrupted", 1), ("scored", 1), ("interrupted", 2), ("scored", 2)]


DISTURBED = {
    "slow": ([dict(slow_steps_percent=30)] * 3, [("disturbed", 1), ("disturbed", 1), ("crash", 1)]),
    "half": ([dict(steps=100), dict(steps=40), {}], [("scored", 1), ("disturbed", 2), ("scored", 2)]),
    "earlier": ([dict(steps=40), dict(steps=100), {}], [("disturbed", 1), ("scored", 2), ("scored", 1)]),
    "elsewhere": ([dict(device="another"), {}], [("elsewhere", 1), ("scored", 1)]),
    "slow machine": ([dict(product_ms=1.2)] * 3, [("disturbed", 1), ("disturbed", 1), ("scored", 1)]),
    "slow machine, when its third run is disturbed by a later one": (
        [dict(product_ms=1.2)] * 3 + [dict(steps=300), dict(product_ms=1.2, steps=300)],
        [("disturbed", 1)] * 3 + [("scored", 2), ("scored", 1)],
    ),
    "slow steps of its own": ([dict(slow_steps_percent=30, recompiled=9)], [("scored", 1)]),
    "slower machine": ([dict(product_ms=1.1)], [("scored", 1)]),
    "slow machine that recompiled": ([dict(product_ms=1.2, recompiled=9)], [("scored", 1)]),
    "a GPU": ([dict(product_ms=None)], [("scored", 1)]),
}


@pytest.mark.parametrize("name", DISTURBED)
def test_disturbed(name, clone):
    changes, states = DISTURBED[name]
    clone.idea("# better", TRAIN)
    for values in changes:
        clone.scores_next(val_bpb=0.9, **values)
        clone.ledger("run")
    assert clone.states() == states


def test_the_speed_of_the_machine_stands_beside_a_score(clone):
    """Checks the closed form, with products that take a fifth longer than in the runs of the baseline."""
    clone.idea("# better", TRAIN)
    clone.scores_next(val_bpb=0.9, product_ms=1.2)
    output = clone.ledger("run")
    assert f"machine: at {1.2**-1.5:.2f} of its speed in the runs of the last keep, worth about -0.030" in output
    assert clone.reasons() == [("disturbed", "the machine ran at 0.76 of its usual speed")]


# --------------------------------------
# Who is killed, and who waits


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_costs_nothing(number, held):
    clone, process, _, _ = held
    process.send_signal(number)
    process.communicate()
    assert "why:  a run is going on" in clone.ledger()
    second = clone.start("run")
    assert "goes on: waiting for it" in second.stdout.readline()
    clone.release()
    assert "scored 1.000000" in second.communicate()[0]
    clone.assert_one_score()


def test_keeper_killed(held):
    clone, process, keeper, _ = held
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: not is_alive(keeper))
    assert process.poll() is None
    clone.release()
    assert "scored 1.000000" in process.communicate()[0]
    clone.assert_one_score()
    os.kill(int((clone.home / "child").read_text()), signal.SIGKILL)  # which only the keeper would have ended


def kill_all(clone):
    """Kill keeper and training: what `run` says then."""
    process, *others = clone.hold()
    for pid in others:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not is_alive(pid))
    clone.release()
    return process.communicate()[0]


def test_all_killed(clone):
    """Of the baseline, which only the human can mend."""
    clone.cut_record(-3)
    for _ in range(2):
        assert "next: uv run ledger.py run" in kill_all(clone)
        clone.ledger("open")
    said = kill_all(clone)
    assert "crash; 3 times ended from outside, with its keeper, after " in said
    assert "next: # tell the human: the untouched train.py does not get through a run: 3 times" in said
    clone.ledger("open", code=1)
    assert "next: uv run ledger.py run" in clone.ledger("until", "never")
    clone.ledger("open")


@pytest.mark.parametrize("first", ["", "import signal; signal.signal(2, signal.SIG_IGN)"], ids=["heard", "ignored"])
def test_ctrl_c_ends_a_run(first, clone):
    clone.edit(("^INTERRUPT_SECONDS = .*", "INTERRUPT_SECONDS = 0.5"), file="night/runner.py")
    clone.idea(first, CHILD, TRAIN)
    process, keeper, training = clone.hold()
    child = int(wait_for(lambda: (clone.home / "child").exists() and (clone.home / "child").read_text()))
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == 130
    assert not any(is_alive(pid) for pid in (keeper, training, child))
    assert clone.reasons() == [("interrupted", "ended with Ctrl-C")]


def test_ctrl_c_in_a_run_that_only_waits(held):
    clone, process, _, training = held
    second = clone.start("run")
    second.stdout.readline()
    second.send_signal(signal.SIGINT)
    assert second.communicate() == ("", "") and second.returncode == 130
    assert is_alive(training)
    clone.release()
    assert "scored 1.000000" in process.communicate()[0]


def test_two_runs_at_once_and_what_they_leave(clone):
    clone.idea(CHILD, TRAIN)
    (clone.home / "hold").touch()
    processes = [clone.start("run") for _ in range(2)]
    wait_for(lambda: clone.state().get("pid"))
    clone.release()
    assert all("idea: scored 1.000000" in process.communicate()[0] for process in processes)
    clone.assert_one_score()
    assert not is_alive(int((clone.home / "child").read_text()))


def test_a_score_that_found_no_disk_is_run_again(clone):
    """A full disk is no fault of train.py; the third time it is a crash, so that a night does not spin."""
    clone.idea("print('scored, val_bpb 1.0, but not recorded: [Errno 28]')", "raise SystemExit(74)")
    assert "interrupted; scored, val_bpb 1.0, but not recorded: [Errno 28]" in clone.ledger("run")
    clone.ledger("run")
    assert "crash; 3 times scored, val_bpb 1.0, but not recorded" in clone.ledger("run")


WRITING = [("run",), ("until", "now"), ("keep",), ("discard",), ("start", "second", "--until", "8"), ()]


@pytest.mark.skipif(not shutil.which("prlimit"), reason="needs prlimit")
def test_a_full_disk_loses_nothing(clone):
    """One line for each command, and the next one goes on."""
    clone.idea(TRAIN, "# more\n")
    clone.scores_next(val_bpb=0.9)
    clone.ledger("run")
    clone.git("checkout", "-q", "HEAD", "--", ".")
    record, rows = clone.record.read_text(), clone.rows()
    for words in WRITING:
        (clone.folder / "results.tsv").unlink(missing_ok=True)
        command = ["prlimit", "--fsize=0", sys.executable, "ledger.py", *words]
        process = subprocess.run(command, cwd=clone.folder, env=clone.environment, capture_output=True, text=True)
        assert (process.returncode, len(process.stderr.splitlines())) == (1, 1), process.stderr
        assert clone.record.read_text() == record
    clone.ledger()
    assert clone.rows() == rows and not list(clone.folder.rglob("*.tmp"))
    assert "scored 0.900000" in clone.ledger("run")


HOLDER = """
import torch
from harness.machine import DeviceLock
lock = DeviceLock(torch.device("cpu"))
input(lock.locks[0].lock_file + chr(10))
"""


def test_device_taken(clone):
    clone.idea(CLOCK.replace("SECONDS\n", "(600, 600)\n"), SCORE)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-uc", HOLDER], cwd=ROOT, env=clone.environment, **pipes) as holder:
        lock = holder.stdout.readline().strip()
        process = clone.start("run")
        said = process.stdout.readline()
        assert said.startswith(f"waiting for the device: another training is running on cpu (pid {holder.pid})")
        assert said.endswith(f"; lock {lock}\n")
    output = process.communicate()[0]
    assert "idea: scored" in output and "waiting" not in output
    clone.assert_one_score()


def test_ctrl_c_while_it_waits_for_the_device(clone):
    lock = clone.home / "device"
    count = f"print(1, file=open({str(clone.home / 'started')!r}, 'a'))"
    clone.idea(count, f"print('another training is running; lock {lock}')", "raise SystemExit(75)")
    with FileLock(lock):
        process = clone.start("run")
        assert process.stdout.readline().startswith("waiting for the device: ")
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "") and process.returncode == 130
    assert clone.reasons() == [("interrupted", "ended with Ctrl-C")]
    assert (clone.home / "started").read_text() == "1\n"


# --------------------------------------
# A death between two writes


@pytest.fixture
def finished(held):
    """A run whose end is written, and which nobody has settled yet."""
    clone, process, keeper, _ = held
    process.kill()
    process.communicate()
    clone.release()
    wait_for(lambda: not is_alive(keeper))
    assert clone.state()["exit"] == 0 and clone.runs() == []
    return clone


# How many lines were written, of run and decision, and which of the keeper's values are in run.json, if it is there
DEATHS = {
    "the end": (0, ["pid"]),
    "the run line": (0, ["pid", "exit"]),
    "the decision": (1, ["pid", "exit"]),
    "run.json goes": (2, ["pid", "exit"]),
    "the view": (2, None),
}


@pytest.mark.parametrize("name", DEATHS)
def test_death_before(name, finished):
    lines, values = DEATHS[name]
    view, run = (finished.folder / "results.tsv").read_bytes(), finished.state()
    finished.ledger()
    expected = [finished.recorded(), finished.rows(), {}]
    assert [line["kind"] for line in finished.recorded()] == ["run", "decision"]

    # all as it was at that moment
    finished.cut_record(lines)
    (finished.folder / "results.tsv").write_bytes(view)
    if values is not None:
        write_run(finished, {key: value for key, value in run.items() if key not in ("pid", "exit") or key in values})
    if "exit" not in (values or ["exit"]):
        expected[0][0]["exit"] = None  # nobody saw it
    for _ in range(2):
        finished.ledger()
        assert [finished.recorded(), finished.rows(), finished.state()] == expected


def write_run(clone, state):
    (clone.place / "run.json").write_text(json.dumps(state))


def test_death_before_the_keeper_starts(finished):
    names = ("commit", "seed", "role", "time", "host", "folder", "log")
    write_run(finished, {"run": "new"} | {name: finished.state()[name] for name in names})
    for _ in range(2):
        finished.ledger()
        assert finished.states() == [("interrupted", 1)] and len(finished.runs()) == 1
    finished.ledger("run")
    assert finished.states() == [("interrupted", 1), ("scored", 1)]


def test_a_score_beats_an_interruption(finished):
    finished.ledger()
    scored, decision = finished.recorded()
    finished.cut_record(0)
    with open(finished.record, "a") as record:
        record.write(json.dumps(scored | {"state": "interrupted", "val_bpb": None, "time": LINE["time"]}) + "\n")
    for _ in range(2):
        finished.ledger()
        assert [line["state"] for line in finished.runs()] == ["interrupted", "scored"]
        assert finished.recorded()[2:] == [decision]


def test_a_run_of_another_place_is_dropped(held, tmp_path):
    clone = held[0]
    copy = Clone(shutil.copytree(clone.folder, tmp_path / "copy"), clone.environment, clone.home)
    for changes in ({}, {"folder": str(copy.place), "host": "another"}):
        write_run(copy, clone.state() | changes)
        assert "next: uv run ledger.py run" in copy.ledger()
        assert copy.state() == {} and copy.recorded() == []
    assert "why:  a run is going on" in clone.ledger()


# --------------------------------------
# What is trained

LOOK = """
from pathlib import Path
assert not Path("stray.py").exists() and "edited" not in Path("prepare.py").read_text()
Path("stray.py").touch()
"""


def test_the_files_are_those_of_the_commit(clone):
    clone.idea(LOOK, TRAIN)
    (clone.folder / "stray.py").touch()
    clone.edit(("^import json", "import edited"), file="prepare.py")
    clone.scores_next(val_bpb=0.9)
    for _ in range(2):
        clone.ledger("run")
    assert clone.states() == [("scored", 1), ("scored", 2)]


def test_uncommitted_changes_and_another_harness_are_not_run(clone):
    keep = clone.head()
    clone.idea("# no better", TRAIN)
    (clone.folder / "train.py").write_text("")
    assert "commit them, or drop them\n" in clone.ledger("run", code=1)
    clone.edit(("^TENTHS = .*", "TENTHS = 5"), file="prepare.py")
    clone.git("commit", "-qam", "another harness")
    assert f"next: git reset -q --keep {keep}" in clone.ledger("run", code=1)
    assert clone.runs() == []


def test_a_night_that_is_checked_out_elsewhere(clone):
    """As clients do, which make worktrees of their own."""
    clone.git("worktree", "add", "-q", "-b", "work", ".claude/worktrees/work")
    record = clone.record.read_text()
    elsewhere = Clone(clone.folder / ".claude" / "worktrees" / "work", clone.environment, clone.home)
    for words in ((), ("run",), ("until", "now"), ("--json",), ("keep",)):
        said = elsewhere.ledger(*words, code=1)
        assert said == f"no night on work: autoresearch/test is checked out in {clone.folder}, work there\n"
    assert "work there" in elsewhere.ledger("open", code=1)
    assert clone.record.read_text() == record and not (elsewhere.folder / "results.tsv").exists()


def test_the_same_train_py_under_a_new_commit_is_named(clone):
    idea = clone.idea(TRAIN, "raise ValueError('no')")
    clone.ledger("run")
    clone.git("reset", "-q", "--keep", "HEAD^")
    assert "has run before" not in clone.ledger()
    clone.idea(TRAIN, "raise ValueError('no')")
    clone.git("commit", "-q", "--amend", "-m", "the same")
    assert f"warning: this train.py has run before, as {idea}: discard\n" in clone.ledger()

"""
The shell lines of program.md, run as they stand by a scripted agent that follows it in a repository of its own.

Only `uv` is a stand-in here, which runs Python at once instead of installing everything again.
"""

import os
import re
import signal
import time
from statistics import mean, stdev

import pytest
from conftest import Agent, new_repository, shell_blocks

import prepare

NAMES = ["exam", "branch", "digest", "commit", "run", "read", "row", "reset", "fetch", "where"]
LINES = shell_blocks("program.md", NAMES)
WEAK = ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR")  # rates that the baseline of these tests has too low
UNHURRIED = (
    r"^    while clock\.elapsed",
    "    while 2 * clock.elapsed",
)  # stops in the middle of the budget: a busy machine is no failure


class Researcher(Agent):
    """Does what program.md says. It remembers nothing: all state is in git and results.tsv."""

    def digest(self):
        """(noise floor, score to beat, commit that has it)"""
        found = re.match(r"noise floor ([\d.]+), to beat ([\d.]+) \((\w+)\)\n", self.sh("digest"))
        return float(found[1]), float(found[2]), found[3]

    def attempt(self, idea, *edits, limit=60):
        """Steps 1 to 7 with one edit. Returns the status, and what step 5 printed."""
        floor, _, best = self.digest()
        self.edit(*edits)
        self.sh("commit", idea=idea, prediction="-0.01")
        return self.finish(idea, floor, best, limit)

    def scores(self, commit):
        return [float(row[1]) for row in self.rows()[1:] if row[0] == commit and row[3] != "crash"]

    def finish(self, idea, floor, best, limit=60):
        scores = []
        for seed in (1, 2):
            self.sh("run", seed=seed, limit=limit)
            output = self.sh("read")
            found = re.search(r"^val_bpb: +(\S+)", output, re.M)
            scores += [float(found[1])] if found else []
            shown = re.search(r"^gain (\S+) \(mean of (\d)\)$", output, re.M)
            assert bool(shown) == bool(found)
            gain = mean(self.scores(best)) - mean(scores) if found else -1
            assert not found or (float(shown[1]), int(shown[2])) == (pytest.approx(gain, abs=2e-6), len(scores))
            status = "crash" if not found else "keep" if len(scores) == 2 and gain > floor / 2 else "discard"
            self.sh("row", status=status, description=idea)
            if status == "crash" or gain <= floor / 10:
                break
        if status != "keep":
            self.sh("reset")
        return status, output


@pytest.fixture
def agent(prepared, tmp_path, environment):
    """A researcher in a fresh repository, with an exam of 3 seconds and a train.py that leaves room for a gain."""
    (prepare.HOME / "current").write_text(prepared)
    agent = Researcher(new_repository(tmp_path / "clone", environment), environment, LINES)
    agent.edit(*[(rf"^({name} +)= ", r"\1= 1e-6 * ") for name in WEAK], UNHURRIED)
    agent.git("commit", "-qam", "weak")
    return agent


def test_a_night(agent):
    """A keep, a discard, a syntax error, a NaN, a hang, a run over its budget, a kill in mid-run and what follows."""
    tracked = agent.git("ls-files")
    assert (prepare.HOME / "current").read_text() in agent.sh("exam")
    (agent.folder / "results.tsv").write_text("of an older night\n")
    agent.sh("branch", tag="test")
    assert (agent.folder / "results-before-test.tsv").read_text() == "of an older night\n"
    start = agent.head()
    for seed in (1, 2, 3):
        agent.sh("run", seed=seed, limit=60)
        agent.sh("read")
        agent.sh("row", status="keep", description=f"baseline, seed {seed}")
    scores = [float(row[1]) for row in agent.rows()[1:]]
    floor, to_beat, best = agent.digest()
    assert (floor, to_beat) == pytest.approx((2 * stdev(scores), mean(scores)), abs=2e-6) and best == start

    restore = [(rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK]
    assert agent.attempt("rates up", *restore)[0] == "keep"
    kept = agent.head()
    assert agent.digest()[2] == kept

    statuses = {
        "rates to nothing": agent.attempt("rates to nothing", (r"^(\w+_LR +)= ", r"\1= 1e-6 * ")),
        "a slip": agent.attempt("a slip", (r"^def norm\(x\):", "def norm(x:")),
        "wild rates": agent.attempt("wild rates", (r"^(\w+_LR +)= ", r"\1= 1e9 * ")),
        "asleep": agent.attempt("asleep", (r"^def main\(\):", "def main():\n    time.sleep(1000)"), limit=8),
        "too slow": agent.attempt("too slow", (r"^    clock.stop\(\)", "    time.sleep(3)\n    clock.stop()")),
    }
    assert [status for status, _ in statuses.values()] == ["discard", "crash", "crash", "crash", "crash"]
    assert "SyntaxError" in statuses["a slip"][1]
    assert "loss nan" in statuses["wild rates"][1]
    assert "not scored: trained for" in statuses["too slow"][1]
    assert agent.head() == kept

    # the machine loses the agent's shell in mid-run, but not the training
    agent.edit((r"^    clock.stop\(\)", "    time.sleep(1000)\n    clock.stop()"))
    agent.sh("commit", idea="lost", prediction="-0.01")
    (agent.folder / "run.log").unlink()
    shell = agent.start("run", seed=42, limit=100)
    for _ in range(600):
        if (agent.folder / "run.log").exists() and "done" in (agent.folder / "run.log").read_text():
            break
        time.sleep(0.1)
    shell.kill()
    shell.wait()
    resumed = Researcher(agent.folder, agent.environment, LINES)
    assert "this commit has no row" in resumed.sh("where")
    resumed.sh("run", seed=42, limit=60)
    pid = re.search(r"another training is running on cpu \(pid (\d+)\)", resumed.sh("read"))[1]
    os.kill(int(pid), signal.SIGKILL)
    floor, _, best = resumed.digest()
    assert resumed.finish("lost", floor, best, limit=15)[0] == "crash"

    # nothing is lost, and the branch holds the keeps
    rows = resumed.rows()
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    ideas = [f"baseline, seed {s}" for s in (1, 2, 3)] + ["rates up"] * 2 + [*statuses, "lost"]
    assert [re.sub(r", \d+ steps$", "", row[4]) for row in rows[1:]] == ideas
    assert [row[3] for row in rows[1:]] == ["keep"] * 3 + ["discard", "keep", "discard"] + ["crash"] * 5
    journal = {
        (run["commit"][:7], f"{run['val_bpb']:.6f}", run["seed"])
        for run in prepare.read_journal(prepare.HOME / (prepare.HOME / "current").read_text())
    }
    for (commit, score, memory, status, _), seed in zip(rows[1:], [1, 2, 3, 1, 2] + [1] * 6):
        if status == "crash":
            assert (score, memory) == ("0.000000", "0.0")
        else:
            assert (commit, score, seed) in journal and 0.1 < float(memory) < 10
        if commit not in (start, kept):
            assert resumed.git("rev-parse", "--short=7", f"refs/tries/{commit}^").strip() == kept
    assert resumed.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [kept]
    assert resumed.git("branch", "--show-current").strip() == "autoresearch/test"
    assert resumed.git("status", "--porcelain") == "" and resumed.git("ls-files") == tracked
    assert resumed.git("diff", "--name-only", "main", "HEAD").split() == ["train.py"]

    # a failed try can be fetched back, mended and tried again
    slip = next(row[0] for row in rows if row[4] == "a slip")
    resumed.sh("fetch", hash=slip)
    assert "def norm(x:" in (agent.folder / "train.py").read_text()
    resumed.edit((r"^def norm\(x:", "def norm(x, unused=None):"))
    resumed.sh("commit", idea="the slip, mended", prediction="0")
    assert resumed.git("diff", "--name-only", "HEAD^", "HEAD").split() == ["train.py"]


@pytest.mark.parametrize(
    "scores, statuses",
    [  # the baseline has 0.995, 1.000 and 1.005: a noise floor of 0.01
        ([0.980, 0.991], ["discard", "keep"]),
        ([0.980, 1.020], ["discard", "discard"]),  # one lucky run is not enough, however lucky
        ([1.001], ["discard"]),
        ([0.9995], ["discard"]),  # hardly a gain
        ([0.994, 0.992], ["discard", "keep"]),  # 0.007 in the mean is more than half the floor
        ([0.994, 0.999], ["discard", "discard"]),
    ],
)
def test_small_gains_are_repeated(agent, scores, statuses):
    """The verdict rules, on logs that are written instead of trained for."""
    agent.sh("branch", tag="rules")

    def log(score):
        (agent.folder / "run.log").write_text(f"---\nval_bpb:          {score:.6f}\npeak_vram_mb:     2048.0\n")

    for score in (0.995, 1.0, 1.005):
        log(score)
        agent.sh("row", status="keep", description="baseline")
    assert agent.digest()[:2] == (0.01, 1.0)
    agent.edit(("^MATRIX_LR.*", r"\g<0>  # edited"))
    agent.sh("commit", idea="small", prediction="-0.001")
    tried, sh = agent.head(), agent.sh

    def without_training(name, **words):
        return log(scores[words["seed"] - 1]) if name == "run" else sh(name, **words)

    agent.sh = without_training
    assert agent.finish("small", 0.01, agent.git("rev-parse", "--short=7", "HEAD^").strip())[0] == statuses[-1]
    assert [row[3] for row in agent.rows()[4:]] == statuses
    assert agent.rows()[4][:3] == [tried, f"{scores[0]:.6f}", "2.0"]
    if statuses[-1] == "keep":
        floor, to_beat, best = agent.digest()
        spread = [value - mean(runs) for runs in ((0.995, 1.0, 1.005), scores) for value in runs]
        assert floor == pytest.approx(2 * (sum(x * x for x in spread) / 3) ** 0.5, abs=2e-6)  # pooled
        assert to_beat == pytest.approx(mean(scores), abs=1e-6) and best == tried == agent.head()
    else:
        assert agent.git("rev-parse", "--short=7", f"refs/tries/{tried}").strip() == tried
        assert agent.head() != tried


def test_reset_keeps_the_humans_edits(agent):
    agent.sh("branch", tag="human")
    (agent.folder / "results.tsv").write_text(
        f"commit\tval_bpb\tmemory_gb\tstatus\tdescription\n{agent.head()}\t1\t1\tkeep\tbaseline\n"
    )
    agent.edit(("^MATRIX_LR.*", ""))
    agent.sh("commit", idea="x", prediction="0")
    (agent.folder / "program.md").write_text("edited by the human")
    agent.sh("reset")
    assert "MATRIX_LR =" in (agent.folder / "train.py").read_text()
    assert (agent.folder / "program.md").read_text() == "edited by the human"


def test_reset_without_a_keep_is_refused(agent):
    agent.sh("branch", tag="empty")
    before = agent.head()
    assert "fatal" in agent.sh("reset", check=False)
    assert agent.head() == before


def test_a_second_night_of_the_same_name_touches_nothing(agent):
    agent.sh("branch", tag="twice")
    with open(agent.folder / "results.tsv", "a") as results:
        results.write("a row\n")
    before = (agent.folder / "results.tsv").read_text()
    assert "already exists" in agent.sh("branch", tag="twice", check=False)
    assert (agent.folder / "results.tsv").read_text() == before

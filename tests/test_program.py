"""
The shell lines of program.md, run as they stand by a scripted agent that does what `--status` says comes next.

Only `uv` is a stand-in here, which runs Python at once instead of installing everything again.
"""

import os
import re
import signal

import pytest
from conftest import PROGRAM, WEAK, Agent, new_repository, wait_for, weaken

import ledger
import prepare
from harness.journal import read_journal


class Researcher(Agent):
    """Remembers nothing: all state is in git, results.tsv and the journal."""

    def next(self):
        return re.search(r"^next: (.*)", self.sh("where"), re.M)[1]

    def attempt(self, idea, *edits):
        self.edit(*edits)
        self.sh("commit", idea=idea, prediction="-0.01")
        return self.finish(idea)

    def finish(self, idea, limit=60):
        """Go on until a new idea is wanted. Returns the status of the last row, and the end of the last log."""
        ran, text = False, ""
        for _ in range(12):
            what = self.next()
            row = re.search(r"write the row: (\S+) (\S+) (\S+) (\S+)", what)
            if row and (what.startswith("write") or ran):
                words = dict(zip(("commit", "val_bpb", "memory_gb", "status"), row.groups()))
                self.sh("row", **words, description=idea)
                ran = False
            elif seed := re.search("with seed (\\d)", what):
                self.sh("run", seed=seed[1], limit=limit)
                ran, text = True, (self.folder / "run.log").read_text()[-1500:]
            elif store := re.match(r"store it as refs/tries/(\w+), reset to (\w+)", what):
                self.sh("reset", commit=store[1], kept=store[2])
            else:
                assert what == "a new idea, before <until>"
                return self.rows()[-1][3], text
        raise AssertionError(what)


@pytest.fixture
def agent(prepared, tmp_path, environment):
    """A researcher in a fresh repository, with runs of 3 seconds and a train.py that leaves room for a gain."""
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    agent = Researcher(new_repository(tmp_path / "clone", environment), environment, PROGRAM)
    weaken(agent.folder)
    agent.git("commit", "-qam", "weak")
    return agent


def test_a_night(agent):
    """
    A keep, a discard, a syntax error, a NaN, a run over its budget; a run that ends while nobody watches; one in which
    the agent is killed and that hangs; and what follows.
    """
    tracked = agent.git("ls-files")
    assert (prepare.HOME / "current").read_text() in agent.sh("look")
    agent.sh("branch", tag="test")
    start = agent.head()
    agent.sh("run", seed=1, limit=60)
    score = re.search(r"^val_bpb: +(\S+)", (agent.folder / "run.log").read_text(), re.M)[1]
    agent = Researcher(agent.folder, agent.environment, PROGRAM)  # another one, who does not repeat it
    assert re.fullmatch(rf"write the row: {start} {score} \S+ keep", agent.next())
    assert agent.finish("baseline")[0] == "keep"
    assert [(row[0], row[3]) for row in agent.rows()[1:]] == [(start, "keep")] * 3

    restore = [(rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK]
    assert agent.attempt("rates up", *restore)[0] == "keep"
    kept = agent.head()
    results = {
        "rates to nothing": agent.attempt("rates to nothing", (r"^(\w+_LR +)= ", r"\1= 1e-6 * ")),
        "a slip": agent.attempt("a slip", (r"^def norm\(x\):", "def norm(x:")),
        "wild rates": agent.attempt("wild rates", (r"^(\w+_LR +)= ", r"\1= 1e9 * ")),
        "too slow": agent.attempt("too slow", (r"^    clock.stop\(\)", "    time.sleep(3)\n    clock.stop()")),
    }
    assert [status for status, _ in results.values()] == ["discard", "crash", "crash", "crash"]
    assert "SyntaxError" in results["a slip"][1]
    assert "; lower the learning rates" in results["wild rates"][1]
    assert "not scored: trained for" in results["too slow"][1]
    assert agent.head() == kept

    # the machine loses the agent's shell in mid-run, but not the training
    agent.edit((r"^    clock.stop\(\)", "    time.sleep(1000)\n    clock.stop()"))
    agent.sh("commit", idea="lost", prediction="-0.01")
    (agent.folder / "run.log").unlink()
    shell = agent.start("run", seed=1, limit=100)
    log = agent.folder / "run.log"
    wait_for(lambda: log.exists() and "compiling what is new" in log.read_text())
    shell.kill()
    shell.wait()
    agent = Researcher(agent.folder, agent.environment, PROGRAM)
    assert agent.next().startswith("run it with seed 1")
    agent.sh("run", seed=1, limit=60)
    pid = re.search(r"another training is running on cpu \(pid (\d+)\)", log.read_text())[1]
    os.kill(int(pid), signal.SIGKILL)
    (agent.folder / "program.md").write_text("edited by the human")
    assert agent.finish("lost", limit=6)[0] == "crash"
    assert (agent.folder / "program.md").read_text() == "edited by the human"

    # on its branch the benchmark is fixed, and another night of this name touches nothing
    for arguments in ([], ["--time-budget", "900"]):
        process = agent.run("prepare.py", *arguments)
        assert process.returncode == 1 and "leave the branch first" in process.stderr
    assert "already exists" in agent.sh("branch", tag="test", check=False)

    # nothing is lost, and the branch holds the keeps
    rows = agent.rows()
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert [row[4] for row in rows[1:]] == ["baseline"] * 3 + ["rates up"] * 2 + [*results, "lost"]
    assert [row[3] for row in rows[1:]] == ["keep"] * 3 + ["discard", "keep", "discard"] + ["crash"] * 4
    journal = read_journal(prepare.HOME / (prepare.HOME / "current").read_text())
    matched, unlisted = ledger.match_runs(ledger.read_ledger(agent.folder / "results.tsv"), journal)
    assert [matched[number]["seed"] for number in range(6)] == [1, 2, 3, 1, 2, 1] and not unlisted
    for commit, *_ in rows[1:]:
        if commit not in (start, kept):
            assert agent.git("rev-parse", "--short=7", f"refs/tries/{commit}^").strip() == kept
    assert agent.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [kept]
    assert agent.git("branch", "--show-current").strip() == "autoresearch/test"
    assert agent.git("status", "--porcelain") == " M program.md\n" and agent.git("ls-files") == tracked
    assert agent.git("diff", "--name-only", "main", "HEAD").split() == ["train.py"]

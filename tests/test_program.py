"""
Defects of program.md, and of what it leans on: a line that does not run as it stands, a `next:` that is not in it, a
run that is lost or repeated when the agent is. A scripted agent runs what `next:` says; only `uv` is a stand-in.
"""

import os
import re
import signal

import pytest
from conftest import PROGRAM, ROOT, WEAK, Agent, new_repository, wait_for, weaken
from test_night import DROP, IDEA

import prepare
from harness.journal import read_journal
from night.rows import read_rows
from night.rules import OVER
from night.worth import pair

MAY_FAIL = ("AUTORESEARCH_SEED=",)  # a run; its row says why


class Researcher(Agent):
    """Remembers nothing: all state is in git, results.tsv, night.json and the journal."""

    def look(self):
        """What the ledger says: (next, why)."""
        status = self.sh("look")
        return re.search(r"^next: (.*)", status, re.M)[1], re.search(r"^why: +(.*)", status, re.M)[1]

    def bash(self, line):
        process = self.start_line(line)
        output = process.communicate()[0]
        return process.returncode, output

    def attempt(self, idea, *edits):
        self.edit(*edits)
        self.sh("commit", idea=idea, gain="+0.01")

    def go_on(self):
        """Run what comes next until that is a comment: returns it."""
        lines = [re.sub("<[^>]*>", ".+", re.escape(line.strip())) for line in self.lines.values()]
        lines.append(r"git checkout -q (--detach )?[\w/]+")
        for _ in range(20):
            command, _ = self.look()
            if command.startswith("#"):
                return command
            assert any(re.fullmatch(line, command) for line in lines), f"not in program.md: {command}"
            code, output = self.bash(command)
            assert code == 0 or command.startswith(MAY_FAIL), output
        raise AssertionError(f"this does not end: {command}")


@pytest.fixture
def agent(prepared, tmp_path, environment):
    """A researcher in a fresh repository, with runs of 3 seconds and a train.py that leaves room for a gain."""
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    agent = Researcher(new_repository(tmp_path / "clone", environment), environment, PROGRAM)
    weaken(agent.folder)
    agent.edit(("^BASELINE_SEEDS = .*", "BASELINE_SEEDS = (1, 2)"), file="night/rules.py")  # fewer runs of a kind
    agent.edit(("^FINAL_SEEDS = .*", "FINAL_SEEDS = (4,)"), file="night/worth.py")
    agent.git("commit", "-qam", "weak")
    return agent


STOP = r"^    clock.stop\(\)"
ROWS = """baseline keep 1
baseline keep 2
rates up discard 1
rates up keep 2
a slip.*: SyntaxError crash 1
too slow.*: not scored: trained for crash 1
lost.*: cut off crash 1
baseline, final keep 4
last keep, final keep 4"""


@pytest.mark.story
def test_a_night_by_program(agent):
    """The agent is lost twice: a run ends while nobody watches, and one hangs."""
    agent.sh("start", tag="test", when=7)
    start, tracked = agent.head(), agent.git("ls-files")
    agent.sh("run", seed=1)
    assert agent.look()[0] == agent.line("add", description="baseline"), "a run that nobody watched is not run again"
    assert agent.go_on() == IDEA
    assert agent.run("ledger.py", "open").returncode == 0

    agent.attempt("rates up", *((rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK))
    assert agent.go_on() == IDEA
    kept = agent.head()
    for idea, edit in (
        ("a slip", (r"^def norm\(x\):", "def norm(x:")),
        ("too slow", (STOP, "    import time\n    time.sleep(3)\n    clock.stop()")),
    ):
        agent.attempt(idea, edit)
        assert agent.go_on() == IDEA and agent.head() == kept

    # the machine loses the agent's shell in mid-run, but not the training, which holds the lock
    agent.attempt("lost", (STOP, "    import time\n    time.sleep(1000)\n    clock.stop()"))
    log = agent.folder / "run.log"
    log.unlink()
    shell = agent.start_line(agent.line("run", seed=1) + "; :")
    wait_for(lambda: log.exists() and "compiling what is new" in log.read_text())
    shell.kill()
    shell.wait()
    command, reason = agent.look()
    pid = re.match(r"this commit's training runs \(pid (\d+)\): wait", reason)[1]
    assert f"commit {agent.head()}, seed 1" in agent.bash(command)[1]
    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: agent.look()[0] == agent.line("run", seed=1))
    assert "was cut off" in agent.look()[1]
    assert agent.bash(agent.line("add", description="lost") + " --crash")[0] == 0
    (agent.folder / "program.md").write_text("edited by the human")

    # seven rows are the end; on its branch the benchmark is fixed
    assert agent.go_on() == OVER
    assert re.search(r"gain to report, on fresh seeds: \+\d", agent.look()[1])
    assert agent.run("ledger.py", "open").returncode == 1
    for arguments in ([], ["--time-budget", "900"]):
        process = agent.run("prepare.py", *arguments)
        assert process.returncode == 1 and "git checkout --detach" in process.stderr

    # every run has its row, and the branch holds the keeps
    rows, problems = read_rows(agent.folder / "results.tsv")
    assert not problems and len(rows) == len(ROWS.splitlines())
    for row, expected in zip(rows, ROWS.splitlines()):
        words, status, seed = expected.rsplit(" ", 2)
        assert row.status == status
        assert re.match(words, row.description) and row.description.endswith(f", seed {seed}")
        if row.commit not in (start, kept):
            assert agent.git("rev-parse", "--short=7", f"refs/tries/{row.commit}^").strip() == kept
    pairs, left = pair(rows, read_journal(prepare.HOME / (prepare.HOME / "current").read_text()))
    assert [pairs[index]["seed"] for index in sorted(pairs)] == [1, 2, 1, 2, 4, 4] and not left
    assert agent.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [kept, start]
    assert agent.git("branch", "--show-current") == "autoresearch/test\n"
    assert agent.git("status", "--porcelain") == " M program.md\n" and agent.git("ls-files") == tracked
    assert agent.git("diff", "--name-only", "main", "HEAD") == "train.py\n"


def test_a_discarded_idea_is_tried_again(agent):
    """By the lines that stand in the sentences of program.md."""
    check, fetch = 'uv run python -c "import train"', "git cherry-pick -n refs/tries/<commit>"
    program = (ROOT / "program.md").read_text()
    assert all(f"`{line}`" in program for line in (check, fetch, DROP)) and program.count("\n") <= 100

    slip, mend = (r"^def norm\(x\):", "def norm(x:"), (r"^def norm\(x:", "def norm(x):  # mended")
    agent.edit(slip)
    assert "SyntaxError" in agent.bash(check)[1]
    agent.sh("commit", idea="a slip", gain="+0.01")
    commit, kept = agent.head(), agent.git("rev-parse", "--short=7", "HEAD^").strip()
    agent.sh("reset", commit=commit, kept=kept)
    assert agent.head() == kept and agent.bash(check) == (0, "")

    fetch = fetch.replace("<commit>", commit)
    assert agent.bash(fetch) == (0, "")
    agent.attempt("the slip, mended", mend)
    assert "mended" in agent.git("show", "HEAD") and agent.git("status", "--porcelain") == ""
    assert agent.bash(fetch)[0] == 1 and "<<<<<<<" in (agent.folder / "train.py").read_text()
    assert agent.bash(DROP)[0] == 0 and agent.git("status", "--porcelain") == ""

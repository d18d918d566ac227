"""
A night by program.md: a scripted agent that runs what `next:` says, and its own edits where that is a comment.

Only `uv` is a stand-in here, which runs Python at once instead of installing everything again.
"""

import os
import re
import signal

import pytest
from conftest import PROGRAM, ROOT, WEAK, Agent, new_repository, wait_for, weaken

import prepare
from harness.journal import read_journal
from night.rows import COLUMNS, read_rows
from night.worth import pair

MAY_FAIL = ("AUTORESEARCH_SEED=",)  # a run; its row says why


class Researcher(Agent):
    """Remembers nothing: all state is in git, results.tsv, night.json and the journal."""

    def look(self):
        """What the ledger says: (next, why)."""
        status = self.sh("look")
        return re.search(r"^next: (.*)", status, re.M)[1], re.search(r"^why: +(.*)", status, re.M)[1]

    def attempt(self, idea, *edits):
        self.edit(*edits)
        self.sh("commit", idea=idea, gain="+0.01")
        return self.go_on()

    def go_on(self):
        """Run what comes next until that is a comment. Returns the comment, and the log of the last run."""
        log = ""
        for _ in range(20):
            command, reason = self.look()
            if command.startswith("#"):
                return command, log
            assert self.is_in_program(command), command
            process = self.start_line(command)
            output = process.communicate()[0]
            assert process.returncode == 0 or command.startswith(MAY_FAIL), output
            if command.startswith(MAY_FAIL):
                log = (self.folder / "run.log").read_text()
        raise AssertionError(f"this does not end: {command} ({reason})")

    def is_in_program(self, command):
        """Whether it is a line of program.md with its words filled in, or leads to another commit."""
        lines = [re.sub("<[^>]*>", ".+", re.escape(line.strip())) for line in self.lines.values()]
        return any(re.fullmatch(line, command) for line in [*lines, r"git checkout -q (--detach )?[\w/]+"])


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


def another(agent):
    """One that knows nothing of what the first has done."""
    return Researcher(agent.folder, agent.environment, PROGRAM)


@pytest.mark.story
def test_a_night(agent):
    """
    A keep, a syntax error, a run over its budget; a run that ends while nobody watches; one in which
    the agent is killed and that hangs; then the end of the night, with its final runs.
    """
    tracked = agent.git("ls-files")
    assert "next: AUTORESEARCH_SEED=1 uv run train.py" in agent.sh("start", tag="test", when=7)
    start = agent.head()

    # a run that ends while nobody watches is added, and not run again
    agent.sh("run", seed=1)
    score = re.search(r"^val_bpb: +(\S+)", (agent.folder / "run.log").read_text(), re.M)[1]
    agent = another(agent)
    assert agent.look()[0] == agent.line("add", description="baseline")
    assert agent.go_on()[0] == "# a new idea: edit train.py"
    assert [(row[0], row[3]) for row in agent.rows()[1:]] == [(start, "keep")] * 2 and agent.rows()[1][1] == score
    assert agent.run("ledger.py", "open").returncode == 0

    restore = [(rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK]
    agent.attempt("rates up", *restore)
    kept = agent.head()
    ideas = {
        "a slip": (r"^def norm\(x\):", "def norm(x:"),
        "too slow": (r"^    clock.stop\(\)", "    import time\n    time.sleep(3)\n    clock.stop()"),
    }
    logs = {idea: agent.attempt(idea, edit)[1] for idea, edit in ideas.items()}
    assert "SyntaxError" in logs["a slip"]
    assert "not scored: trained for" in logs["too slow"]
    assert agent.head() == kept

    # the machine loses the agent's shell in mid-run, but not the training, which holds the lock
    agent.edit((r"^    clock.stop\(\)", "    import time\n    time.sleep(1000)\n    clock.stop()"))
    agent.sh("commit", idea="lost", gain="+0.01")
    (agent.folder / "run.log").unlink()
    shell = agent.start_line(agent.line("run", seed=1) + "; :")
    log = agent.folder / "run.log"
    wait_for(lambda: log.exists() and "compiling what is new" in log.read_text())
    shell.kill()
    shell.wait()
    agent = another(agent)
    command, reason = agent.look()
    assert command == "tail -c 300 run.log" and re.match(r"this commit's training runs \(pid \d+\): wait", reason)
    assert f"commit {agent.head()}, seed 1" in agent.start_line(command).communicate()[0]
    os.kill(int(re.search(r"pid (\d+)", reason)[1]), signal.SIGKILL)
    wait_for(lambda: agent.look()[0] == agent.line("run", seed=1))
    assert "was cut off" in agent.look()[1]
    added = agent.start_line(agent.line("add", description="lost") + " --crash").communicate()[0]
    assert f"added: {agent.head()} 0.000000 crash, lost" in added
    (agent.folder / "program.md").write_text("edited by the human")

    # seven rows are the end: the baseline and the last keep run on fresh seeds, and the loop around the agent ends
    assert agent.go_on()[0] == "# the night is over"
    assert re.search(r"gain to report, on fresh seeds: \+\d", agent.look()[1])
    assert agent.run("ledger.py", "open").returncode == 1
    assert (agent.folder / "program.md").read_text() == "edited by the human"

    # on its branch the benchmark is fixed, and another night of this name touches nothing
    for arguments in ([], ["--time-budget", "900"]):
        process = agent.run("prepare.py", *arguments)
        assert process.returncode == 1 and "leave the branch first" in process.stderr
    assert "this night exists" in agent.sh("start", tag="test", when=7, check=False)

    # nothing is lost, and the branch holds the keeps
    rows = agent.rows()
    assert rows[0] == list(COLUMNS)
    tried = ["baseline"] * 2 + ["rates up"] * 2 + [*ideas, "lost", "baseline, final", "last keep, final"]
    assert [re.split("; expect|: |, seed", row[4])[0] for row in rows[1:]] == tried
    statuses = ["keep"] * 2 + ["discard", "keep"] + ["crash"] * 3 + ["keep"] * 2
    assert [row[3] for row in rows[1:]] == statuses
    assert [re.search(r", seed (\d)$", row[4])[1] for row in rows[1:]] == list("121211144")
    listed, problems = read_rows(agent.folder / "results.tsv")
    journal = read_journal(prepare.HOME / (prepare.HOME / "current").read_text())
    pairs, left = pair(listed, journal)
    assert [pairs[index]["seed"] for index in sorted(pairs)] == [1, 2, 1, 2, 4, 4]
    assert not left and not problems
    for commit, *_ in rows[1:]:
        if commit not in (start, kept):
            assert agent.git("rev-parse", "--short=7", f"refs/tries/{commit}^").strip() == kept
    assert agent.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [kept, start]
    assert agent.git("branch", "--show-current").strip() == "autoresearch/test"
    assert agent.git("status", "--porcelain") == " M program.md\n" and agent.git("ls-files") == tracked
    assert agent.git("diff", "--name-only", "main", "HEAD").split() == ["train.py"]


def test_a_discarded_idea_is_tried_again(agent):
    """The lines of program.md that stand in its sentences, too."""
    program = (ROOT / "program.md").read_text()
    check, fetch, drop = (
        'uv run python -c "import train"',
        "git cherry-pick -n refs/tries/<commit>",
        "git checkout HEAD -- train.py",
    )
    assert all(f"`{line}`" in program for line in (check, fetch, drop)) and program.count("\n") <= 100

    def try_line(line):
        process = agent.start_line(line)
        output = process.communicate()[0]
        return process.returncode, output

    agent.edit((r"^def norm\(x\):", "def norm(x:"))
    assert "SyntaxError" in try_line(check)[1]
    agent.sh("commit", idea="a slip", gain="+0.01")
    slip, kept = agent.head(), agent.git("rev-parse", "--short=7", "HEAD^").strip()
    agent.sh("reset", commit=slip, kept=kept)
    assert agent.head() == kept and try_line(check) == (0, "")

    fetch = fetch.replace("<commit>", slip)
    assert try_line(fetch) == (0, "")
    agent.edit((r"^def norm\(x:", "def norm(x):  # mended"))
    agent.sh("commit", idea="the slip, mended", gain="+0.01")
    assert "mended" in agent.git("show", "HEAD") and agent.git("status", "--porcelain") == ""

    assert try_line(fetch)[0] == 1 and "<<<<<<<" in (agent.folder / "train.py").read_text()
    assert try_line(drop)[0] == 0 and agent.git("status", "--porcelain") == ""

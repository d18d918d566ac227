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
def researcher(prepared, tmp_path, environment):
    """A researcher in a fresh repository, with runs of 3 seconds and a train.py that leaves room for a gain."""
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    researcher = Researcher(new_repository(tmp_path / "clone", environment), environment, PROGRAM)
    weaken(researcher.folder)
    researcher.edit(("^BASELINE_SEEDS = .*", "BASELINE_SEEDS = (1, 2)"), file="night/rules.py")  # fewer runs of a kind
    researcher.edit(("^FINAL_SEEDS = .*", "FINAL_SEEDS = (4,)"), file="night/worth.py")
    researcher.git("commit", "-qam", "weak")
    return researcher


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
def test_a_night_by_program(researcher):
    """The agent is lost twice: a run ends while nobody watches, and one hangs."""
    researcher.sh("start", tag="test", when=7)
    start, tracked = researcher.head(), researcher.git("ls-files")
    researcher.sh("run", seed=1)  # which nobody watched, so it is not run again
    assert researcher.look()[0] == researcher.line("add", description="baseline")
    assert researcher.go_on() == IDEA
    assert researcher.run("ledger.py", "open").returncode == 0

    researcher.attempt("rates up", *((rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK))
    assert researcher.go_on() == IDEA
    kept = researcher.head()
    for idea, edit in (
        ("a slip", (r"^def norm\(x\):", "def norm(x:")),
        ("too slow", (STOP, "    import time\n    time.sleep(3)\n    clock.stop()")),
    ):
        researcher.attempt(idea, edit)
        assert researcher.go_on() == IDEA and researcher.head() == kept

    # the machine loses the agent's shell in mid-run, but not the training, which holds the lock
    researcher.attempt("lost", (STOP, "    import time\n    time.sleep(1000)\n    clock.stop()"))
    log = researcher.folder / "run.log"
    log.unlink()
    shell = researcher.start_line(researcher.line("run", seed=1) + "; :")
    wait_for(lambda: log.exists() and "compiling what is new" in log.read_text())
    shell.kill()
    shell.wait()
    command, reason = researcher.look()
    pid = re.match(r"this commit's training runs \(pid (\d+)\): wait", reason)[1]
    assert f"commit {researcher.head()}, seed 1" in researcher.bash(command)[1]
    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: researcher.look()[0] == researcher.line("run", seed=1))
    assert "was cut off" in researcher.look()[1]
    assert researcher.bash(researcher.line("add", description="lost") + " --crash")[0] == 0
    (researcher.folder / "program.md").write_text("edited by the human")

    # seven rows are the end; on its branch the benchmark is fixed
    assert researcher.go_on() == OVER
    assert re.search(r"gain to report, on fresh seeds: \+\d", researcher.look()[1])
    assert researcher.run("ledger.py", "open").returncode == 1
    for arguments in ([], ["--time-budget", "900"]):
        process = researcher.run("prepare.py", *arguments)
        assert process.returncode == 1 and "git checkout --detach" in process.stderr

    # every run has its row, and the branch holds the keeps
    rows, problems = read_rows(researcher.folder / "results.tsv")
    assert not problems and len(rows) == len(ROWS.splitlines())
    for row, expected in zip(rows, ROWS.splitlines()):
        words, status, seed = expected.rsplit(" ", 2)
        assert row.status == status
        assert re.match(words, row.description) and row.description.endswith(f", seed {seed}")
        if row.commit not in (start, kept):
            assert researcher.git("rev-parse", "--short=7", f"refs/tries/{row.commit}^").strip() == kept
    pairs, left = pair(rows, read_journal(prepare.HOME / (prepare.HOME / "current").read_text()))
    assert [pairs[index]["seed"] for index in sorted(pairs)] == [1, 2, 1, 2, 4, 4] and not left
    assert researcher.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [kept, start]
    assert researcher.git("branch", "--show-current") == "autoresearch/test\n"
    assert researcher.git("status", "--porcelain") == " M program.md\n" and researcher.git("ls-files") == tracked
    assert researcher.git("diff", "--name-only", "main", "HEAD") == "train.py\n"


def test_a_discarded_idea_is_tried_again(researcher):
    """By the lines that stand in the sentences of program.md."""
    check, fetch = 'uv run python -c "import train"', "git cherry-pick -n refs/tries/<commit>"
    program = (ROOT / "program.md").read_text()
    assert all(f"`{line}`" in program for line in (check, fetch, DROP)) and program.count("\n") <= 100

    slip, mend = (r"^def norm\(x\):", "def norm(x:"), (r"^def norm\(x:", "def norm(x):  # mended")
    researcher.edit(slip)
    assert "SyntaxError" in researcher.bash(check)[1]
    researcher.sh("commit", idea="a slip", gain="+0.01")
    commit, kept = researcher.head(), researcher.git("rev-parse", "--short=7", "HEAD^").strip()
    researcher.sh("reset", commit=commit, kept=kept)
    assert researcher.head() == kept and researcher.bash(check) == (0, "")

    fetch = fetch.replace("<commit>", commit)
    assert researcher.bash(fetch) == (0, "")
    researcher.attempt("the slip, mended", mend)
    assert "mended" in researcher.git("show", "HEAD") and researcher.git("status", "--porcelain") == ""
    assert researcher.bash(fetch)[0] == 1 and "<<<<<<<" in (researcher.folder / "train.py").read_text()
    assert researcher.bash(DROP)[0] == 0 and researcher.git("status", "--porcelain") == ""

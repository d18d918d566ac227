"""
Checks that program.md can be followed: its lines run as they stand, every `next:` is one of them, and no run is lost or
repeated when the agent is. A scripted agent runs what `next:` says; only `uv` is a stand-in.
"""

import re
import textwrap

import pytest
from conftest import CPU, ROOT, WEAK, Agent, ask_no_torch, new_repository, wait_for, weaken

import prepare
from harness.journal import read_journal
from night.steps import DROP, NEW_IDEA, OVER

BLOCKS = re.findall(r"^ *```sh\n(.*?)^ *```$", (ROOT / "program.md").read_text(), re.M | re.S)
NAMES = ["look", "check", "commit", "run", "reset"]  # of the blocks: one without a name has no test
PROGRAM = dict(zip(NAMES, map(textwrap.dedent, BLOCKS), strict=True))
START = ["ledger.py", "start", "test", "--until", "8"]


class Researcher(Agent):
    """Remembers nothing: all state is in git and in the night's record."""

    def look(self):
        """What the ledger says: (next, why)."""
        status = self.sh("look")
        return re.search(r"^next: (.*)", status, re.M)[1], re.search(r"^why: +(.*)", status, re.M)[1]

    def sh(self, name, /, check=True, **words):
        """Run a block of program.md; returns what it prints."""
        output, code = self.bash(self.line(name, **words))
        assert code == 0 or not check, output
        return output

    def line(self, name, /, **words):
        """A block with its <words> filled in."""
        line = PROGRAM[name]
        for word, value in words.items():
            assert f"<{word}>" in line
            line = line.replace(f"<{word}>", str(value))
        assert not re.search(r"<\w+>", line), f"{name}: not all words are filled in"
        return line.strip()

    def attempt(self, idea, *edits):
        self.edit(*edits)
        self.sh("check", check=False)
        self.sh("commit", idea=idea, gain="+0.01")

    def go_on(self):
        """Run what comes next until that is a comment: returns it. No command fails."""
        lines = [re.sub("<[^>]*>", ".+", re.escape(line.strip())) for line in PROGRAM.values()]
        for _ in range(20):
            command, _ = self.look()
            if command.startswith("#"):
                return command
            assert any(re.fullmatch(line, command) for line in lines), f"not in program.md: {command}"
            output, code = self.bash(command)
            assert code == 0, output
        raise AssertionError(f"this does not end: {command}")


@pytest.fixture
def researcher(prepared, tmp_path, environment):
    """A researcher in a fresh repository, with runs of 3 seconds and a train.py that leaves room for a gain."""
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    researcher = Researcher(new_repository(tmp_path / "clone", environment), environment)
    weaken(researcher.folder)
    for name in ("BASELINE_SEEDS = (1, 2)", "FINAL_SEEDS = (4,)"):  # fewer runs of a kind
        researcher.edit((f"^{name.split()[0]} = .*", name), file="night/rules.py")
    ask_no_torch(researcher.folder, prepare.device_name(CPU))
    researcher.git("commit", "-qam", "weak")
    assert researcher.run(*START).returncode == 0
    return researcher


ROWS = """baseline keep 1
baseline keep 2
rates up.* keep 1
rates up.* keep 2
rates up.* keep 3
a slip.* crash 1
lost.* discard 1
dropped.* discard 1
baseline, final keep 4
rates up.*, final keep 4"""


@pytest.mark.story
def test_a_night_by_program(researcher):
    """The agent loses its shell in mid-run, and the human edits program.md."""
    start, tracked = researcher.head(), researcher.git("ls-files")
    assert researcher.go_on() == NEW_IDEA
    assert researcher.run("ledger.py", "open").returncode == 0

    researcher.attempt("rates up", *((rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK))
    assert researcher.go_on() == NEW_IDEA
    kept = researcher.head()
    researcher.attempt("a slip", (r"^def norm\(x\):", "def norm(x:"))
    assert researcher.go_on() == NEW_IDEA and researcher.head() == kept

    # the shell is lost, but not the run: the same line again waits for it, and takes its score
    researcher.attempt("lost", *((rf"^({name} +)= ", r"\1= 1e-6 * ") for name in WEAK))
    log = researcher.folder / "run.log"
    log.unlink()
    shell = researcher.start_line(f"exec {researcher.line('run')}")
    wait_for(lambda: log.exists() and "compiling what is new" in log.read_text())
    shell.kill()
    shell.wait()
    assert researcher.look() == (researcher.line("run"), "a run is going on: this waits for it")
    assert "goes on: waiting for it" in researcher.sh("run")
    assert researcher.go_on() == NEW_IDEA
    (researcher.folder / "program.md").write_text("edited by the human")

    # a choice of the agent's own
    researcher.attempt("dropped", (r"^ADAM_EPS = .*", "ADAM_EPS = 1e-9"))
    researcher.sh("run")
    assert researcher.bash("uv run ledger.py discard")[1] == 0

    # eight rows are the end
    assert researcher.go_on() == OVER
    assert re.search(r"gain to report, on fresh seeds: \+\d", researcher.look()[1])
    assert researcher.run("ledger.py", "open").returncode == 1

    # every run has its row, none was made twice, and the branch holds the keeps
    rows = researcher.rows()[1:]
    expected = [line.rsplit(" ", 2) for line in ROWS.splitlines()]
    assert len(rows) == len(expected)
    for row, (words, status, seed) in zip(rows, expected):
        assert row[3] == status and re.fullmatch(f"{words}, seed {seed}", row[4])
        if row[0] not in (start, kept):
            assert researcher.git("rev-parse", "--short=7", f"refs/tries/{row[0]}^").strip() == kept
    runs = [run["run"] for run in read_journal(prepare.HOME / (prepare.HOME / "current").read_text())]
    assert len(runs) == len(set(runs)) == len([row for row in rows if row[3] != "crash"])
    assert researcher.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [kept, start]
    assert researcher.git("branch", "--show-current") == "autoresearch/test\n"
    assert researcher.git("status", "--porcelain") == " M program.md\n" and researcher.git("ls-files") == tracked
    assert researcher.git("diff", "--name-only", "main", "HEAD") == "train.py\n"


def test_a_discarded_idea_is_tried_again(researcher):
    """By the lines that stand in the sentences of program.md."""
    for name in ("BASELINE_SEEDS = ()", "LEAST_SCORES = 0"):  # ideas at once
        researcher.edit((f"^{name.split()[0]} = .*", name), file="night/rules.py")
    fetch = "git cherry-pick -n refs/tries/<commit>"
    program = (ROOT / "program.md").read_text()
    assert all(f"`{line}`" in program for line in (fetch, DROP)) and program.count("\n") <= 85

    slip, mend = (r"^def norm\(x\):", "def norm(x:"), (r"^def norm\(x:", "def norm(x):  # mended")
    researcher.edit(slip)
    assert "SyntaxError" in researcher.sh("check", check=False)
    researcher.sh("commit", idea="a slip", gain="+0.01")
    commit, kept = researcher.head(), researcher.git("rev-parse", "--short=7", "HEAD^").strip()
    assert "SyntaxError: " in researcher.sh("run")
    researcher.sh("reset", kept=kept)
    assert researcher.head() == kept and researcher.sh("check") == ""

    fetch = fetch.replace("<commit>", commit)
    assert researcher.bash(fetch) == ("", 0)
    researcher.attempt("the slip, mended", mend)
    assert "mended" in researcher.git("show", "HEAD") and researcher.git("status", "--porcelain", "train.py") == ""
    assert researcher.bash(fetch)[1] == 1 and "<<<<<<<" in (researcher.folder / "train.py").read_text()
    assert researcher.bash(DROP)[1] == 0 and researcher.git("status", "--porcelain", "train.py") == ""

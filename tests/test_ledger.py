"""
Defects of ledger.py in a real repository: a start that lets through what ends a night, a row that is wrong, lost or
written twice, a night that is forgotten, a loop that stops or spins. The journal is the tests' own: nothing trains.
"""

import json
import math
import os
import re
import sys
import time
import types
from datetime import datetime, timedelta

import pytest
from conftest import HEADER, PROGRAM, Agent, new_repository
from filelock import FileLock
from test_night import DROP, IDEA, adds, back, train

import ledger
from harness import journal as harness_journal
from night import checks
from night.rows import append_rows
from night.rules import OVER


def test_sparkline(monkeypatch):
    assert ledger.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert ledger.sparkline([2, 2]) == "▁▁"
    assert ledger.sparkline(list(range(500))) == ledger.sparkline(list(range(60)))
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding="ascii"))
    assert ledger.sparkline([1, 2]) == ""


NOW = datetime.now().astimezone()
SOON = (NOW + timedelta(hours=2)).replace(second=0, microsecond=0)
BEFORE = (NOW - timedelta(hours=2)).replace(second=0, microsecond=0)
TIMES = {
    "a time of day": (f"{SOON:%H:%M}", SOON),
    "a date": (f"{SOON:%Y-%m-%dT%H:%M}", SOON),
    "with its zone": (SOON.isoformat(timespec="minutes"), SOON),
    "tomorrow": (f"{BEFORE:%H:%M}", BEFORE + timedelta(days=1)),
}


@pytest.mark.parametrize("name", TIMES)
def test_until_is_a_time_in_utc(name):
    text, expected = TIMES[name]
    until = datetime.fromisoformat(ledger.parse_until(text))
    assert until == expected and until.utcoffset() == timedelta(0)


@pytest.mark.parametrize("text", ["", "0", "-1", "25:00", "7 o'clock", "2020-01-01", "forty", "\u0664"])
def test_until_refuses(text):
    with pytest.raises(SystemExit, match="--until"):
        ledger.parse_until(text)


@pytest.mark.parametrize("text", ["never", "1", "40"])
def test_until_is_a_number_of_rows_or_never(text):
    assert ledger.parse_until(text) == text


# --------------------------------------
# In a real repository

GONE = "gone"  # a key that a line of the journal lacks


class Clone(Agent):
    """A repository with a benchmark, and the commands of ledger.py in this process."""

    def __init__(self, folder, environment, home, capsys):
        super().__init__(folder, environment, PROGRAM)
        self.home, self.capsys = home, capsys
        self.journal = home / "local" / "journal.jsonl"

    def bash(self, line):
        process = self.start_line(line)
        return process.communicate()[0], process.returncode

    def commit(self, message="an idea"):
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.head()

    def write(self, name, text):
        time.sleep(0.02)  # so that it is newer, however coarse the clock
        (self.folder / name).write_text(text)

    def scored(self, score, seed=1, **changes):
        run = {"time": harness_journal.now(), "commit": self.git("rev-parse", "HEAD").strip(), "dirty": False}
        run |= {"seed": seed, "val_bpb": score, "steps": 10, "peak_memory_mb": 2048.0, "device": "cpu"} | changes
        with open(self.journal, "a") as file:
            file.write(json.dumps({key: value for key, value in run.items() if value != GONE}) + "\n")

    def job(self, commit, seed, state="scored", **changes):
        """A result of a wave."""
        job = {"job": f"{commit}-{seed}", "commit": self.git("rev-parse", commit).strip(), "seed": seed, "attempt": 1}
        job |= {"state": state, "benchmark": "local", "dirty": False, "steps": 10, "device": "cpu"} | changes
        folder = self.folder / "wave" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{job['job']}.json").write_text(json.dumps(job))

    def call(self, function, *arguments):
        self.capsys.readouterr()
        function(self.folder, *arguments)
        return self.capsys.readouterr().out

    def status(self):
        return self.call(ledger.print_status)

    def next(self):
        return re.search("^next: (.*)", self.status(), re.M)[1]

    def add(self, words="baseline", status=None):
        time.sleep(0.02)
        return self.call(ledger.add, words, status)

    def tries(self):
        """The rows after the baseline: [commit, status, description]."""
        return [[row[0], *row[3:]] for row in self.rows()[4:]]

    def baseline(self):
        """A night that has started, with its baseline. Returns its commit."""
        self.call(ledger.start, "test")
        for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005)):
            self.scored(score, seed)
        self.add()
        return self.head()


@pytest.fixture
def clone(tmp_path, environment, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "local").mkdir(parents=True)
    (home / "current").write_text("local")
    (home / "local" / "benchmark.json").write_text('{"id": "local", "settings": {"time_budget": 3}}')
    environment |= {"AUTORESEARCH_HOME": str(home), "CXX": sys.executable}  # some program: no compiler is needed here
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    clone = Clone(new_repository(tmp_path / "clone", environment), None, home, capsys)
    monkeypatch.setattr(harness_journal, "ROOT", clone.folder)
    return clone


# --------------------------------------
# Start


def hook(name, line):
    return f"printf '#!/bin/sh\\n{line}\\n' > .git/hooks/{name}; chmod +x .git/hooks/{name}"


PROBLEMS = {  # what is wrong, and the fix
    "no repository": ("rm -rf .git", "git clone it, or git init"),
    "a folder of another repository": ("rm -rf .git; git init -q ..", "move it out of there"),
    "no commit": ("rm -rf .git; git init -q", "git add -A"),
    "no identity": ("printf '[user]\\nuseConfigOnly = true\\n' > ../gitconfig", "git config user.name me"),
    "index.lock": ("touch .git/index.lock", "rm '.git/index.lock'"),
    "changes": ("echo >> train.py", "train.py: git stash"),
    "a stray file": ("touch new.py", "new.py, so no run"),
    "tracked results": ("touch results.tsv; git add -f .; git commit -qm x", "git rm --cached results.tsv"),
    "branch autoresearch": ("git branch autoresearch", "git branch -m autoresearch"),
    "branch of a night": ("git branch autoresearch/test", "git checkout autoresearch/test"),
    "no benchmark": ("rm ../home/current", "uv run prepare.py"),
    "a home that is a file": ("rm -r ../home; touch ../home", "set AUTORESEARCH_HOME to a folder on a local disk"),
    "a hook that refuses": (hook("pre-commit", "exit 1"), "git config core.hooksPath /dev/null"),
    "the same, detached": ("git checkout -q --detach;" + hook("pre-commit", "exit 1"), "core.hooksPath"),
    "a hook that hangs": (hook("commit-msg", "sleep 60"), "no answer for 1 s"),
    "a hook of checkout": (hook("post-checkout", "exit 1"), "core.hooksPath"),
    "signing": ("git config commit.gpgsign true; git config gpg.program false", "git config commit.gpgsign false"),
}
SETTINGS = {  # the same, of the environment
    "no git": ("PATH", "/nowhere", "git is missing: install it"),
    "GIT_DIR": ("GIT_DIR", "/x", "unset GIT_DIR"),
    "another owner": ("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1", "git config --global --add safe.directory"),
    "no such home": ("AUTORESEARCH_HOME", "~nobody-of-this-name/x", "set AUTORESEARCH_HOME"),
}


def refuses_to_start(clone, fix):
    """Start: it must refuse with one such line, and leave all as it was."""

    def look():
        paths = [clone.folder / ".git" / "HEAD"]
        for pattern in ("*", ".git/*.lock", ".git/refs/heads/**/*"):
            paths += clone.folder.glob(pattern)
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = look()
    with pytest.raises(SystemExit) as problem:
        ledger.start(clone.folder, "test", "never")
    assert len([line for line in str(problem.value).splitlines() if fix in line]) == 1, problem.value
    assert look() == before


@pytest.mark.parametrize("name", PROBLEMS)
def test_start_refuses_and_leaves_all_as_it_was(name, clone, monkeypatch):
    monkeypatch.setattr(checks, "COMMIT_SECONDS", 1)
    line, fix = PROBLEMS[name]
    assert clone.bash(f"mkdir -p .git/hooks; {line}") == ("", 0)
    refuses_to_start(clone, fix)


@pytest.mark.parametrize("name", SETTINGS)
def test_start_refuses_what_is_set(name, clone, monkeypatch):
    variable, value, fix = SETTINGS[name]
    monkeypatch.setenv(variable, value)
    refuses_to_start(clone, fix)


def test_start_refuses_a_machine_that_is_taken_or_has_no_compiler(clone, monkeypatch):
    monkeypatch.setattr(checks, "LOCK_SECONDS", 0)
    monkeypatch.setattr(checks, "running_training", lambda: "77")
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    with FileLock(clone.home / "night.lock"):
        for fix in ("night.lock is taken", "wait for it, or kill 77", "no C++ compiler"):
            refuses_to_start(clone, fix)
    clone.write("train.py", "COMPILE = False\n")
    assert checks.compiler_problems(clone.folder) == []


def test_a_hook_that_hangs_is_ended(clone):
    pipe = clone.folder.parent / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    clone.bash(f"mkdir -p .git/hooks; {hook('commit-msg', 'exec sleep 60 > ../pipe')}")
    worked, _, complaint = checks.run_git(clone.folder, "commit", "--allow-empty", "-m", "x", seconds=1)
    assert not worked and "no answer for 1 s" in complaint
    assert os.read(reader, 1) == b"", "which raises while the hook holds the other end"
    os.close(reader)


def test_start_says_all_problems_at_once(clone):
    names = ("no identity", "index.lock", "changes", "a stray file", "branch autoresearch", "no benchmark")
    clone.bash("; ".join(PROBLEMS[name][0] for name in names))
    lines = "\n".join(checks.find_problems(clone.folder, "a b"))
    assert len(lines.splitlines()) == 7 and "'a b' can't name a branch" in lines


def test_start_moves_an_old_ledger_aside_over_nothing(clone):
    for name in ("results.tsv", "results-before-test.tsv", "run.log", "ideas.md"):
        clone.write(name, name)
    main = clone.git("rev-parse", "--short", "main").strip()
    said = clone.call(ledger.start, "test", "40")
    assert "is results-before-test2.tsv now" in said
    assert f"branch autoresearch/test, from {main} (start), until 40" in said
    assert (clone.folder / "results-before-test2.tsv").read_text() == "results.tsv"
    for name in ("results-before-test.tsv", "ideas.md"):
        assert (clone.folder / name).read_text() == name
    assert (clone.folder / "results.tsv").read_text() == HEADER and not (clone.folder / "run.log").exists()
    state = json.loads((clone.folder / "night.json").read_text())
    assert state["until"] == "40" and state["commit"] == clone.git("rev-parse", "HEAD").strip()
    assert clone.git("log", "-1", "--format=%s") == "autoresearch/test: start\n" and clone.next() == train(1)


# --------------------------------------
# Add


def test_add_writes_rows_by_the_rule(clone):
    start = clone.baseline()
    assert clone.rows()[1][1] == "0.995000" and clone.rows()[3][1] == "1.005000"
    assert clone.rows()[2] == [start, "1.000000", "2.0", "keep", "baseline, seed 2"]
    idea = clone.commit()
    clone.scored(0.98)
    text = clone.status()
    assert f"to beat:     1.000000, {start}\n" in text
    assert "  0.980000 seed 1, 10 steps, gain +0.020000, no row yet\n" in text
    assert f"added: {idea} 0.980000 discard, wider, seed 1\n" in clone.add("wider") and clone.next() == train(2)
    text = clone.status()
    assert clone.status() == text and "no row" not in text, "looking again counts nothing twice"

    # the runs of what is judged move no floor
    clone.scored(0.985, 2)
    clone.scored(0.6, 3, dirty=True)
    text = clone.status()
    assert "noise floor: 0.010000, pooled" in text and "gain +0.400000, does not count\n" in text
    assert f"added: {idea} 0.985000 keep, wider, seed 2\n" in clone.add("wider, seed 2")

    # final runs do not move what is to beat
    clone.write("night.json", (clone.folder / "night.json").read_text().replace("never", "5"))
    clone.scored(0.5, 4)
    assert "last keep, final, seed 4" in clone.add(None)
    text = clone.status()
    assert f"to beat:     0.982500, {idea}\n" in text and "1.0000 to 0.9825\n" in text


def test_add_drops_what_is_promising(clone):
    start = clone.baseline()
    idea = clone.commit()
    clone.scored(0.98)
    assert "discard, wider, dropped, seed 1" in clone.add("wider", "discard")
    assert clone.next() == back(idea, start)


def test_a_try_on_top_of_a_discard_is_named(clone):
    """Somebody forgot to go back."""
    clone.baseline()
    forgotten = clone.commit()
    clone.scored(1.1)
    assert "was not kept" not in clone.add("worse") + clone.status()
    clone.commit("half of it")
    clone.commit("all of it")
    text = clone.status()
    assert f"warning: HEAD is on top of {forgotten}, which was not kept" in text and text.count("was not kept") == 1
    clone.scored(0.9)
    clone.scored(0.9, 2)
    assert "was not kept" in clone.add("better") and "was not kept" not in clone.status()


REFUSED = {
    "nothing to add": (lambda clone: None, None, "nothing to add"),
    "uncommitted changes": (lambda clone: clone.write("train.py", "x"), None, "uncommitted changes"),
    "conflict markers": (lambda clone: clone.write("train.py", "<<<<<<< HEAD\n"), None, "conflict markers"),
    "cut off": (lambda clone: clone.write("run.log", f"commit {clone.head()}, seed 1, x\n"), None, "nothing to add"),
    "of another commit": (lambda clone: clone.write("run.log", "commit abcdef0, seed 1\nError\n"), None, "nothing to"),
    "files that differ": (lambda clone: clone.scored(0.9, dirty=True), None, "nothing to add"),
    "keep after one run": (lambda clone: clone.scored(0.99), "keep", "second run first: AUTORESEARCH_SEED=2"),
    "a scored run as a crash": (lambda clone: clone.scored(0.99), "crash", "use --discard"),
    "keep of what is worse": (lambda clone: [clone.scored(1.1), clone.scored(1.1, 2)], "keep", "the gain is -0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_add_refuses(name, clone):
    clone.baseline()
    clone.commit()
    spoil, status, words = REFUSED[name]
    spoil(clone)
    with pytest.raises(SystemExit, match=words):
        clone.add("wider", status)
    assert clone.tries() == []


def test_add_keeps_what_is_simpler_and_not_worse(clone):
    clone.baseline()
    clone.commit()
    clone.scored(0.999)
    clone.add("simpler")
    assert clone.next().startswith("git update-ref")
    clone.scored(0.9999, 2)
    assert "0.999900 keep, simpler, seed 2" in clone.add("simpler", "keep") and clone.next() == IDEA


CRASHES = {
    "an error": ("commit {head}, seed 1, x\nTraceback\nValueError: no\n", None, "wider: ValueError: no, seed 1"),
    "a syntax error": ("SyntaxError: no\n", None, "wider: SyntaxError: no, seed 1"),
    "killed for memory": ("commit {head}, seed 1, x\nstep 1\n", "crash", "wider: cut off, seed 1"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_add_of_a_crash(name, clone):
    start = clone.baseline()
    head = clone.commit()
    log, status, words = CRASHES[name]
    clone.write("run.log", log.format(head=head))
    clone.add("wider", status)
    assert clone.rows()[-1] == [head, "0.000000", "0.0", "crash", words]
    assert clone.next() == back(head, start)
    assert clone.bash(clone.next()) == ("", 0)
    assert clone.next() == IDEA and clone.head() == start, "an old log is of no other commit"


def test_a_score_and_then_a_crash_before_add(clone):
    clone.baseline()
    head = clone.commit()
    clone.scored(0.98)
    clone.write("run.log", f"commit {head}, seed 2, x\nMemoryError\n")
    clone.add("wider")
    assert clone.tries() == [[head, "discard", "wider, seed 1"], [head, "crash", "wider: MemoryError, seed 2"]]


WAVE = {"lucky": (0.93, 0.95, 0.96), "better": (0.955, 0.94, 0.95), "worse": (0.98, 0.99, 1.01)}


def test_add_of_a_wave(clone):
    """The best of two winners is kept, by the runs after the first. What does not compare is named, and no row."""
    start = clone.baseline()
    tried = {}
    for name in (*WAVE, "slip"):
        tried[name] = clone.commit(f"{name}; expect +0.01")
        clone.git("update-ref", f"refs/tries/{tried[name]}", "HEAD")
        clone.git("reset", "-q", "--keep", start)
    for name, scores in WAVE.items():
        for seed, score in enumerate(scores, 1):
            clone.job(tried[name], seed, val_bpb=score, time="then")
    clone.job(tried["slip"], 1, "crash", reason="SyntaxError: no")
    clone.job(tried["worse"], 4, val_bpb=0.1, device="A100")
    clone.job(tried["worse"], 5, val_bpb=0.1, benchmark="another")
    first = json.loads(clone.journal.read_text().splitlines()[0])
    clone.job(start, 1, val_bpb=0.995, time=first["time"])  # it ran on this machine: the journal has it
    (clone.folder / "wave" / "results" / "torn.json").write_text("{")

    assert clone.next() == "uv run ledger.py add --wave"
    added = clone.call(ledger.add_wave)
    for problem in ("torn.json of the wave cannot be read", "on A100, the baseline on cpu", "the benchmark another"):
        assert added.count(problem) == 1
    expected = []
    for name, status in (("lucky", "discard"), ("better", "keep"), ("worse", "discard")):
        expected += [[tried[name], status, f"{name}; expect +0.01, seed {seed}"] for seed in (1, 2, 3)]
    expected.append([tried["slip"], "crash", "slip; expect +0.01: SyntaxError: no, seed 1"])
    assert sorted(clone.tries()) == sorted(expected)
    assert clone.next() == f"git reset -q --keep {tried['better']}"
    with pytest.raises(SystemExit, match="nothing to add: no commit"):
        ledger.add_wave(clone.folder)


def test_a_final_run_is_one_whatever_it_is_called(clone):
    start = clone.baseline()
    (clone.folder / "night.json").write_text(json.dumps({"tag": "test", "until": "3", "commit": start}))
    clone.scored(1.0, 4)
    clone.add("on a fresh seed")
    assert clone.rows()[-1][-1] == "on a fresh seed, final, seed 4"


# --------------------------------------
# What is lost, edited or somebody else's


def test_results_lost_are_rebuilt(clone):
    clone.baseline()
    kept = clone.commit("deeper; expect +0.01")
    for seed in (1, 2):
        clone.scored(0.98, seed)
        clone.add("deeper")
    tried = clone.commit("wider")
    clone.scored(1.2)
    clone.scored(1.3, 2, slow_steps_percent=50)
    clone.add("wider")
    clone.git("reset", "-q", "--keep", kept)  # nothing but git's log of HEAD knows it now
    clone.commit("not judged")
    clone.scored(0.97)
    baseline = clone.rows()[:4]
    clone.git("checkout", "-q", "--detach", baseline[1][0])
    clone.scored(1.0, 4)
    clone.git("checkout", "-q", "autoresearch/test")
    (clone.folder / "results.tsv").unlink()
    assert "results.tsv was lost, and is rebuilt" in clone.status()
    assert clone.rows()[:4] == baseline
    assert clone.tries() == [
        *([kept, "keep", f"deeper; expect +0.01, seed {seed}"] for seed in (1, 2)),
        [tried, "discard", "wider, seed 1"],
        [baseline[1][0], "keep", "baseline, final, seed 4"],
    ]
    assert clone.next() == adds("not judged") and "lost" not in clone.status()


LOST = ["", "[]", "{}", '{"commit": "ffffffff", "tag": "x", "until": "1"}', "\xff"]


@pytest.mark.parametrize("content", LOST)
def test_night_json_lost_is_recovered(content, clone):
    clone.baseline()
    clone.commit()
    clone.git("checkout", "-q", "--detach")
    (clone.folder / "night.json").write_text(content, encoding="latin-1")
    text = clone.status()
    assert "night:       test, 3 rows, until never" in text and "warning: night.json is lost" in text
    (clone.folder / "night.json").unlink()
    assert clone.status() == text


@pytest.mark.parametrize(
    ("until", "expected"),
    [("2020-01-01T00:00", OVER), ("3000-01-01T00:00:00Z", IDEA), (3, OVER), (4, IDEA), ("soon", IDEA), (None, IDEA)],
)
def test_until_edited_by_hand(until, expected, clone):
    clone.baseline()
    state = json.loads((clone.folder / "night.json").read_text())
    clone.write("night.json", json.dumps(state | {"until": until}))
    assert clone.next() == expected


def test_runs_of_another_night_are_not_taken(clone):
    clone.scored(0.5)
    start = clone.baseline()
    clone.git("checkout", "-q", "main")
    clone.scored(0.6)
    clone.commit()
    clone.scored(0.7)
    assert clone.bash(clone.next()) == ("", 0)
    assert clone.next() == IDEA and clone.head() == start


OLD = [{name: GONE} for name in ("time", "steps", "seed", "dirty", "device")]
NULL = [{name: None} for name in ("peak_memory_mb", "steps", "slow_steps_percent", "untimed_rows")]


@pytest.mark.parametrize("changes", [*OLD, *NULL], ids=str)
def test_lines_of_older_journals_are_runs(changes, clone):
    clone.call(ledger.start, "test")
    clone.scored(1.0, **changes)
    assert clone.next() == adds("baseline")
    assert clone.add().count("added") == 1 and clone.next().startswith("AUTORESEARCH_SEED=")


def test_lines_that_are_no_runs_are_skipped(clone):
    clone.call(ledger.start, "test")
    clone.write(clone.journal, '{"val_bpb": 0.9}\n[1]\n{"commit": null, "val_bpb": 1}\n{"val_bpb": 0.9, "comm\n')
    clone.scored(math.nan)
    clone.scored(1.0)
    assert clone.add().count("added") == 1


def test_a_log_is_not_of_the_commit_that_amends_its_own(clone):
    clone.baseline()
    clone.commit()
    clone.write("run.log", "SyntaxError: no\n")
    time.sleep(0.02)
    clone.git("commit", "-q", "--amend", "--allow-empty", "-m", "fixed")
    assert clone.next() == train(1)


def test_a_keep_that_git_does_not_know_is_none(clone):
    start = clone.baseline()
    append_rows(clone.folder / "results.tsv", [("abcdef0", "0.1", "1.0", "keep", "a dream")])
    text = clone.status()
    assert f"to beat:     1.000000, {start}" in text and "results.tsv:5: abcdef0 is not a commit of this night" in text


def test_train_py_without_its_text(clone):
    """Gone, or with the markers of a cherry-pick, which `git commit -- train.py` accepts."""
    clone.baseline()
    (clone.folder / "train.py").unlink()
    assert clone.next().startswith("# a new idea is in train.py")
    clone.write("train.py", "<<<<<<< HEAD\n")
    assert clone.next() == DROP
    clone.git("commit", "-q", "-m", "four", "--", "train.py")
    assert clone.next() == "git reset -q --keep HEAD^"


# --------------------------------------
# Open


@pytest.fixture
def waits(clone, monkeypatch):
    """The seconds that two questions of `open`, or more, waited."""

    def ask(times=2):
        seconds = []
        monkeypatch.setattr(ledger, "time", types.SimpleNamespace(sleep=seconds.append))
        for _ in range(times):
            clone.call(ledger.wait_while_open)
        return seconds

    return ask


def test_open_waits_longer_each_time_until_there_is_a_row(clone, waits):
    clone.call(ledger.start, "test", "4")
    assert waits(8) == [30, 60, 120, 240, 480, 900, 900]
    assert clone.git("status", "--porcelain") == ""
    for seed in (1, 2, 3):
        clone.scored(1.0, seed)
    clone.add()
    assert waits() == [30]
    clone.scored(1.1, 4)
    clone.add()
    with pytest.raises(SystemExit) as over:
        ledger.wait_while_open(clone.folder)
    assert over.value.code == 1


def test_a_linked_worktree(clone, monkeypatch, waits):
    clone.git("worktree", "add", "-q", "-b", "other", "../linked")
    clone.folder = clone.folder.parent / "linked"
    monkeypatch.setattr(harness_journal, "ROOT", clone.folder)
    clone.baseline()
    clone.write("run.log", "SyntaxError: no\n")
    assert clone.next() == adds("baseline")
    assert waits() == [30]


BAD = {
    "no benchmark": "rm ../home/current",
    "no night": "git checkout -q main; rm night.json",
    "no repository": "rm -rf .git",
    "a ledger that is a folder": "rm results.tsv; mkdir results.tsv",
    "a ledger of another tool": "printf 'step\\tloss\\n1\\t2\\n' > results.tsv",
}


@pytest.mark.parametrize("name", BAD)
def test_open_goes_on_where_the_books_are_bad(name, clone, waits):
    clone.baseline()
    assert clone.bash(BAD[name]) == ("", 0)
    assert waits()[-1] == 30


# --------------------------------------
# As commands


def test_output_anywhere(clone, monkeypatch):
    assert clone.bash("uv run ledger.py start test >/dev/null") == ("", 0)
    for seed in (1, 2):
        clone.scored(1.0, seed)
    assert clone.bash("uv run ledger.py add '\u65e5 \u2028 \u00e9' >/dev/null") == ("", 0)
    lines = [f"PYTHONIOENCODING={code} uv run ledger.py >/dev/null" for code in ("cp1252", "ascii", "utf-8")]
    lines += ["uv run ledger.py | true", "cd night && uv run ../ledger.py >/dev/null"]
    for line in lines:
        assert clone.bash(f"set -o pipefail; {line}") == ("", 0), line


WRONG = ["start", "start x --until soon", "add x --wave", "add x --maybe", "opem", "--status", "add x --keep --crash"]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_line_is_answered_in_one(words, clone):
    answer, code = clone.bash(f"uv run ledger.py {words}")
    assert code in (1, 2) and answer.count("\n") == 1

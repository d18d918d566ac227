"""
The commands of ledger.py in a real repository, whose journal the test writes itself: nothing trains here. What comes
next, and what is read, is tested in test_night.py.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest
from conftest import HEADER, ROOT, replace
from filelock import FileLock
from test_night import DROP, IDEA, adds, back, train

import ledger
from harness import journal as harness_journal
from night import checks
from night.rows import append_rows
from night.rules import OVER

# --------------------------------------
# Small things


def test_sparkline():
    assert ledger.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert ledger.sparkline([2, 2]) == "▁▁" and ledger.sparkline([1]) == "▁"
    assert len(ledger.sparkline(list(range(500)))) == 60 and ledger.sparkline(list(range(500)))[-1] == "█"


def test_until():
    here = datetime.now()
    for text in ("never", "1", "40"):
        assert ledger.parse_until(text) == text
    soon = here + timedelta(hours=2)
    for text in (f"{soon:%H:%M}", f"{soon:%Y-%m-%dT%H:%M}", soon.astimezone().isoformat(timespec="minutes")):
        until = datetime.fromisoformat(ledger.parse_until(text))
        assert until == soon.astimezone().replace(second=0, microsecond=0) and until.utcoffset() == timedelta(0)
    before = here - timedelta(minutes=1)
    assert datetime.fromisoformat(ledger.parse_until(f"{before:%H:%M}")) > here.astimezone() + timedelta(hours=22)


@pytest.mark.parametrize("text", ["", "0", "-1", "25:00", "7 o'clock", "2020-01-01", "forty", "\u0664"])
def test_until_refuses(text):
    with pytest.raises(SystemExit, match="--until"):
        ledger.parse_until(text)


# --------------------------------------
# In a real repository

TRAIN = """# COMPILE = True
import json, os, subprocess, sys, time
sys.path.insert(0, os.getcwd())
from harness.journal import find_home, now
SCORE = 1.0
seed = int(os.environ["AUTORESEARCH_SEED"])
commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
print(f"commit {commit[:7]}, seed {seed}, local")
score = SCORE + 0.001 * (seed % 3)
run = dict(time=now(), commit=commit, seed=seed, val_bpb=score, dirty=False, steps=9, peak_memory_mb=2048.0)
with open(find_home() / "local" / "journal.jsonl", "a") as file:
    file.write(json.dumps(run) + "\\n")
print(f"---\\nval_bpb: {score}")
"""


class Clone:
    """A repository, its home with a benchmark, and the commands of ledger.py in this process."""

    def __init__(self, folder, home, capsys):
        self.folder, self.home, self.capsys = folder, home, capsys
        self.journal = home / "local" / "journal.jsonl"

    def git(self, *words):
        return subprocess.run(
            ["git", *words], cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, message="an idea"):
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.head()

    def head(self):
        return self.git("rev-parse", "--short=7", "HEAD")

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def run(self, score, seed=1, **changes):
        run = {"commit": self.git("rev-parse", "HEAD"), "dirty": False, "seed": seed, "steps": 10, "val_bpb": score}
        run = {"time": harness_journal.now(), "same_harness": True, "peak_memory_mb": 2048.0} | run | changes
        with open(self.journal, "a") as file:
            file.write(json.dumps({key: value for key, value in run.items() if value != "none"}) + "\n")

    def log(self, text):
        time.sleep(0.02)  # so that it is newer, however coarse the clock
        self.write("run.log", text)

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

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()[1:]]

    def baseline(self):
        """A night that has started, with its baseline. Returns its commit."""
        self.call(ledger.start, "test")
        for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005)):
            self.run(score, seed)
        self.add()
        return self.head()


@pytest.fixture
def clone(tmp_path, monkeypatch, capsys):
    folder, home = tmp_path / "clone", tmp_path / "home"
    (home / "local").mkdir(parents=True)
    (home / "current").write_text("local")
    (home / "local" / "benchmark.json").write_text('{"id": "local", "settings": {"time_budget": 3}}')
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    config = "[user]\nname = Agent\nemail = agent@example.org\n[init]\ndefaultBranch = main\n"
    (tmp_path / "gitconfig").write_text(config)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    monkeypatch.setenv("CXX", sys.executable)  # some program: a compiler is not what is tested
    monkeypatch.setattr(harness_journal, "ROOT", folder)
    clone = Clone(folder, home, capsys)
    folder.mkdir()
    clone.write("train.py", TRAIN)
    shutil.copy(ROOT / ".gitignore", folder)
    clone.git("init", "-q")
    clone.git("add", ".")
    clone.commit("start")
    return clone


def hook(name, body):
    def spoil(clone, monkeypatch):
        path = clone.folder / ".git" / "hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return spoil


def no_identity(clone, monkeypatch):
    (clone.folder.parent / "gitconfig").write_text("[user]\nuseConfigOnly = true\n")


def bare_folder(clone, monkeypatch):
    shutil.rmtree(clone.folder / ".git")


def inside_another(clone, monkeypatch):
    bare_folder(clone, monkeypatch)
    subprocess.run(["git", "init", "-q"], cwd=clone.folder.parent, check=True)


def no_commit(clone, monkeypatch):
    bare_folder(clone, monkeypatch)
    clone.git("init", "-q")


def no_compiler(clone, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)


def taken(clone, monkeypatch):
    monkeypatch.setattr(checks, "LOCK_SECONDS", 0)
    monkeypatch.setattr(checks, "running_training", lambda: "77")
    lock = FileLock(clone.home / "night.lock")
    lock.acquire()
    monkeypatch.setattr(clone, "lock", lock, raising=False)


PROBLEMS = {
    "no git": (lambda clone, monkeypatch: monkeypatch.setenv("PATH", "/nowhere"), "git is missing: install it"),
    "GIT_DIR": (lambda clone, monkeypatch: monkeypatch.setenv("GIT_DIR", "/x"), "unset GIT_DIR"),
    "another owner": (
        lambda clone, monkeypatch: monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1"),
        "git config --global --add safe.directory",
    ),
    "no repository": (bare_folder, "git clone it, or git init"),
    "a folder of another repository": (inside_another, "move it out of there"),
    "no commit": (no_commit, "git add -A"),
    "no identity": (no_identity, "git config user.name me"),
    "index.lock": (lambda clone, monkeypatch: clone.write(".git/index.lock", ""), "rm '.git/index.lock'"),
    "changes": (lambda clone, monkeypatch: clone.write("train.py", "x"), "train.py first: git stash"),
    "a stray file": (lambda clone, monkeypatch: clone.write("new.py", "x"), "new.py, so no run"),
    "tracked results": (lambda clone, monkeypatch: track_results(clone), "git rm --cached results.tsv"),
    "branch autoresearch": (
        lambda clone, monkeypatch: clone.git("branch", "autoresearch"),
        "git branch -m autoresearch",
    ),
    "branch of a night": (
        lambda clone, monkeypatch: clone.git("branch", "autoresearch/test"),
        "git checkout autoresearch/test",
    ),
    "no benchmark": (lambda clone, monkeypatch: (clone.home / "current").unlink(), "uv run prepare.py"),
    "a home that is a file": (
        lambda clone, monkeypatch: monkeypatch.setenv("AUTORESEARCH_HOME", str(clone.folder / "train.py")),
        "set AUTORESEARCH_HOME to a folder on a local disk",
    ),
    "no such home": (
        lambda clone, monkeypatch: monkeypatch.setenv("AUTORESEARCH_HOME", "~nobody-of-this-name/x"),
        "set AUTORESEARCH_HOME",
    ),
    "another night's lock": (taken, "night.lock is taken"),
    "a training": (taken, "wait for it, or kill 77"),
    "no compiler": (no_compiler, "install g++"),
    "a hook that refuses": (hook("pre-commit", "echo not on my watch; exit 1"), "git config core.hooksPath /dev/null"),
    "a hook that hangs": (hook("commit-msg", "sleep 60"), "no answer for 1 s"),
    "a hook of checkout": (hook("post-checkout", "exit 1"), "core.hooksPath"),
    "signing": (
        lambda clone, monkeypatch: [
            clone.git("config", "commit.gpgsign", "true"),
            clone.git("config", "gpg.program", "false"),
        ],
        "git config commit.gpgsign false",
    ),
}


def track_results(clone):
    clone.write("results.tsv", HEADER)
    clone.git("add", "-f", "results.tsv")
    clone.commit()


@pytest.mark.parametrize("name", PROBLEMS)
def test_start_refuses_and_leaves_all_as_it_was(name, clone, monkeypatch):
    monkeypatch.setattr(checks, "COMMIT_SECONDS", 1)
    spoil, fix = PROBLEMS[name]
    spoil(clone, monkeypatch)
    files = {path: path.read_bytes() for path in clone.folder.glob("*") if path.is_file()}
    head = (clone.folder / ".git/HEAD").read_text() if (clone.folder / ".git").exists() else ""
    with pytest.raises(SystemExit) as refused:
        ledger.start(clone.folder, "test", "never")
    (line,) = [line for line in str(refused.value).splitlines() if fix in line]
    assert {path: path.read_bytes() for path in clone.folder.glob("*") if path.is_file()} == files
    if head:
        assert (clone.folder / ".git/HEAD").read_text() == head
        branches = [path.name for path in (clone.folder / ".git/refs/heads").rglob("test")]
        assert branches == ["test"] * (name == "branch of a night")
        locks = [path.name for path in (clone.folder / ".git").glob("*.lock")]
        assert locks == ["index.lock"] * (name == "index.lock")


def test_start_says_all_problems_at_once(clone, monkeypatch):
    for name in ("no identity", "index.lock", "a stray file", "branch autoresearch", "no benchmark", "no compiler"):
        PROBLEMS[name][0](clone, monkeypatch)
    lines = "\n".join(checks.find_problems(clone.folder, "a b"))
    assert len(lines.splitlines()) == 7 and "'a b' is no name" in lines


def test_without_compile_no_compiler_is_needed(clone, monkeypatch):
    no_compiler(clone, monkeypatch)
    clone.write("train.py", "COMPILE = False\n")
    assert checks.compiler_problems(clone.folder) == []


def test_start_moves_an_old_ledger_aside_over_nothing(clone):
    for name in ("results.tsv", "results-before-test.tsv", "run.log"):
        clone.write(name, name)
    assert "is results-before-test2.tsv now" in clone.call(ledger.start, "test", "40")
    assert (clone.folder / "results-before-test2.tsv").read_text() == "results.tsv"
    assert (clone.folder / "results-before-test.tsv").read_text() == "results-before-test.tsv"
    assert (clone.folder / "results.tsv").read_text() == HEADER and not (clone.folder / "run.log").exists()
    state = json.loads((clone.folder / "night.json").read_text())
    assert state["until"] == "40" and state["commit"] == clone.git("rev-parse", "HEAD")
    assert clone.git("log", "-1", "--format=%s") == "autoresearch/test: start" and clone.next() == train(1)


def test_start_from_a_detached_head_goes_back_to_it(clone, monkeypatch):
    hook("pre-commit", "exit 1")(clone, monkeypatch)
    clone.git("checkout", "-q", "--detach")
    head = clone.git("rev-parse", "HEAD")
    with pytest.raises(SystemExit):
        ledger.start(clone.folder, "test")
    assert (clone.folder / ".git/HEAD").read_text().strip() == head and clone.git("status", "--porcelain") == ""


def test_a_linked_worktree(clone, monkeypatch):
    linked = clone.folder.parent / "linked"
    clone.git("worktree", "add", "-q", "-b", "other", str(linked))
    clone.folder = linked
    monkeypatch.setattr(harness_journal, "ROOT", linked)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    clone.baseline()
    clone.write("run.log", "SyntaxError: no\n")
    assert clone.next() == adds("baseline")
    assert not clone.call(ledger.wait_while_open) and "waiting 30 s" in clone.call(ledger.wait_while_open)


# --------------------------------------
# Status and add


def test_add_writes_rows_by_the_rule(clone):
    start = clone.baseline()
    assert [row[1:] for row in clone.rows()] == [
        [f"{score:.6f}", "2.0", "keep", f"baseline, seed {seed}"] for seed, score in ((1, 0.995), (2, 1), (3, 1.005))
    ]
    text = clone.status()
    assert "noise floor: 0.010000, pooled" in text and f"to beat:     1.000000, {start}\n" in text
    idea = clone.commit()
    clone.run(0.98)
    assert "  0.980000 seed 1, 10 steps, gain +0.020000, no row yet\n" in clone.status()
    assert f"added: {idea} 0.980000 discard, wider, seed 1\n" in clone.add("wider") and clone.next() == train(2)
    text = clone.status()
    assert clone.status() == text and "no row" not in text, "looking again counts nothing twice"
    clone.run(0.985, 2)
    assert f"added: {idea} 0.985000 keep, wider, seed 2\n" in clone.add("wider")
    text = clone.status()
    assert f"to beat:     0.982500, {idea}\n" in text and "1.0000 to 0.9825\n" in text


REFUSED = {
    "nothing to add": (lambda clone: None, None, "nothing to add"),
    "uncommitted changes": (lambda clone: clone.write("train.py", "x"), None, "uncommitted changes"),
    "conflict markers": (lambda clone: clone.write("train.py", "<<<<<<< HEAD\n"), None, "conflict markers"),
    "cut off": (lambda clone: clone.log(f"commit {clone.head()}, seed 1, x\nstep 1\n"), None, "nothing to add"),
    "a log of another commit": (lambda clone: clone.log("commit abcdef0, seed 1, x\nError\n"), None, "nothing to add"),
    "files that differ": (lambda clone: clone.run(0.9, dirty=True), None, "nothing to add"),
    "keep after one run": (lambda clone: clone.run(0.99), "keep", "second run first: AUTORESEARCH_SEED=2"),
    "keep of something worse": (lambda clone: [clone.run(1.1), clone.run(1.1, 2)], "keep", "the gain is -0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_add_refuses(name, clone):
    clone.baseline()
    clone.commit()
    spoil, status, words = REFUSED[name]
    spoil(clone)
    rows = clone.rows()
    with pytest.raises(SystemExit, match=words):
        clone.add("wider", status)
    assert clone.rows() == rows


def test_add_keeps_what_is_simpler_and_not_worse(clone):
    clone.baseline()
    clone.commit()
    clone.run(0.999)
    clone.add("simpler")
    assert clone.next().startswith("git update-ref")
    clone.run(0.9999, 2)
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
    log_text, status, words = CRASHES[name]
    clone.log(log_text.format(head=head))
    clone.add("wider", status)
    assert clone.rows()[-1] == [head, "0.000000", "0.0", "crash", words]
    assert clone.next() == back(head, start)
    subprocess.run(clone.next(), shell=True, cwd=clone.folder, check=True)
    assert clone.next() == IDEA and clone.head() == start, "an old log is of no other commit"


def test_add_of_a_wave(clone):
    """Jobs become rows: the best of two winners is kept, the branch moves there, and what cannot be read is said."""
    start = clone.baseline()
    tried = {}
    for name in ("good", "better", "slip"):
        tried[name] = clone.commit(f"{name}; expect +0.01")
        clone.git("update-ref", f"refs/tries/{tried[name]}", "HEAD")
        clone.git("reset", "-q", "--keep", start)
    results = clone.folder / "wave" / "results"
    results.mkdir(parents=True)
    for name, seed, state, score in (
        *(("good", seed, "scored", 0.98) for seed in (1, 2, 3)),
        *(("better", seed, "scored", 0.97) for seed in (1, 2, 3)),
        ("slip", 1, "crash", None),
    ):
        commit = clone.git("rev-parse", tried[name])
        job = {"job": f"test-{tried[name]}-{seed}-1", "commit": commit, "seed": seed, "attempt": 1, "state": state}
        job |= {"benchmark": "local", "dirty": False, "steps": 10, "peak_memory_mb": 2048.0, "time": f"{seed}"}
        job |= {"val_bpb": score + 0.0001 * seed} if score else {"reason": "SyntaxError: no"}
        (results / f"{job['job']}.json").write_text(json.dumps(job))
    (results / "torn.json").write_text("{")
    assert clone.next() == "uv run ledger.py add --wave"
    added = clone.call(ledger.add_wave)
    assert "torn.json of the wave cannot be read" in added
    words = {tried["good"]: "discard", tried["better"]: "keep", tried["slip"]: "crash"}
    rows = {(row[0], row[3], row[4].rpartition(", seed ")[2]) for row in clone.rows()[3:]}
    assert rows == {(commit, words[commit], str(seed)) for commit in tuple(words)[:2] for seed in (1, 2, 3)} | {
        (tried["slip"], "crash", "1")
    }
    assert "slip; expect +0.01: SyntaxError: no, seed 1" in added
    assert clone.next() == f"git reset -q --keep {tried['better']}"
    with pytest.raises(SystemExit, match="nothing to add: every job"):
        ledger.add_wave(clone.folder)


def test_a_log_of_a_commit_that_was_amended_is_not_of_the_new_one(clone):
    clone.baseline()
    clone.commit()
    clone.log("SyntaxError: no\n")
    time.sleep(0.02)
    clone.git("commit", "-q", "--amend", "--allow-empty", "-m", "fixed")
    assert clone.next() == train(1)


def test_a_score_and_then_a_crash_before_add(clone):
    clone.baseline()
    head = clone.commit()
    clone.run(0.98)
    clone.log(f"commit {head}, seed 2, x\nMemoryError\n")
    clone.add("wider")
    assert [row[3:] for row in clone.rows()[-2:]] == [
        ["discard", "wider, seed 1"],
        ["crash", "wider: MemoryError, seed 2"],
    ]


def test_results_lost_are_rebuilt(clone):
    start = clone.baseline()
    kept = clone.commit("deeper; expect +0.01")
    clone.run(0.98)
    clone.add("deeper")
    clone.run(0.98, 2)
    clone.add("deeper")
    tried = clone.commit("wider")
    clone.run(1.2)
    clone.run(1.3, 2, slow_steps_percent=50)
    clone.add("wider")
    clone.git("reset", "-q", "--keep", kept)  # nothing but git's log of HEAD knows it now
    clone.commit("not judged")
    clone.run(0.97)
    (clone.folder / "results.tsv").unlink()
    assert "results.tsv was lost, and is rebuilt" in clone.status()
    assert [(row[0], row[3], row[4]) for row in clone.rows()] == [
        *((start, "keep", f"baseline, seed {seed}") for seed in (1, 2, 3)),
        *((kept, "keep", f"deeper; expect +0.01, seed {seed}") for seed in (1, 2)),
        (tried, "discard", "wider, seed 1"),
    ]
    assert clone.next() == "uv run ledger.py add 'not judged'" and "lost" not in clone.status()


@pytest.mark.parametrize("spoil", [None, "", "[]", "{}", '{"commit": "ffffffff", "tag": "x", "until": "1"}', "\xff"])
@pytest.mark.parametrize("detached", [False, True])
def test_night_json_lost_is_recovered(spoil, detached, clone):
    clone.baseline()
    clone.commit()
    clone.git("checkout", "-q", *["--detach"] * detached)
    (clone.folder / "night.json").unlink()
    if spoil is not None:
        (clone.folder / "night.json").write_text(spoil, encoding="latin-1")
    text = clone.status()
    assert "night:       test, 3 rows, until never" in text and "warning: night.json is lost" in text


@pytest.mark.parametrize(
    ("until", "over"),
    [
        ("2020-01-01T00:00", True),
        ("3000-01-01T00:00:00Z", False),
        (3, True),
        (4, False),
        ("soon", False),
        (None, False),
    ],
)
def test_until_edited_by_hand(until, over, clone):
    clone.baseline()
    state = json.loads((clone.folder / "night.json").read_text())
    clone.write("night.json", json.dumps(state | {"until": until}))
    assert clone.next() == (OVER if over else IDEA)


def test_runs_of_another_night_are_not_taken(clone):
    clone.run(0.5)
    start = clone.baseline()
    clone.git("checkout", "-q", "main")
    clone.run(0.6)
    clone.commit()
    clone.run(0.7)
    assert clone.next() == "git checkout -q autoresearch/test"
    clone.git("checkout", "-q", "autoresearch/test")
    assert clone.next() == IDEA and clone.head() == start


OLD = [
    {"time": "none"},
    {"steps": "none"},
    {"seed": "none"},
    {"dirty": "none"},
    {"peak_memory_mb": None},
    {"steps": None},
]


@pytest.mark.parametrize("changes", [*OLD, {"slow_steps_percent": None}, {"untimed_rows": None}], ids=str)
def test_lines_of_older_journals_are_runs(changes, clone):
    clone.call(ledger.start, "test")
    clone.run(1.0, **changes)
    assert clone.next() == adds("baseline")
    clone.add()
    assert len(clone.rows()) == 1 and clone.next().startswith("AUTORESEARCH_SEED=")


@pytest.mark.parametrize(
    "line", ['{"val_bpb": 0.9}', '{"val_bpb": 0.9, "comm', "[1]", '{"commit": null, "val_bpb": 1}']
)
def test_lines_that_are_no_runs_are_skipped(line, clone):
    clone.call(ledger.start, "test")
    clone.journal.write_text(line + "\n")
    clone.run(1.0, val_bpb=math.nan)
    clone.run(1.0)
    assert "rows of" not in clone.status() and clone.add().count("added") == 1


def test_a_keep_that_git_does_not_know_is_none(clone):
    start = clone.baseline()
    append_rows(clone.folder / "results.tsv", [("abcdef0", "0.1", "1.0", "keep", "a dream")])
    text = clone.status()
    assert f"to beat:     1.000000, {start}" in text and "results.tsv:5: abcdef0 is no commit of this night" in text


def test_train_py_gone(clone):
    clone.baseline()
    (clone.folder / "train.py").unlink()
    assert clone.next().startswith("# a new idea is in train.py")


def test_a_conflict_of_cherry_pick(clone):
    clone.baseline()
    clone.write("train.py", TRAIN.replace("SCORE = 1.0", "SCORE = 2.0"))
    clone.git("commit", "-qam", "two")
    tried = clone.head()
    clone.git("reset", "-q", "--keep", "HEAD^")
    clone.write("train.py", TRAIN.replace("SCORE = 1.0", "SCORE = 3.0"))
    clone.git("commit", "-qam", "three")
    subprocess.run(["git", "cherry-pick", "-n", tried], cwd=clone.folder, capture_output=True)
    assert clone.next() == DROP
    clone.git("commit", "-q", "-m", "four", "--", "train.py")
    assert clone.next() == "git reset -q --keep HEAD^"


# --------------------------------------
# Open


def test_open_waits_longer_each_time_and_starts_again_after_a_row(clone, monkeypatch):
    waits = []
    clone.baseline()
    monkeypatch.setattr(ledger.time, "sleep", waits.append)
    for _ in range(8):
        clone.call(ledger.wait_while_open)
    assert waits == [30, 60, 120, 240, 480, 900, 900]
    clone.commit()
    clone.run(0.9)
    clone.add("wider")
    waits.clear()
    clone.call(ledger.wait_while_open)
    clone.call(ledger.wait_while_open)
    assert waits == [30] and clone.git("status", "--porcelain") == ""


def test_open_ends_with_the_night(clone):
    clone.call(ledger.start, "test", "3")
    assert clone.call(ledger.wait_while_open) == ""
    for seed in (1, 2, 3):
        clone.run(1.0, seed)
    clone.add()
    with pytest.raises(SystemExit) as over:
        ledger.wait_while_open(clone.folder)
    assert over.value.code == 1


BAD = {
    "no benchmark": lambda clone: (clone.home / "current").unlink(),
    "no night": lambda clone: [clone.git("checkout", "-q", "main"), (clone.folder / "night.json").unlink()],
    "no repository": lambda clone: shutil.rmtree(clone.folder / ".git"),
    "a ledger that is a folder": lambda clone: [
        (clone.folder / "results.tsv").unlink(),
        (clone.folder / "results.tsv").mkdir(),
    ],
    "a ledger of another tool": lambda clone: clone.write("results.tsv", "step\tloss\n1\t2\n"),
}


@pytest.mark.parametrize("name", BAD)
def test_open_goes_on_where_the_books_are_bad(name, clone, monkeypatch):
    waits = []
    clone.baseline()
    BAD[name](clone)
    monkeypatch.setattr(ledger.time, "sleep", waits.append)
    clone.call(ledger.wait_while_open)
    clone.call(ledger.wait_while_open)
    assert waits[-1] == 30


# --------------------------------------
# As commands


@pytest.fixture
def shell(clone, environment):
    """Runs a line as it stands, in the clone with the product in it, where `uv` is a stand-in."""
    shutil.copy(ROOT / "ledger.py", clone.folder)
    for name in ("harness", "night"):
        shutil.copytree(ROOT / name, clone.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    clone.git("add", ".")
    clone.commit("the product")

    def run(line, **more):
        options = dict(cwd=clone.folder, env=environment | os.environ | {"PATH": environment["PATH"]} | more)
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, errors="replace", **options)

    return run


EDITS = ["SCORE = 0.9", "SCORE = 0.9; x =", "SCORE = 0.95", "SCORE = 0.8"]


def test_every_next_line_runs_as_it_stands(clone, shell):
    assert shell("uv run ledger.py start test --until 9").returncode == 0
    edits, lines = list(EDITS), []
    while True:
        line = clone.next()
        if line.startswith("# a new idea"):
            replace(clone.folder / "train.py", ("^SCORE = .*", edits.pop(0)))
            line = f"git commit -q -m 'idea {len(edits)}; expect +0.1' -- train.py"
        if line == OVER:
            break
        lines.append(line)
        assert len(lines) < 60
        failed = shell(line).returncode != 0
        assert failed == ("train.py >" in line and "x =" in (clone.folder / "train.py").read_text()), line
    assert [row[3] for row in clone.rows()] == ["keep"] * 3 + ["discard", "keep", "crash", "discard"] + [
        "discard",
        "keep",
    ] + ["keep"] * 4
    assert sum("train.py >" in line for line in lines) == 13 == len(clone.rows())
    assert "the gain to report, on fresh seeds: +0.200000" in clone.status()
    assert shell("uv run ledger.py open").returncode == 1
    assert clone.git("branch", "--show-current") == "autoresearch/test" and clone.git("status", "--porcelain") == ""
    assert len(clone.git("for-each-ref", "refs/tries").splitlines()) == 2


def test_output_anywhere(clone, shell):
    assert shell("uv run ledger.py start test").returncode == 0
    for seed in (1, 2):
        clone.run(1.0, seed)
    assert shell("uv run ledger.py add '\u65e5 \u2028 \u00e9'").returncode == 0
    for code in ("cp1252", "ascii", "utf-8"):
        status = shell("uv run ledger.py", PYTHONIOENCODING=code)
        assert (status.returncode, status.stderr) == (0, "")
    for line in ("uv run ledger.py | head -1", "uv run ledger.py | true", "cd night && uv run ../ledger.py"):
        piped = shell(f"set -o pipefail; {line}")
        assert (piped.returncode, piped.stderr) == (0, ""), line


@pytest.mark.parametrize(
    "words",
    [
        "start",
        "start x --until",
        "start x --until soon",
        "add x --wave",
        "add x --maybe",
        "opem",
        "--status",
        "add x --keep --crash",
    ],
)
def test_a_wrong_line_is_answered_in_one(words, clone, shell):
    answer = shell(f"uv run ledger.py {words}")
    assert answer.returncode in (1, 2) and len(answer.stderr.splitlines()) == 1 and answer.stdout == ""


def test_a_second_of_many_rows(clone, shell):
    clone.baseline()
    rows = [(f"{number:07x}", "1.1", "1.0", "discard", f"idea {number}, seed 1") for number in range(300)]
    append_rows(clone.folder / "results.tsv", rows)
    begun = time.monotonic()
    assert shell("uv run ledger.py").returncode == 0
    print(f"the status took {time.monotonic() - begun:.2f} s")

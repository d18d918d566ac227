"""
Checks ledger.py in a real repository: what `start` refuses, that no record is lost or misread, rows and decisions,
nights side by side, and the loop's end. Nothing trains.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from conftest import Agent, add_benchmark, new_repository, refused
from filelock import FileLock

import ledger
from harness import common
from night import checks
from night.steps import NEW_IDEA, RUN

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def test_sparkline():
    assert ledger.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█" and ledger.sparkline([2, 2]) == "▁▁"


SOON, BEFORE = [(datetime.now().astimezone() + timedelta(hours=h)).replace(second=0, microsecond=0) for h in (2, -2)]
TIMES = {
    "a time of day": (f"{SOON:%H:%M}", SOON),
    "a date": (f"{SOON:%Y-%m-%dT%H:%M}", SOON),
    "with its zone": (SOON.isoformat(timespec="minutes"), SOON),
    "tomorrow": (f"{BEFORE:%H:%M}", BEFORE + timedelta(days=1)),
}
PAST_OR_WRONG = ["", "0", "9" * 10, "-1", "25:00", "7 o'clock", "2020-01-01", "0001-01-01", "forty", "\u0664"]


@pytest.mark.parametrize("name", TIMES)
def test_until_is_a_time_in_utc_a_number_or_never(name):
    text, expected = TIMES[name]
    until = datetime.fromisoformat(ledger.parse_until(text, "until "))
    assert until == expected and until.utcoffset() == timedelta(0)
    assert [ledger.parse_until(text, "until ") for text in ("never", "1", "40")] == ["never", "1", "40"]


@pytest.mark.parametrize("text", PAST_OR_WRONG)
def test_until_refuses(text):
    assert refused(ledger.parse_until, text, "--until ").startswith(f"--until {text}: ")


# --------------------------------------
# In a real repository


class Clone(Agent):
    """A repository with a benchmark, and the commands of ledger.py in this process."""

    def __init__(self, folder, patch, capsys):
        super().__init__(folder, None)
        self.home, self.patch, self.capsys, self.numbers = folder.parent / "home", patch, capsys, itertools.count()
        self.enter(folder, "test")

    def enter(self, folder, tag):
        """Go to a night in a folder."""
        self.patch.setattr(common, "ROOT", folder)
        self.folder, self.view = folder, folder / "results.tsv"
        self.place = (folder / self.git("rev-parse", "--git-common-dir").strip() / "autoresearch" / tag).resolve()
        self.record = self.place / "record.jsonl"

    def say(self, *arguments):
        """What a command prints."""
        self.capsys.readouterr()
        ledger.main(arguments)
        return self.capsys.readouterr().out

    def json(self):
        return json.loads(self.say("--json"))

    def next(self):
        return self.json()["next"]["command"]

    def decisions(self):
        return [(item["commit"], item["decision"], item["by"]) for item in self.json()["decisions"]]

    def whole(self, name="HEAD"):
        return self.git("rev-parse", name).strip()

    def commit(self, *scores, message="wider"):
        """Commit an idea and record its runs: scores, None for a crash."""
        self.git("commit", "-q", "--allow-empty", "-m", message)
        for seed, score in enumerate(scores, 1):
            self.ran(score, seed)
        return self.whole()

    def write(self, *lines):
        with open(self.record, "a") as file:
            file.write("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))

    def ran(self, score=None, seed=1, role="idea", **changes):
        """Record a run of HEAD. Returns its line."""
        line = {"kind": "run", "time": "", "run": f"x{next(self.numbers)}", "commit": self.whole(), "role": role}
        line |= {"seed": seed, "state": "scored" if score else "crash", "val_bpb": score, "memory_gb": 2.0}
        line |= {"description": self.git("log", "-1", "--format=%s").strip()} | changes
        self.write(line)
        return line

    def begin(self, tag="test", until="never"):
        """A night with its baseline: the mean is 1, and each step must gain more than 0.0025. Returns its commit."""
        self.say("start", tag, "--until", until)
        self.enter(self.folder, tag)
        for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005)):
            self.ran(score, seed, "baseline", description="baseline")
        return self.whole()


@pytest.fixture
def clone(tmp_path, environment, monkeypatch, capsys):
    add_benchmark(tmp_path / "home", "local")
    environment |= {"AUTORESEARCH_HOME": str(tmp_path / "home"), "CXX": sys.executable}  # any program: none compiles
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checks, "find_device", lambda: ("cpu test", []))  # it imports torch
    return Clone(new_repository(tmp_path / "clone", environment), monkeypatch, capsys)


@pytest.fixture
def night(clone):
    clone.start = clone.begin()
    clone.say()
    return clone


def contents(*folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}


# --------------------------------------
# Start


def hook(name, line):
    return f"mkdir -p .git/hooks; printf '#!/bin/sh\\n{line}\\n' > .git/hooks/{name}; chmod +x .git/hooks/{name}"


PROBLEMS = {  # what is wrong (a command, or a variable), and the fix
    "no repository": ("rm -rf .git", "git clone it, or git init"),
    "a folder of another repository": ("rm -rf .git; git init -q ..", "move it out of there"),
    "no commit": ("rm -rf .git; git init -q", "git add -A"),
    "no identity": ("printf '[user]\\nuseConfigOnly = true\\n' > ../gitconfig", "git config user.name me"),
    "index.lock": ("touch .git/index.lock", "rm '.git/index.lock'"),
    "changes": ("echo >> train.py", "train.py: git stash"),
    "tracked results": ("touch results.tsv; git add -f .; git commit -qm x", "git rm --cached results.tsv"),
    "branch autoresearch": ("git branch autoresearch", "git branch -m autoresearch"),
    "branch of the night": ("git branch autoresearch/test", "git checkout autoresearch/test"),
    "its record": ("mkdir -p .git/autoresearch/test; touch .git/autoresearch/test/record.jsonl", "take another tag"),
    "no benchmark": ("rm ../home/current", "uv run prepare.py"),
    "a benchmark that is gone": ("rm -r ../home/local", "uv run prepare.py"),
    "a home that is a file": ("rm -r ../home; touch ../home", "set AUTORESEARCH_HOME to a folder on a local disk"),
    "a hook that refuses": (hook("pre-commit", "exit 1"), "git config core.hooksPath /dev/null"),
    "a hook of edits": (
        hook("pre-commit", "git diff --cached --quiet || { echo no; exit 1; }"),
        "commit: no); to do without",
    ),
    "the same, detached": ("git checkout -q --detach;" + hook("pre-commit", "exit 1"), "core.hooksPath"),
    "a hook that hangs": (hook("commit-msg", "sleep 60"), "no answer for 2 s"),
    "a hook of checkout": (hook("post-checkout", "exit 1"), "core.hooksPath"),
    "signing": ("git config commit.gpgsign true; git config gpg.program false", "git config commit.gpgsign false"),
    "no compiler": (("CXX", "none"), "or commit COMPILE = False in train.py"),
    "no git": (("PATH", "/nowhere"), "git is missing: install it"),
    "GIT_DIR": (("GIT_DIR", "/x"), "unset GIT_DIR"),
    "another owner": (("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1"), "git config --global --add safe.directory"),
    "no such home": (("AUTORESEARCH_HOME", "~nobody-of-this-name/x"), "set AUTORESEARCH_HOME"),
}


def spoil(clone, problem, monkeypatch):
    if isinstance(problem, tuple):
        monkeypatch.setenv(*problem)
    else:
        assert clone.bash(problem) == ("", 0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_start_refuses_and_leaves_all_as_it_was(name, clone, monkeypatch):
    problem, fix = PROBLEMS[name]
    spoil(clone, problem, monkeypatch)
    if "hangs" in name:
        monkeypatch.setattr(common, "GIT_SECONDS", 2)

    def look():
        patterns = ("*", ".git/HEAD", ".git/*.lock", ".git/refs/heads/**/*", ".git/autoresearch/**/*")
        paths = [path for pattern in patterns for path in clone.folder.glob(pattern)]
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = look()
    with pytest.raises(SystemExit) as refusal:
        ledger.start("test", "never")
    assert len([line for line in str(refusal.value).splitlines() if fix in line]) == 1, refusal.value
    assert look() == before


WITH_A_REASON = 'prefix_rule(pattern = ["git", "reset"], decision = "forbidden", justification = "a" + "b")'
CLIENTS = {  # file of the user's, what it has, and what would be refused
    "deny": ("user", {"deny": ["Bash(git reset *)"]}, "git reset -q --keep HEAD"),
    "ask": ("user", {"ask": ["Bash(git commit:*)"]}, "git commit -q -m 'an idea' -- train.py"),
    "ask for all of uv": ("user", {"ask": ["Bash(uv *)"]}, "uv run ledger.py"),
    "ask for any command": ("local", {"ask": ["Bash"]}, "uv run ledger.py"),
    "ask for edits": ("user", {"ask": ["Edit"]}, "the edit of train.py"),
    "edits of Python": ("local", {"deny": ["Edit(**/*.py)"]}, "the edit of train.py"),
    "edits of Python here": ("user", {"deny": ["Edit(./**/*.py)"]}, "the edit of train.py"),
    "plan": ("local", {"defaultMode": "plan"}, "Claude Code edits nothing"),
    "no JSON": ("user", None, "can't be read, so Claude Code may refuse anything"),
    "prompt": ("rules", 'prefix_rule(pattern = ["git", ["commit", "push"]], decision = "prompt")', "git commit -q -m"),
    "forbidden": ("rules", 'prefix_rule(pattern = ["uv", "run"], decision = "forbidden")', "uv run ledger.py"),
    "with a reason": ("rules", WITH_A_REASON, "git reset -q --keep HEAD"),
    "no rules": ("rules", "prefix_rule(", "can't be read, so Codex may refuse anything"),
    # of no concern
    "plan of the user": ("user", {"defaultMode": "plan"}, ""),
    "other commands": ("user", {"deny": ["Bash(git push *)", "Bash(rm:*)", "WebFetch", "Edit(/src/**)"]}, ""),
    "allowed": ("rules", 'prefix_rule(pattern = ["git"], decision = "allow")', ""),
    "other rules": ("rules", 'prefix_rule(pattern = ["git", "push"], decision = "forbidden")', ""),
}


def write_settings(case, folder, home):
    """One of CLIENTS, in the files of a user with this home."""
    place, content, _ = case
    paths = {"user": home / ".claude/settings.json", "local": folder / ".claude/settings.local.json"}
    path = paths.get(place, home / ".codex/rules/default.rules")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if place == "rules" else content and json.dumps({"permissions": content}) or "{")


@pytest.mark.parametrize("name", CLIENTS)
def test_start_names_the_rules_of_clients(name, clone, tmp_path, monkeypatch):
    """The real clients agree: tests/test_clients.py."""
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / ".claude"))
    monkeypatch.setenv("CODEX_HOME", str(tmp_path / ".codex"))
    write_settings(CLIENTS[name], clone.folder, tmp_path)
    printed = clone.say("start", "test", "--until", "never")
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(CLIENTS[name][2]) and all(CLIENTS[name][2] in line for line in warnings)


def test_start_says_all_problems_at_once(clone, monkeypatch):
    for name in ("no identity", "index.lock", "changes", "branch autoresearch", "no benchmark", "no compiler"):
        spoil(clone, PROBLEMS[name][0], monkeypatch)
    monkeypatch.setattr(checks, "LOCK_SECONDS", 0)
    with FileLock(clone.home / "night.lock"):
        problems, _ = checks.find_problems("a b")
    assert len(problems) == 8 and "'a b' can't name a branch" in "\n".join(problems)
    (clone.folder / "train.py").write_text("COMPILE = False\n")
    assert checks.compiler_problems() == []


def test_a_hook_that_hangs_is_ended(clone):
    os.mkfifo(clone.home / "pipe")
    reader = os.open(clone.home / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    clone.bash(hook("commit-msg", "exec sleep 60 > ../home/pipe"))
    assert "no answer for 1 s" in common.git("commit", "--allow-empty", "-m", "x", seconds=1).complaint
    assert os.read(reader, 1) == b"", "which raises while the hook holds the other end"
    os.close(reader)


def test_start_moves_an_old_ledger_aside_over_nothing_and_minds_no_stray_file(clone):
    for name in ("results.tsv", "results-before-test.tsv", "ideas.md", "stray.py"):
        (clone.folder / name).write_text(name)
    said = clone.say("start", "test", "--until", "40")
    assert "is results-before-test2.tsv now" in said and said.endswith(f"\nnext: {RUN}\n")
    assert re.search(r"autoresearch/test, from \w+ \(start\), until 40 rows\nbenchmark local, 3 s a run, on cpu", said)
    kept = [(clone.folder / name).read_text() for name in ("results-before-test.tsv", "ideas.md", "stray.py")]
    assert kept == ["results-before-test.tsv", "ideas.md", "stray.py"] and clone.view.read_text() == HEADER
    assert (clone.folder / "results-before-test2.tsv").read_text() == "results.tsv"


# --------------------------------------
# The words of the first commit, and where no night is

TRAILER = hook("commit-msg", 'printf "\\\\nChange-Id: 1\\\\n" >> "$1"')


@pytest.mark.parametrize("line", ["true", TRAILER], ids=["plain", "a hook that adds a trailer"])
def test_a_lost_record_is_begun_anew_from_the_first_commit(line, clone):
    clone.bash(line)
    clone.say("start", "test", "--until", "40")
    subject, words = clone.git("log", "-1", "--format=%B").strip().split("\n\n")[:2]
    first = json.loads(words)
    expected = {"tag": "test", "until": "40", "benchmark": "local", "device": "cpu test"}
    assert subject == "autoresearch/test: start" and first == {"kind": "start", "time": first["time"]} | expected
    before = clone.record.read_text()
    assert json.loads(before) == first | {"commit": clone.whole()}
    clone.commit(1.0)
    assert "night:       test, 1 row, until 40 rows\n" in clone.say()
    shutil.rmtree(clone.place)  # as in a `git clone`
    found = clone.json()
    assert (found["noise_floor"], found["to_beat"], found["runs"], found["next"]["command"]) == (None, None, [], RUN)
    assert clone.record.read_text() == before


@pytest.mark.parametrize("line", ["main", "--detach"])
def test_where_no_night_is_the_commands_name_those_there_are(line, clone):
    said = "no night on main; next: uv run ledger.py start <tag> --until <when>\n"
    assert clone.bash("uv run ledger.py open") == (said, 1)
    clone.begin("older")
    clone.git("checkout", "-q", "main")
    clone.begin()
    clone.git("checkout", "-q", line)
    before = contents(clone.folder, clone.home)
    for command in ([], ["--json"], ["run"], ["keep"], ["discard"], ["until", "now"]):
        said = refused(ledger.main, command)
        assert re.match(r"no night on (main|a detached HEAD); next: ", said)
        assert said.endswith("git checkout -q autoresearch/test, or autoresearch/older")
    assert clone.bash("PYTHONDONTWRITEBYTECODE=1 uv run ledger.py open") == (said + "\n", 0)
    assert contents(clone.folder, clone.home) == before


def test_checkout_goes_on_with_an_older_night(clone):
    clone.begin("older")
    clone.say()
    older = clone.view.read_bytes()
    clone.git("checkout", "-q", "main")
    clone.begin(until="50")
    clone.commit(1.1)
    assert clone.json()["until"] == "50" and clone.view.read_bytes() != older
    clone.git("checkout", "-q", "autoresearch/older")
    found = clone.json()
    assert (found["tag"], found["until"], len(found["runs"]), found["problems"]) == ("older", "never", 3, [])
    assert clone.view.read_bytes() == older


# --------------------------------------
# results.tsv


def test_rows(night):
    kept = night.commit(0.98, 0.97, 0.96)
    crashed = night.commit(None, message="worse")
    night.git("reset", "-q", "--keep", kept)
    night.say()
    night.ran(0.5, 4, "final")
    idea = night.commit(message="another, final")
    for state in ("disturbed", "elsewhere", "interrupted"):
        night.ran(0.9, state=state)
    night.ran(0.9, description="tab\there, line\nthere, final")
    found = night.json()
    assert night.view.read_text() == HEADER + "".join(
        f"{commit[:7]}\t{words}\n"
        for commit, words in [
            *((night.start, f"{score}\t2.0\tkeep\tbaseline, seed {seed}") for score, seed in BASELINE),
            *((kept, f"0.9{9 - seed}0000\t2.0\tkeep\twider, seed {seed}") for seed in (1, 2, 3)),
            (crashed, "0.000000\t0.0\tcrash\tworse, seed 1"),
            (kept, "0.500000\t2.0\tkeep\twider, final, seed 4"),
            (idea, "0.900000\t2.0\tdiscard\ttab here, line there, final, seed 1"),
        ]
    )
    assert found["next"]["training"] == {"role": "idea", "commit": idea, "seed": 2}
    assert found["to_beat"] == pytest.approx(0.97), "final runs select nothing"


BASELINE = [("0.995000", 1), ("1.000000", 2), ("1.005000", 3)]
VIEWS = {"lost": lambda path: path.unlink(), "of before": lambda path: path.write_text(HEADER), "whole": os.stat}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_comes_back_byte_for_byte(name, night):
    """One that an agent's checkpoint brought back is no edit, and one that is as it should be is left alone."""
    content, stat = night.view.read_bytes(), night.view.stat()
    VIEWS[name](night.view)
    assert night.json()["problems"] == [] and night.view.read_bytes() == content
    after = night.view.stat()
    assert ((after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)) == (name == "whole")


@pytest.mark.parametrize("is_link", [False, True], ids=["a file", "a link"])
def test_an_edited_view_is_moved_aside_over_nothing(is_link, night):
    target = night.view
    if is_link:
        target = night.home / "results.tsv"
        night.view.rename(target)
        night.view.symlink_to(target)
    before = target.read_bytes()
    for name in ("results-edited.tsv", "results-edited2.tsv"):
        target.write_text(name)
        assert f"warning: results.tsv was edited: it is {name} now" in night.say()
        assert target.with_name(name).read_text() == name and target.read_bytes() == before
    assert target.with_name("results-edited.tsv").read_text() == "results-edited.tsv"
    assert night.view.is_symlink() == is_link and "edited" not in night.say()


# --------------------------------------
# Lines of the record

UNREADABLE = {
    "torn": '{"kind": "run", "ru',
    "no object": "[1]",
    "no kind": '{"run": "x"}',
    "unknown decision": '{"kind": "decision", "commit": "x", "decision": "maybe"}',
    "decision of nobody": '{"kind": "decision", "commit": "x", "decision": "keep", "by": "chance"}',
    "end without until": '{"kind": "end"}',
    "end null": '{"kind": "end", "until": null}',
    "run that says no score": {"kind": "run", "run": "x", "commit": 40 * "a", "role": "idea", "state": "scored"},
}


def test_an_unreadable_line_is_counted_and_never_a_default(night):
    """Checks one of each kind; runs with each field wrong are in tests/test_hub.py."""
    before = night.json()
    night.write(*UNREADABLE.values(), {"kind": "dream of a later version"}, {"kind": "say", "message": "hello"})
    found = night.json()
    assert found["problems"] == [f"{len(UNREADABLE)} lines of {night.record} cannot be read, and do not count"]
    assert found | {"time": before["time"], "problems": []} == before


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_line_is_appended_to_one_without_its_end(is_torn, night):
    night.ran(1.0, 6, "again")
    with open(night.record, "rb+") as file:
        file.truncate(night.record.stat().st_size - (9 if is_torn else 1))
    night.say("until", "60")
    found = night.json()
    assert (found["until"], len(found["problems"]), len(found["runs"])) == ("60", is_torn, 4 - is_torn)


def test_a_later_line_about_a_run_takes_its_place(night):
    commit = night.commit()
    line = night.ran(None, state="interrupted")
    night.ran(0.999, 2, state="disturbed")
    night.write(line | {"state": "scored", "val_bpb": 0.9999})
    assert [(run["seed"], run["state"]) for run in night.json()["runs"][3:]] == [(1, "scored"), (2, "disturbed")]
    assert night.rows()[4:] == [[commit[:7], "0.999900", "2.0", "discard", "wider, seed 1"]]


APPEND = """
import sys
from night.record import append, recording
for number in range(5):
    with recording("test") as (night, place):
        assert len(night.messages) == len(open(place / "record.jsonl").readlines()) - 4
        append(place, night, {"kind": "say", "message": f"{sys.argv[1]} {number} " + 9999 * "x"})
"""


def test_forty_appends_at_once_are_all_there(night):
    commands = [[sys.executable, "-c", APPEND, str(number)] for number in range(8)]
    processes = [subprocess.Popen(command, cwd=night.folder) for command in commands]
    assert [process.wait() for process in processes] == 8 * [0]
    found = sorted(json.loads(line)["message"][:3] for line in night.record.read_text().splitlines()[4:])
    assert found == [f"{process} {number}" for process in range(8) for number in range(5)]


# --------------------------------------
# Keep and discard


DECIDED = {  # what the agent decides of HEAD with these runs, and the answer; a refusal where no decision is recorded
    "keep of what ran twice": ("keep", [0.98, 0.999], "decision: keep"),
    "keep of what ran once": ("keep", [1.002], "decision: simpler"),
    "discard of what is promising": ("discard", [0.98], "decision: discard"),
    "keep of the baseline": ("keep", None, "the baseline is what all is compared with"),
    "discard of the baseline": ("discard", None, "the baseline is what all is compared with"),
    "keep without a run": ("keep", [], f"has no run that counts; next: {RUN}"),
    "discard without a run": ("discard", [], f"has no run that counts; next: {RUN}"),
    "keep of a crash": ("keep", [0.98, None], "decision: discard"),
    "keep of what is worse": ("keep", [0.98, 1.1], "decision: discard"),
    "keep of what is kept": ("keep", [0.98, 0.98, 0.98], "is kept already"),
}


@pytest.mark.parametrize("name", DECIDED)
def test_what_the_agent_decides(name, night):
    command, scores, answer = DECIDED[name]
    if scores is not None:
        night.commit(*scores)
    before = night.decisions()
    if answer.startswith("decision: "):
        verdict = answer.removeprefix("decision: ")
        by = "rule" if len(scores) > 1 else "hand"  # a keep is a wish
        assert answer in night.say(command) and night.decisions() == [(night.whole(), verdict, by)]
        back = f"git reset -q --keep {night.start[:7]}"
        assert night.next() == {"keep": NEW_IDEA, "simpler": RUN, "discard": back}[verdict]
    else:
        assert answer in refused(ledger.main, [command]) and night.decisions() == before


def test_what_is_off_the_line_is_not_kept(night):
    better = night.commit(0.98, 0.98, 0.98, message="better")
    night.say()
    night.git("reset", "-q", "--keep", night.start)
    night.commit(0.99, message="simpler")
    assert refused(ledger.main, ["keep"]).endswith(f"next: git reset -q --keep {better[:7]}")


# --------------------------------------
# The end, and `open`


def test_until_says_another_end(night):
    assert "lasts until 3 rows; it has 3 rows\n" in night.say("until", "3") and night.json()["over"]
    night.ran(0.9, 4, "final")
    assert "lasts until 4 rows; it has 3 rows and 1 final\n" in night.say("until", "4")
    assert not night.json()["over"]
    night.say("until", "3000-01-01T00:00+00:00")
    assert night.json()["until"] == "3000-01-01T00:00:00+00:00" and night.next() == NEW_IDEA
    assert "next: # the night is over" in night.say("until", "now") and night.json()["over"]
    before = night.record.read_bytes()
    for text in ("2020-01-01", "soon"):
        assert refused(ledger.main, ["until", text]).startswith(f"until {text}: ")
    assert night.record.read_bytes() == before


OPEN = {  # what happens, and the answer of `open`, nothing where the night goes on
    "an idea": (lambda night: None, ""),
    "a run": (lambda night: (night.place / "run.json").write_text('{"run": "x"}'), ""),
    "an edited view": (lambda night: night.view.write_text("x"), ""),
    "a commit that was left": (lambda night: night.git("reset", "-q", night.commit(0.98) + "^"), ""),
    "no benchmark": (lambda night: shutil.rmtree(night.home), ""),
    "over": (lambda night: night.write({"kind": "end", "until": "3"}), "the night is over: nothing was kept\n"),
    "crashes": (lambda night: [night.ran(None, n, "baseline", exit=1) for n in (1, 2)], "tell the human: the untouch"),
    "mended": (lambda night: (OPEN["crashes"][0](night), night.write({"kind": "end", "until": "9"})), ""),
}


@pytest.mark.parametrize("name", OPEN)
def test_open_answers_and_writes_nothing(name, night):
    OPEN[name][0](night)
    before = contents(night.folder, night.home)
    night.capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        ledger.main(["open"])
    said, answer = night.capsys.readouterr().out, OPEN[name][1]
    assert end.value.code == (1 if answer else 0) and said[: len(answer) or None] == answer
    assert contents(night.folder, night.home) == before


# --------------------------------------
# Several nights, and what is printed


def test_two_clones_with_one_home_do_not_meet(night):
    add_benchmark(night.home, "another")
    folder = night.folder
    night.git("clone", "-q", "-b", "main", ".", "../second")
    night.enter(folder.parent / "second", "test")
    night.begin()
    night.commit(0.5)
    assert night.json()["benchmark"] == "another"
    (night.home / "another" / "journal.jsonl").write_text(json.dumps({"val_bpb": 0.1, "commit": night.start}) + "\n")
    night.enter(folder, "test")
    found = night.json()
    assert (found["benchmark"], found["to_beat"], found["problems"]) == ("local", 1.0, [])
    night.commit()
    shutil.rmtree(night.home / "local")
    assert "the benchmark of this night, local, is not in" in refused(ledger.main, ["run"])


def test_nothing_is_run_where_no_score_can_be_recorded(night, capsys):
    (night.home / "local" / f"writable.{os.getpid()}.tmp").mkdir()
    night.git("commit", "-q", "--allow-empty", "-m", "an idea")
    before = night.record.read_bytes()
    with pytest.raises(SystemExit):
        night.say("run")
    assert "cannot write to AUTORESEARCH_HOME: [Errno 21]" in capsys.readouterr().err
    assert night.record.read_bytes() == before and night.next() == "uv run ledger.py run"


def test_a_run_by_hand_is_named_and_has_no_row(night):
    lines = [{"val_bpb": 0.5, "commit": commit, "run": run} for commit, run in (("x", None), (night.start, "x"))]
    for count, line in enumerate([*lines, {"val_bpb": 0.5, "commit": night.start, "run": None}]):
        common.append_lines(night.home / "local" / "journal.jsonl", [line])
        assert ("1 runs of this commit by hand have no row" in night.say()) == (count == 2)
    assert len(night.rows()) == 4 and len(night.json()["runs"]) == 3


def test_output_anywhere(clone):
    """In processes of their own, with the device that torch tells."""
    assert clone.bash("CUDA_VISIBLE_DEVICES= uv run ledger.py start test --until 9 >/dev/null") == ("", 0)
    assert json.loads(clone.record.read_text())["device"]
    clone.commit(1.0, message="\u65e5 \u2028 \u00e9")
    lines = [f"PYTHONIOENCODING={code} uv run ledger.py >/dev/null" for code in ("cp1252", "ascii", "utf-8")]
    for line in [*lines, "uv run ledger.py | true", "cd night && uv run ../ledger.py >/dev/null"]:
        assert clone.bash(f"set -o pipefail; {line}") == ("", 0), line

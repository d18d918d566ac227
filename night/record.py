"""
A night as it was recorded, read once into a Night, and the lines that are added to it.

The record of the night on branch autoresearch/<tag> is .git/autoresearch/<tag>/record.jsonl: one JSON object a line,
of the kind "start", "run", "decision", "end" or "say". Lines are appended, never edited; a later line about the same
run or commit takes the place of an earlier one. The night's first commit has the words of the first line, too.
"""

import contextlib
import functools
import json
import os
import re
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from harness import common
from harness.common import append_lines, git, now

LOCK_SECONDS = 60  # for another process that records
PREFIX = "autoresearch/"  # of the branches of nights
START_KEYS = ("until", "commit", "benchmark", "device")
ROLES = ("baseline", "idea", "again", "final")
STATES = ("scored", "crash", "disturbed", "elsewhere", "interrupted")
DECISIONS = ("keep", "discard", "simpler")  # the last one: kept if its second run is not worse
LONGEST_LINE = 20_000  # characters of a line that is read
HASH = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")  # of git, in full: SHA-1 or SHA-256


class NoNight(SystemExit):
    """No night is checked out: the text says what there is, and how to go on."""


# --------------------------------------
# What is in a record


@dataclass
class Run:
    """One training of one commit, and how it ended."""

    run: str  # its id
    time: str
    commit: str
    role: str
    seed: int
    state: str
    parent: str = ""
    train: str = ""  # the blob of train.py
    benchmark: str = ""
    device: str = ""
    val_bpb: float | None = None
    memory_gb: float = 0.0
    steps: int = 0
    tokens_per_second: float = 0.0
    slow_steps_percent: float = 0.0
    losses: list = field(default_factory=list)  # means of the tenths of the run
    exit: int | None = None  # exit code, or minus the signal; None where nobody saw the end
    reason: str = ""
    description: str = ""

    @property
    def counts(self):
        return self.state == "scored"

    @property
    def is_over(self):
        """Whether this seed has had its run. Otherwise the run proves nothing, and is made again."""
        return self.state in ("scored", "crash")


@dataclass
class Decision:
    commit: str
    decision: str
    by: str = "rule"
    gain: float | None = None
    floor: float | None = None
    reason: str = ""
    time: str = ""


@dataclass
class Message:
    """What an agent has said to the others of a hub."""

    message: str
    time: str = ""
    commit: str = ""  # where it was then


@dataclass
class Try:
    """A commit that has run, or was decided."""

    commit: str
    runs: dict = field(default_factory=dict)  # id -> Run, in order
    decision: Decision | None = None

    @property
    def verdict(self):
        """keep, discard or simpler; "" while it is undecided."""
        if self.decision is None:
            return ""
        return self.decision.decision

    @property
    def description(self):
        return next((run.description for run in self.runs.values()), "")

    def of_role(self, *roles):
        return [run for run in self.runs.values() if run.role in roles]

    def counted(self):
        """The runs that tell what the commit is worth: final ones select nothing, so they are left out."""
        return [run for run in self.of_role("baseline", "idea", "again") if run.counts]


@dataclass(frozen=True)
class Checkout:
    """Where a working folder is."""

    line: tuple = ()  # commits from the night's first to HEAD, oldest first
    changed: bool = False  # train.py differs from HEAD
    other_files: tuple = ()  # Python files but train.py that differ between the first commit and HEAD


@dataclass
class Night:
    """All that a look needs: what was recorded, and where git is. Commits are whole hashes."""

    tag: str = "test"
    until: str = "never"  # a time (ISO, in UTC), a number of rows, or never
    start: str = "0" * 40  # the first commit, whose train.py is the baseline
    benchmark: str = ""
    device: str = ""
    tries: dict = field(default_factory=dict)  # commit -> Try
    runs: dict = field(default_factory=dict)  # id -> Run, in order
    decided: dict = field(default_factory=dict)  # commit -> Decision, in order
    runs_before_end: int = 0  # how many runs there were when `until` was last said
    messages: list = field(default_factory=list)
    unreadable: int = 0  # lines

    line: tuple = ()  # of the Checkout that is the repository's folder
    changed: bool = False
    other_files: tuple = ()
    worktrees: dict = field(default_factory=dict)  # of a wave: name -> Checkout
    out: list = field(default_factory=list)  # jobs on a cluster that have not ended, as in jobs/*.json
    on_cluster: bool = False  # whether the human has named a cluster that trains
    going_on: dict | None = None  # run.json of the run that is going on, or is over and not recorded yet
    time: str = ""  # now

    @property
    def head(self):
        return (self.start, *self.line)[-1]

    @property
    def kept(self):
        """The commits that were kept, in that order; the first one is the baseline."""
        kept = [commit for commit, decision in self.decided.items() if decision.decision == "keep"]
        return [self.start, *kept]

    @property
    def last_keep(self):
        return self.kept[-1]

    def attempt(self, commit):
        """The Try of a commit; an empty one if it never ran."""
        return self.tries.get(commit) or Try(commit)

    def add(self, line):
        """Take in a line of the record. Raises ValueError, KeyError or TypeError if its values are not of its kind."""
        kind = line["kind"]
        # kinds of later versions are left out
        if kind == "run":
            run = as_run(line)
            self.runs[run.run] = run
            self.device = self.device or run.device  # of a night on a cluster the first run tells it
            self.tries.setdefault(run.commit, Try(run.commit)).runs[run.run] = run
        elif kind == "decision":
            self.add_decision(as_decision(line))
        elif kind == "end":
            self.until = checked_until(line["until"])
            self.runs_before_end = len(self.runs)
        elif kind == "say":
            self.messages.append(Message(**values_of(Message, line)))

    def add_decision(self, decision):
        attempt = self.tries.setdefault(decision.commit, Try(decision.commit))

        # the rule never overrules a hand; `simpler` is a wish, which the rule decides
        by_hand = attempt.decision and attempt.decision.by == "hand" and attempt.verdict != "simpler"
        if by_hand and decision.by == "rule":
            return
        attempt.decision = decision
        self.decided.pop(decision.commit, None)  # its place is that of its last decision
        self.decided[decision.commit] = decision


def checked_until(until):
    """The end of a night: `never`, a number of rows or a time in ISO form. Raises an error where it is none."""
    if until != "never" and not until.isdecimal():
        datetime.fromisoformat(until)
    return until


def values_of(kind, line):
    """The values of a line that a Run or a Decision has. Raises TypeError where one is of another type."""
    values = {}
    for name, wanted in types_of(kind):
        if name in line:
            values[name] = line[name]
            if not isinstance(line[name], wanted):
                raise TypeError(name)
    return values


@functools.cache
def types_of(kind):
    """The fields of a dataclass, and what JSON may give for each: it has no mark for a float that is whole."""
    numbers = {float: (float, int), float | None: (float, int, type(None))}
    return [(item.name, numbers.get(item.type, item.type)) for item in fields(kind)]


def as_run(line):
    run = Run(**values_of(Run, line))
    if not run.commit or run.role not in ROLES or run.state not in STATES:
        raise ValueError("no commit, or no such role or state")
    if run.state in ("scored", "disturbed", "elsewhere") and not 0 < run.val_bpb < 1e3:
        raise ValueError("no score")
    return run


def as_decision(line):
    decision = Decision(**values_of(Decision, line))
    if decision.decision not in DECISIONS or decision.by not in ("rule", "hand"):
        raise ValueError("no such decision")
    return decision


# --------------------------------------
# Where it lies


def find_place(tag):
    """The folder of a night's record and of its runs; one for all worktrees of a repository."""
    answer = git("rev-parse", "--git-common-dir")
    if not answer.worked:
        raise NoNight(f"no repository here: {answer.complaint}")
    return Path(common.ROOT, answer.output).resolve() / PREFIX / tag


def find_tag():
    """The tag of the night that is checked out. Raises NoNight, with the nights there are, if none is."""
    branch = git("symbolic-ref", "-q", "--short", "HEAD").output
    if branch.startswith(PREFIX):
        return branch.removeprefix(PREFIX)
    nights = git("for-each-ref", "--sort=committerdate", "--format=%(refname:short)", f"refs/heads/{PREFIX}").output
    place = branch or "a detached HEAD"
    if not nights:
        raise NoNight(f"no night on {place}; next: uv run ledger.py start <tag> --until <when>")
    *older, latest = nights.split()
    raise NoNight(f"no night on {place}; next: git checkout -q {latest}{''.join(f', or {name}' for name in older)}")


@contextlib.contextmanager
def recording(tag):
    """
    The night with this tag, read under the lock under which lines are added: (night, place). One process of a
    repository records at a time. Where there is no record, as in a clone, it begins.
    """
    place = find_place(tag)
    path = place / "record.jsonl"
    if not path.exists():
        first = start_of(tag)  # raises before a folder is made for no night
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "record.lock", timeout=LOCK_SECONDS):
        if not path.exists():
            append(place, Night(), first)
        yield read_night(tag)


def append(place, night, *lines):
    """Add lines, dicts, to the record and to the night that was read from it. The caller holds recording()."""
    for line in lines:
        night.add(line)  # which raises, before it is written, what could not be read
    append_lines(place / "record.jsonl", lines)


# --------------------------------------
# Reading


def read_night(tag=None):
    """The night that is checked out, as it was recorded, and its place. Raises NoNight if there is none."""
    tag = tag or find_tag()
    place = find_place(tag)
    path = place / "record.jsonl"
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    night = parse_night(tag, text, lambda: start_of(tag))
    look_around(night, place)
    return night, place


def parse_night(tag, text, find_start):
    """The Night of a record, whose first line is asked for where it can't be read."""
    first, *lines = parse_lines(text) or [None]
    if not is_start(first):
        first = find_start()
    night = Night(tag, str(first["until"]), first["commit"], first["benchmark"], first["device"], time=now())

    # what cannot be read counts for nothing, and is never taken for something else
    for line in lines:
        try:
            check_hashes(line)
            night.add(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            night.unreadable += 1
    return night


def check_hashes(line):
    """Raise ValueError where a line has something else for a commit or a blob: others may have written it."""
    for name in ("commit", "parent", "train"):
        if line.get(name, "") != "" and not HASH.fullmatch(line[name]):
            raise ValueError(name)


def parse_lines(text):
    """The lines of a record; None for those that are no JSON, or too long."""
    found = []
    for line in filter(None, text.split("\n")):
        value = None
        with contextlib.suppress(ValueError, RecursionError):
            if len(line) <= LONGEST_LINE:
                value = json.loads(line)
        found.append(value)
    return found


def is_start(line):
    if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in START_KEYS):
        return False
    return HASH.fullmatch(line["commit"]) is not None


def start_of(tag):
    """The first line of a record, from the night's first commit. Raises NoNight if the branch has none."""
    subject = f"{PREFIX}{tag}: start"
    output = git("log", "--format=%H%n%B", "-1", "--fixed-strings", f"--grep={subject}", "HEAD").output
    commit, _, message = output.partition("\n")
    try:
        # a hook may have added lines below
        words, _ = json.JSONDecoder().raw_decode(message.removeprefix(subject).lstrip())
        first = words | {"commit": commit}
    except (ValueError, TypeError):
        first = None
    if not is_start(first):
        raise NoNight(f"the branch {PREFIX}{tag} was not begun by `uv run ledger.py start`: begin a night with that")
    return first


def look_around(night, place):
    """Where git is, here and in the worktrees of a wave, and what is running."""
    here = look_at(common.ROOT, night.start)
    night.line, night.changed, night.other_files = here.line, here.changed, here.other_files
    for marker in sorted((common.ROOT / "wave").glob("*/.git")):
        night.worktrees[marker.parent.name] = look_at(marker.parent, night.start)
    night.out = [job for job in read_jobs(place).values() if "exit" not in job]
    night.going_on = read_run(place)
    night.on_cluster = bool(os.environ.get("RAY_API_SERVER_ADDRESS"))


def look_at(folder, start):
    """The Checkout of a folder, in the night that has begun with the commit `start`."""
    # by first parents: a merge brings no commit of its own into the night
    line = git("rev-list", "--reverse", "--first-parent", "HEAD", f"^{start}^@", folder=folder).output
    changed = git("status", "--porcelain", "--", "train.py", folder=folder).output != ""

    # a run has the harness of its commit, so that has to be the night's
    names = git("diff", "--name-only", "--no-ext-diff", start, "HEAD", "--", "*.py", folder=folder).output
    others = tuple(name for name in names.split("\n") if name not in ("", "train.py"))
    return Checkout(tuple(line.split()), changed, others)


def read_run(place):
    """run.json, a dict; None if no run is going on or to be settled."""
    try:
        return json.loads((place / "run.json").read_text())
    except (OSError, ValueError):
        return None


def read_jobs(place):
    """
    The jobs of a night that are not recorded yet: {path: dict}. Each has what run.json has of a run; once the job has
    ended its `exit`, too.
    """
    jobs = {}
    for path in sorted((place / "jobs").glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # recorded just now
            jobs[path] = json.loads(path.read_text())
    return jobs

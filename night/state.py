"""A night: what its record says, taken in line by line, and what git has checked out."""

import functools
import re
from dataclasses import dataclass, field, fields
from datetime import datetime

from harness.common import printable

HIGHEST_SCORE = 1e3  # of val_bpb
ROLES = ("baseline", "idea", "again", "final")
STATES = ("scored", "crash", "disturbed", "elsewhere", "interrupted")
DECISIONS = ("keep", "discard", "simpler")  # the last one: kept if its second run is not worse


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
    product_ms: float | None = None  # of the machine meanwhile: see ends.machine_speed
    losses: list = field(default_factory=list)  # means of the tenths of the run
    exit: int | None = None  # exit code, or minus the signal; None where nobody saw the end
    reason: str = ""
    description: str = ""

    # other states prove nothing
    @property
    def counts(self):
        return self.state == "scored"

    @property
    def is_done(self):
        """Whether it is scored or crashed. Runs in other states prove nothing, and are made again."""
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
        # all its runs have it
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
    """What was recorded, what git has checked out, what is running. Commits are whole hashes."""

    tag: str = "test"
    until: str = "never"  # a time (ISO, in UTC), a number of rows, or never
    start: str = "0" * 40  # the first commit, whose train.py is the baseline
    benchmark: str = ""
    device: str = ""

    # what was recorded
    tries: dict = field(default_factory=dict)  # commit -> Try
    runs: dict = field(default_factory=dict)  # id -> Run, in order
    decided: dict = field(default_factory=dict)  # commit -> Decision, in order
    runs_before_end: int = 0  # how many runs there were when `until` was last said
    messages: list = field(default_factory=list)
    unreadable: int = 0  # lines

    # where git is, and what is running
    line: tuple = ()  # of the Checkout that is the repository's folder
    changed: bool = False
    other_files: tuple = ()
    worktrees: dict = field(default_factory=dict)  # of a wave: name -> Checkout
    broken: dict = field(default_factory=dict)  # worktrees that git cannot read: name -> why
    out: list = field(default_factory=list)  # jobs on a cluster that are not recorded, as in jobs/*.json
    on_cluster: bool = False  # whether the human has named a cluster that trains
    going_on: dict | None = None  # run.json of the run that is going on, or is over and not recorded yet
    time: str = ""  # now

    @property
    def head(self):
        # git may know no line, where HEAD has nothing to do with this night
        return (self.start, *self.line)[-1]

    @property
    def kept(self):
        """The commits that were kept, in that order; the first one is the baseline."""
        # the dict is in the order of decisions
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
    if until != "never" and not re.fullmatch("[0-9]{1,9}", until):
        datetime.fromisoformat(until)
    return until


def values_of(kind, line):
    """
    The values of a line that a Run or a Decision has, its texts on one line each. Raises TypeError where one is of
    another type, ValueError where a number is out of all range.
    """
    # kinds of later versions may have more
    values = {}
    for name, wanted in types_of(kind):
        if name not in line:
            continue
        value = line[name]
        if not isinstance(value, wanted):
            raise TypeError(name)
        if isinstance(value, (int, float)) and not abs(value) < 1e15:
            raise ValueError(name)
        if isinstance(value, str) and not value.isprintable():
            value = printable(value, len(value))
        values[name] = value
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

    # their scores are printed and compared
    if run.state in ("scored", "disturbed", "elsewhere") and not 0 < run.val_bpb < HIGHEST_SCORE:
        raise ValueError("no score")
    return run


def as_decision(line):
    decision = Decision(**values_of(Decision, line))
    if decision.decision not in DECISIONS or decision.by not in ("rule", "hand"):
        raise ValueError("no such decision")
    return decision

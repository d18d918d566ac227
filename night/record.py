"""
A night as it was recorded, read once into a Night, and the lines that are added to it.

The record of the night on branch autoresearch/<tag> is .git/autoresearch/<tag>/record.jsonl: one JSON object a line,
of the kind "start", "run", "decision", "end" or "say". Lines are appended, never edited; a later line about the same
run or commit takes the place of an earlier one. The night's first commit has the words of the first line, too.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from filelock import FileLock

from harness import common
from harness.common import append_lines, call_git, git, now, printable
from night.state import Checkout, Night, checked_until

LOCK_SECONDS = 60  # for another process that records
PREFIX = "autoresearch/"  # of the branches of nights
START_KEYS = ("until", "commit", "benchmark", "device")
LONGEST_LINE = 20_000  # characters of a line that is read
HASH = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")  # of git, in full: SHA-1 or SHA-256


class NoNight(SystemExit):
    """No night is checked out: the text says what there is, and how to go on."""


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
    form = "--format=%(refname:short) %(worktreepath)"
    nights = git("for-each-ref", "--sort=committerdate", form, f"refs/heads/{PREFIX}").output.splitlines()[::-1]
    place = branch or "a detached HEAD"
    if not nights:
        raise NoNight(f"no night on {place}; next: uv run ledger.py start <tag> --until <when>")

    # git checks a branch out once
    latest, _, folder = nights[0].partition(" ")
    if folder:
        raise NoNight(f"no night on {place}: {latest} is checked out in {folder}, work there")
    names = ", or ".join(night.split(" ")[0] for night in nights)
    raise NoNight(f"no night on {place}; next: git checkout -q {names}")


@contextlib.contextmanager
def recording(tag):
    """
    The night with this tag, read while holding the lock of its record: (night, place). One process at a time may add
    lines. A missing record, as in a clone, is begun.
    """
    place = find_place(tag)
    path = place / "record.jsonl"
    if not path.exists():
        first = start_of(tag)  # raises before a folder is made for no night
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "record.lock", timeout=LOCK_SECONDS):
        if not path.exists():
            append_lines(path, [first])
        yield read_night(tag)


def append(place, night, *lines):
    """Add lines, dicts, to the record and to the night that was read from it. The caller holds recording()."""
    for line in lines:
        night.add(line)  # raises for a line that could not be read back, before any is written
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
    names = (printable(first[name], 200) for name in ("benchmark", "device"))
    night = Night(tag, first["until"], first["commit"], *names, time=now())

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
    with contextlib.suppress(ValueError):
        return HASH.fullmatch(line["commit"]) is not None and checked_until(line["until"]) != ""
    return False


def start_of(tag):
    """The first line of a record, from the night's first commit. Raises NoNight if the branch has none."""
    subject = f"{PREFIX}{tag}: start"
    output = git("log", "--format=%H%n%B", "-1", "--fixed-strings", f"--grep={subject}", "HEAD").output
    commit, _, message = output.partition("\n")
    first = None
    with contextlib.suppress(ValueError, TypeError):
        # a hook may have added lines below
        words, _ = json.JSONDecoder().raw_decode(message.removeprefix(subject).lstrip())
        first = words | {"commit": commit}
    if not is_start(first):
        raise NoNight(f"the branch {PREFIX}{tag} was not begun by `uv run ledger.py start`: begin a night with that")
    return first


def look_around(night, place):
    """Fill in what no record has: what is checked out, here and in the worktrees of a wave, and what is running."""
    here = look_at(common.ROOT, night.start)
    night.line, night.changed, night.other_files = here.line, here.changed, here.other_files
    for marker in sorted((common.ROOT / "wave").glob("*/.git")):
        try:
            checkout = look_at(marker.parent, night.start)
        except SystemExit as error:
            night.broken[marker.parent.name] = str(error)
            continue
        if night.start in checkout.line:  # otherwise it is another night's
            night.worktrees[marker.parent.name] = checkout
    night.out = [job for job in read_jobs(place).values() if job["run"] not in night.runs]
    night.going_on = read_run(place)
    night.on_cluster = bool(os.environ.get("RAY_API_SERVER_ADDRESS"))


def look_at(folder, start):
    """The Checkout of a folder, in the night that has begun with the commit `start`. Raises SystemExit if git fails."""
    # by first parents: a merge brings no commit of its own into the night
    line = call_git("rev-list", "--reverse", "--first-parent", "HEAD", f"^{start}^@", folder=folder)
    changed = call_git("status", "--porcelain", "--", "train.py", folder=folder) != ""

    # a run has the harness of its commit, so that has to be the night's
    others = call_git("diff", "--name-only", start, "HEAD", "--", "*.py", ":!train.py", folder=folder)
    return Checkout(tuple(line.split()), changed, tuple(others.splitlines()))


def read_run(place):
    """run.json, a dict; None if no run is going on or to be settled."""
    return read_state(place / "run.json")


def read_jobs(place):
    """
    The jobs of a night that are not recorded yet: {path: dict}. Each has what run.json has of a run; once the job has
    ended its `exit`, too.
    """
    jobs = {path: read_state(path) for path in sorted((place / "jobs").glob("*.json"))}
    return {path: job for path, job in jobs.items() if job}


def read_state(path):
    """What is known of a run; None where there is no such file, or it was torn."""
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state, dict) and state.keys() >= {"run", "commit", "seed", "role"}:
            return state
    return None

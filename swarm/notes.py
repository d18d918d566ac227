"""
What agents share on a hub: results and messages, lines of git notes; tries and branches.

A result or a message is one JSON object, one line of the note `results` of its commit. Notes are merged by
cat_sort_uniq, so there is no conflict. Anybody may have written them: a line that is no such object is skipped.

Sections: Lines, Of rows, The frontier, The remote.
"""

import json
import math
import random
import re
import statistics
import time
from collections import Counter

from harness.journal import ROOT, first_line, now
from night.checks import run_git
from night.rows import STATUSES
from night.worth import kept_commits, noise_floor, pair

NETWORK_SECONDS = 300  # for a fetch or a push
PUSHES, PAUSE = 12, 0.5  # tries of a push that others come before, and seconds between them, more each time
OTHERS_CAME_FIRST = "fetch first|non-fast-forward|lock|failed to update|already exists|old value"
BEST = 5  # of the frontier
DIGITS = 12  # of the hashes in lines: seven are too few for the commits of a thousand agents
LONGEST_LINE, LONGEST_DESCRIPTION = 20_000, 1000  # characters

FETCHED = ("+refs/heads/*:refs/remotes/hub/*", "+refs/tries/*:refs/hub/tries/*", "+refs/notes/*:refs/hub/notes/*")

# --------------------------------------
# Lines

HASH = "[0-9a-f]{7,40}"
NAME = "[A-Za-z0-9_-]{1,100}"
MESSAGE = {
    "time": re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00"),
    "agent": re.compile(f"{NAME}/{NAME}"),
    "commit": re.compile(HASH),
}
RESULT = {
    "parent": re.compile(HASH),
    "train": re.compile(HASH),  # the blob of train.py
    "benchmark": re.compile(".+"),
    "status": re.compile("|".join(STATUSES)),
    "description": re.compile("(?s:.*)"),
}


def parse_line(text):
    """A result or a message: a dict whose values have the right types. None if the line is neither."""
    if len(text) > LONGEST_LINE:
        return None
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not has_texts(line, MESSAGE):
        return None
    if isinstance(line.get("say"), str):
        return line
    if has_texts(line, RESULT) and has_numbers(line) and isinstance(line.get("device", 0), (str, type(None))):
        return line
    return None


def has_texts(line, patterns):
    for key, pattern in patterns.items():
        value = line.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            return False
    return True


def has_numbers(line):
    """Whether row, memory and score are numbers that a run can have. A crash, and only a crash, has no score."""
    row, memory, score = line.get("row"), line.get("memory_gb"), line.get("val_bpb")
    if line["status"] == "crash" and score is None:
        score = 1.0
    elif line["status"] == "crash":
        return False
    if type(row) is not int or type(memory) not in (int, float) or type(score) not in (int, float):
        return False
    return 0 < row < 1e9 and 0 <= memory < 1e9 and 0 < score < 1e3


def read_lines(agent=None):
    """All that was shared and is here, or that of one agent: ([result], by agent and row, [message])."""
    if not resolve("refs/notes/results"):
        return [], []
    options = ("-h", "-a", "--no-color", "--no-line-number", "--no-column", "-F", "-e")
    words = "{"
    if agent:
        words = f'"agent": "{agent}"'
    _, output, complaint = run_git(ROOT, "grep", *options, words, "refs/notes/results", seconds=NETWORK_SECONDS)
    if complaint:
        raise SystemExit(f"the notes cannot be read: {reason_of(complaint)}")

    # a row that was published twice, after some mishap, counts once
    results, messages = {}, []
    for text in sorted(set(output.split("\n"))):
        line = parse_line(text)
        if line and agent not in (None, line["agent"]):
            continue
        if line and "say" in line:
            messages.append(line)
        elif line:
            results.setdefault((line["agent"], line["row"]), line)
    return [results[key] for key in sorted(results)], messages


def printable(text, length):
    """Other people's text, on one line, with control characters replaced by ?."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:length])


# --------------------------------------
# Of rows


def new_results(night, benchmark):
    """
    Lines for the rows of results.tsv that have none. A row has one if there is one of its commit and score: nothing is
    doubled or left out where rows have moved, as in a ledger that was rebuilt.
    """
    own, _ = read_lines(night.tag)
    shared = Counter((result["commit"][:7], result["val_bpb"]) for result in own)
    number = max((result["row"] for result in own), default=0)
    pairs, _ = pair(night.rows, night.runs)
    lines = []
    for index, row in enumerate(night.rows):
        score = None if math.isnan(row.val_bpb) else round(row.val_bpb, 6)
        shared[row.commit, score] -= 1
        if shared[row.commit, score] >= 0:
            continue

        # a row typed by hand may name what git does not know
        worked, hashes, _ = run_git(ROOT, "rev-parse", row.commit, f"{row.commit}^", f"{row.commit}:train.py")
        if not worked:
            print(f"results.tsv:{row.line} is not shared: git knows no train.py of {row.commit}")
            continue
        number += 1
        line = {"time": now(), "agent": night.tag, "row": number, "benchmark": benchmark}
        line |= zip(("commit", "parent", "train"), (name[:DIGITS] for name in hashes.split()), strict=True)
        line |= {"device": pairs.get(index, {}).get("device"), "val_bpb": score, "status": row.status}
        line["memory_gb"] = 0.0 if math.isnan(row.memory_gb) else row.memory_gb
        lines.append(line | {"description": row.description[:LONGEST_DESCRIPTION]})
    return lines


# --------------------------------------
# The frontier


def best_pools(results):
    """
    The best that anybody kept: [(mean, number of runs, the result that was its first keep)]. All runs of one train.py
    count, whoever made them: every agent starts from a commit of its own.
    """
    pools = {}
    for result in results:
        pools.setdefault(result["train"], []).append(result)
    found = []
    for pool in pools.values():
        keeps = [result for result in pool if result["status"] == "keep"]
        if keeps:
            origin = min(keeps, key=lambda result: (result["time"], result["agent"], result["row"]))
            found.append((statistics.fmean(result["val_bpb"] for result in pool), len(pool), origin))
    return sorted(found, key=lambda entry: (entry[0], entry[2]["train"]))[:BEST]


def comparable(night, record, results):
    """
    The results of this benchmark and this kind of device, the mean of this agent's last keep, and its noise floor;
    NaN where they are not known.
    """
    here = (record["id"], device_of(night))
    shared = [line for line in results if (line["benchmark"], line["device"]) == here and line["val_bpb"]]

    # each agent judges by its own runs
    scores = {}
    for result in shared:
        if result["agent"] == night.tag:
            scores.setdefault(result["commit"][:7], []).append(result["val_bpb"])
    best = kept_commits(night)[-1]
    mean = statistics.fmean(scores[best]) if best in scores else math.nan
    return shared, mean, noise_floor(scores)


def device_of(night):
    """The kind of device of the last run here, None if that is not known."""
    if not night.runs:
        return None
    return night.runs[-1].get("device")


# --------------------------------------
# The remote


def resolve(name):
    """The full hash of what a name means, "" if git does not know it or it means several things."""
    return run_git(ROOT, "rev-parse", "--verify", "-q", name)[1]


def reason_of(complaint):
    """The line of git's complaint that says why."""
    found = re.search(r"^ *(fatal:|error:|ERROR:|!).*", complaint, re.M)
    if found:
        return first_line(found[0])
    return first_line(complaint or "git gives no reason")


def add_line(line, commit):
    """Append a result or a message, a dict, to the note of a commit."""
    worked, _, complaint = run_git(ROOT, "notes", "--ref=results", "append", "-m", json.dumps(line), commit)
    if not worked:
        raise SystemExit(f"git refuses the note: {reason_of(complaint)}")


def receive():
    """Fetch what others have shared, and merge the notes. Returns why the hub was not reached, "" if it was."""
    if not run_git(ROOT, "remote", "get-url", "hub")[0]:
        raise SystemExit("no hub here: uv run swarm/hub.py join <url> --tag <tag> --agent <agent>")
    fetch = ("fetch", "-q", "--no-tags", "--no-recurse-submodules", "hub", *FETCHED)
    worked, _, complaint = run_git(ROOT, *fetch, seconds=NETWORK_SECONDS)
    if not worked:
        return reason_of(complaint)
    if resolve("refs/hub/notes/results"):
        merge = ("notes", "--ref=results", "merge", "-q", "-s", "cat_sort_uniq", "refs/hub/notes/results")
        worked, _, complaint = run_git(ROOT, *merge, seconds=NETWORK_SECONDS)
        if not worked:
            raise SystemExit(f"the notes of the hub cannot be merged: {reason_of(complaint)}")
    return ""


def send(tag):
    """Receive, then push branch, tries and notes; again where others came first. Returns why that did not work."""
    branch = f"refs/heads/autoresearch/{tag}"
    tries = f"+refs/tries/*:refs/tries/{tag}/*"
    notes = "refs/notes/results*:refs/notes/results*"  # a pattern, as there may be none yet
    complaint = ""
    for attempt in range(PUSHES):
        time.sleep(random.uniform(0, PAUSE * attempt))
        reason = receive()
        if reason:
            return reason
        push = ("push", "-q", "hub", f"+{branch}:{branch}", tries, notes)
        worked, _, complaint = run_git(ROOT, *push, seconds=NETWORK_SECONDS)
        if worked:
            return ""
        if not re.search(OTHERS_CAME_FIRST, complaint):
            break
    return reason_of(complaint)

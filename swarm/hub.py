# ruff: noqa: E402
"""
A hub: a git remote through which several agents share results, tries and plans. There is no other server.

    uv run swarm/hub.py join <url> --tag T --agent A    # the first time, and after everything here was lost
    uv run swarm/hub.py exchange                        # sends new rows, fetches those of others, prints the frontier
    uv run swarm/hub.py                                 # the frontier, without network
    uv run swarm/hub.py look <word>                     # the last results and messages with a word or a hash
    uv run swarm/hub.py say '<what you try next>'       # the others see it before your run
    uv run swarm/hub.py adopt <hash>                    # another's train.py becomes the next experiment here

Only train.py is ever taken from others. notes.py has the shared notes, join.py the first command.

Sections: Exchange, Frontier, Look, Adopt, Command line.
"""

import argparse
import math
import os
import re
import statistics
import sys
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

sys.exit("hubs do not work at this commit: they move to the record of the night next")

from harness.journal import ROOT, now
from ledger import OneLineParser, print_next
from night.checks import run_git
from night.load import load_night
from night.rules import next_step
from night.steps import NEW_IDEA
from swarm.join import join
from swarm.notes import (
    DIGITS,
    HASH,
    NAME,
    NETWORK_SECONDS,
    add_line,
    best_pools,
    comparable,
    device_of,
    new_results,
    printable,
    read_lines,
    reason_of,
    receive,
    resolve,
    send,
)

SHOWN = 20  # lines of `look`

# --------------------------------------
# Exchange


def exchange(message=None):
    """Share the rows that have no line yet, and a message. Returns the night and its benchmark's record."""
    night, record, _ = load_night(ROOT)
    if "/" not in night.tag:
        raise SystemExit(f"the night {night.tag} is on no hub: join one from a clone of its own")
    for line in new_results(night, record["id"]):
        commit = resolve(line["commit"])
        run_git(ROOT, "update-ref", f"refs/tries/{commit[:7]}", commit)
        add_line(line, commit)
    if message:
        head = resolve("HEAD")
        add_line({"time": now(), "agent": night.tag, "commit": head[:DIGITS], "say": message}, head)
    reason = send(night.tag)
    if reason:
        print(f"the hub was not reached: {reason}; the next exchange sends it")
    return night, record


# --------------------------------------
# Frontier


def print_frontier(night, record):
    device = device_of(night)
    if not device:
        print("frontier: unknown before the first run here, which tells the kind of device")
        return
    results = read_lines()[0] + new_results(night, record["id"])
    shared, mean, floor = comparable(night, record, results)

    # what was tried here is decided here
    tried = {result["train"] for result in results if result["agent"] == night.tag}
    tried.add(resolve("HEAD:train.py")[:DIGITS])
    ahead = []
    print(f"frontier: the best that anybody kept on {record['id']}, {device}")
    for score, runs, origin in best_pools(shared):
        words = f"{score:.6f}, runs {runs}, {origin['commit'][:7]}, {origin['agent']}: {origin['description']}"
        if mean - score > floor and origin["train"] not in tried:
            words = f"{words:.120}; ahead of your last keep by {mean - score:.6f}"
            ahead.append(origin["commit"][:7])
        print(f"  {printable(words, 200)}")
    if ahead and is_open(night):
        print(f"next: uv run swarm/hub.py adopt {ahead[0]}")


def is_open(night):
    """Whether the ledger waits for a new idea: HEAD is the last keep, and nothing is changed, running or missing."""
    return next_step(night).command == NEW_IDEA


# --------------------------------------
# Look


def look(word):
    reason = receive()
    if reason:
        print(f"the hub was not reached: {reason}; below is what was fetched before")
    results, messages = read_lines()

    # a hash may have more digits than those in the lines
    word = re.sub(rf"\b([0-9a-f]{{{DIGITS}}})[0-9a-f]{{0,28}}\b", r"\1", word.lower())
    found = []
    for line in results + messages:
        text = as_text(line)
        if word in f"{text} commit={line['commit']} parent={line.get('parent')}".lower():
            found.append((line["time"], text))
    for _, text in sorted(found)[-SHOWN:]:
        print(printable(text, 700))
    if not found:
        print(f"nothing about {printable(word, 100)}")


def as_text(line):
    words = f"{line['time'][:16].replace('T', ' ')} {line['agent']}"
    if "say" in line:
        return f"{words} says: {line['say']}"
    score = "" if line["val_bpb"] is None else f"{line['val_bpb']:.6f} "
    place = f"{line['commit'][:7]} on {line['parent'][:7]}, {line['device'] or 'unknown device'}"
    return f"{words} {score}{line['status']}, {place}: {line['description']}"


# --------------------------------------
# Adopt


def adopt(name):
    night, record, _ = load_night(ROOT)
    if not is_open(night):
        step = next_step(night)
        raise SystemExit(f"no new idea starts now: {step.reason}; next: {step.command}")
    results, _ = read_lines()
    commit = resolve(f"{name}^{{commit}}")
    origin = next((line for line in results if commit and commit.startswith(line["commit"])), None)
    if not origin:
        raise SystemExit(f"{name} names no result here, or several: uv run swarm/hub.py exchange, or use more digits")
    if not run_git(ROOT, "ls-tree", commit, "--", "train.py")[1].startswith("100"):  # 100xxx: a regular file
        raise SystemExit(f"the train.py of {name} is not a file")
    if resolve(f"{commit}:train.py") == resolve("HEAD:train.py"):
        raise SystemExit(f"{name} has the same train.py as HEAD")

    # what all its runs that compare promise
    shared, mean, _ = comparable(night, record, results)
    scores = [line["val_bpb"] for line in shared if line["train"] == origin["train"]]
    gain = "unknown"
    if scores and not math.isnan(mean):
        gain = f"{mean - statistics.fmean(scores):+.6f}"
    idea = re.split("; expect|, seed", origin["description"])[0]
    message = f"adopted {commit[:7]} from {origin['agent']}: {printable(idea, 100)}; expect {gain}"

    worked, _, complaint = run_git(ROOT, "checkout", commit, "--", "train.py")
    if worked:
        worked, _, complaint = run_git(ROOT, "commit", "-q", "-m", message, "--", "train.py")
    if not worked:
        run_git(ROOT, "checkout", "HEAD", "--", "train.py")
        raise SystemExit(f"git refuses to commit it: {reason_of(complaint)}")
    print(message)
    print(run_git(ROOT, "diff", "--no-color", "--no-ext-diff", "--stat", "HEAD^", "HEAD")[1])
    print_next(load_night(ROOT)[0])


# --------------------------------------
# Command line


def matching(pattern, advice):
    """A type of argparse: printable texts that match a pattern."""

    def check(text):
        if not text.isprintable() or not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(advice)
        return text

    return check


def parse_arguments(arguments=None):
    name = matching(NAME, "take letters, digits, - and _")
    parser = OneLineParser(description="Results that agents share: see swarm/program.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="join | exchange | look | say | adopt")
    begin = commands.add_parser("join", allow_abbrev=False, help="share a night with the agents of a hub")
    begin.add_argument("url", type=matching("[^-].*", "must be a url or a folder"), help="of a git repository")
    begin.add_argument("--tag", type=name, required=True, help="what all its agents call the night")
    begin.add_argument("--agent", type=name, required=True, help="a name that no other agent of the hub has")
    begin.add_argument("--until", default="never", help="when the night ends, as for ledger.py start")
    commands.add_parser("exchange", allow_abbrev=False, help="send new rows, fetch those of others")
    words = commands.add_parser("look", allow_abbrev=False, help="the last results and messages")
    words.add_argument("word", nargs="*", help="what they contain: any text, or a hash")
    plan = commands.add_parser("say", allow_abbrev=False, help="tell the others what you try next")
    plan.add_argument("message", type=matching(r"\S.{0,499}", "must be one line of at most 500 characters"))
    idea = commands.add_parser("adopt", allow_abbrev=False, help="make another's train.py the next experiment")
    idea.add_argument("hash", type=matching(HASH, "must be 7 to 40 digits of a commit, 0-9 and a-f"))
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print a description shows ? in it
    worked, git_folder, complaint = run_git(ROOT, "rev-parse", "--git-common-dir")
    if not worked:
        raise SystemExit(f"no repository here: {reason_of(complaint)}")
    try:
        with FileLock(ROOT / git_folder / "autoresearch-hub.lock", timeout=NETWORK_SECONDS):
            run_command(options)
    except Timeout:
        raise SystemExit("another hub.py is at work in this clone: wait for it") from None


def run_command(options):
    if options.command == "join":
        join(options.url, f"{options.tag}/{options.agent}", options.until)
    elif options.command == "exchange":
        print_frontier(*exchange())
    elif options.command == "look":
        look(" ".join(options.word))
    elif options.command == "say":
        exchange(options.message)
        print(f"noted: {options.message}")
    elif options.command == "adopt":
        adopt(options.hash)
    else:
        night, record, _ = load_night(ROOT)
        print_frontier(night, record)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

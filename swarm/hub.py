"""
A hub: a bare git repository through which several agents share results, tries and plans. There is no other server.

    uv run swarm/hub.py join <url> --tag T --agent A    # the first time, and after everything here was lost
    uv run swarm/hub.py exchange                        # sends new runs, fetches those of others, prints the frontier
    uv run swarm/hub.py                                 # the frontier, without network
    uv run swarm/hub.py look <word>                     # the last runs and messages with a word or a hash
    uv run swarm/hub.py say '<what you try next>'       # the others see it before your run
    uv run swarm/hub.py adopt <hash>                    # another's train.py becomes the next experiment here

Only train.py is ever taken from others. share.py has what goes to the hub and comes from it.

Sections: Exchange, Frontier, Look, Adopt, Command line.
"""

import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).parent.parent))  # Python has put swarm/ there

import ledger
from harness.common import OneLineParser, call_git, git, matching, now, printable, resolve, run_command
from night.record import append, read_night, recording
from night.rules import bar, noise_floor, short
from night.steps import next_step
from swarm.share import NAME, NETWORK_SECONDS, join, read_agents, receive, send

SHOWN = 20  # lines of `look`
BEST = 5  # of the frontier
HASH = "[0-9a-f]{7,64}"

# --------------------------------------
# Exchange


def exchange(message=None):
    """Share this agent's night, with a message. Returns the night."""
    night, _, _, _ = ledger.refresh()
    if "/" not in night.tag:
        raise SystemExit(f"the night {night.tag} is on no hub: join one from a clone of its own")
    if message:
        with recording(night.tag) as (night, place):
            append(place, night, {"kind": "say", "time": now(), "commit": night.head, "message": message})
    reason = send(night)
    if reason:
        print(f"not all was exchanged: {reason}; the next exchange goes on")
    return night


# --------------------------------------
# Frontier


@dataclass
class Pool:
    """All runs of one train.py, whoever made them: every agent starts from a commit of its own."""

    scores: list = field(default_factory=list)
    keeps: list = field(default_factory=list)  # of commits that were kept: (time, agent, Run)

    @property
    def mean(self):
        return statistics.fmean(self.scores)


def find_pools(night, others):
    """What all have run on this benchmark and this kind of device: {train: Pool}."""
    pools = {}
    for agent, other in {**others, night.tag: night}.items():
        if (other.benchmark, other.device) != (night.benchmark, night.device):
            continue
        kept = set(other.kept)
        for attempt in other.tries.values():
            for run in attempt.counted():
                pool = pools.setdefault(run.train, Pool())
                pool.scores.append(run.val_bpb)
                if attempt.commit in kept:
                    pool.keeps.append((run.time, agent, run))
    return pools


def print_frontier(night):
    if not night.runs:
        print("frontier: unknown before the first run here, which tells the kind of device")
        return
    others = read_agents()
    pools = find_pools(night, others)
    best = sorted((pool.mean, train) for train, pool in pools.items() if pool.keeps)[:BEST]

    # not what this agent has tried itself
    tried = {run.train for run in night.runs.values()} | {resolve("HEAD:train.py")}
    ahead = []
    print(f"frontier: the best that anybody kept on {night.benchmark}, {night.device}")
    for mean, train in best:
        _, agent, run = min(pools[train].keeps, key=lambda keep: keep[:2])
        words = f"{mean:.6f}, runs {len(pools[train].scores)}, {short(run.commit)}, {agent}: {run.description}"
        is_there = resolve(f"{run.commit}:train.py") == train  # others may write what they like
        if bar(night) - mean > noise_floor(night) and train not in tried and is_there:
            words = f"{words:.120}; ahead of your last keep by {bar(night) - mean:.6f}"
            ahead.append(run.commit)
        print(f"  {printable(words, 200)}")
    unreadable = sum(other.unreadable for agent, other in others.items() if agent != night.tag)
    if unreadable:
        print(f"{unreadable} lines in the records of others cannot be read, and do not count")
    if ahead and wants_idea(night):
        print(f"next: uv run swarm/hub.py adopt {short(ahead[0])}")


def wants_idea(night):
    """Whether the ledger waits for a new idea: HEAD is the last keep, and nothing is changed, running or missing."""
    return next_step(night).kind == "idea" and not night.changed


# --------------------------------------
# Look


def look(word):
    reason = receive()
    if reason:
        print(f"the hub was not reached: {reason}; below is what was fetched before")
    night, _ = read_night()
    found = []
    for agent, other in {**read_agents(), night.tag: night}.items():
        for item, text in texts_of(other):
            line = f"{item.time[:16].replace('T', ' ')} {agent} {text}"
            if word.lower() in f"{line} commit={item.commit} parent={getattr(item, 'parent', '')}".lower():
                found.append((item.time, line))
    for _, line in sorted(found)[-SHOWN:]:
        print(printable(line, 700))
    if not found:
        print(f"nothing about {printable(word, 100)}" if word else "nothing yet")


def texts_of(night):
    """Each run and message of a night, with a text for it."""
    kept = set(night.kept)
    for run in night.runs.values():
        attempt = night.attempt(run.commit)
        status = run.state
        if run.counts:
            status = "keep" if run.commit in kept else attempt.verdict or "undecided"
        score = "" if run.val_bpb is None else f"{run.val_bpb:.6f} "
        place = f"{short(run.commit)} on {short(run.parent)}, {run.device or 'unknown device'}"
        yield run, f"{score}{status}, {place}: {run.description}, seed {run.seed}"
    for message in night.messages:
        yield message, f"says: {message.message}"


# --------------------------------------
# Adopt


def adopt(name):
    night, _, _, _ = ledger.refresh()
    if not wants_idea(night):
        step = next_step(night)
        raise SystemExit(f"no new idea starts now: {step.reason}; next: {step.command}")
    commit = resolve(f"{name}^{{commit}}")
    others = read_agents()
    agent = next((agent for agent, other in others.items() if other.attempt(commit).runs), None)
    if not agent:
        raise SystemExit(f"{name} names no run here, or several: uv run swarm/hub.py exchange, or use more digits")
    if not git("ls-tree", commit, "--", "train.py").output.startswith("100"):  # 100xxx: a regular file
        raise SystemExit(f"the train.py of {name} is not a file")
    train = resolve(f"{commit}:train.py")
    if train == resolve("HEAD:train.py"):
        raise SystemExit(f"{name} has the same train.py as HEAD")

    # the mean over all its runs that compare
    pool = find_pools(night, others).get(train)
    gain = "unknown"
    if pool and not math.isnan(bar(night)):
        gain = f"{bar(night) - pool.mean:+.6f}"
    idea = re.split("; expect", others[agent].attempt(commit).description)[0]
    message = f"adopted {short(commit)} from {agent}: {printable(idea, 100)}; expect {gain}"

    answer = git("checkout", commit, "--", "train.py")
    if answer.worked:
        answer = git("commit", "-q", "-m", message, "--", "train.py")
    if not answer.worked:
        git("checkout", "HEAD", "--", "train.py")
        raise SystemExit(f"git refuses to commit it: {answer.complaint}")
    print(message)
    print(git("diff", "--stat", "HEAD^", "HEAD").output)
    ledger.print_next(ledger.refresh()[0])


# --------------------------------------
# Command line


def parse_arguments(arguments=None):
    name = matching(NAME, "take letters, digits, - and _")
    parser = OneLineParser(description="Results that agents share: see swarm/program.md.")
    commands = parser.add_subparsers(dest="command", metavar="join | exchange | look | say | adopt")
    begin = commands.add_parser("join", help="share a night with the agents of a hub")
    begin.add_argument("url", type=matching("[^-].*", "must be a url or a folder"), help="of a git repository")
    begin.add_argument("--tag", type=name, required=True, help="what all its agents call the night")
    begin.add_argument("--agent", type=name, required=True, help="a name that no other agent of the hub has")
    begin.add_argument("--until", help="when a new night ends, as for ledger.py start")
    commands.add_parser("exchange", help="send new runs, fetch those of others")
    words = commands.add_parser("look", help="the last runs and messages")
    words.add_argument("word", nargs="*", help="what they contain: any text, or a hash")
    plan = commands.add_parser("say", help="tell the others what you try next")
    plan.add_argument("message", type=matching(r"\S.{0,499}", "must be one line of at most 500 characters"))
    idea = commands.add_parser("adopt", help="make another's train.py the next experiment")
    idea.add_argument("hash", type=matching(HASH, "must be 7 digits or more of a commit, 0-9 and a-f"))
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    folder = call_git("rev-parse", "--path-format=absolute", "--git-common-dir")
    try:
        # not the lock of the record: runs are recorded meanwhile
        with FileLock(Path(folder, "autoresearch-hub.lock"), timeout=NETWORK_SECONDS):
            do(options)
    except Timeout:
        raise SystemExit("another hub.py is at work in this clone: wait for it") from None


def do(options):
    if options.command == "join":
        join(options.url, f"{options.tag}/{options.agent}", options.until)
    elif options.command == "exchange":
        print_frontier(exchange())
    elif options.command == "look":
        look(" ".join(options.word))
    elif options.command == "say":
        exchange(options.message)
        print(f"noted: {options.message}")
    elif options.command == "adopt":
        adopt(options.hash)
    else:
        print_frontier(ledger.refresh()[0])


if __name__ == "__main__":
    run_command(main)

"""
The books of a night: results.tsv, what it is worth, and what comes next.

    uv run ledger.py start <tag> --until 07:00    # checks all that would end the night, and makes the branch
    uv run ledger.py                              # where the night stands, and the next command
    uv run ledger.py add ['<description>']        # after a run: writes its row
    uv run ledger.py open                         # exit 0 while the night goes on: for the loop around the agent

All state is in git (branch autoresearch/<tag>), results.tsv, night.json and the harness's journal. Nothing heavy is
imported, so it may run beside a training.

Sections: Status, Add, Start, Open, Command line. In night/: rows.py reads and writes results.tsv, load.py all the rest,
worth.py says what runs are worth, rules.py what comes next, checks.py what would end a night.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from datetime import datetime, timedelta

from harness.journal import ROOT, first_line, flags, git
from night import checks
from night.load import as_cells, fallbacks, in_utc, load_night, made_at, row_of
from night.rows import STATUSES, Row, append_rows
from night.rules import OVER, crashed_seed, has_crashed, next_step
from night.steps import describe
from night.waves import last_attempts, unwritten, winner
from night.worth import (
    KEEP,
    PROMISING,
    TRIES,
    disturbed_tries,
    ends_night,
    gain,
    is_final,
    kept_commits,
    new_runs,
    noise_floor,
    pair,
    scores_of,
    verdict,
)

LAST_ROWS = 10  # that the status shows
FIRST_WAIT, LONGEST_WAIT = 30, 15 * 60  # seconds that `open` waits when nothing was added since it was last asked

# --------------------------------------
# Status


def print_status(folder):
    night, record, problems = load_night(folder)
    kept = kept_commits(night)
    last_keep = kept[-1]

    # final runs measure the night's gain, and do not count in the score to beat
    scores = scores_of([row for row in night.rows if not is_final(row)], new_runs(night)[0])

    # the noise floor leaves out the commit that it judges
    floor = noise_floor(scores, without=None if night.head == last_keep else night.head)
    print(f"night:       {night.tag}, {len(night.rows)} rows, until {night.end}")
    print(f"benchmark:   {record['id']}, {record['settings']['time_budget']:g} s a run")
    if math.isnan(floor):
        print("noise floor: unknown until a commit has two runs that count")
    else:
        limits = f"promising from {PROMISING * floor:+.6f}, keep from {KEEP * floor:+.6f}"
        print(f"noise floor: {floor:.6f}, pooled over all commits but the one that is judged; {limits}")

    # the kept commits in order, each no worse than those before
    means = [statistics.fmean(scores[commit]) for commit in kept if commit in scores]
    if len(means) > 1:
        print(f"best so far: {sparkline(list(itertools.accumulate(means, min)))} {means[0]:.4f} to {min(means):.4f}")
    if last_keep in scores:
        print(f"to beat:     {statistics.fmean(scores[last_keep]):.6f}, {last_keep}")
    print_commit(folder, night, last_keep, scores)
    print_wave(night, last_keep)
    for row in night.rows[-LAST_ROWS:]:
        print(f"  {row.commit} {row.val_bpb:.6f} {row.status:<7} {row.description:.100}")
    for problem in problems:
        print(f"warning: {problem}")
    print_next(night)


def print_commit(folder, night, last_keep, scores):
    """The runs of HEAD, their gains over the last keep, and what asks for a look."""
    place = night.branch or "a detached HEAD"
    print(f"this commit: {night.head} on {place}")
    pairs, _ = pair(night.rows, night.runs)
    counted, _ = new_runs(night)
    own = [run for run in night.runs if run["commit"][:7] == night.head]
    for run in own:
        words = f"{run['val_bpb']:.6f} seed {run['seed']}, {run.get('steps', 0):,} steps"
        if night.head != last_keep and last_keep in scores:
            words += f", gain {statistics.fmean(scores[last_keep]) - run['val_bpb']:+.6f}"
        if run in counted:
            words += ", no row yet"
        elif run not in pairs.values():
            words += ", does not count"
        print(f"  {words}")
        for warning in flags(run):
            print(f"  warning: {warning}")
    if night.log.get("commit") == night.head:
        for line in fallbacks(folder / "run.log"):
            print(f"  warning: run.log: {line}")


def print_wave(night, last_keep):
    """The commits of a wave that are not kept, the best first, and the jobs that are out."""
    runs = [run for commit_runs, _ in unwritten(night).values() for run in commit_runs]
    scores = scores_of(night.rows, runs)
    attempts = last_attempts(night)

    # jobs that are out, and then what came in, against the last keep
    out = [job["job"] for job in attempts.values() if job["state"] == "out"]
    if out:
        print(f"wave:        {len(out)} jobs are out: {', '.join(out)}")
    if last_keep not in scores:
        return
    tried = dict.fromkeys(commit for commit, _ in attempts if commit in scores and commit not in kept_commits(night))
    for commit in sorted(tried, key=lambda commit: -gain(commit, last_keep, scores)):
        gained = gain(commit, last_keep, scores)
        words = verdict(commit, last_keep, scores)
        print(f"wave:        {commit} gains {gained:+.6f}, runs {len(scores[commit])}: {words}, {subject_of(commit)}")


def subject_of(commit):
    return git("log", "-1", "--format=%s", commit) or "no subject"


def print_next(night):
    step = next_step(night)
    print(f"why:  {step.reason}")
    print(f"next: {step.command}")


def sparkline(values, width=60):
    """Values as one line of block characters, at most `width` of them; nothing where they can't be printed."""
    width = min(width, len(values))
    values = [values[len(values) * (part + 1) // width - 1] for part in range(width)]
    low = min(values)
    span = max(values) - low or 1
    blocks = "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in values)
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ""
    return blocks


# --------------------------------------
# Add


def add(folder, description, forced=None):
    """Write the rows of HEAD's runs that have none, and of its crash. Raises SystemExit if nothing is to write."""
    night, _, problems = load_night(folder)
    refuse_unclear(night)
    counted, _ = new_runs(night)
    if forced == "crash" and counted:
        raise SystemExit("--crash is for a run without a score: use --discard")
    scores = scores_of(night.rows, counted)
    # rows end with the seed of their run, whoever typed one
    description = re.sub(r", seed \d+$", "", description or describe(night))
    if counted and ends_night(counted[0], night):
        description = f"{description.removesuffix(', final')}, final"
    if forced == "keep" and night.head not in kept_commits(night):
        refuse_worse(night, scores)
    status = forced or status_of(night, scores)
    if forced == "discard":
        description += ", dropped"
    rows = [row_of(run, status, description) for run in counted]
    rows += crash_rows(night, description, forced)

    # the gain, and what asks for a look, before anybody believes it; and why a run does not count
    print_commit(folder, night, kept_commits(night)[-1], scores)
    if not rows:
        raise SystemExit(f"nothing to add: {night.head} has no run without a row; see `uv run ledger.py`")
    write_rows(folder, rows, problems)


def add_wave(folder):
    """Write the rows of a wave's jobs that have none. Raises SystemExit if nothing is to write."""
    night, _, problems = load_night(folder)
    results = unwritten(night)
    if not results:
        raise SystemExit("nothing to add: no commit has all its jobs in and a row missing; see `uv run ledger.py`")

    # only one commit is kept: a second winner is combined with it, and runs again
    kept = [*kept_commits(night), winner(night, results)]  # the latter may be None
    rows = []
    for commit, (runs, crashes) in results.items():
        status = "keep" if commit in kept else "discard"
        subject = "baseline" if commit == night.start else subject_of(commit)
        for run in runs:
            ending = ", final" if ends_night(run, night) else ""
            rows.append(row_of(run, status, subject + ending))
        for seed, reason in crashes:
            rows.append(Row(commit, math.nan, 0.0, "crash", f"{subject}: {reason}, seed {seed}", 0))
    print_wave(night, kept_commits(night)[-1])
    write_rows(folder, rows, problems)


def write_rows(folder, rows, problems):
    append_rows(folder / "results.tsv", [as_cells(row) for row in rows])
    for problem in problems:
        print(f"warning: {problem}")
    for row in rows:
        print(f"added: {row.commit} {as_cells(row)[1]} {row.status}, {row.description}")
    print_next(load_night(folder)[0])


def refuse_unclear(night):
    """Raise SystemExit where it is not clear what has run."""
    if night.conflict:
        raise SystemExit("train.py has conflict markers: nothing is written; see `uv run ledger.py`")
    if night.changed:
        raise SystemExit("train.py has uncommitted changes, so the runs are of another file: commit or drop them first")
    if night.running and night.log.get("commit") == night.head:
        raise SystemExit(f"this commit's training runs (pid {night.running}): wait for it, then add its row")


def crash_rows(night, description, forced):
    """The row of a run of HEAD that has left no score, if there is one: [Row]."""
    seed, tries = disturbed_tries(night)
    log_is_ours = night.log.get("commit") == night.head
    if has_crashed(night):
        reason = f"{night.log['reason']}, seed {crashed_seed(night)}"
    elif tries >= TRIES or (tries and forced == "crash"):
        reason = f"disturbed {tries} times, seed {seed}"
    elif forced == "crash" and log_is_ours and night.log["seed"] and not new_runs(night)[0]:
        reason = f"cut off, seed {night.log['seed']}"  # no error, no score: only its owner knows why
    else:
        return []
    return [Row(night.head, math.nan, 0.0, "crash", f"{description}: {reason}", 0)]


def status_of(night, scores):
    """The status of HEAD's new rows: keep for what was kept before, and for what the rule keeps."""
    kept = kept_commits(night)
    if night.head in kept:
        return "keep"
    if night.head in scores and verdict(night.head, kept[-1], scores) == "keep":
        return "keep"
    return "discard"


def refuse_worse(night, scores):
    """Raise SystemExit unless something simpler has run twice, and its second run is not behind."""
    if len(scores.get(night.head, [])) < 2:
        raise SystemExit("--keep wants a second run first: AUTORESEARCH_SEED=2 uv run train.py > run.log 2>&1")
    last_keep = kept_commits(night)[-1]
    if last_keep not in scores:
        raise SystemExit("--keep wants a baseline to be compared with: see `uv run ledger.py`")
    gained = gain(night.head, last_keep, scores)
    if gained < 0:
        raise SystemExit(f"--keep is for what is simpler and not worse: the gain is {gained:+.6f}; use --discard")


# --------------------------------------
# Start


def start(folder, tag, until="never"):
    """Check everything, then make the branch, an empty results.tsv and night.json."""
    until = parse_until(until)
    problems = checks.find_problems(folder, tag)
    if problems:
        raise SystemExit("\n".join(f"- {problem}" for problem in problems))
    commit = checks.first_commit(folder, tag)

    # an old ledger is moved aside, over nothing
    ledger = folder / "results.tsv"
    if ledger.exists():
        names = (f"results-before-{tag.replace('/', '-')}{number}.tsv" for number in ("", *range(2, 1000)))
        old = next(folder / name for name in names if not (folder / name).exists())
        os.replace(ledger, old)
        print(f"the ledger of another night is {old.name} now")
    append_rows(ledger, [])
    state = {"tag": tag, "until": until, "started": made_at(commit), "commit": commit}
    (folder / "night.json").write_text(json.dumps(state) + "\n")
    (folder / "run.log").unlink(missing_ok=True)
    ideas = folder / "ideas.md"
    if not ideas.exists():
        ideas.write_text("# Ideas\n\n## Backlog\n\n## What each try taught\n")
    night, record, _ = load_night(folder)
    print(f"branch autoresearch/{tag}, from {git('log', '-1', '--format=%h (%s)', 'HEAD^')}, until {night.end}")
    if until.isdecimal() and int(until) < 24:
        print(f"(if you meant the hour: delete the branch, and start with --until {int(until):02}:00)")
    print(f"benchmark {record['id']}, {record['settings']['time_budget']:g} s a run")
    print_next(night)


def parse_until(text):
    """A time of day becomes the next such time, in ISO form and UTC; numbers and `never` stay. Raises SystemExit."""
    if text == "never" or re.fullmatch(r"[1-9][0-9]*", text):
        return text
    clock = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", text)
    here = datetime.now()
    if clock:
        moment = here.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        if moment <= here:
            moment += timedelta(days=1)
        return in_utc(moment)

    # a date, in the time of this place unless it names its own
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SystemExit(f"--until {text}: must be like 07:00, 2026-11-28T07:00, 40 (rows) or never") from None
    if moment.astimezone() <= here.astimezone():
        raise SystemExit(f"--until {text}: that is in the past")
    return in_utc(moment)


# --------------------------------------
# Open


def wait_while_open(folder):
    """
    Raise SystemExit(1) when the night is over. When no row was added since it was last asked, it waits first: 30 s,
    then twice as long each time. So a client that fails at once, as at a usage limit, costs nothing. Books in a bad
    state end no night: an agent may repair them.
    """
    try:
        night, _, _ = load_night(folder)
        step = next_step(night)
        rows = f"{night.tag}: {len(night.rows)}"
    except (SystemExit, Exception) as error:
        print(f"the books cannot be read ({first_line(error)})", flush=True)
        step, rows = None, "unknown"
    if step and step.command == OVER:
        print(f"the night is over: {step.reason}")
        raise SystemExit(1)

    # how long it has waited is kept in .git: no other place is sure to be ignored
    memory = folder / (git("rev-parse", "--git-path", "autoresearch-open.json") or ".git/autoresearch-open.json")
    wait = next_wait(memory, rows)
    if wait:
        print(f"no row was added since: waiting {wait} s", flush=True)
        time.sleep(wait)


def next_wait(memory, rows):
    """The seconds to wait, given the file with those of the last time, which is written anew."""
    wait = 0
    try:
        before = json.loads(memory.read_text())
        if before["rows"] == rows:
            wait = min(LONGEST_WAIT, max(FIRST_WAIT, 2 * before["wait"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # asked for the first time
    try:
        memory.write_text(json.dumps({"rows": rows, "wait": wait}))
    except OSError:
        wait = FIRST_WAIT  # where nothing can be kept, a loop must not spin
    return wait


# --------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(arguments=None):
    parser = OneLineParser(description="The books of a night: see program.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="start | add | open")
    begin = commands.add_parser("start", allow_abbrev=False, help="check everything and make the branch")
    begin.add_argument("tag", help="a name for the night, such as nov28")
    begin.add_argument("--until", default="never", help="07:00, 2026-11-28T07:00, 40 (rows) or never, the default")
    row = commands.add_parser("add", allow_abbrev=False, help="write the rows of this commit's runs")
    row.add_argument("description", nargs="?", help="what was tried; without one, the commit's message")
    row.add_argument("--wave", action="store_true", help="instead: the rows of the wave's jobs (swarm/program.md)")
    choice = row.add_mutually_exclusive_group()
    for status in STATUSES:
        choice.add_argument(
            f"--{status}", action="store_const", const=status, dest="status", help=f"make it a {status}"
        )
    commands.add_parser("open", allow_abbrev=False, help="exit 0 while the night goes on")
    options = parser.parse_args(arguments)
    if options.command == "add" and options.wave and (options.description or options.status):
        row.error("--wave takes no description and no status: each commit has its own")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)

    # a terminal that cannot print a description shows ? in it
    sys.stdout.reconfigure(errors="replace")
    if options.command == "start":
        start(ROOT, options.tag, options.until)
    elif options.command == "add" and options.wave:
        add_wave(ROOT)
    elif options.command == "add":
        add(ROOT, options.description, options.status)
    elif options.command == "open":
        wait_while_open(ROOT)
    else:
        print_status(ROOT)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

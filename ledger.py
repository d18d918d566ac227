"""
The commands of a night: what has run, what it is worth, and what comes next.

    uv run ledger.py start <tag> --until 07:00    # the human: checks all that would end the night, and makes the branch
    uv run ledger.py                              # where the night stands, and the next command; --json for programs
    uv run ledger.py run                          # the agent: train what comes next, record it, decide
    uv run ledger.py keep | discard               # the agent: of HEAD, where the rules leave it the choice
    uv run ledger.py until <when>                 # the human: another end of the night; `now` ends it
    uv run ledger.py open                         # exit 0 while an agent has something to do: for the loop around it

Nothing heavy is imported, so it may run beside a training.

Sections: Night, Status, Run, Keep and discard, Start and until, Open, Command line. In night/: state.py holds a night,
record.py reads and writes its record, rules.py decides, steps.py says what comes next, runner.py trains, ends.py judges
how a run ended, view.py writes results.tsv, checks.py and clients.py look for problems before the night.
"""

import itertools
import json
import math
import re
import signal
import statistics
import sys
import time
from dataclasses import asdict
from datetime import datetime, timedelta, timezone

from harness import common
from harness.common import OneLineParser, find_home, git, now, resolve, run_command
from harness.journal import flags, read_journal
from night import checks, clients, ends, runner
from night.record import NoNight, append, find_tag, read_night, read_run, recording
from night.rules import bar, is_over, noise_floor, scores_of, short
from night.steps import RUN, next_step
from night.view import move_aside, rows_of, write_view

LAST_ROWS = 10  # that the status shows
SPEED_GAIN = 0.11  # of val_bpb for e times the steps: on two cores 1% of them is worth 0.0011
POLL_SECONDS = 0.3  # between looks at a run that goes on
IDEAS = "# Ideas\n\n## From the human\n\n## Backlog\n\n## What each try taught\n"

# --------------------------------------
# Night


def refresh():
    """
    Settle the runs that have ended and bring results.tsv up to date. Returns (night, folder of its record, the lines of
    its benchmark's journal that name a commit, warnings as sentences). Raises NoNight if no night is checked out.
    """
    with recording(find_tag()) as (night, place):
        # asked before the journal is read: a run that ends in between is settled by the next look
        running = runner.is_running(place)
        journal = [line for line in read_journal(find_home() / night.benchmark) if line.get("commit")]
        ends.settle(place, night, journal, running)
        edited = write_view(common.ROOT, night, place)
    problems = [edited] if edited else []
    if night.unreadable:
        problems.append(f"{night.unreadable} lines of {place / 'record.jsonl'} cannot be read, and do not count")
    for name, reason in night.broken.items():
        problems.append(f"wave/{name} cannot be read, {reason}: git worktree repair wave/{name}, or remove the folder")
    same = same_train(night)
    if same:
        problems.append(f"this train.py has run before, as {short(same.commit)}: {same.verdict or 'undecided'}")
    by_hand = [line for line in journal if line["commit"] == night.head and not line.get("run")]
    if by_hand:
        problems.append(f"{len(by_hand)} runs of this commit by hand have no row: `{RUN}` makes runs that count")
    return night, place, journal, problems


def same_train(night):
    """The Try of another commit with the train.py of HEAD; None if there is none, or HEAD is decided."""
    if night.head in night.kept or night.attempt(night.head).verdict:
        return None
    train = resolve("HEAD:train.py")
    for attempt in night.tries.values():
        if attempt.commit != night.head and any(run.train == train for run in attempt.runs.values()):
            return attempt
    return None


# --------------------------------------
# Status


def print_status():
    night, _, journal, problems = refresh()
    floor = noise_floor(night, without=None if night.head == night.last_keep else night.head)
    print(f"night:       {night.tag}, {rows_in_words(night)}, until {end_in_words(night)}")
    print(f"benchmark:   {night.benchmark}, on {night.device or 'a cluster'}")
    if math.isnan(floor):
        print("noise floor: unknown until a commit has two runs that count")
    else:
        print(f"noise floor: {floor:.6f}; each step of an idea must gain more than a quarter, {floor / 4:.6f}")

    # the kept commits in order, each no worse than those before
    kept = [scores_of(night.attempt(commit)) for commit in night.kept]
    means = [statistics.fmean(scores) for scores in kept if scores]
    if len(means) > 1:
        print(f"best so far: {sparkline(list(itertools.accumulate(means, min)))} {means[0]:.4f} to {min(means):.4f}")
    if not math.isnan(bar(night)):
        print(f"to beat:     {bar(night):.6f}, {short(night.last_keep)}")
    standing = night.attempt(night.head).verdict or "undecided"
    if night.head == night.start:
        standing = "the baseline"
    print(f"this commit: {short(night.head)}, {standing}")
    for run in night.attempt(night.head).runs.values():
        print(f"  {run_in_words(run, night)}")

    # and the last rows of others
    rows = [cells for cells in rows_of(night) if cells[0] != short(night.head)]
    for cells in rows[-LAST_ROWS:]:
        print(f"  {cells[0]} {cells[1]} {cells[3]:<7} {cells[4]:.160}")
    print_problems(problems)
    print_next(night)


def end_in_words(night):
    return f"{night.until} rows" if night.until.isdecimal() else night.until


def rows_in_words(night):
    """How many rows there are. Those of final runs do not count for an end by rows."""
    finals = [run for run in night.runs.values() if run.is_done and run.role == "final"]
    count = len(rows_of(night)) - len(finals)
    words = f"{count} rows"
    if count == 1:
        words = "1 row"
    if finals:
        words += f" and {len(finals)} final"
    return words


def print_problems(problems):
    for problem in problems:
        print(f"warning: {problem}")


def print_next(night):
    step = next_step(night)
    print(f"why:  {step.reason}")
    print(f"next: {step.command}")


def run_in_words(run, night):
    words = f"seed {run.seed}, {run.role}: {run.state}"
    if run.val_bpb is not None:
        words += f" {run.val_bpb:.6f}"
    if run.counts and run.role == "idea" and not math.isnan(bar(night)) and run.commit != night.last_keep:
        words += f", gain {bar(night) - run.val_bpb:+.6f}"
    if run.steps:
        words += f", {run.steps:,} steps, {run.tokens_per_second:,.0f} tokens/s"
    if run.reason:
        words += f"; {run.reason}"
    return words


def sparkline(values):
    """Values as one line of block characters."""
    low = min(values)
    span = max(values) - low or 1
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in values)


def print_json():
    """The night for programs: what was recorded, what comes next, and what the rules make of it."""
    night, _, _, problems = refresh()
    known = {"tag", "until", "start", "benchmark", "device", "line", "changed", "going_on", "time"}
    values = {name: value for name, value in vars(night).items() if name in known}
    values |= {
        "runs": [asdict(run) for run in night.runs.values()],
        "decisions": [asdict(decision) for decision in night.decided.values()],
        "kept": night.kept,
        "noise_floor": none_if_nan(noise_floor(night)),
        "to_beat": none_if_nan(bar(night)),
        "over": is_over(night),
        "problems": problems,
        "next": asdict(next_step(night)),
    }
    print(json.dumps(values))


def none_if_nan(value):
    """JSON has no NaN."""
    if math.isnan(value):
        return None
    return value


# --------------------------------------
# Run


def run():
    """
    Train what comes next, or wait for the run that goes on; then print how the run ended, and what comes next. If there
    is nothing to train, print the last run again.
    """
    night, place, _, _ = refresh()
    step = next_step(night)

    # the last branch prints the last run again: the client may have lost the first answer
    if step.kind == "run" and night.on_cluster:
        raise SystemExit(f"nothing is run here: this night trains on a cluster; next: {step.command}")
    if step.kind == "run":
        keeper = start_run(step.training)
        wait_for_run(place, keeper)
    elif step.kind == "wait":
        print(f"run {night.going_on['run']} goes on: waiting for it", flush=True)
        wait_for_run(place, None)
    elif step.kind == "drop" or (step.kind == "reset" and not night.attempt(night.head).runs):
        raise SystemExit(f"nothing is run: {step.reason}\nnext: {step.command}")
    else:
        print("there is nothing to run; the last run:")
    night, _, journal, problems = refresh()
    for last in list(night.runs.values())[-1:]:
        print_run(last, night, journal, runner.read_log(common.ROOT / "run.log"))
    print_problems(problems)
    print_next(night)


def start_run(training):
    """Start a keeper, unless another process has made this run since, or makes it; returns its process, or None."""
    with recording(find_tag()) as (night, place):
        if next_step(night).training != training:
            return None
        return runner.begin(place, night, training)


def wait_for_run(place, keeper):
    """
    Wait until the run is over. Ctrl-C ends a run that this process has started; otherwise only the waiting, as do all
    other signals.
    """
    said = ""
    try:
        while runner.is_running(place):
            time.sleep(POLL_SECONDS)
            if keeper:
                keeper.poll()  # so that it is no zombie
            state = read_run(place) or {}
            if state.get("waiting") and state["waiting"] != said:
                said = state["waiting"]
                print(f"waiting for the device: {said}", flush=True)
            show_progress(state)
    except KeyboardInterrupt:
        if not keeper:
            raise
        keeper.send_signal(signal.SIGINT)
        keeper.wait()
        refresh()
        raise
    finally:
        show_progress(None)


def show_progress(state):
    """On a terminal, the last line of the log; None clears it."""
    if sys.stdout.isatty():
        line = runner.last_line(runner.read_log(state["log"])) if state else ""
        print(f"\r\x1b[K{line[:100]}", end="", flush=True)


def print_run(run, night, journal, log):
    """A run that is over: its score and gain, its curve beside that of the last keep, and what asks for a look."""
    print(f"run:  {short(run.commit)} {run_in_words(run, night)}")

    # this run's losses, then those of the last keep; if this commit is the last keep now, those of the keep before
    if run.losses:
        print(f"loss by tenths: {as_curve(run.losses)}")
    keep = night.last_keep
    if run.commit == keep and run.role == "idea":
        keep = night.kept[-2]
    keeps = night.attempt(keep).counted()
    if keeps and run.commit != keep:
        speed = f"{keeps[-1].steps:,} steps, {keeps[-1].tokens_per_second:,.0f} tokens/s"
        print(f"last keep:      {as_curve(keeps[-1].losses)}, seed {keeps[-1].seed}, {speed}")
        print_machine(run, keeps)
    warnings = [flag for line in journal if line.get("run") == run.run for flag in flags(line)]
    print_problems(warnings + ends.fallbacks(log))
    decision = night.attempt(run.commit).decision
    if decision and run.role == "idea":
        print(f"decision: {decision.decision} {short(run.commit)}, {decision.reason}")


def print_machine(run, others):
    """How fast the machine was during a run: a gain over the other runs may be one of the machine."""
    speed = ends.machine_speed(run.product_ms, others)
    if not math.isnan(speed):
        worth = SPEED_GAIN * math.log(speed)
        print(f"machine: at {speed:.2f} of its speed in the runs of the last keep, worth about {worth:+.3f}")


def as_curve(losses):
    return " ".join("-" if loss is None else f"{loss:.2f}" for loss in losses)


# --------------------------------------
# Keep and discard


def decide(decision):
    """The agent's own decision of HEAD, where the rules leave it the choice."""
    night, _, _, _ = refresh()
    if night.head == night.start:
        raise SystemExit("the baseline is what all is compared with: commit an idea first")
    if night.head in night.kept:
        raise SystemExit(f"{short(night.head)} is kept already: to take it back, commit an idea without it")
    if not night.attempt(night.head).counted():
        raise SystemExit(f"{short(night.head)} has no run that counts; next: {RUN}")
    if night.last_keep not in night.line and decision == "keep":
        raise SystemExit(f"not kept: {next_step(night).reason}; next: {next_step(night).command}")

    # a keep is a wish, which the rule decides as soon as there is a second run
    values = {"decision": "discard", "reason": "by hand"}
    if decision == "keep":
        values = {
            "decision": "simpler",
            "reason": "kept if its second run is not worse; in a wave, once that is decided",
        }
    with recording(night.tag) as (night, place):
        append(place, night, {"kind": "decision", "time": now(), "commit": night.head, "by": "hand", **values})
    night, _, _, _ = refresh()
    made = night.attempt(night.head).decision
    print(f"decision: {made.decision} {short(night.head)}, {made.reason}")
    print_next(night)


# --------------------------------------
# Start and until


def start(tag, until):
    """Check everything, then make the branch, the first commit and the record. Returns the night."""
    until = parse_until(until, "--until ")
    problems, device = checks.find_problems(tag)
    if problems:
        raise SystemExit("\n".join(f"- {problem}" for problem in problems))
    benchmark = (find_home() / "current").read_text().strip()
    words = {"kind": "start", "time": now(), "tag": tag, "until": until, "benchmark": benchmark, "device": device}
    warnings = clients.warnings()
    checks.first_commit(tag, json.dumps(words))

    # a results.tsv of another night, or of another program
    table = common.ROOT / "results.tsv"
    if table.exists():
        aside = move_aside(table, f"results-before-{tag.replace('/', '-')}")
        print(f"there was a results.tsv: it is {aside.name} now")
    ideas = common.ROOT / "ideas.md"
    if not ideas.exists():
        ideas.write_text(IDEAS)
    night, _, _, _ = refresh()
    origin = git("log", "-1", "--format=%h (%s)", "HEAD^").output
    print(f"branch autoresearch/{tag}, from {origin}, until {end_in_words(night)}")
    if until.isdecimal() and int(until) < 24:
        print(f"(if you meant the hour: uv run ledger.py until {int(until):02}:00)")
    if until == "never":
        print("(a night without an end has no final runs, so no gain to report: `uv run ledger.py until now` ends it)")
    print(f"benchmark {night.benchmark}, {runner.load_budget(night):g} s a run, on {night.device or 'a cluster'}")
    print_problems(warnings)
    return night


def set_until(text):
    """Another end of the night. It also says that the human has mended what no agent can."""
    until = now() if text == "now" else parse_until(text, "until ")
    with recording(find_tag()) as (night, place):
        append(place, night, {"kind": "end", "time": now(), "until": until})
    night, _, _, _ = refresh()
    print(f"the night {night.tag} lasts until {end_in_words(night)}; it has {rows_in_words(night)}")
    print_next(night)


def parse_until(text, command):
    """A time of day becomes the next such time, in ISO form and UTC; numbers and `never` stay. Raises SystemExit."""
    if text == "never" or re.fullmatch("[1-9][0-9]{0,8}", text):
        return text
    clock = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", text)
    here = datetime.now()
    if clock:
        moment = here.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        if moment <= here:
            moment += timedelta(days=1)
    else:
        # a date, in the time of this place unless it names its own
        try:
            moment = datetime.fromisoformat(text).astimezone()
        except (ValueError, OverflowError):
            raise SystemExit(f"{command}{text}: must be like 07:00, 2026-11-28T07:00, 40 (rows) or never") from None
        if moment <= here.astimezone():
            raise SystemExit(f"{command}{text}: that is in the past")
    return moment.astimezone(timezone.utc).isoformat(timespec="seconds")


# --------------------------------------
# Open


def is_open():
    """
    Whether an agent has something to do: the night is not over, and waits for nothing that only the human can mend.
    Where another branch is checked out, an agent can go back to the night's.
    """
    try:
        night, _ = read_night()
    except NoNight as error:
        print(error)
        return "git checkout" in str(error)
    step = next_step(night)
    if step.kind in ("over", "tell"):
        print(f"{step.command.removeprefix('# ')}: {step.reason}")
    return step.kind not in ("over", "tell")


# --------------------------------------
# Command line


def parse_arguments(arguments=None):
    parser = OneLineParser(description="The commands of a night: see program.md.")
    parser.add_argument("--json", action="store_true", help="print the night for programs")
    commands = parser.add_subparsers(dest="command", metavar="start | run | keep | discard | until | open")
    begin = commands.add_parser("start", help="check everything and make the branch")
    begin.add_argument("tag", help="a name for the night, such as nov28")
    begin.add_argument("--until", required=True, metavar="WHEN", help="07:00, 2026-11-28T07:00, 40 (rows) or never")
    commands.add_parser("run", help="train what comes next, record it, decide")
    commands.add_parser("keep", help="HEAD is simpler: keep it, if its second run is not worse")
    commands.add_parser("discard", help="drop HEAD, though it is promising")
    end = commands.add_parser("until", help="another end of the night")
    end.add_argument("when", help="as for start, or `now`")
    commands.add_parser("open", help="exit 0 while an agent has something to do")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.command == "start" and "/" in options.tag:
        raise SystemExit("a tag with / is a night on a hub: uv run swarm/hub.py join (swarm/program.md)")
    elif options.command == "start":
        print_next(start(options.tag, options.until))
    elif options.command == "run":
        run()
    elif options.command in ("keep", "discard"):
        decide(options.command)
    elif options.command == "until":
        set_until(options.when)
    elif options.command == "open":
        sys.exit(0 if is_open() else 1)
    elif options.json:
        print_json()
    else:
        print_status()


if __name__ == "__main__":
    run_command(main)

"""
What comes next in a night: a command, and why. The rules are those of program.md, in its order; they are pure, so that
their test is a table of nights.
"""

import math
import re
from collections import namedtuple

from night.worth import (
    FINAL_SEEDS,
    TRIES,
    confirmed_gain,
    disturbed_tries,
    first_free,
    kept_commits,
    new_runs,
    pair,
    scores_of,
    seeds_of,
    verdict,
)

BASELINE_SEEDS = (1, 2, 3)
DRIFT_ROWS = 20  # after which the baseline runs once more
PRUNING_IDEAS = 8  # after which something that was kept is taken out, to see
OVER = "# the night is over"
DROP = "git checkout HEAD -- train.py"

Step = namedtuple("Step", ["command", "reason"])


def next_step(night):
    """What comes next: a Step whose command can be run as it stands. A comment (#) where it is the agent's turn."""
    best = kept_commits(night)[-1]
    return (
        in_trouble(night)
        or off_the_line(night, best)
        or after_a_run(night)
        or in_baseline(night)
        or with_an_idea(night, best)
        or at_the_end(night, best)
        or with_the_next_idea(night, best)
    )


# --------------------------------------
# Steps


def run_step(night, seed, reason):
    # its log is of this run and says no error, but there is no score
    scored = [run["seed"] for run in night.runs if run["commit"][:7] == night.head]
    if night.log == {"commit": night.head, "seed": seed, "reason": ""} and seed not in scored:
        reason += "; its last run was cut off (if memory ran out, add it with --crash)"
    return Step(f"AUTORESEARCH_SEED={seed} uv run train.py > run.log 2>&1", reason)


def add_step(night, reason):
    return Step(f"uv run ledger.py add '{describe(night)}'", reason)


def go_to(commit, night, reason):
    if commit == night.start:
        return Step(f"git checkout -q --detach {commit}", reason)
    return Step(f"git checkout -q autoresearch/{night.tag}", reason)


def describe(night):
    """What the next row says, if nobody says it better."""
    seeds = [run["seed"] for run in new_runs(night)[0]] or [night.log.get("seed")]
    ending = ", final" if is_over(night) and seeds[0] in FINAL_SEEDS else ""
    if night.head == night.start:
        return f"baseline{ending}"
    if ending and night.head == kept_commits(night)[-1]:
        return "last keep, final"
    subject = re.sub(r"[^ -&(-~]+", " ", night.subject).strip(" -")  # printable ASCII, no quotes, not like an option
    return subject or "no subject"


# --------------------------------------
# Before anything else


def in_trouble(night):
    """What has to be put right before anything else."""
    branch = f"autoresearch/{night.tag}"
    if night.conflict and night.changed:
        return Step(DROP, "train.py has conflict markers: begin again, by hand")
    if night.conflict and night.head != night.start:
        return Step("git reset -q --keep HEAD^", "train.py was committed with conflict markers")
    if night.running:
        kind = "another training, perhaps not yours, runs"
        if night.log.get("commit") == night.head:
            kind = "this commit's training runs"
        return Step("tail -c 300 run.log", f"{kind} (pid {night.running}): wait for it")
    if night.stray:
        return Step("git status --short", f"{night.stray} is not as in HEAD, so no run counts: restore or move it")
    if night.branch not in ("", branch) and night.changed:
        return Step("git status --short", f"train.py has changes, and this is not {branch}: commit or drop them")
    if night.branch not in ("", branch):
        return Step(f"git checkout -q {branch}", "this is not the branch of the night")
    return None


def off_the_line(night, best):
    """HEAD is not where the night goes on: behind the last keep, beside it, or on no branch with something new."""
    branch = f"autoresearch/{night.tag}"
    is_known = night.head in kept_commits(night) or bool(seeds_of(night.head, night)) or has_crashed(night)
    if is_known and not night.branch or night.changed:
        return None
    if night.branch and best not in night.lineage and not new_runs(night)[0]:
        return Step(f"git reset -q --keep {best}", "HEAD is not on top of the last keep")
    if night.branch:
        return None

    # a detached HEAD that never ran: the branch takes what was committed on top of the last keep
    if best in night.lineage:
        move = f"git checkout -q {branch} && git reset -q --keep {night.head}"
        return Step(move, "HEAD is on no branch, so give it one")
    return Step(f"git checkout -q {branch}", "HEAD is on no branch, and not on top of the last keep")


# --------------------------------------
# After a run


def after_a_run(night):
    """Rows that are missing, and runs that do not count."""
    counted, _ = new_runs(night)
    if night.changed and (counted or has_crashed(night)):
        return Step("git diff", f"runs of HEAD have no row, but train.py has changes: {DROP}, then add the row")
    if counted:
        return add_step(night, f"runs of this commit without a row: {len(counted)}")
    if has_crashed(night):
        return add_step(night, f"it has crashed: {night.log['reason']}")
    if night.changed:
        return None

    seed, tries = disturbed_tries(night)
    if tries >= TRIES:
        return add_step(night, f"disturbed {tries} times: give it up")
    if tries:
        return run_step(night, seed, "disturbed: stop what else runs here, or wait ten minutes, then run it again")
    return with_a_run_elsewhere(night)


def has_crashed(night):
    """Whether run.log is of a run of HEAD that ended with an error, and has no row."""
    return night.log.get("commit") == night.head and night.log["reason"] != ""


def crashed_seed(night):
    """Its seed. A run that did not come to say it has the first that is free."""
    return night.log["seed"] or first_free(seeds_of(night.head, night))


def with_a_run_elsewhere(night):
    """A run of another commit of this night that counts and has no row: somebody left before adding it."""
    _, left = pair(night.rows, night.runs)
    for commit in dict.fromkeys(run["commit"][:7] for run in left):
        if commit != night.head and new_runs(night, commit)[0]:
            return Step(f"git checkout -q --detach {commit}", "a run of this commit has no row: go there to add it")
    return None


# --------------------------------------
# The night in order: baseline, idea, end, next idea


def in_baseline(night):
    seeds = seeds_of(night.start, night)
    missing = [seed for seed in BASELINE_SEEDS if seed not in seeds]
    if night.start not in scores_of(night.rows) and len(seeds) >= 2:
        return Step("tail -c 1500 run.log", "the untouched train.py does not run here: tell the human")
    if not missing:
        return None
    if night.changed:
        return Step(DROP, "the baseline is the untouched train.py: note your idea, and drop it here")
    if night.head != night.start:
        return Step(f"git checkout -q --detach {night.start}", "the baseline is not complete")
    return run_step(night, missing[0], "the baseline")


def with_an_idea(night, best):
    """HEAD is a commit that is not the best: run it, run it again, or let it go."""
    if night.head in kept_commits(night):
        return None
    scores = scores_of(night.rows)
    seeds = seeds_of(night.head, night)
    if night.changed:
        return Step("git diff", f"train.py has changes: commit them, or drop them with `{DROP}`")
    if not seeds and not is_over(night):
        return run_step(night, 1, "a new idea")
    crashed = any(row.commit == night.head and row.status == "crash" for row in night.rows)
    if not crashed and night.head in scores and verdict(night.head, best, scores) == "promising":
        return run_step(night, first_free(seeds), "promising: the second run decides")
    store = f"git update-ref refs/tries/{night.head} {night.head}"
    return Step(f"{store} && git reset -q --keep {best}", "it is not kept: store the try, and go back")


def is_over(night):
    """Whether no new idea may start."""
    if night.until == "never":
        return False
    if night.until.isdecimal():
        ideas = [row for row in night.rows if not re.search(r", final, seed \d+$", row.description)]
        return len(ideas) >= int(night.until)
    return night.time >= night.until


def final_runs(night, best):
    """The runs at the end that are missing, in turns: [(commit, seed)]. None if nothing was kept."""
    if best == night.start:
        return []
    wanted = [(commit, seed) for seed in FINAL_SEEDS for commit in (night.start, best)]
    return [(commit, seed) for commit, seed in wanted if seed not in seeds_of(commit, night)]


def at_the_end(night, best):
    """The baseline and the last keep run on fresh seeds; then the night is over."""
    if not is_over(night):
        return None
    if night.changed:
        return Step(DROP, "the end: no new idea starts")
    for commit, seed in final_runs(night, best):
        if night.head == commit:
            return run_step(night, seed, "the end: what was gained, on seeds that selected nothing")
        return go_to(commit, night, "the end: in turns, the baseline and the last keep")
    if not night.branch:
        return go_to("", night, "back to the branch")
    if best == night.start:
        return Step(OVER, "nothing was kept")
    gained = confirmed_gain(night)
    if math.isnan(gained):
        return Step(OVER, "the final runs have no score, so no gain is confirmed")
    return Step(OVER, f"the gain to report, on fresh seeds: {gained:+.6f}")


def with_the_next_idea(night, best):
    """HEAD was kept, or is the baseline once more."""
    commit = "git commit -q -m '<idea>; expect <gain>' -- train.py"
    if night.changed and night.branch and night.head == best:
        return Step("# a new idea is in train.py: finish it", f"then commit it: {commit}")
    if night.changed:
        return Step(DROP, "new ideas start from the last keep, on the branch of the night")

    # is the machine still what it was?
    latest = [row.commit for row in night.rows[-DRIFT_ROWS:]]
    if len(night.rows) > DRIFT_ROWS and night.start not in latest and best != night.start:
        if night.head == night.start:
            return run_step(night, 1, "the baseline once more, to see drift")
        return go_to(night.start, night, f"no baseline in {DRIFT_ROWS} rows: run it once more, to see drift")
    if not night.branch or night.head != best:
        return go_to("", night, "back to the last keep")

    ideas = len({row.commit for row in night.rows} - {night.start})
    if ideas and ideas % PRUNING_IDEAS == 0 and best != night.start:
        return Step("# a new idea: edit train.py", "a round of pruning: take out one thing that was kept, and see")
    return Step("# a new idea: edit train.py", f"then commit it: {commit}")

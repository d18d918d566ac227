"""
What comes next in a night: a command, and why. The rules are those of program.md, in its order; they are pure, so that
their test is a table of nights.
"""

import math
import re

from night.steps import DROP, NEW_IDEA, Step, add_step, go_to, run_step, submit_step
from night.waves import last_attempts, with_a_wave
from night.worth import (
    FINAL_SEEDS,
    TRIES,
    confirmed_gain,
    disturbed_tries,
    first_free,
    is_given_up,
    is_over,
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
PRUNED = r"^prun"  # how the description of that begins
OVER = "# the night is over"


def next_step(night):
    """The next Step. Its command can be run as it stands; a comment (#) means that it is the agent's turn."""
    last_keep = kept_commits(night)[-1]
    return (
        in_trouble(night)
        or with_a_wave(night)
        or off_the_line(night, last_keep)
        or after_a_run(night)
        or in_baseline(night)
        or with_an_idea(night, last_keep)
        or at_the_end(night, last_keep)
        or with_the_next_idea(night, last_keep)
    )


# --------------------------------------
# Before anything else


def in_trouble(night):
    """Trouble that has to be put right first."""
    branch = f"autoresearch/{night.tag}"
    if night.conflict and night.changed:
        return Step(DROP, "train.py has conflict markers: begin again, by hand")
    if night.conflict and night.head != night.start:
        return Step("git reset -q --keep HEAD^", "train.py was committed with conflict markers")
    if night.running and not any(job["state"] == "out" for job in last_attempts(night).values()):
        kind = "another training, perhaps not yours, runs"
        if night.log.get("commit") == night.head:
            kind = "this commit's training runs"
        return Step("tail -c 300 run.log", f"{kind} (pid {night.running}): wait for it")
    if night.stray:
        return Step(f"# restore or move {night.stray}", "it is not as in HEAD, so no run counts")
    if night.branch not in ("", branch) and night.changed:
        return Step("# train.py has changes: commit them, or drop them", f"this is not {branch}")
    if night.branch not in ("", branch):
        return Step(f"git checkout -q {branch}", "this is not the branch of the night")
    return None


def off_the_line(night, last_keep):
    """HEAD is not where the night goes on: behind the last keep, beside it, or on no branch with something new."""
    branch = f"autoresearch/{night.tag}"
    # the rules below handle changes, and a tried commit that is checked out by its hash
    was_tried = night.head in kept_commits(night) or bool(seeds_of(night.head, night)) or has_crashed(night)
    if night.changed or (was_tried and not night.branch):
        return None
    if night.branch and last_keep not in night.lineage and not new_runs(night)[0]:
        return Step(f"git reset -q --keep {last_keep}", "HEAD is not on top of the last keep")
    if night.branch:
        return None

    # a detached HEAD that never ran: the branch takes what was committed on top of the last keep
    if last_keep in night.lineage:
        move = f"git checkout -q {branch} && git reset -q --keep {night.head}"
        return Step(move, "HEAD is on no branch, so give it one")
    return Step(f"git checkout -q {branch}", "HEAD is on no branch, and not on top of the last keep")


# --------------------------------------
# After a run


def after_a_run(night):
    """Rows that are missing, and runs that do not count."""
    counted, _ = new_runs(night)
    if night.changed and (counted or has_crashed(night)):
        return Step(f"# note your idea, then drop it: {DROP}", "runs of HEAD have no row, but train.py has changes")
    if counted:
        return add_step(night, f"runs of this commit without a row: {len(counted)}")
    if has_crashed(night):
        return add_step(night, f"it has crashed: {night.log['reason']}")
    if night.changed:
        return None

    # repeat a disturbed run, up to TRIES times; once the night is over, repeat only final runs
    seed, tries = disturbed_tries(night)
    if tries >= TRIES:
        return add_step(night, f"disturbed {tries} times: give it up")
    if tries and (seed in FINAL_SEEDS or not is_over(night)):
        return run_step(night, seed, "disturbed: look what else runs here (`uptime`), then run it again")
    return with_a_run_elsewhere(night)


def has_crashed(night):
    """Whether run.log is of a run of HEAD that ended with an error, and has no row."""
    return night.log.get("commit") == night.head and night.log["reason"] != ""


def crashed_seed(night):
    """The seed of that run. One that crashed before it printed its seed gets the first that is free."""
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
    if not missing or is_over(night):
        return None

    # its jobs are clones of a commit, so it does not matter what is checked out here
    if night.wave:
        return submit_step([(night.start, seed) for seed in missing], "the baseline")
    if night.changed:
        return Step(DROP, "the baseline is the untouched train.py: note your idea, and drop it here")
    if night.head != night.start:
        return Step(f"git checkout -q --detach {night.start}", "the baseline is not complete")
    return run_step(night, missing[0], "the baseline")


def with_an_idea(night, last_keep):
    """HEAD is a commit that is not kept: run it, run it again, or let it go."""
    if night.head in kept_commits(night):
        return None
    scores = scores_of(night.rows)
    seeds = seeds_of(night.head, night)
    if night.changed and night.head in scores:
        return Step(f"# note your idea, then drop it: {DROP}", "new ideas start from the last keep")
    if night.changed:
        return Step("# train.py has changes: commit them, or drop them", f"to drop them: {DROP}")
    if not seeds and not is_over(night):
        return run_step(night, 1, "a new idea")
    is_open = night.head in scores and not is_given_up(night.head, night)
    if is_open and verdict(night.head, last_keep, scores) == "promising":
        return run_step(night, first_free(seeds), "promising: the second run decides")
    store = f"git update-ref refs/tries/{night.head} {night.head}"
    reason = "it is not kept: store it and go back"
    if is_open and len(seeds) == 1:
        reason += " (if it is simpler, run seed 2 first: see the table)"
    return Step(f"{store} && git reset -q --keep {last_keep}", reason)


def final_runs(night, last_keep):
    """The runs at the end that are missing, in turns: [(commit, seed)], empty if nothing was kept."""
    if last_keep == night.start:
        return []
    wanted = [(commit, seed) for seed in FINAL_SEEDS for commit in (night.start, last_keep)]
    return [(commit, seed) for commit, seed in wanted if seed not in seeds_of(commit, night)]


def at_the_end(night, last_keep):
    """The baseline and the last keep run on fresh seeds; then the night is over."""
    if not is_over(night):
        return None
    if night.changed:
        return Step(DROP, "the end: no new idea starts")

    # a cluster has room for all of them at once; one machine takes them in turns
    missing = final_runs(night, last_keep)
    if missing and night.wave:
        return submit_step(missing, "the end: what was gained, on seeds that selected nothing")
    if missing:
        commit, seed = missing[0]
        if night.head == commit:
            return run_step(night, seed, "the end: what was gained, on seeds that selected nothing")
        return go_to(commit, night, "the end: in turns, the baseline and the last keep")
    if not night.branch:
        return go_to("", night, "back to the branch")
    return Step(OVER, result_of(night, last_keep))


def result_of(night, last_keep):
    """The result of the night, in words."""
    if last_keep == night.start:
        return "nothing was kept"
    gained = confirmed_gain(night)
    if math.isnan(gained):
        return "the final runs have no score, so no gain is confirmed"
    return f"the gain to report, on fresh seeds: {gained:+.6f}"


def with_the_next_idea(night, last_keep):
    """HEAD was kept, or is the baseline once more."""
    commit = "git commit -q -m '<idea>; expect <gain>' -- train.py"
    if night.changed and night.branch and night.head == last_keep:
        return Step("# a new idea is in train.py: finish it", f"commit it when it is done: {commit}")
    if night.changed:
        return Step(DROP, "new ideas start from the last keep, on the branch of the night")

    # is the machine still what it was?
    latest = [row.commit for row in night.rows[-DRIFT_ROWS:]]
    if not night.wave and len(night.rows) > DRIFT_ROWS and night.start not in latest and last_keep != night.start:
        if night.head == night.start:
            return run_step(night, 1, "the baseline once more, to see drift")
        return go_to(night.start, night, f"no baseline in {DRIFT_ROWS} rows: run it once more, to see drift")
    if not night.branch or night.head != last_keep:
        return go_to("", night, "back to the last keep")

    if last_keep != night.start and len(ideas_since(PRUNED, night)) >= PRUNING_IDEAS:
        return Step(NEW_IDEA, "pruning is due: take out one thing that was kept; its message begins with `prune`")
    reason = f"commit it when it is done: {commit}"
    if "/" in night.tag:  # it is shared on a hub
        reason = f"exchange, look and say what you will try (swarm/program.md); {reason}"
    return Step(NEW_IDEA, reason)


def ideas_since(pattern, night):
    """The commits that were tried after the last row whose description matches: all of the night, if none does."""
    commits = set()
    for row in night.rows:
        if re.search(pattern, row.description):
            commits.clear()
        elif row.commit != night.start:
            commits.add(row.commit)
    return commits

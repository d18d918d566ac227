"""
What a commit is worth, what is decided of it, and what it needs: pure functions of a Night that was read once.

Gains are positive where val_bpb has fallen. Three runs decide (../program.md): each step of the way asks for a gain of
more than QUARTER of the noise floor over the last keep.

Sections: Worth, Decisions, What a commit needs.
"""

import math
import statistics
from dataclasses import dataclass, replace

from night.state import Decision

QUARTER = 1 / 4  # of the noise floor: what each step must gain
IDEA_SEEDS = (1, 2, 3)
BASELINE_SEEDS = (1, 2, 3)
FINAL_SEEDS = (4, 5)  # that selected nothing: they tell what the night has gained
FIRST_AGAIN = 6  # seed of the first run with which a last keep sharpens its bar
LEAST_SCORES = 2  # of the baseline
AGAIN_RUNS = 20  # counted runs after which the last keep runs once more
MOST_DISTURBED = 3  # of one seed: with slow steps the third is a crash, on a slow machine it counts
MOST_KILLED, MOST_INTERRUPTED = 2, 3  # of one seed: the last one is a crash

STEPS = ("the first run", "the second run", "the mean of the second and third run")


@dataclass(frozen=True)
class Training:
    """A run that comes next."""

    role: str
    commit: str
    seed: int


def short(commit):
    return commit[:7]


# --------------------------------------
# Worth


def scores_of(attempt):
    return [run.val_bpb for run in attempt.counted()]


def noise_floor(night, without=None):
    """
    Twice the standard deviation between runs of one commit, pooled over all commits but the one that is judged; NaN if
    none ran twice.
    """
    squares, repeats = 0.0, 0
    for commit, attempt in night.tries.items():
        scores = scores_of(attempt)
        if commit != without and len(scores) > 1:
            squares += statistics.variance(scores) * (len(scores) - 1)
            repeats += len(scores) - 1
    if repeats == 0:
        return math.nan
    return 2 * math.sqrt(squares / repeats)


def bar(night):
    """What is to beat: the mean of the last keep's counted runs; NaN before it has any."""
    scores = scores_of(night.attempt(night.last_keep))
    if not scores:
        return math.nan
    return statistics.fmean(scores)


def gains_of(commit, night):
    """What the runs that decide have gained, in order: the first, the second, the mean of the second and third."""
    by_seed = {run.seed: run.val_bpb for run in night.attempt(commit).of_role("idea") if run.counts}
    to_beat = bar(night)
    gains = []
    for seed in IDEA_SEEDS:
        if seed not in by_seed:
            break
        # each alone, but the third with the second: the first was selected
        judged = [by_seed[seed]]
        if seed == 3:
            judged.append(by_seed[2])
        gains.append(to_beat - statistics.fmean(judged))
    return gains


def final_gain(night):
    """The gain of the last keep over the baseline with the seeds that selected nothing; NaN until both have run."""
    means = []
    for commit in (night.start, night.last_keep):
        scores = [run.val_bpb for run in night.attempt(commit).of_role("final") if run.counts]
        if not scores:
            return math.nan
        means.append(statistics.fmean(scores))
    return means[0] - means[1]


# --------------------------------------
# Decisions


def due_decisions(night):
    """What the rule decides of the commits that are undecided: [Decision]."""
    candidates = {*night.line, *commits_of_wave(night)}
    found = []
    for attempt in night.tries.values():
        if attempt.commit == night.start or attempt.verdict not in ("", "simpler"):
            continue
        decision = judge(attempt, night)
        if attempt.commit not in candidates and not attempt.verdict:
            decision = judge_gone(attempt, decision, night)
        if decision:
            found.append(decision)
    return choose_of_wave(found, night)


def judge_gone(attempt, decision, night):
    """
    Decide a commit that is neither HEAD nor below HEAD nor in a wave: by its runs if they suffice, else discard. None
    while one of its runs goes on, or a worktree cannot be read: the commit may be there.
    """
    if night.broken or (night.going_on and night.going_on["commit"] == attempt.commit):
        return None

    # its last runs may have ended after HEAD had moved on, or its worktree was removed
    run = next(iter(attempt.runs.values()))
    if decision and (decision.decision == "discard" or run.parent == night.last_keep):
        return decision
    return Decision(attempt.commit, "discard", reason="abandoned before it was decided")


def choose_of_wave(decisions, night):
    """Keep the best idea of a wave, and discard the other winners, once no further idea can still win: [Decision]."""
    winners = [decision for decision in decisions if decision.decision == "keep"]
    if not winners or not (night.worktrees or night.out):
        return decisions
    others = [decision for decision in decisions if decision not in winners]

    # without a cluster the worktrees wait, and so does what has won in them
    if not night.on_cluster:
        return others + [winner for winner in winners if winner.commit in night.line]

    # what else may still be kept
    decided = {decision.commit for decision in decisions} | set(night.kept)
    waiting = [training.commit for training in needed_in_wave(night, night)] + [job["commit"] for job in night.out]
    if any(commit not in decided and night.attempt(commit).verdict != "discard" for commit in waiting):
        return others

    # the others were measured against the same bar, so they may add up
    best = max(winners, key=lambda decision: decision.gain)
    reason = f"it could be kept, too: combine with {short(best.commit)}"
    lost = [replace(winner, decision="discard", reason=reason) for winner in winners if winner is not best]
    return [*others, best, *lost]


def judge(attempt, night):
    """The Decision that the runs of a commit add up to; None while they decide nothing."""
    crashes = [run for run in attempt.of_role("idea") if run.state == "crash"]
    if crashes:
        return Decision(attempt.commit, "discard", reason=f"crashed: {crashes[-1].reason}")
    gains = gains_of(attempt.commit, night)
    if not gains or math.isnan(gains[-1]) or lacks_baseline(night):
        return None
    floor = noise_floor(night, without=attempt.commit)
    numbers = dict(gain=round(gains[-1], 6), floor=None)
    least = 0.0  # without a repeated run there is no floor: any gain will do
    if not math.isnan(floor):
        numbers["floor"] = round(floor, 6)
        least = QUARTER * floor
    if attempt.verdict == "simpler":
        return judge_simpler(attempt, gains, numbers)

    # each step of the way, in order
    for place, gained in enumerate(gains):
        if not gained > least:
            reason = f"gain of {STEPS[place]}: {gained:+.6f}, needed: more than {least:.6f}"
            return Decision(attempt.commit, "discard", **numbers, reason=reason)
    if len(gains) < len(IDEA_SEEDS):
        return None
    reason = f"each step gained more than {least:.6f}, the last {gains[-1]:+.6f}"
    return Decision(attempt.commit, "keep", **numbers, reason=reason)


def judge_simpler(attempt, gains, numbers):
    """Of a commit that the agent wants for being simpler: its runs after the first must not be worse."""
    if len(gains) < 2:
        return None
    if gains[-1] >= 0:
        return Decision(attempt.commit, "keep", **numbers, reason="simpler, and not worse")
    return Decision(attempt.commit, "discard", **numbers, reason=f"simpler, but {STEPS[len(gains) - 1]} is worse")


# --------------------------------------
# What a commit needs


def missing_seeds(attempt, role, seeds):
    """Those of the seeds that have no run of this role that counts or crashed."""
    done = {run.seed for run in attempt.of_role(role) if run.is_done}
    return [seed for seed in seeds if seed not in done]


def needed(commit, night):
    """The runs that a commit still needs before it is decided: [Training], those that may run at once."""
    attempt = night.attempt(commit)
    if commit == night.start:
        return [Training("baseline", commit, seed) for seed in baseline_seeds(night)]
    if attempt.verdict in ("keep", "discard"):
        return []
    gains = gains_of(commit, night)
    seeds = IDEA_SEEDS[:1]
    if gains and not lacks_baseline(night):
        seeds = IDEA_SEEDS
    if attempt.verdict == "simpler":
        seeds = IDEA_SEEDS[:2]
    return [Training("idea", commit, seed) for seed in missing_seeds(attempt, "idea", seeds)]


def baseline_seeds(night):
    """The seeds with which the baseline has to run. What crashed before `until` was last said may run again."""
    attempt = night.attempt(night.start)
    missing = missing_seeds(attempt, "baseline", BASELINE_SEEDS)

    # too few seeds have a score: run again those that have not run since the human's last `until`
    scored = [run.seed for run in attempt.of_role("baseline") if run.counts]
    if missing or len(scored) >= LEAST_SCORES:
        return missing
    since = {run.seed for run in runs_since_end(night) if run.role == "baseline" and run.is_done}
    return [seed for seed in BASELINE_SEEDS if seed not in since and seed not in scored]


def lacks_baseline(night):
    """Whether runs of the baseline are missing, so that there is no bar to judge by. At the end none is waited for."""
    return bool(baseline_seeds(night)) and not is_over(night)


def is_candidate(night):
    """Whether HEAD could be kept: above the last keep, nothing decided between, and only train.py changed."""
    above = commits_above(night)
    return bool(above) and not night.other_files and all(not night.attempt(commit).verdict for commit in above[:-1])


def commits_above(night):
    """The commits from the last keep, which is left out, to HEAD; none if HEAD is not above it."""
    if night.last_keep not in night.line:
        return ()
    return night.line[night.line.index(night.last_keep) + 1 :]


def needed_in_wave(night, *others):
    """
    The runs that the ideas in the worktrees of a wave, and in other checkouts, need: [Training]. At the end only those
    that have begun. Without a cluster the worktrees wait.
    """
    worktrees = night.worktrees.values() if night.on_cluster else ()
    found = []
    for checkout in (*worktrees, *others):
        view = view_of(night, checkout)
        if not is_candidate(view):
            continue
        for commit in commits_above(view):
            has_run = bool(night.attempt(commit).counted())
            if has_run or (commit == view.head and not is_over(night)):
                found += needed(commit, night)
    return list(dict.fromkeys(found))  # two worktrees may be on one commit


def needed_on_cluster(night):
    """All runs that may be made at once, but those that are out: [Training]."""
    found = needed_in_wave(night, night)
    if not is_over(night):
        found = needed(night.start, night) + needed_again(night) + found
    elif not found and not night.out:
        found = needed_finals(night)
    running = [*night.out, night.going_on] if night.going_on else night.out
    out = [Training(state["role"], state["commit"], state["seed"]) for state in running]
    return [training for training in found if training not in out]


def commits_of_wave(night):
    """The commits that a wave may still decide: those on the last keep in its worktrees, and those that are out."""
    found = {job["commit"] for job in night.out}
    for checkout in night.worktrees.values():
        for commit in commits_above(view_of(night, checkout)):
            if night.attempt(commit).verdict == "discard":
                break  # what is above contains it
            found.add(commit)
    return found


def view_of(night, checkout):
    """The night as it is from another checkout."""
    return replace(night, line=checkout.line, changed=checkout.changed, other_files=checkout.other_files)


def runs_since_end(night):
    """The runs since the human last said `until`, which means that all is well again."""
    return list(night.runs.values())[night.runs_before_end :]


def needed_again(night):
    """The run that sharpens the bar, when the last keep ran long ago: [Training]."""
    keep = night.last_keep

    # the runs after its last one
    runs = [run for run in night.runs.values() if run.role != "final" and run.is_done]
    indices = [index for index, run in enumerate(runs) if run.commit == keep]
    if not indices or len([run for run in runs[indices[-1] + 1 :] if run.counts]) < AGAIN_RUNS:
        return []
    done = [run for run in night.attempt(keep).of_role("again") if run.is_done]
    return [Training("again", keep, FIRST_AGAIN + len(done))]


def needed_finals(night):
    """The runs at the end, in turns the baseline and the last keep: [Training], none if nothing was kept."""
    if night.last_keep == night.start:
        return []
    found = []
    for seed in FINAL_SEEDS:
        for commit in (night.start, night.last_keep):
            if missing_seeds(night.attempt(commit), "final", [seed]):
                found.append(Training("final", commit, seed))
    return found


def is_over(night):
    """Whether no new idea may start."""
    if night.until == "never":
        return False
    if night.until.isdecimal():
        return len([run for run in night.runs.values() if run.is_done and run.role != "final"]) >= int(night.until)
    return night.time >= night.until

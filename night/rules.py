"""
What a commit is worth, and what comes next: pure functions of a Night that was read once.

Gains are positive where val_bpb has fallen. Three runs decide (../program.md): each step of the way asks for a gain of
more than QUARTER of the noise floor over the last keep.

Sections: Worth, Decisions, What a commit needs, What comes next.
"""

import math
import statistics
from dataclasses import dataclass, replace

from night.record import Decision

QUARTER = 1 / 4  # of the noise floor: what each step must gain
IDEA_SEEDS = (1, 2, 3)
BASELINE_SEEDS = (1, 2, 3)
FINAL_SEEDS = (4, 5)  # that selected nothing: they tell what the night has gained
FIRST_AGAIN = 6  # seed of the first run with which a last keep sharpens its bar
LEAST_SCORES = 2  # of the baseline
AGAIN_RUNS = 20  # counted runs after which the last keep runs once more
PRUNING_IDEAS = 8  # after which something that was kept is taken out, to see
STUCK_IDEAS = 5  # not kept in a row: time for another kind of idea
MOST_DISTURBED = 3  # such runs of one seed are a crash ...
MOST_KILLED, MOST_INTERRUPTED = 2, 3  # ... and so are these

STEPS = ("the first run", "the second run", "the mean of the second and third run")

# What an agent types
RUN = "uv run ledger.py run"
WAVE_RUN = "uv run --group cluster swarm/wave.py run"
COMMIT = "git commit -q -m '<idea>; expect <gain>' -- train.py"
DROP = "git checkout HEAD -- train.py"
NEW_IDEA = "# a new idea: edit train.py"
OVER = "# the night is over"


@dataclass(frozen=True)
class Training:
    """A run that comes next."""

    role: str
    commit: str
    seed: int


@dataclass(frozen=True)
class Step:
    """What comes next: its kind, a command that can be run as it stands, or a comment (#), and the reason."""

    kind: str  # run, wait, wave, idea, drop, reset, tell or over
    command: str
    reason: str
    training: Training | None = None  # of the kind run


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


def least_gain(commit, night):
    """What each step of a commit must gain. Without a repeated run there is no floor: any gain will do."""
    floor = noise_floor(night, without=commit)
    if math.isnan(floor):
        return 0.0
    return QUARTER * floor


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
    undecided = [attempt for attempt in night.tries.values() if attempt.verdict in ("", "simpler")]
    candidates = {*night.line, *commits_of_wave(night)}
    found = []
    for attempt in undecided:
        if attempt.commit == night.start:
            continue

        # what is neither below HEAD nor in a wave is given up
        if attempt.commit not in candidates and not attempt.verdict:
            found.append(Decision(attempt.commit, "discard", reason="left"))
            continue
        decision = judge(attempt, night)
        if decision:
            found.append(decision)
    return choose_of_wave(found, night)


def choose_of_wave(decisions, night):
    """Of all that could be kept of a wave the best, when nothing else of it is out or needed: [Decision]."""
    wave = commits_of_wave(night)
    winners = [decision for decision in decisions if decision.decision == "keep" and decision.commit in wave]
    if not winners:
        return decisions
    others = [decision for decision in decisions if decision not in winners]

    # what else may still be kept
    decided = {decision.commit for decision in decisions} | set(night.kept)
    waiting = [training.commit for training in needed_in_wave(night)] + [job["commit"] for job in night.out]
    if any(commit not in decided and night.attempt(commit).verdict != "discard" for commit in waiting):
        return others
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
    numbers = dict(gain=round(gains[-1], 6), floor=None if math.isnan(floor) else round(floor, 6))
    if attempt.verdict == "simpler":
        return judge_simpler(attempt, gains, numbers)

    # each step of the way, in order
    least = least_gain(attempt.commit, night)
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


def lacks(attempt, role, seeds):
    """Those of the seeds that have no run of this role that counts or crashed."""
    done = {run.seed for run in attempt.of_role(role) if run.is_over}
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
    return [Training("idea", commit, seed) for seed in lacks(attempt, "idea", seeds)]


def baseline_seeds(night):
    """The seeds with which the baseline has to run. What crashed before `until` was last said may run again."""
    attempt = night.attempt(night.start)
    missing = lacks(attempt, "baseline", BASELINE_SEEDS)

    # each seed has had its run, and too few have a score: those since the human's word count
    scored = [run.seed for run in attempt.of_role("baseline") if run.counts]
    if missing or len(scored) >= LEAST_SCORES:
        return missing
    since = {run.seed for run in runs_since_end(night) if run.role == "baseline" and run.is_over}
    return [seed for seed in BASELINE_SEEDS if seed not in since and seed not in scored]


def lacks_baseline(night):
    """Whether the bar is not known yet, so that nothing can be judged by it. At the end it will not get better."""
    return bool(baseline_seeds(night)) and not is_over(night)


def needed_in_wave(night, *others):
    """
    The runs that the ideas in the worktrees of a wave, and in other checkouts, need: [Training]. At the end only those
    that have begun.
    """
    found = []
    for checkout in (*night.worktrees.values(), *others):
        view = replace(night, line=checkout.line, other_files=checkout.other_files)
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
    """The commits that a wave may still decide: those in its worktrees, and those whose jobs are out."""
    lines = [checkout.line for checkout in night.worktrees.values()]
    return {job["commit"] for job in night.out}.union(*lines)


def runs_since_end(night):
    """The runs since the human last said `until`, which means that all is well again."""
    return list(night.runs.values())[night.runs_before_end :]


def needed_again(night):
    """The run that sharpens the bar, when the last keep ran long ago: [Training]."""
    keep = night.last_keep

    # the runs after its last one
    counted = [run for run in night.runs.values() if run.role != "final" and run.is_over]
    places = [place for place, run in enumerate(counted) if run.commit == keep]
    if not places or len([run for run in counted[places[-1] + 1 :] if run.counts]) < AGAIN_RUNS:
        return []
    done = [run for run in night.attempt(keep).of_role("again") if run.is_over]
    return [Training("again", keep, FIRST_AGAIN + len(done))]


def needed_finals(night):
    """The runs at the end, in turns the baseline and the last keep: [Training], none if nothing was kept."""
    if night.last_keep == night.start:
        return []
    found = []
    for seed in FINAL_SEEDS:
        for commit in (night.start, night.last_keep):
            if lacks(night.attempt(commit), "final", [seed]):
                found.append(Training("final", commit, seed))
    return found


def is_over(night):
    """Whether no new idea may start."""
    if night.until == "never":
        return False
    if night.until.isdecimal():
        return len([run for run in night.runs.values() if run.is_over and run.role != "final"]) >= int(night.until)
    return night.time >= night.until


# --------------------------------------
# What comes next


def next_step(night):
    """The next Step, in the order of the rules in program.md."""
    return (
        with_a_run_going_on(night)
        or for_the_human(night)
        or with_a_wave(night)
        or in_baseline(night)
        or at_the_end(night)
        or off_the_line(night)
        or with_an_idea(night)
        or with_the_last_keep(night)
    )


def run_step(night, training, reason):
    command = WAVE_RUN if night.on_cluster else RUN
    return Step("run", command, f"{reason}: seed {training.seed} of {short(training.commit)}", training)


def with_a_run_going_on(night):
    if night.going_on:
        return Step("wait", RUN, "a run is going on: this waits for it")
    return None


def with_a_wave(night):
    if night.out:
        return Step("wave", WAVE_RUN, f"jobs are out, {len(night.out)} of them: this waits for the next result")
    if needed_in_wave(night):
        return Step("wave", WAVE_RUN, "an idea in a worktree needs a run")
    return None


def for_the_human(night):
    """What no agent can mend, until the human says `until` again."""
    recent = runs_since_end(night)

    # an interrupted run says nothing yet: it runs again
    baseline = [run for run in recent if run.role == "baseline" and run.state != "interrupted"]
    mended = "mend it, then say when the night ends: uv run ledger.py until <when>"
    if len(recent) >= 2 and all(run.state == "elsewhere" for run in recent[-2:]):
        found = f"the last two runs were on {recent[-1].device}, but this night is on {night.device}"
    elif baseline and baseline[-1].state == "crash" and baseline[-1].exit is None:
        found = f"the untouched train.py does not get through a run: {baseline[-1].reason}"
    elif len(baseline) >= 2 and all(run.state == "crash" for run in baseline[-2:]):
        found = f"the untouched train.py crashes here: {baseline[-1].reason}"
    elif too_few_scores(night):
        found = f"the baseline has fewer than {LEAST_SCORES} scores"
    else:
        return None
    return Step("tell", f"# tell the human: {found}", mended)


def too_few_scores(night):
    return not needed(night.start, night) and len(scores_of(night.attempt(night.start))) < LEAST_SCORES


def in_baseline(night):
    missing = needed(night.start, night)
    if missing and not is_over(night):
        return run_step(night, missing[0], "the baseline")
    return None


def is_candidate(night):
    """Whether HEAD could be kept: it is above the last keep, and so is nothing that was decided."""
    above = commits_above(night)
    return bool(above) and not night.other_files and all(not night.attempt(commit).verdict for commit in above[:-1])


def commits_above(night):
    """The commits from the last keep, which is left out, to HEAD; none if HEAD is not above it."""
    if night.last_keep not in night.line:
        return ()
    return night.line[night.line.index(night.last_keep) + 1 :]


def at_the_end(night):
    """A commit that has a run gets those that decide; then baseline and last keep run on fresh seeds."""
    if not is_over(night):
        return None

    # what has begun is decided first; then what was gained, and the branch ends where the night has come to
    missing = needed(night.head, night)
    if is_candidate(night) and night.attempt(night.head).counted() and missing:
        return run_step(night, missing[0], "the end, but this commit is not decided")
    missing = needed_finals(night)
    if missing:
        return run_step(night, missing[0], "the end: what was gained, on seeds that selected nothing")
    if night.head != night.last_keep:
        return go_back(night, "the end: the branch ends with the last keep")
    result = result_of(night)
    if "/" in night.tag:
        result += "; share it, if you have not: uv run swarm/hub.py exchange"
    return Step("over", OVER, result)


def result_of(night):
    """The result of the night, in words."""
    if night.last_keep == night.start:
        return "nothing was kept"
    gained = final_gain(night)
    if math.isnan(gained):
        return "the final runs have no score, so no gain is confirmed"
    words = f"the gain to report, on fresh seeds: {gained:+.6f}"
    floor = noise_floor(night)
    if abs(gained) <= floor:
        words += f", within the noise floor of {floor:.6f}"
    return words


def go_back(night, reason):
    """Reset to the last keep; changes that are in the way have to be dropped first."""
    if night.changed:
        return Step("drop", f"# note what you have in train.py, then drop it: {DROP}", reason)
    return Step("reset", f"git reset -q --keep {short(night.last_keep)}", reason)


def off_the_line(night):
    """HEAD is where nothing can be kept."""
    if night.last_keep not in night.line:
        return go_back(night, "HEAD is not on top of the last keep")
    if night.other_files:
        return go_back(night, f"HEAD changes {', '.join(night.other_files)}: only train.py may differ")
    for commit in commits_above(night)[:-1]:
        if night.attempt(commit).verdict:
            return go_back(night, f"HEAD is on top of {short(commit)}, which was not kept, and contains that change")
    return None


def with_an_idea(night):
    """HEAD is a commit that is not kept."""
    if night.head == night.last_keep:
        return None
    attempt = night.attempt(night.head)

    # decided, or not committed as it stands
    if attempt.verdict == "discard":
        reason = f"discarded, {attempt.decision.reason}"
        if can_be_simpler(attempt):
            reason += " (only if it is simpler: `uv run ledger.py keep`)"
        return go_back(night, reason)
    if night.changed:
        return Step("drop", "# train.py has changes: commit them, or drop them", f"to drop them: {DROP}")

    # its runs, unless the bar has to be sharpened before the first of them
    missing = needed(night.head, night)
    if not missing:
        return go_back(night, "its runs decide nothing, for the last keep has no score that counts")
    again = needed_again(night)
    if again and not attempt.runs:
        return run_step(night, again[0], f"the last keep once more: {AGAIN_RUNS} runs have passed")
    if not attempt.counted():
        return run_step(night, missing[0], "a new idea")
    return run_step(night, missing[0], "promising")


def can_be_simpler(attempt):
    """Whether `keep` could still make something of a commit that the rule has discarded."""
    decision = attempt.decision
    if decision.by == "hand" or decision.gain is None:  # a crash has no gain
        return False
    return len(attempt.counted()) == 1 or decision.gain >= 0


def with_the_last_keep(night):
    """HEAD is the last keep: time for an idea."""
    again = needed_again(night)
    if again:
        return run_step(night, again[0], f"the last keep once more: {AGAIN_RUNS} runs have passed")
    when_done = f"nothing is left to run; when the edit is done, commit it: {COMMIT}"
    if night.on_cluster:
        when_done = "nothing is left to run; make a worktree for each idea (swarm/program.md)"
    if "/" in night.tag:  # it is shared on a hub
        when_done = f"exchange, look and say what you will try (swarm/program.md). Then: {when_done}"
    if night.changed:
        return Step("idea", "# a new idea is in train.py: finish it", when_done)

    # now and then another kind of idea is due
    if night.last_keep != night.start and ideas_since_pruning(night) >= PRUNING_IDEAS:
        reason = "pruning is due: take out one thing that was kept; its message begins with `prune`"
        return Step("idea", NEW_IDEA, reason)
    lost = ideas_since_keep(night)
    if lost >= STUCK_IDEAS:
        return Step("idea", NEW_IDEA, f"{lost} ideas in a row were not kept: change the structure, not a number")
    return Step("idea", NEW_IDEA, when_done)


def ideas_since_pruning(night):
    count = 0
    for commit in night.decided:
        count += 1
        if night.attempt(commit).description.startswith("prun"):
            count = 0
    return count


def ideas_since_keep(night):
    count = 0
    for decision in night.decided.values():
        count += 1
        if decision.decision == "keep":
            count = 0
    return count

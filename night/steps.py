"""What comes next in a night: a pure function of a Night. The first rule that applies gives the next Step."""

import math
from dataclasses import dataclass

from night.rules import (
    AGAIN_RUNS,
    LEAST_SCORES,
    Training,
    commits_above,
    final_gain,
    is_candidate,
    is_over,
    needed,
    needed_again,
    needed_finals,
    needed_in_wave,
    noise_floor,
    runs_since_end,
    scores_of,
    short,
)

PRUNING_IDEAS = 8  # after which something that was kept is taken out, to see
STUCK_IDEAS = 5  # not kept in a row: time for another kind of idea

# What an agent types
RUN = "uv run ledger.py run"
WAVE_RUN = "uv run --group cluster swarm/wave.py run"
COMMIT = "git commit -q -m '<idea>; expect <gain>' -- train.py"
DROP = "git checkout HEAD -- train.py"
NEW_IDEA = "# a new idea: edit train.py"
NEW_WORKTREE = f"# a new idea: {WAVE_RUN.removesuffix('run')}new <name>"
OVER = "# the night is over"


@dataclass(frozen=True)
class Step:
    """What comes next: its kind, a command that can be run as it stands, or a comment (#), and the reason."""

    kind: str  # run, wait, wave, idea, drop, reset, tell or over
    command: str
    reason: str
    training: Training | None = None  # of the kind run


def next_step(night):
    """The next Step, from the first rule that applies."""
    return (
        with_a_run_going_on(night)
        or for_the_human(night)
        or with_a_wave(night)
        or in_baseline(night)
        or at_the_end(night)
        or with_a_misplaced_head(night)
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
    # a wave goes on until all of it is decided
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
    scores = scores_of(night.attempt(night.start))
    mended = "mend it, then say when the night ends: uv run ledger.py until <when>"
    if len(recent) >= 2 and all(run.state == "elsewhere" for run in recent[-2:]):
        found = f"the last two runs were on {recent[-1].device}, but this night is on {night.device}"
    elif baseline and baseline[-1].state == "crash" and baseline[-1].exit is None:
        found = f"the untouched train.py does not get through a run: {baseline[-1].reason}"
    elif len(baseline) >= 2 and all(run.state == "crash" for run in baseline[-2:]):
        found = f"the untouched train.py crashes here: {baseline[-1].reason}"
    elif night.out and not night.on_cluster:
        mended = f"export RAY_API_SERVER_ADDRESS, or give them up: remove .git/autoresearch/{night.tag}/jobs"
        found = f"jobs are out, {len(night.out)} of them, but no cluster is named (RAY_API_SERVER_ADDRESS)"
    elif len(scores) < LEAST_SCORES and not needed(night.start, night):
        found = f"the baseline has fewer than {LEAST_SCORES} scores"
    else:
        return None
    return Step("tell", f"# tell the human: {found}", mended)


def in_baseline(night):
    # at the end the runs so far have to do
    missing = needed(night.start, night)
    if missing and not is_over(night):
        return run_step(night, missing[0], "the baseline")
    return None


def at_the_end(night):
    """A commit that has a run gets those that decide; then baseline and last keep run on fresh seeds."""
    if not is_over(night):
        return None

    # decide what has begun, make the final runs, then leave the branch at the last keep
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

    # the difference of the final runs, which selected nothing
    gained = final_gain(night)
    if math.isnan(gained):
        return "the baseline or the last keep has no final run with a score, so no gain is confirmed"
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


def with_a_misplaced_head(night):
    """HEAD is where nothing can be kept."""
    # by hand, or by a branch of another tool
    if night.last_keep not in night.line:
        return go_back(night, "HEAD is not on top of the last keep")
    if night.other_files:
        return go_back(night, f"HEAD changes {', '.join(night.other_files)}: only train.py may differ")

    # what stands on a discard contains it
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
        return go_back(
            night, "its runs are decided later: with the rest of its wave, or when the last keep has a score"
        )
    again = needed_again(night)
    if again and not attempt.runs:
        return run_step(night, again[0], f"the last keep once more: {AGAIN_RUNS} runs have passed")
    if not attempt.counted():
        return run_step(night, missing[0], "a new idea")
    return run_step(night, missing[0], attempt.verdict or "promising")


def can_be_simpler(attempt):
    """Whether `keep` could still make something of a commit that the rule has discarded."""
    # a crash has no gain, and the human's or the agent's word is the last
    decision = attempt.decision
    if decision.by == "hand" or decision.gain is None:
        return False
    return len(attempt.counted()) == 1 or decision.gain >= 0


def with_the_last_keep(night):
    """HEAD is the last keep: time for an idea."""
    again = needed_again(night)
    if again:
        return run_step(night, again[0], f"the last keep once more: {AGAIN_RUNS} runs have passed")
    when_done = f"nothing is left to run; when the edit is done, commit it: {COMMIT}"
    command = NEW_IDEA
    if night.on_cluster:
        when_done = "nothing is left to run; make a worktree for each idea (swarm/program.md)"
        command = NEW_WORKTREE
    if "/" in night.tag:  # it is shared on a hub
        when_done = f"exchange, look and say what you will try (swarm/program.md). Then: {when_done}"
    if night.changed:
        return Step("idea", "# a new idea is in train.py: finish it", when_done)

    # now and then another kind of idea is due
    prunings = {commit for commit, attempt in night.tries.items() if attempt.description.startswith("prun")}
    if night.last_keep != night.start and ideas_since(night, prunings) >= PRUNING_IDEAS:
        reason = "pruning is due: remove one change that was kept, with a message that begins with `prune`; if the "
        reason += "score stays about as good: uv run ledger.py keep"
        return Step("idea", command, reason)
    lost = ideas_since(night, night.kept)
    if lost >= STUCK_IDEAS:
        return Step("idea", command, f"{lost} ideas in a row were not kept: change the structure, not a number")
    return Step("idea", command, when_done)


def ideas_since(night, commits):
    """How many ideas were decided after the last of these commits was."""
    count = 0
    for commit in night.decided:
        count += 1
        if commit in commits:
            count = 0
    return count

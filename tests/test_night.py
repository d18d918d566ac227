"""
Checks of night/rules.py and steps.py: noise floor and gains against brute force, the rule of acceptance as a table and
on the draws of a simulation, what comes next in a table of nights, waves, and random nights that must come to an end.
"""

import math
import random
import re
from dataclasses import replace
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from night import rules, steps
from night.rules import Training, due_decisions, needed, needed_on_cluster, noise_floor
from night.state import Checkout, Night
from night.steps import next_step

S, A, B, C = (letter * 40 for letter in "0abc")  # the start, and ideas
BASE = [(S, 1, 0.995), (S, 2, 1.0), (S, 3, 1.005)]  # the noise floor is 0.010, so each step takes more than 0.0025
GOOD = [(A, 1, 0.99), (A, 2, 0.99), (A, 3, 0.99)]
END = "2026-11-28T07:00:00+00:00"


def run_line(number, commit, seed, result, role=None, **changes):
    """A line of the record: `result` is a score or a state."""
    line = {"kind": "run", "run": f"run-{number}", "time": "", "commit": commit, "seed": seed, "device": "cpu"}
    line |= {"role": role or ("baseline" if commit == S else "idea"), "description": "an idea", "exit": 0}
    if isinstance(result, float):
        return line | {"state": "scored", "val_bpb": result} | changes
    if result in ("disturbed", "elsewhere"):
        return line | {"state": result, "val_bpb": 1.0} | changes
    return line | {"state": result, "reason": "ValueError: no"} | changes


def decision_line(commit, decision, by="rule"):
    return {"kind": "decision", "commit": commit, "decision": decision, "by": by}


def record(night, *lines):
    """Add runs, (commit, seed, result, ...), or lines, and decide what is due, as the ledger does."""
    for line in (*lines, None):
        if isinstance(line, tuple):
            *values, changes = line if isinstance(line[-1], dict) else (*line, {})
            line = run_line(len(night.runs), *values, **changes)
        if line:
            night.add(line)
        for decision in due_decisions(night):
            night.add({"kind": "decision", **vars(decision)})
    return night


def night_of(*lines, at=S, **changes):
    """A night with these runs and lines, whose HEAD was on each idea as it ran, and is at `at` now."""
    night = Night(device="cpu", start=S)
    for line in lines:
        commit = line[0] if isinstance(line, tuple) else line.get("commit", S)
        night.line = line_to(commit, night)
        record(night, line)
    night.line = line_to(at, night)
    vars(night).update(changes)
    record(night)
    return night


def line_to(commit, night):
    """The commits from the first to this one, which stands on the last keep."""
    kept = night.kept
    return tuple(kept[: kept.index(commit) + 1]) if commit in kept else (*kept, commit)


# --------------------------------------
# Worth


@given(runs=st.lists(st.tuples(st.sampled_from([S, A, B, C]), st.floats(0.5, 2)), max_size=30))
def test_noise_floor_against_brute_force(runs):
    night = Night(start=S)
    expected = {}
    for number, (commit, score) in enumerate(runs):
        night.add(run_line(number, commit, number, score))
        night.add(run_line(f"final-{number}", commit, 4, score + number, "final"))  # which count for nothing
        expected.setdefault(commit, []).append(score)
    for without in (None, *expected):
        groups = [scores for commit, scores in expected.items() if commit != without and len(scores) > 1]
        if not groups:
            assert math.isnan(noise_floor(night, without))
            continue
        pooled = sum(stdev(scores) ** 2 * (len(scores) - 1) for scores in groups)
        pooled /= sum(len(scores) - 1 for scores in groups)
        assert noise_floor(night, without) == pytest.approx(2 * math.sqrt(pooled), abs=1e-9)


ACCEPTANCE = {  # scores of the runs -> decision, words of its reason
    "first too low": ([0.9976], "discard", "gain of the first run: +0.0024"),
    "first promising": ([0.9974], "", ""),
    "second too low": ([0.9, 0.9976], "discard", "gain of the second run: +0.0024"),
    "second promising": ([0.9974, 0.99], "", ""),
    "mean too low": ([0.9, 0.9974, 0.998], "discard", "gain of the mean of the second and third run: +0.0023"),
    "kept, though the third alone is too low": ([0.9974, 0.99, 0.998], "keep", "each step"),
    "kept": ([0.99, 0.99, 0.99], "keep", "each step gained more than 0.0025"),
    "crash": (["crash"], "discard", "crashed: ValueError: no"),
    "crash of the second": ([0.99, "crash"], "discard", "crashed"),
    "disturbed": (["disturbed"], "", ""),
}


@pytest.mark.parametrize("name", ACCEPTANCE)
def test_three_runs_decide(name):
    results, decision, words = ACCEPTANCE[name]
    attempt = night_of(*BASE, *((A, seed, result) for seed, result in enumerate(results, 1)), at=A).attempt(A)
    assert attempt.verdict == decision
    assert words in (attempt.decision.reason if attempt.decision else "")


def test_without_a_floor_any_gain_is_enough():
    night = night_of((S, 1, 1.0), (S, 2, "crash"), (S, 3, "crash"), (A, 1, 0.99999), at=A)
    assert needed(A, night) == [Training("idea", A, 2), Training("idea", A, 3)]
    assert night_of((S, 1, 1.0), (S, 2, "crash"), (S, 3, "crash"), (A, 1, 1.0), at=A).attempt(A).verdict == "discard"


def test_the_rule_on_the_draws_of_the_simulation():
    """Nights as in the simulation that chose the rule, where the noise floor is known to be two deviations."""
    draw = random.Random(1)
    decided = {"keep": 0, "discard": 0}
    for _ in range(300):
        base = [draw.gauss(100, 1) for _ in range(30)]
        deviation = noise_floor(night_of(*((S, seed, score) for seed, score in enumerate(base, 1)))) / 2
        scores = [draw.gauss(99, 1) for _ in range(3)]
        limit = deviation / 2
        keeps = all(mean(base) - mean(judged) > limit for judged in (scores[:1], scores[1:2], scores[1:]))

        # run by run, until the rule has decided
        night = night_of(*((S, seed, score) for seed, score in enumerate(base, 1)), at=A)
        for seed, score in enumerate(scores, 1):
            if not night.attempt(A).verdict:
                record(night, (A, seed, score))
        assert night.attempt(A).verdict == ("keep" if keeps else "discard")
        decided[night.attempt(A).verdict] += 1
    assert min(decided.values()) > 30


# --------------------------------------
# What comes next: a table of nights

RUN, IDEA, OVER, DROP = "uv run ledger.py run", steps.NEW_IDEA, steps.OVER, steps.DROP
CHANGES = "# train.py has changes: commit them, or drop them"
NOTE = f"# note what you have in train.py, then drop it: {DROP}"
KEPT = [*BASE, *GOOD]
WORSE = [(letter * 40, 1, 1.1) for letter in "123456789"]
FINALS = [(commit, seed, 0.98, "final") for seed in (4, 5) for commit in (S, A)]
CLOSE = [(S, 4, 0.98, "final"), (A, 4, 0.979, "final"), (S, 5, 0.98, "final"), (A, 5, 0.979, "final")]
CRASHED = [(S, seed, "crash") for seed in (1, 2, 3)]
AWAY = [(A, 1, "elsewhere")] * 2
NEXT = [(B, seed, 0.9) for seed in (1, 2, 3)]
LOST = [(commit, seed, "crash", "final") for commit, seed, *_ in FINALS]
GONE = {"state": "crash", "exit": None, "reason": "3 times ended from outside"}
UNTIL = {"kind": "end", "until": "never"}
PRUNED = {"description": "prune the smear"}


def back(commit=S):
    return f"git reset -q --keep {commit[:7]}"


NIGHTS = {  # night -> the run that comes next (role, commit, seed) or the command, words of the reason
    # the baseline
    "nothing yet": (night_of(), ("baseline", S, 1), "baseline"),
    "one": (night_of(*BASE[:1]), ("baseline", S, 2), "baseline"),
    "one crashed": (night_of((S, 1, "crash")), ("baseline", S, 2), "baseline"),
    "one was interrupted": (night_of((S, 1, "interrupted")), ("baseline", S, 1), "baseline"),
    "one was disturbed": (night_of((S, 1, "disturbed")), ("baseline", S, 1), "baseline"),
    "one was elsewhere": (night_of((S, 1, "elsewhere")), ("baseline", S, 1), "baseline"),
    "HEAD is an idea": (night_of(*BASE[:2], at=A), ("baseline", S, 3), "baseline"),
    "an edit meanwhile": (night_of(*BASE[:2], changed=True), ("baseline", S, 3), "baseline"),
    "complete": (night_of(*BASE), IDEA, "git commit"),
    "complete, on a hub": (night_of(*BASE, tag="night/ada"), IDEA, "exchange, look and say"),
    "over, on a hub": (night_of(*BASE, tag="night/ada", until="3"), OVER, "hub.py exchange"),
    "complete with two scores": (night_of((S, 1, "crash"), *BASE[1:]), IDEA, "git commit"),
    "going on": (night_of(*BASE[:2], going_on={"run": "x"}), RUN, "going on"),
    # for the human
    "two crashed": (night_of(*CRASHED[:2]), "# tell the human: the untouched", "until"),
    "cut off three times": (night_of((S, 1, "crash", GONE)), "# tell the human: the untouched", "until"),
    "one score": (night_of(CRASHED[0], BASE[1], CRASHED[2]), "# tell the human: the baseline has fewer", "until"),
    "mended": (night_of(*CRASHED[:2], UNTIL), ("baseline", S, 3), "baseline"),
    "one score, mended": (night_of(CRASHED[0], BASE[1], CRASHED[2], UNTIL), ("baseline", S, 1), "baseline"),
    "mended, two more to go": (night_of(*CRASHED, UNTIL), ("baseline", S, 1), "baseline"),
    "twice elsewhere": (night_of(*BASE, *AWAY, at=A), "# tell the human: the last two runs were on cpu", "until"),
    "once elsewhere": (night_of(*BASE, (A, 1, "elsewhere"), at=A), ("idea", A, 1), "new idea"),
    "elsewhere, mended": (night_of(*BASE, *AWAY, UNTIL | {"commit": A}, at=A), ("idea", A, 1), "new idea"),
    # an idea
    "edited": (night_of(*BASE, changed=True), "# a new idea is in train.py: finish it", "git commit"),
    "committed": (night_of(*BASE, at=A), ("idea", A, 1), "new idea"),
    "committed and edited": (night_of(*BASE, at=A, changed=True), CHANGES, "to drop them"),
    "promising": (night_of(*BASE, (A, 1, 0.99), at=A), ("idea", A, 2), "promising"),
    "promising twice": (night_of(*BASE, *GOOD[:2], at=A), ("idea", A, 3), "promising"),
    "the second was disturbed": (night_of(*BASE, GOOD[0], (A, 2, "disturbed"), at=A), ("idea", A, 2), "promising"),
    "discarded": (night_of(*BASE, (A, 1, 1.1), at=A), back(), "only if it is simpler"),
    "discarded and edited": (night_of(*BASE, (A, 1, 1.1), at=A, changed=True), NOTE, "discarded"),
    "crashed": (night_of(*BASE, (A, 1, "crash"), at=A), back(), "discarded, crashed: ValueError: no"),
    "dropped": (night_of(*BASE, GOOD[0], decision_line(A, "discard", "hand"), at=A), back(), "discarded"),
    "simpler": (night_of(*BASE, (A, 1, 1.001), decision_line(A, "simpler", "hand"), at=A), ("idea", A, 2), "simpler"),
    "kept": (night_of(*KEPT, at=A), IDEA, "git commit"),
    "the next one": (night_of(*KEPT, at=B), ("idea", B, 1), "new idea"),
    # HEAD is elsewhere
    "behind the last keep": (night_of(*KEPT), back(A), "not on top"),
    "behind, edited": (night_of(*KEPT, changed=True), NOTE, "not on top"),
    "beside it": (night_of(*KEPT, line=(S, B)), back(A), "not on top"),
    "on no commit of the night": (night_of(*BASE, line=()), back(), "not on top"),
    "on a discard": (night_of(*BASE, (A, 1, 1.1), line=(S, A, B)), back(), "aaaaaaa, which was not kept"),
    "on an undecided one": (night_of(*BASE, GOOD[0], line=(S, A, B)), ("idea", B, 1), "new idea"),
    "prepare.py differs": (night_of(*BASE, at=A, other_files=("prepare.py",)), back(), "changes prepare.py"),
    # now and then
    "pruning": (night_of(*KEPT, *WORSE[:7], at=A), IDEA, "pruning"),
    "not yet pruning": (night_of(*KEPT, *WORSE[:4], at=A), IDEA, "git commit"),
    "stuck": (night_of(*BASE, *WORSE[:5]), IDEA, "5 ideas in a row were not kept: change the structure"),
    "not yet stuck": (night_of(*BASE, *WORSE[:4]), IDEA, "git commit"),
    "pruned": (night_of(*KEPT, *WORSE[:6], (B, 1, 1.1, PRUNED), WORSE[7], at=A), IDEA, "8 ideas in a row"),
    # the end
    "before the time": (night_of(*KEPT, at=A, until=END, time="2026-11-28T06:59:59+00:00"), IDEA, "git commit"),
    "at the time": (night_of(*KEPT, at=A, until=END, time=END), ("final", S, 4), "the end"),
    "before the number": (night_of(*KEPT, at=A, until="7"), IDEA, "git commit"),
    "at the number": (night_of(*KEPT, at=A, until="6"), ("final", S, 4), "the end"),
    "in turns": (night_of(*KEPT, FINALS[0], at=A, until="6"), ("final", A, 4), "the end"),
    "a disturbed final run": (
        night_of(*KEPT, (S, 4, "disturbed", "final"), at=A, until="6"),
        ("final", S, 4),
        "the end",
    ),
    "a final run crashed": (night_of(*KEPT, (S, 4, "crash", "final"), at=A, until="6"), ("final", A, 4), ""),
    "wherever HEAD is": (night_of(*KEPT, changed=True, until="6"), ("final", S, 4), "the end"),
    "promising at the end": (night_of(*KEPT, (B, 1, 0.9), at=B, until="7"), ("idea", B, 2), "not decided"),
    "not begun at the end": (night_of(*KEPT, at=B, until="6"), ("final", S, 4), "the end"),
    "nothing was kept": (night_of(*BASE, until="3"), OVER, "nothing was kept"),
    "the baseline is incomplete": (night_of(*BASE[:2], until="1"), OVER, "nothing was kept"),
    "over": (night_of(*KEPT, *FINALS[:3], (A, 5, 0.9, "final"), at=A, until="6"), OVER, "seeds: +0.040000"),
    "over, within the noise": (night_of(*KEPT, *CLOSE, at=A, until="6"), OVER, "+0.001000, within the noise"),
    "over, all final runs crashed": (night_of(*KEPT, *LOST, at=A, until="6"), OVER, "no gain is confirmed"),
    "over, HEAD is an idea": (night_of(*KEPT, *FINALS, (B, 1, 1.1), at=B, until="6"), back(A), "the branch ends"),
    "over, extended": (night_of(*KEPT, *FINALS, at=A, until="9"), IDEA, "git commit"),
    "extended, a new last keep": (night_of(*KEPT, *FINALS, *NEXT, at=B, until="9"), ("final", B, 4), "the end"),
}


@pytest.mark.parametrize("name", NIGHTS)
def test_next_step(name):
    night, expected, words = NIGHTS[name]
    step = next_step(night)
    assert words in step.reason
    if isinstance(expected, tuple):
        assert (step.kind, step.command, step.training) == ("run", RUN, Training(*expected))
    else:
        assert step.command.startswith(expected) and step.training is None
        assert step.kind == "wait" or step.command != RUN


def test_the_last_keep_runs_again_after_twenty_runs():
    ideas = [(f"{number:040}", 1, 1.1) for number in range(1, 21)]
    assert next_step(night_of(*KEPT, *ideas[:19], at=A)).kind == "idea"
    night = night_of(*KEPT, *ideas, at=A)
    assert next_step(night).training == Training("again", A, 6)

    # its score sharpens the bar; a crash counts as having run, and takes nothing from the keep
    assert rules.bar(record(night, (A, 6, 0.95, "again"))) == pytest.approx(0.98)
    assert next_step(night).kind == "idea"
    night = night_of(*KEPT, *ideas, (A, 6, "crash", "again"), at=A)
    assert next_step(night).kind == "idea" and night.last_keep == A
    assert next_step(night_of(*KEPT, *ideas, (A, 6, "crash", "again"), *ideas, at=A)).training.seed == 7


def test_a_commit_that_was_left_is_decided_once():
    """Not before its run is over, which may keep it."""
    night = night_of(*BASE, at=A)
    for seed in (1, 2, 3):
        night.line, night.going_on = line_to(S, night), {"run": "x", "commit": A}
        record(night, (A, seed, 0.99, {"parent": S}))
    assert verdicts(night)[0] == "" and night.last_keep == S
    night.going_on = None
    assert verdicts(record(night))[0] == "keep"
    night = night_of(*BASE, GOOD[0])
    assert night.attempt(A).decision.reason.startswith("abandoned") and not due_decisions(night)


def test_a_hand_decision_is_never_superseded_by_the_rule():
    night = night_of(*BASE, GOOD[0], decision_line(A, "keep", "hand"), at=A)
    night.add(decision_line(A, "discard"))
    assert night.last_keep == A and next_step(night).kind == "idea"
    for decision in (decision_line(A, "discard", "hand") | {"gain": 0.01}, decision_line(A, "keep")):
        night.add(decision)
        assert night.last_keep == S and "simpler" not in next_step(night).reason


def test_the_last_keep_is_the_one_that_was_decided_last():
    night = night_of(*KEPT, (B, 1, 1.1), at=B)
    for commit, decision in ((A, "discard"), (B, "keep"), (A, "keep")):
        night.add(decision_line(commit, decision, "hand"))
    assert night.kept == [S, B, A]


@pytest.mark.parametrize(("second", "verdict"), [(1.0, "keep"), (1.0001, "discard")])
def test_what_is_simpler_is_kept_if_its_second_run_is_not_worse(second, verdict):
    wish = decision_line(A, "simpler", "hand")
    assert night_of(*BASE, (A, 1, 1.001), wish, (A, 2, second), at=A).attempt(A).verdict == verdict


# --------------------------------------
# Waves


def wave_of(*lines, ideas=(A, B), out=(), **changes):
    """A night with these runs, whose ideas are in worktrees, on the first commit."""
    worktrees = {str(number): Checkout((S, commit)) for number, commit in enumerate(ideas)}
    jobs = [dict(zip(("role", "commit", "seed"), job)) for job in out]
    night = Night(device="cpu", start=S, line=(S,), worktrees=worktrees, out=jobs, on_cluster=True)
    vars(night).update(changes)
    return record(night, *lines)


def ideas(*pairs):
    return [Training("idea", commit, seed) for commit, seed in pairs]


BASELINE = [Training("baseline", S, seed) for seed in (1, 2, 3)]
ALL_FINALS = [Training("final", commit, seed) for seed in (4, 5) for commit in (S, A)]
WINNERS = [*GOOD, *((B, seed, 0.98) for seed in (1, 2, 3))]
SENT = {  # night -> what is sent
    "all at once": (wave_of(), BASELINE + ideas((A, 1), (B, 1))),
    "what is out is not sent": (wave_of(out=[("baseline", S, 1), ("idea", B, 1)]), BASELINE[1:] + ideas((A, 1))),
    "what runs here": (wave_of(going_on=vars(BASELINE[0])), BASELINE[1:] + ideas((A, 1), (B, 1))),
    "until the bar is known, only first runs": (wave_of(BASE[0], GOOD[0]), BASELINE[1:] + ideas((B, 1))),
    "then all that may decide": (wave_of(*BASE, GOOD[0]), ideas((A, 2), (A, 3), (B, 1))),
    "a seed that was disturbed": (wave_of(*BASE, GOOD[0], (A, 2, "disturbed"), ideas=[A]), ideas((A, 2), (A, 3))),
    "not a discard": (wave_of(*BASE, (A, 1, 1.1)), ideas((B, 1))),
    "one commit in two worktrees": (wave_of(*BASE, ideas=[A, A]), ideas((A, 1))),
    "a chain": (wave_of(*BASE, GOOD[0], worktrees={"x": Checkout((S, A, B))}), ideas((A, 2), (A, 3), (B, 1))),
    "not on top of a discard": (wave_of(*BASE, (A, 1, 1.1), worktrees={"x": Checkout((S, A, B))}), []),
    "not on an older keep": (replace(wave_of(*KEPT, ideas=[A]), worktrees={"x": Checkout((S, B))}), []),
    "nor with another prepare.py": (wave_of(*BASE, worktrees={"x": Checkout((S, A), other_files=("prepare.py",))}), []),
    "HEAD, too": (wave_of(*BASE, ideas=[A], line=(S, B)), ideas((A, 1), (B, 1))),
    "at the end what has begun": (wave_of(*BASE, GOOD[0], until="3"), ideas((A, 2), (A, 3))),
    "not what has not": (wave_of(*BASE, until="3"), []),
    "no final runs while something is out": (wave_of(*KEPT, ideas=[A], out=[("idea", B, 1)], until="6"), []),
    "then all": (wave_of(*KEPT, ideas=[A], until="6"), ALL_FINALS),
}


@pytest.mark.parametrize("name", SENT)
def test_what_is_sent_to_a_cluster(name):
    night, trainings = SENT[name]
    assert needed_on_cluster(night) == trainings


def test_head_is_of_the_wave_too():
    """It was adopted beside worktrees: the best of all is kept, and only when all are decided."""
    worktree, head = Checkout((S, A)), dict(line=(S, B))
    night = wave_of(*BASE, worktrees={"x": worktree}, **head)
    assert verdicts(record(night, (B, 1, 0.5), *GOOD)) == ["", "", ""]
    assert verdicts(record(night, (B, 2, 0.5), (B, 3, 0.5))) == ["discard", "keep", ""]


def test_what_stands_on_a_discard_is_left_when_nothing_of_it_is_out():
    tree = {"x": Checkout((S, A, B))}
    runs = [*BASE, GOOD[0], (B, 1, 0.9), (A, 2, 1.1)]
    assert verdicts(wave_of(*runs, worktrees=tree, out=[("idea", B, 2)])) == ["discard", "", ""]
    assert verdicts(wave_of(*runs, worktrees=tree)) == ["discard", "discard", ""]


def test_what_is_gone_is_judged_by_its_runs_first():
    parent = {"parent": S}
    won = [(A, seed, 0.99, parent) for seed in (1, 2, 3)]
    assert verdicts(wave_of(*BASE, *won, ideas=[]))[0] == "discard"  # abandoned, after the first of them
    night = wave_of(*BASE, ideas=[A], out=[("idea", A, 3)])
    record(night, *won)
    night.worktrees, night.out = {}, []
    assert verdicts(record(night))[0] == "keep"
    night = wave_of(*BASE, ideas=[A], out=[("idea", A, 3)])
    record(night, *won[:2])
    night.worktrees, night.out, night.broken = {}, [], {"a": "git fails"}
    assert verdicts(record(night))[0] == ""  # for it may be there
    night.broken = {}
    assert record(night).attempt(A).decision.reason.startswith("abandoned")


def verdicts(night):
    return [night.attempt(commit).verdict for commit in (A, B, C)]


def test_the_best_of_a_wave_is_kept_when_nothing_of_it_is_out_or_needed():
    assert verdicts(wave_of(*BASE, *WINNERS)) == ["discard", "keep", ""]
    assert wave_of(*BASE, *WINNERS).attempt(A).decision.reason == "it could be kept, too: combine with bbbbbbb"
    assert verdicts(wave_of(*BASE, *WINNERS, ideas=(A, B, C))) == ["", "", ""]
    assert verdicts(wave_of(*BASE, *WINNERS, (C, 1, 1.1), ideas=(A, B, C))) == ["discard", "keep", "discard"]
    assert verdicts(wave_of(*BASE, *WINNERS, (C, 1, 0.99), ideas=(A, B, C), out=[("idea", C, 2)])) == ["", "", ""]
    night = wave_of(*BASE, *WINNERS, (C, 1, 1.1), ideas=(A, B, C), out=[("idea", C, 2)])
    assert verdicts(night) == ["discard", "keep", "discard"]  # whatever the rest of a discard says
    assert next_step(wave_of(*BASE, *WINNERS)).command == back(B)


def test_nothing_of_a_wave_is_judged_before_the_bar_is_known():
    for first in range(3):
        runs = [*BASE[:first], (A, 1, 1.1), *BASE[first:]]
        for count in range(len(runs)):
            assert verdicts(wave_of(*runs[:count]))[0] == ""
        assert verdicts(wave_of(*runs))[0] == "discard"
    assert verdicts(wave_of(BASE[0], (A, 1, "crash")))[0] == "discard"


def test_what_comes_next_in_a_wave():
    assert next_step(wave_of(out=[("baseline", S, 1)])).reason.startswith("jobs are out, 1 of them")
    assert next_step(wave_of(*BASE)).command == steps.WAVE_RUN
    assert next_step(wave_of(ideas=[])).command == steps.WAVE_RUN  # the baseline
    assert next_step(wave_of(ideas=[], on_cluster=False)).command == RUN
    lost = next_step(wave_of(*BASE, out=[("idea", A, 1)], on_cluster=False))
    assert lost.kind == "tell" and "jobs are out, 1 of them, but no cluster" in lost.command
    assert next_step(wave_of(*BASE, on_cluster=False)).command == IDEA
    assert verdicts(wave_of(*BASE, *WINNERS[3:], line=(S, B), on_cluster=False))[1] == "keep"
    assert verdicts(wave_of(*BASE, *WINNERS, ideas=(A, B, C), on_cluster=False)) == ["", "", ""]
    assert next_step(wave_of(*BASE, (A, 1, 1.1), (B, 1, 1.1))).command == steps.NEW_WORKTREE
    gone = wave_of(*BASE, (A, 1, 0.99), ideas=[])
    assert gone.attempt(A).decision.reason.startswith("abandoned") and next_step(gone).kind == "idea"


# --------------------------------------
# Random nights


class Player:
    """Plays a night as an agent does, with random scores, crashes, kills, hand decisions, ends and extensions."""

    def __init__(self, draw):
        self.draw = draw
        self.night = Night(device="cpu", start=S, time=END)
        self.lines = []
        self.commits = 0

    def add(self, line):
        self.lines.append(line)
        self.night.add(line)
        for decision in due_decisions(self.night):
            self.lines.append({"kind": "decision", **vars(decision)})
            self.night.add(self.lines[-1])
        assert not due_decisions(self.night), "the same decision again"

    def move(self):
        """Do what comes next. Returns its kind."""
        step = next_step(self.night)
        assert step.command and step.reason
        if step.kind == "run":
            self.train(step.training)
        elif step.kind == "idea":
            self.commits += 1
            self.night.changed = False
            self.night.line = (*self.night.line, f"{self.commits:040x}"[::-1])
        elif step.kind == "reset":
            keep = re.fullmatch("git reset -q --keep ([0-9a-f]{7})", step.command)[1]
            kept = next(commit for commit in self.night.kept if commit.startswith(keep))
            self.night.line = line_to(kept, self.night)
            self.add({"kind": "say", "message": ""})  # a look decides what was left
        elif step.kind == "drop":
            self.night.changed = False
        elif step.kind == "tell":
            self.add({"kind": "end", "until": self.night.until})
        return step.kind

    def train(self, training):
        states = ["scored"] * 12 + ["crash", "disturbed", "elsewhere", "interrupted"]
        state = self.draw.choice(states)
        result = self.draw.gauss(1, 0.01) if state == "scored" else state
        self.add(run_line(len(self.night.runs), training.commit, training.seed, result, training.role))

    def disturb(self):
        """What else happens in a night."""
        chance = self.draw.random()
        attempt = self.night.attempt(self.night.head)
        if chance < 0.05:
            self.night.changed = True
        elif chance < 0.1 and attempt.counted() and self.night.head not in self.night.kept:
            self.add(decision_line(self.night.head, self.draw.choice(["keep", "discard", "simpler"]), "hand"))
        elif chance < 0.13:
            self.add({"kind": "end", "until": str(self.draw.randint(1, 40))})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_nights_end_and_are_read_again_as_they_were(seed):
    player = Player(random.Random(seed))
    for _ in range(150):
        player.move()
        player.disturb()

    # from now on nothing happens but what comes next: the night ends
    player.add({"kind": "end", "until": "1"})
    for _ in range(200):
        if player.move() == "over":
            break
    else:
        raise AssertionError(f"it goes on: {next_step(player.night)}")
    again = Night(device="cpu", start=S, line=player.night.line, time=END)
    for line in player.lines:
        again.add(line)
    assert vars(again) == vars(player.night) | {"line": again.line, "changed": False}

    # no seed of a role counts twice
    counted = [(run.commit, run.role, run.seed) for run in player.night.runs.values() if run.counts]
    assert len(counted) == len(set(counted))

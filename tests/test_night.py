"""
night/: what runs are worth, what comes next (a table of nights, and nights that are played), and what is read of a
results.tsv or a run.log that others have written. No repository, no training.
"""

import math
import random
import re
from statistics import mean, stdev

import pytest
from conftest import HEADER
from hypothesis import given, settings
from hypothesis import strategies as st

import ledger
from night import load, waves, worth
from night.rows import Row, append_rows, read_rows
from night.rules import OVER, next_step
from night.worth import Night, gain, noise_floor, scores_of, verdict

# --------------------------------------
# Worth, against a brute-force reading


@given(runs=st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.5, 2)), max_size=30))
def test_noise_floor_and_gain_against_brute_force(runs):
    rows = [Row(commit, score, 1.0, "keep", "", 0) for commit, score in [*runs, ("f", math.nan)]]
    scores = scores_of(rows)
    assert scores == {c: [s for other, s in runs if other == c] for c in dict.fromkeys(c for c, _ in runs)}
    repeated = [group for group in scores.values() if len(group) > 1]
    if not repeated:
        assert math.isnan(noise_floor(scores))
    else:
        pooled = sum(stdev(g) ** 2 * (len(g) - 1) for g in repeated) / sum(len(g) - 1 for g in repeated)
        assert noise_floor(scores) == pytest.approx(2 * math.sqrt(pooled), abs=1e-9)
    for commit, group in scores.items():
        for best in scores:
            decisive = group if commit == best or len(group) == 1 else group[1:]
            assert gain(commit, best, scores) == pytest.approx(mean(scores[best]) - mean(decisive), abs=1e-9)


@pytest.mark.parametrize(
    ("tried", "expected"),
    [  # against a baseline of 1.000 with a noise floor of 0.010
        ([0.980], "promising"),
        ([0.998], "discard"),
        ([1.100], "discard"),
        ([0.980, 0.991], "keep"),
        ([0.980, 0.996], "discard"),  # however lucky the first run was
        ([0.997, 0.980], "keep"),
        ([0.980, 0.990, 1.002], "discard"),
    ],
)
def test_verdict(tried, expected):
    assert verdict("new", "base", {"base": [0.995, 1.0, 1.005], "new": tried, "wide": [2.0]}) == expected


# --------------------------------------
# What comes next: a table of nights

S, A, B = "0000000", "aaaaaaa", "bbbbbbb"  # the start, and ideas


def run_of(commit, seed, score, **changes):
    return {"commit": commit + 33 * "0", "seed": seed, "val_bpb": score, "dirty": False, "steps": 1000} | changes


def night(rows=(), new=(), at=S, **changes):
    """A night with these rows, (commit, score, status, description), the runs they are of, and runs without a row."""
    rows = [Row(commit, score or math.nan, 1.0, status, words, 0) for commit, score, status, words in rows]
    seeds = [re.search(r", seed (\d+)$", row.description) for row in rows]
    runs = [run_of(row.commit, int(seed[1]), row.val_bpb) for row, seed in zip(rows, seeds) if seed and row.val_bpb > 0]
    lineage = (S,) if at == S else (S, at)
    return Night(rows=rows, **{"runs": [*runs, *new], "head": at, "lineage": lineage, "subject": "wider"} | changes)


def train(seed):
    return f"AUTORESEARCH_SEED={seed} uv run train.py > run.log 2>&1"


def adds(words):
    return f"uv run ledger.py add '{words}'"


def back(commit, best=S):
    return f"git update-ref refs/tries/{commit} {commit} && git reset -q --keep {best}"


BASE = [(S, score, "keep", f"baseline, seed {seed}") for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005))]
FIRST = [*BASE, (A, 0.98, "discard", "wider, seed 1")]
KEPT = [*FIRST, (A, 0.985, "keep", "wider, seed 2")]
FINALS = [(commit, 0.99, "keep", f"x, final, seed {seed}") for seed in (4, 5) for commit in (S, A)]
MANY = [*KEPT, *((f"{n:07}", 1.1, "discard", "no, seed 1") for n in range(1, 21))]
CRASH = (A, 0, "crash", "wider: ValueError: no, seed 1")
SLOW = dict(slow_steps_percent=30.0)
CHANGES = "# train.py has changes: commit them, or drop them"
IDEA, DROP, BRANCH = "# a new idea: edit train.py", "git checkout HEAD -- train.py", "git checkout -q autoresearch/test"
TO_START = f"git checkout -q --detach {S}"
END = "2026-11-28T07:00:00+00:00"


def log(commit, seed=1, reason="ValueError: no"):
    return {"log": {"commit": commit, "seed": seed, "reason": reason}}


def seven(*more):
    return [*KEPT, *((f"{n:07}", 1.1, "discard", "no, seed 1") for n in range(1, 7)), *more]


NIGHTS = {
    # the baseline
    "after start": (night(), train(1), "baseline"),
    "in the first run, cut off": (night(**log(S, reason="")), train(1), "cut off"),
    "after the first run": (night(new=[run_of(S, 1, 1.0)]), adds("baseline"), "without a row"),
    "after the first row": (night(BASE[:1]), train(2), "baseline"),
    "two of three rows": (night(BASE[:2]), train(3), "baseline"),
    "a baseline by hand, without seeds": (night([(S, 1.0, "keep", "baseline")] * 2), train(3), "baseline"),
    "the baseline is away": (night(BASE[:2], at=A), TO_START, "not complete"),
    "an edit before the baseline": (night(BASE[:2], changed=True), DROP, "untouched"),
    "the baseline crashes": (night(**log(S)), adds("baseline"), "ValueError"),
    "it has crashed once": (night([(S, 0, "crash", "x, seed 1")]), train(2), "baseline"),
    "it has crashed twice": (night([(S, 0, "crash", f"x, seed {n}") for n in (1, 2)]), "tail -c 1500 run.log", "human"),
    "it has crashed thrice": (night([(S, 0, "crash", "x")] * 3), "tail -c 1500 run.log", "does not run"),
    "baseline complete": (night(BASE), IDEA, "commit it"),
    "baseline complete, detached": (night(BASE, branch=""), BRANCH, "last keep"),
    # an idea
    "edited": (night(BASE, changed=True), "# a new idea is in train.py: finish it", "git commit"),
    "committed": (night(BASE, at=A), train(1), "a new idea"),
    "committed and edited": (night(BASE, at=A, changed=True), CHANGES, "to drop them"),
    "in mid-run": (night(BASE, at=A, running="77", **log(A, reason="")), "tail -c 300 run.log", "this commit's"),
    "another trains": (night(BASE, at=A, running="77"), "tail -c 300 run.log", "perhaps not yours"),
    "the run was killed": (night(BASE, at=A, **log(A, reason="")), train(1), "--crash"),
    "after the run": (night(BASE, [run_of(A, 1, 0.9)], A), adds("wider"), "without a row: 1"),
    "after the run, edited": (
        night(BASE, [run_of(A, 1, 0.9)], A, changed=True),
        f"# note your idea, then drop it: {DROP}",
        "no row",
    ),
    "after a run, detached": (night(BASE, [run_of(A, 1, 0.9)], A, branch=""), adds("wider"), "row"),
    "two runs without a row": (night(BASE, [run_of(A, n, 0.9) for n in (1, 2)], A), adds("wider"), "without a row: 2"),
    "a subject with quotes": (
        night(BASE, [run_of(A, 1, 0.9)], A, subject="--it's\u2028`ß`;"),
        adds("it s ` `;"),
        "row",
    ),
    "no subject": (night(BASE, [run_of(A, 1, 0.9)], A, subject=""), adds("no subject"), "row"),
    "promising": (night(FIRST, at=A), train(2), "promising"),
    "promising, by hand": (night([*BASE, (A, 0.98, "discard", "wider")], at=A), train(2), "promising"),
    "not promising": (night([*BASE, (A, 0.998, "discard", "wider, seed 1")], at=A), back(A), "not kept"),
    "the second run confirms": (night(KEPT, at=A), IDEA, "commit it"),
    "it does not": (night([*FIRST, (A, 0.999, "discard", "wider, seed 2")], at=A), back(A), "not kept"),
    "after the reset": (night([*FIRST, (A, 0.999, "discard", "wider, seed 2")]), IDEA, "commit it"),
    "the first run crashes": (night(BASE, at=A, **log(A)), adds("wider"), "crashed: ValueError"),
    "before its first line": (night(BASE, at=A, **log(A, 0)), adds("wider"), "crashed"),
    "its row is there": (night([*BASE, CRASH], at=A), back(A), "not kept"),
    "the second run crashes": (night(FIRST, at=A, **log(A, 2)), adds("wider"), "crashed"),
    "then its row is there": (night([*FIRST, (A, 0, "crash", "x, seed 2")], at=A), back(A), "not kept"),
    "the log of another commit": (night(BASE, at=A, **log(B)), train(1), "a new idea"),
    "a run of files that differ": (night(BASE, [run_of(A, 1, 0.9, dirty=True)], A), train(1), "a new idea"),
    "a run of another commit": (night(BASE, [run_of(B, 1, 0.9)]), f"git checkout -q --detach {B}", "has no row"),
    "a keep by hand": (night([*BASE, (A, 0.98, "keep", "merged")], at=A), IDEA, "commit it"),
    "a merge on top of it": (
        night([*BASE, (A, 0.98, "keep", "merged")], at=B, lineage=(S, A, B)),
        train(1),
        "a new idea",
    ),
    # disturbed runs
    "disturbed": (night(BASE, [run_of(A, 1, 0.9, **SLOW)], A), train(1), "disturbed"),
    "half the steps": (night(BASE[:2], [run_of(S, 3, 1.1, steps=490)]), train(3), "disturbed"),
    "disturbed, then well": (night(BASE, [run_of(A, 1, 0.9, **SLOW), run_of(A, 1, 0.8)], A), adds("wider"), "row: 1"),
    "disturbed, then well, then its row": (
        night(FIRST, at=A, runs=[run_of(A, 1, 0.9, **SLOW), *night(FIRST).runs]),
        train(2),
        "promising",
    ),
    "disturbed three times": (night(BASE, [run_of(A, 1, 0.9, **SLOW)] * 3, A), adds("wider"), "disturbed 3 times"),
    "given up": (night([*BASE, CRASH], [run_of(A, 1, 0.9, **SLOW)] * 3, A), back(A), "not kept"),
    "disturbed after a crash": (
        night([(S, 0, "crash", "x, seed 1")], [run_of(S, 2, 1.1, **SLOW)] * 3),
        adds("baseline"),
        "3 times",
    ),
    # trouble
    "markers in the folder": (night(BASE, conflict=True, changed=True), DROP, "conflict"),
    "markers in the commit": (night(BASE, at=A, conflict=True), "git reset -q --keep HEAD^", "conflict"),
    "a stray file": (night(BASE, stray="new.py"), "# restore or move new.py", "no run counts"),
    "another branch": (night(BASE, branch="main", lineage=()), BRANCH, "not the branch"),
    "another branch, edited": (night(BASE, branch="main", changed=True), CHANGES, "not autoresearch/test"),
    "behind the last keep": (night(KEPT), f"git reset -q --keep {A}", "on top"),
    "beside the last keep": (night(KEPT, at=B), f"git reset -q --keep {A}", "on top"),
    "an idea on no branch": (night(BASE, at=A, branch=""), f"{BRANCH} && git reset -q --keep {A}", "no branch"),
    "elsewhere, on no branch": (night(KEPT, at=B, branch=""), BRANCH, "no branch"),
    "at the last keep, on no branch": (night(KEPT, at=A, branch=""), BRANCH, "last keep"),
    # now and then
    "pruning": (night(seven(("0000009", 1.1, "discard", "no, seed 1")), at=A), IDEA, "pruning"),
    "pruning is still due": (
        night(seven(*((f"000000{n}", 1.1, "discard", "x, seed 1") for n in "89")), at=A),
        IDEA,
        "pruning",
    ),
    "pruning, done": (night(seven(("0000009", 1.1, "discard", "prune x, seed 1")), at=A), IDEA, "commit it"),
    "nothing kept, no pruning": (night([*BASE, *seven()[5:], *MANY[12:]]), IDEA, "commit it"),
    "not yet pruning": (night(seven(), at=A), IDEA, "commit it"),
    "drift is due": (night(MANY, at=A), TO_START, "drift"),
    "drift, edited": (night(MANY, at=A, changed=True), "# a new idea is in train.py: finish it", "git commit"),
    "drift, there": (night(MANY, branch=""), train(1), "drift"),
    "drift, run": (night(MANY, [run_of(S, 1, 1.01)], branch=""), adds("baseline"), "row"),
    "drift, disturbed": (night(MANY, [run_of(S, 1, 1.01, **SLOW)], branch=""), train(1), "disturbed"),
    "drift, given up": (night(MANY, [run_of(S, 1, 1.01, **SLOW)] * 3, branch=""), adds("baseline"), "3 times"),
    "drift, crashed": (night(MANY, branch="", **log(S)), adds("baseline"), "crashed"),
    "drift, done": (night([*MANY, (S, 1.0, "keep", "baseline, seed 1")], branch=""), BRANCH, "last keep"),
    "nothing kept, no drift": (night([*BASE, *MANY[5:]]), IDEA, "commit it"),
    # the end
    "before the time": (night(KEPT, at=A, until=END, time="2026-11-28T06:59:59+00:00"), IDEA, "commit it"),
    "at the time": (night(KEPT, at=A, until=END, time=END), TO_START, "the end"),
    "before the number": (night(KEPT, at=A, until="6"), IDEA, "commit it"),
    "at the number": (night(KEPT, at=A, until="5"), TO_START, "the end"),
    "after the number": (night(KEPT, at=A, until="4"), TO_START, "the end"),
    "the end, edited": (night(KEPT, at=A, until="5", changed=True), DROP, "no new idea"),
    "the end, an idea that never ran": (night(KEPT, at=B, lineage=(S, A, B), until="5"), back(B, A), "not kept"),
    "the end, promising": (night(FIRST, at=A, until="4"), train(2), "promising"),
    "the end, baseline incomplete": (night(BASE[:2], until="1"), OVER, "nothing was kept"),
    "the end, baseline disturbed": (
        night(new=[run_of(S, 1, 1.0, **SLOW)], until=END, time=END),
        OVER,
        "nothing was kept",
    ),
    "the end, an idea disturbed": (night(BASE, [run_of(A, 1, 0.9, **SLOW)], A, until="3"), back(A), "not kept"),
    "the end, a final run disturbed": (
        night(KEPT, [run_of(S, 4, 1.0, **SLOW)], branch="", until="5"),
        train(4),
        "disturbed",
    ),
    "promising, but added with --discard": (
        night([*BASE, (A, 0.98, "discard", "wider, dropped, seed 1")], at=A),
        back(A),
        "not kept",
    ),
    "final baseline, 4": (night(KEPT, branch="", until="5"), train(4), "the end"),
    "final baseline, run": (night(KEPT, [run_of(S, 4, 1.0)], branch="", until="5"), adds("baseline, final"), "row"),
    "then the last keep": (night([*KEPT, *FINALS[:1]], branch="", until="5"), BRANCH, "in turns"),
    "final keep, 4": (night([*KEPT, *FINALS[:1]], at=A, until="5"), train(4), "the end"),
    "final keep, run": (
        night([*KEPT, *FINALS[:1]], [run_of(A, 4, 0.9)], A, until="5"),
        adds("last keep, final"),
        "row",
    ),
    "final baseline, 5, away": (night([*KEPT, *FINALS[:2]], at=A, until="5"), TO_START, "in turns"),
    "final baseline, 5": (night([*KEPT, *FINALS[:2]], branch="", until="5"), train(5), "the end"),
    "final keep, 5": (night([*KEPT, *FINALS[:3]], at=A, until="5"), train(5), "the end"),
    "a final run crashed": (night([*KEPT, (S, 0, "crash", "x, seed 4")], at=A, until="5"), train(4), "the end"),
    "over, on no branch": (night([*KEPT, *FINALS], branch="", until="5"), BRANCH, "back"),
    "over": (night([*KEPT, *FINALS[:3], (A, 0.97, "keep", "x, final, seed 5")], at=A, until="5"), OVER, "+0.010000"),
    "over, nothing kept": (night(BASE, until="3"), OVER, "nothing was kept"),
    "over, all finals crashed": (
        night([*KEPT, *((c, 0, "crash", f"x, seed {n}") for n in (4, 5) for c in (S, A))], at=A, until="5"),
        OVER,
        "no gain",
    ),
}


def job(commit, seed, state, attempt=1, **changes):
    name = f"test-{commit}-{seed}-{attempt}"
    return {"job": name, "commit": commit + 33 * "0", "seed": seed, "state": state, "attempt": attempt} | changes


def wave(rows, jobs, at=S, **changes):
    """A night whose cluster is open: the runs of jobs that have a score count as any others."""
    scored = [run_of(other["commit"][:7], other["seed"], 0.9) | other for other in jobs if other["state"] == "scored"]
    return night(rows, scored, at, jobs=jobs, **{"wave": True} | changes)


def submits(*pairs):
    return "uv run --group cluster swarm/wave.py submit " + " ".join(pairs)


ADDS, COLLECT = "uv run ledger.py add --wave", "uv run --group cluster swarm/wave.py collect"
NIGHTS |= {
    "wave: the baseline": (wave([], []), submits(f"{S}:1", f"{S}:2", f"{S}:3"), "baseline"),
    "wave: jobs are out": (wave(BASE, [job(A, 1, "out")]), COLLECT, "out: 1"),
    "wave: out, on this machine": (wave(BASE, [job(A, 1, "out")], running="77"), COLLECT, "out"),
    "wave: a stranger trains": (wave(BASE, [], running="77"), "tail -c 300 run.log", "not yours"),
    "wave: a run came in": (wave(BASE, [job(A, 1, "scored")]), ADDS, A),
    "wave: one came in, one is out": (wave(BASE, [job(A, 2, "scored"), job(A, 3, "out")]), COLLECT, "out: 1"),
    "wave: a crash": (wave(BASE, [job(A, 1, "crash", reason="no")]), ADDS, A),
    "wave: the cluster is closed": (wave(BASE, [job(A, 1, "scored")], wave=False), ADDS, A),
    "wave: a crash with its row": (wave([*BASE, CRASH], [job(A, 1, "crash")]), IDEA, "commit it"),
    "wave: promising": (
        wave([*FIRST, (B, 0.9, "discard", "x, seed 1")], [job(A, 1, "-"), job(B, 1, "-"), job(B, 2, "out")]),
        COLLECT,
        "out",
    ),
    "wave: two are promising": (
        wave([*FIRST, (B, 0.9, "discard", "x, seed 1")], [job(A, 1, "-"), job(B, 1, "-")]),
        submits(f"{A}:2", f"{A}:3", f"{B}:2", f"{B}:3"),
        "promising",
    ),
    "wave: one of them was dropped": (
        wave([*FIRST, (B, 0.9, "discard", "x, dropped, seed 1")], [job(A, 1, "-"), job(B, 1, "-")]),
        submits(f"{A}:2", f"{A}:3"),
        "promising",
    ),
    "wave: a node went": (wave(BASE, [job(A, 1, "lost")]), submits(f"{A}:1"), "again"),
    "wave: sent again": (wave(BASE, [job(A, 1, "lost"), job(A, 1, "out", 2)]), COLLECT, "out"),
    "wave: disturbed": (wave(BASE, [job(A, 1, "scored", **SLOW)]), submits(f"{A}:1"), "again"),
    "wave: lost three times": (wave(BASE, [job(A, 1, "lost", n) for n in (1, 2, 3)]), ADDS, A),
    "wave: kept": (wave(KEPT, [job(A, 1, "-")]), f"git reset -q --keep {A}", "not on top"),
    "wave: an idea on the branch": (wave(BASE, [], A), submits(f"{A}:1"), "a new idea"),
    "wave: no drift": (wave(MANY, [], A), IDEA, "pruning"),
    "wave: the end": (
        wave(KEPT, [], A, until="5"),
        submits(f"{S}:4", f"{A}:4", f"{S}:5", f"{A}:5"),
        "the end",
    ),
}


def test_one_commit_of_a_wave_is_kept():
    """The best of those that the rule keeps; the first run of each, which was the luckiest, says nothing."""
    jobs = [job(commit, seed, "scored") for commit in (A, B, "ccccccc") for seed in (1, 2, 3)]
    scores = {A: [0.93, 0.95, 0.96], B: [0.955, 0.94, 0.95], "ccccccc": [0.98, 0.99, 1.01]}
    for other in jobs:
        other["val_bpb"] = scores[other["commit"][:7]][other["seed"] - 1]
    state = wave(BASE, jobs)
    assert waves.winner(state, waves.unwritten(state)) == B
    assert waves.winner(wave(BASE, jobs[6:]), waves.unwritten(wave(BASE, jobs[6:]))) is None


@pytest.mark.parametrize(
    ("changes", "counts"),
    [({}, 1), ({"benchmark": "another"}, 0), ({"device": "A100"}, 0), ({"commit": S + 33 * "0", "seed": 1}, 0)],
    ids=["like the baseline", "another benchmark", "another device", "the journal has it"],
)
def test_runs_of_a_wave_compare(changes, counts):
    here = run_of(S, 1, 1.0, device="H100", time="1")
    runs = [here]
    sent = run_of(A, 1, 0.9, device="H100", time="1", benchmark="this", state="scored", job="x") | changes
    problems = waves.add_runs(runs, [sent], {"id": "this"}, here["commit"])
    assert len(runs) - 1 == counts
    assert len(problems) == (1 if "benchmark" in changes or "device" in changes else 0)


@pytest.mark.parametrize("name", NIGHTS)
def test_next_step(name):
    state, command, word = NIGHTS[name]
    step = next_step(state)
    assert (step.command, word in step.reason) == (command, True), step


commits = st.sampled_from([S, A, B, "ccccccc"])
some_rows = st.builds(
    Row,
    commits,
    st.sampled_from([0.9, 0.99, 1.0, math.nan]),
    st.just(1.0),
    st.sampled_from(["keep", "discard", "crash"]),
    st.sampled_from(["x", "x, seed 1", "x, seed 2", "x, final, seed 4", "seed", ""]),
    st.just(1),
)
some_runs = st.builds(
    run_of,
    commits,
    st.integers(0, 5),
    st.sampled_from([0.9, 0.99, 1.0]),
    dirty=st.sampled_from([True, False, None]),
    steps=st.sampled_from([0, 400, 1000]),
)
some_jobs = st.builds(
    lambda commit, seed, state, attempt: job(commit, seed, state, attempt),
    commits,
    st.integers(1, 5),
    st.sampled_from(["out", "scored", "crash", "lost"]),
    st.integers(1, 4),
)
some_logs = st.builds(lambda c, seed, reason: log(c, seed, reason)["log"], commits, st.integers(0, 5), st.text())


@settings(max_examples=300, deadline=None)
@given(
    state=st.builds(
        Night,
        until=st.sampled_from(["never", "1", "7", END]),
        time=st.just(END),
        start=st.just(S),
        head=commits,
        branch=st.sampled_from(["", "main", "autoresearch/test"]),
        lineage=st.lists(commits).map(tuple),
        subject=st.text(),
        rows=st.lists(some_rows, max_size=30),
        runs=st.lists(some_runs, max_size=12),
        log=st.one_of(st.just({}), some_logs),
        running=st.sampled_from(["", "77"]),
        changed=st.booleans(),
        stray=st.sampled_from(["", "new.py"]),
        conflict=st.booleans(),
        jobs=st.lists(some_jobs, max_size=4),
        wave=st.booleans(),
    )
)
def test_next_step_never_raises(state):
    step = next_step(state)
    assert step.command and step.reason
    if "ledger.py add" in step.command:
        assert re.fullmatch(r"uv run ledger.py add ('[ -&(-~]+'|--wave)", step.command)


class Player:
    """Does what next_step says in a night of its own, with chance for scores, crashes and slips."""

    def __init__(self, until, chance):
        self.night = night(until=str(until))
        self.chance = chance
        self.parents = {S: None}
        self.tip = S
        self.counted = []

    def go(self, commit, branch):
        self.night.head, self.night.branch = commit, branch
        if branch:
            self.tip = commit
        self.night.lineage = ()
        while commit:
            self.night.lineage = (commit, *self.night.lineage)
            commit = self.parents[commit]

    def do(self, command):
        """One command. False when the night is over, or nothing can go on."""
        if command == OVER or command.startswith("tail"):
            return False
        seed = re.match(r"AUTORESEARCH_SEED=(\d)", command)
        target = re.search(r"(?:--keep|--detach) (\w+)$", command)
        if seed:
            self.train(int(seed[1]))
        elif "ledger.py add" in command:
            self.add()
        elif target and command.startswith("git checkout -q auto"):
            self.go(target[1], "autoresearch/test")
        elif target:
            self.go(target[1], "" if "--detach" in command or not self.night.branch else self.night.branch)
        elif command.startswith("git checkout -q auto"):
            self.go(self.tip, "autoresearch/test")
        else:
            assert command.startswith("# a new idea")
            commit = f"{len(self.parents):07}"
            self.parents[commit] = self.night.head
            self.go(commit, self.night.branch)
        return True

    def train(self, seed):
        fate = self.chance.choice(["score"] * 6 + ["crash", "slip", "disturbed", "cut off"])
        head = self.night.head
        reason = {"crash": "ValueError: no", "slip": "SyntaxError: no"}.get(fate, "")
        self.night.log = log(head, 0 if fate == "slip" else seed, reason)["log"]
        if fate in ("score", "disturbed"):
            slow = SLOW if fate == "disturbed" else {}
            self.night.runs.append(run_of(head, seed, self.chance.gauss(1 - 0.001 * len(self.parents), 0.003), **slow))
        if fate == "score" and not (head == S and seed == 1):  # which runs again, for drift
            self.counted.append((head, seed))

    def add(self):
        new, _ = worth.new_runs(self.night)
        status = ledger.status_of(self.night, scores_of(self.night.rows, new))
        rows = [load.row_of(run, status, "x") for run in new] + ledger.crash_rows(self.night, "x", None)
        assert rows, "nothing to add"
        self.night.rows += rows
        self.night.log = {}


@settings(max_examples=60, deadline=None)
@given(until=st.integers(1, 45), chance=st.integers(0, 10**9).map(random.Random))
def test_a_played_night_ends_and_runs_nothing_twice(until, chance):
    player = Player(until, chance)
    for _ in range(20 * until + 200):
        if chance.random() < 0.03:  # a slip: the agent is suddenly elsewhere
            player.go(chance.choice(list(player.parents)), "")
        elif not player.do(next_step(player.night).command):
            break
    else:
        raise AssertionError(f"it does not end: {next_step(player.night)}")
    assert len(set(player.counted)) == len(player.counted), "a run that counted ran again"
    scored = worth.counting(player.night.runs, player.night.runs)
    assert len(worth.pair(player.night.rows, scored)[1]) == 0, "a run has no row"


# --------------------------------------
# What is read of a results.tsv

LINE = "a1b2c3d\t0.998100\t44.0\tkeep\tbaseline, seed 1\n"
ROW = ("a1b2c3d", 0.9981, 44.0, "keep", "baseline, seed 1")
NO_MEMORY = (*ROW[:2], None, *ROW[3:])
FULL_HASH = "a1b2c3d" + "4" * 33

LEDGERS = {
    "as it is written": (HEADER + LINE, [ROW], []),
    "nothing": ("", [], []),
    "a header alone": (HEADER, [], []),
    "no header": (LINE, [ROW], []),
    "a header twice": (HEADER + LINE + HEADER + LINE, [ROW] * 2, []),
    "no last newline": (HEADER + LINE.strip(), [ROW], []),
    "blank lines": (f"\n{HEADER}\n{LINE}\n\n", [ROW], []),
    "a full hash": (LINE.replace("a1b2c3d", FULL_HASH), [ROW], []),
    "a hash of 12": (LINE.replace("a1b2c3d", FULL_HASH[:12]), [ROW], []),
    "a hash of 6": (LINE.replace("a1b2c3d", "a1b2c3"), [("a1b2c3", *ROW[1:])], []),
    "upper case": (LINE.replace("a1b2c3d", "A1B2C3D").replace("keep", "KEEP"), [ROW], []),
    "byte order mark": ((HEADER + LINE).encode("utf-8-sig"), [ROW], []),
    "UTF-16": ((HEADER + LINE).encode("utf-16"), [ROW], []),
    "UTF-16, big end first": (b"\xfe\xff" + (HEADER + LINE).encode("utf-16-be"), [ROW], []),
    "UTF-16 appended to UTF-8": (HEADER.encode() + LINE.encode("utf-16-le"), [ROW], []),
    "Windows-1252": (LINE.replace("base", "b\xe4se").encode("cp1252"), [(*ROW[:4], "b\xe4seline, seed 1")], []),
    "CRLF": ((HEADER + LINE).replace("\n", "\r\n"), [ROW], []),
    "CR": ((HEADER + LINE).replace("\n", "\r"), [ROW], []),
    "U+2028 in a description": (LINE.replace("line,", "\u2028,"), [(*ROW[:4], "base\u2028, seed 1")], []),
    "spaces for tabs": ((HEADER + LINE).replace("\t", " "), [ROW], []),
    "many spaces": (LINE.replace("\t", "    "), [ROW], []),
    "written-out tabs": ((HEADER + LINE).replace("\t", "\\t"), [ROW], []),
    "semicolons": ((HEADER + LINE).replace("\t", ";"), [ROW], []),
    "semicolons, decimal commas": (LINE.replace("\t", ";").replace(".", ","), [ROW], []),
    "commas": (LINE.replace("\t", ","), [ROW], []),
    "commas and quotes": ('a1b2c3d,0.9981,44.0,keep,"baseline, seed 1"', [ROW], []),
    "a table of Markdown": (LINE.replace("\t", " | ").replace("a1", "| a1").replace("\n", " |"), [ROW], []),
    "one tab, then spaces": ("a1b2c3d\t0.9981 44.0 keep baseline, seed 1", [ROW], []),
    "decimal commas": (LINE.replace("0.9981", "0,9981"), [ROW], []),
    "commas in a description between spaces": (
        "a1b2c3d 0.9981 44.0 keep baseline, wide, seed 1",
        [(*ROW[:4], "baseline, wide, seed 1")],
        [],
    ),
    "tabs in a description": (LINE.replace("baseline, ", "base\tline, "), [(*ROW[:4], "base\tline, seed 1")], []),
    "no memory": (LINE.replace("\t44.0", ""), [NO_MEMORY], []),
    "no description": ("a1b2c3d\t0.9981\t44.0\tkeep", [(*ROW[:4], "")], []),
    "a number too many": (LINE.replace("\tkeep", "\t8\tkeep"), [ROW], []),
    "five columns under six": (HEADER.replace("\tval", "\tsteps\tval") + LINE, [ROW], []),
    "six columns under six": (
        HEADER.replace("\tval", "\tsteps\tval") + LINE.replace("\t0.99", "\t800\t0.99"),
        [ROW],
        [],
    ),
    "other columns, other order": ("Status\tVal_BPB\tCommit\nkeep\t0.9981\ta1b2c3d\n", [(*NO_MEMORY[:4], "")], []),
    "a word for keep": (LINE.replace("keep", "Kept!"), [ROW], []),
    "an unknown word": (LINE.replace("keep", "promising"), [(*ROW[:3], "discard", ROW[4])], []),
    "an unknown word, keep in the words": ("a1b2c3d\t0.9981\t44.0\tgood\tkeep", [(*ROW[:3], "discard", "keep")], []),
    "a crash": ("a1b2c3d\t0.000000\t0.0\tcrash\tno", [("a1b2c3d", None, 0.0, "crash", "no")], []),
    "a crash without numbers": ("a1b2c3d\t-\t\tfailed\tno", [("a1b2c3d", None, None, "crash", "no")], []),
    "a discard of zero": ("a1b2c3d\t0\t0\tdiscard\tno", [("a1b2c3d", None, 0.0, "crash", "no")], []),
    "not a score": (HEADER + LINE.replace("0.998100", "n/a"), [], [":2: not a row"]),
    "not a hash": (HEADER + LINE.replace("a1b2c3d", "HEAD") + LINE, [ROW], [":2: not a row"]),
    "two rows in a line": (HEADER + LINE.strip() + LINE, [(*ROW[:4], "baseline, seed 1" + LINE.strip())], []),
    "words": ("# my notes\n" + LINE, [ROW], [":1: not a row"]),
    "another tool": ("step\tloss\n1\t2.5\n", [], [":1: not a row", ":2: not a row"]),
    "another tool with a val_bpb": ("step\tval_bpb\n1\t2.5\n", [], [":1: a ledger of another tool", ":2: not a row"]),
    "bytes": (bytes(range(128, 256)), [], [":1: not a row"]),
}


@pytest.mark.parametrize("name", LEDGERS)
def test_what_is_read_and_kept(name, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    content, expected, said = LEDGERS[name]
    path = tmp_path / "results.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, problems = read_rows(path)
    assert [[None if cell != cell else cell for cell in row[:5]] for row in rows] == [list(row) for row in expected]
    assert len(problems) == len(said) and all(words in line for words, line in zip(said, problems)), problems

    # a row more, and all is there that was
    append_rows(path, [("e" * 7, "1.000000", "1.0", "keep", "one\u2028more\nline")])
    more, again = read_rows(path)
    assert again == problems or not content
    assert [row[:1] + row[3:5] for row in more[:-1]] == [row[:1] + row[3:5] for row in rows]
    assert more[-1][:5] == ("e" * 7, 1.0, 1.0, "keep", "one more line")
    assert not list(tmp_path.glob("*.tmp"))


@given(content=st.binary())
def test_reading_never_raises(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    path.write_bytes(content)
    rows, problems = read_rows(path)
    assert len(rows) + len(problems) <= len(content)


LOGS = {
    "scored": ("commit a1b2c3d, seed 2, x\n---\nval_bpb: 0.9\ndepth: 8\n", ("a1b2c3d", 2, "")),
    "an error": ("commit a1b2c3d, seed 2, x\nTraceback\nValueError: no\n\n", ("a1b2c3d", 2, "ValueError: no")),
    "cut off in mid-run": ("commit a1b2c3d, seed 2, x\nstep 00010 | 5%\rstep 00020 | 9%", ("a1b2c3d", 2, "")),
    "interrupted": ("commit a1b2c3d, seed 2, x\nTraceback\nKeyboardInterrupt\n", ("a1b2c3d", 2, "")),
    "a syntax error": ("  File x\nSyntaxError: no\n", ("eeeeeee", 0, "SyntaxError: no")),
    "the device was taken": ("another training is running on cpu (pid 7): wait for it or end it\n", None),
    "empty": ("", None),
    "a long one": ("commit a1b2c3d, seed 2, x\n" + "word\n" * 99_999 + "MemoryError\n", ("a1b2c3d", 2, "MemoryError")),
}


@pytest.mark.parametrize("name", LOGS)
def test_logs(name, tmp_path):
    text, expected = LOGS[name]
    (tmp_path / "run.log").write_text(text)
    assert tuple(load.read_log(tmp_path / "run.log", "e" * 40).values()) == (expected or ())

"""
Defects of night/: a wrong noise floor or verdict, a wrong or endless next step, a wave's job that counts wrongly, a
results.tsv or run.log of other hands that is misread. No repository, no training.
"""

import dataclasses
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
# Worth


@given(runs=st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.5, 2)), max_size=30))
def test_noise_floor_and_gain_against_brute_force(runs):
    expected = {}
    for commit, score in runs:
        expected.setdefault(commit, []).append(score)
    scores = scores_of([Row(commit, score, 1.0, "keep", "", 0) for commit, score in [*runs, ("f", math.nan)]])
    assert scores == expected

    repeated = [group for group in scores.values() if len(group) > 1]
    if repeated:
        squares = sum(stdev(group) ** 2 * (len(group) - 1) for group in repeated)
        pooled = squares / sum(len(group) - 1 for group in repeated)
        assert noise_floor(scores) == pytest.approx(2 * math.sqrt(pooled), abs=1e-9)
    else:
        assert math.isnan(noise_floor(scores))
    for commit, group in scores.items():
        assert gain(commit, commit, scores) == 0
        for best in scores.keys() - {commit}:
            decisive = group[1:] or group
            assert gain(commit, best, scores) == pytest.approx(mean(scores[best]) - mean(decisive), abs=1e-9)


VERDICTS = {  # against a baseline of 1.000 with a noise floor of 0.010
    "over a quarter of the floor": ([0.997], "promising"),
    "under it": ([0.998], "discard"),
    "over half of it, after the first": ([0.980, 0.994], "keep"),
    "a lucky first run": ([0.900, 0.996], "discard"),
    "an unlucky first run": ([1.100, 0.980], "keep"),
    "the third run is behind": ([0.980, 0.990, 1.002], "discard"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name):
    tried, expected = VERDICTS[name]
    assert verdict("new", "base", {"base": [0.995, 1.0, 1.005], "new": tried, "wide": [2.0]}) == expected


# --------------------------------------
# What comes next: a table of nights

S, A, B = "0000000", "aaaaaaa", "bbbbbbb"  # the start, and ideas


def run_of(commit, seed, score, **changes):
    return {"commit": commit + 33 * "0", "seed": seed, "val_bpb": score, "dirty": False, "steps": 1000} | changes


def night(rows=(), new=(), at=S, **changes):
    """A night with these rows, (commit, score, status, description), the runs they are of, and runs without a row."""
    rows = [Row(commit, score or math.nan, 1.0, status, words, 0) for commit, score, status, words in rows]
    runs = []
    for row in rows:
        seed = re.search(r", seed (\d+)$", row.description)
        if seed and row.val_bpb > 0:
            runs.append(run_of(row.commit, int(seed[1]), row.val_bpb))
    lineage = tuple(dict.fromkeys([S, at]))
    return Night(rows=rows, **{"runs": [*runs, *new], "head": at, "lineage": lineage, "subject": "wider"} | changes)


def job(commit, seed, state, attempt=1, **changes):
    name = f"test-{commit}-{seed}-{attempt}"
    return {"job": name, "commit": commit + 33 * "0", "seed": seed, "state": state, "attempt": attempt} | changes


def wave(rows, jobs, at=S, **changes):
    """A night whose cluster is open: the runs of jobs that have a score count as any others."""
    scored = [run_of(other["commit"][:7], other["seed"], 0.9) | other for other in jobs if other["state"] == "scored"]
    return night(rows, scored, at, jobs=jobs, **{"wave": True} | changes)


def log(commit, seed=1, reason="ValueError: no"):
    return {"log": {"commit": commit, "seed": seed, "reason": reason}}


def train(seed):
    return f"AUTORESEARCH_SEED={seed} uv run train.py > run.log 2>&1"


def adds(words):
    return f"uv run ledger.py add '{words}'"


def back(commit, best=S):
    return f"git update-ref refs/tries/{commit} {commit} && git reset -q --keep {best}"


def submits(*pairs):
    return "uv run --group cluster swarm/wave.py submit " + " ".join(pairs)


def tries(count, first=1):
    """Rows of so many ideas that came to nothing."""
    return [(f"{number:07}", 1.1, "discard", "no, seed 1") for number in range(first, first + count)]


BASE = [(S, score, "keep", f"baseline, seed {seed}") for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005))]
FIRST = [*BASE, (A, 0.98, "discard", "wider, seed 1")]
BOTH = [*FIRST, (B, 0.9, "discard", "x, seed 1")]
KEPT = [*FIRST, (A, 0.985, "keep", "wider, seed 2")]
FINALS = [(commit, 0.99, "keep", f"x, final, seed {seed}") for seed in (4, 5) for commit in (S, A)]
FINAL_CRASHES = [(commit, 0, "crash", f"x, seed {seed}") for seed in (4, 5) for commit in (S, A)]
CRASH = (A, 0, "crash", "wider: ValueError: no, seed 1")
DROPPED = (B, 0.9, "discard", "x, dropped, seed 1")
SLOW = dict(slow_steps_percent=30.0)
RUN, SLOW_RUNS = run_of(A, 1, 0.9), [run_of(A, 1, 0.9, **SLOW)] * 3
TRY = dict(at=A, branch="autoresearch/test")
HOME = dict(at=A, until="5")  # at the last keep, at the end
AWAY = dict(branch="", until="5")  # at the baseline, at the end
END = "2026-11-28T07:00:00+00:00"
FINISH, CHANGES = "# a new idea is in train.py: finish it", "# train.py has changes: commit them, or drop them"
IDEA, DROP, BRANCH = "# a new idea: edit train.py", "git checkout HEAD -- train.py", "git checkout -q autoresearch/test"
TO_START, TAIL = f"git checkout -q --detach {S}", "tail -c 300 run.log"
ADDS, COLLECT = "uv run ledger.py add --wave", "uv run --group cluster swarm/wave.py collect"

NIGHTS = {
    # the baseline
    "after start": (night(), train(1), "baseline"),
    "in the first run, cut off": (night(**log(S, reason="")), train(1), "cut off"),
    "after the first run": (night(new=[run_of(S, 1, 1.0)]), adds("baseline"), "without a row"),
    "after the first row": (night(BASE[:1]), train(2), "baseline"),
    "a baseline by hand, without seeds": (night([(S, 1.0, "keep", "baseline")] * 2), train(3), "baseline"),
    "the baseline is away": (night(BASE[:2], at=A), TO_START, "not complete"),
    "an edit before the baseline": (night(BASE[:2], changed=True), DROP, "untouched"),
    "the baseline crashes": (night(**log(S)), adds("baseline"), "ValueError"),
    "it has crashed twice": (night([(S, 0, "crash", f"x, seed {n}") for n in (1, 2)]), "tail -c 1500 run.log", "human"),
    "half the steps": (night(BASE[:2], [run_of(S, 3, 1.1, steps=490)]), train(3), "disturbed"),
    "baseline complete": (night(BASE), IDEA, "commit it"),
    "the same, on a hub": (night(BASE, tag="test/ada", branch="autoresearch/test/ada"), IDEA, "exchange"),
    "baseline complete, detached": (night(BASE, branch=""), BRANCH, "last keep"),
    # an idea
    "edited": (night(BASE, changed=True), FINISH, "git commit"),
    "edited, detached": (night(BASE, changed=True, branch=""), DROP, "on the branch"),
    "committed": (night(BASE, at=A), train(1), "a new idea"),
    "committed and edited": (night(BASE, at=A, changed=True), CHANGES, "to drop them"),
    "in mid-run": (night(BASE, at=A, running="77", **log(A, reason="")), TAIL, "this commit's"),
    "another trains": (night(BASE, at=A, running="77"), TAIL, "perhaps not yours"),
    "the run was killed": (night(BASE, at=A, **log(A, reason="")), train(1), "--crash"),
    "edited after the run": (night(BASE, [RUN], A, changed=True), f"# note your idea, then drop it: {DROP}", "no row"),
    "after a run, detached": (night(BASE, [RUN], A, branch=""), adds("wider"), "row"),
    "two runs without a row": (night(BASE, [RUN, run_of(A, 2, 0.9)], A), adds("wider"), "without a row: 2"),
    "quotes": (night(BASE, [RUN], A, subject="--it's\u2028`ß`;"), adds("it s ` `;"), "row"),
    "no subject": (night(BASE, [RUN], A, subject=""), adds("no subject"), "row"),
    "promising": (night(FIRST, at=A), train(2), "promising"),
    "promising, by hand": (night([*BASE, (A, 0.98, "discard", "wider")], at=A), train(2), "promising"),
    "promising, but dropped": (night([*BASE, DROPPED], at=B), back(B), "not kept"),
    "not promising": (night([*BASE, (A, 0.998, "discard", "wider, seed 1")], at=A), back(A), "not kept"),
    "the second run confirms": (night(KEPT, at=A), IDEA, "commit it"),
    "it does not": (night([*FIRST, (A, 0.999, "discard", "wider, seed 2")], at=A), back(A), "not kept"),
    "a crash before its first line": (night(BASE, at=A, **log(A, 0)), adds("wider"), "crashed: ValueError"),
    "the second run crashed": (night([*FIRST, (A, 0, "crash", "x, seed 2")], at=A), back(A), "not kept"),
    "the log of another commit": (night(BASE, at=A, **log(B)), train(1), "a new idea"),
    "a run of files that differ": (night(BASE, [RUN | {"dirty": True}], A), train(1), "a new idea"),
    "a run of another commit": (night(BASE, [run_of(B, 1, 0.9)]), f"git checkout -q --detach {B}", "has no row"),
    "a keep by hand": (night([*BASE, (A, 0.98, "keep", "merged")], at=A), IDEA, "commit it"),
    # disturbed runs
    "disturbed": (night(BASE, SLOW_RUNS[:1], A), train(1), "disturbed"),
    "disturbed, then well": (night(FIRST, at=A, runs=[*SLOW_RUNS[:1], *night(FIRST).runs]), train(2), "promising"),
    "disturbed three times": (night(BASE, SLOW_RUNS, A), adds("wider"), "disturbed 3 times"),
    "given up": (night([*BASE, CRASH], SLOW_RUNS, A), back(A), "not kept"),
    "the end, an idea disturbed": (night(BASE, SLOW_RUNS[:1], A, until="3"), back(A), "not kept"),
    "the end, a final run disturbed": (night(KEPT, [run_of(S, 4, 1.0, **SLOW)], **AWAY), train(4), "disturbed"),
    # trouble
    "markers in the folder": (night(BASE, conflict=True, changed=True), DROP, "conflict"),
    "markers in the commit": (night(BASE, at=A, conflict=True), "git reset -q --keep HEAD^", "conflict"),
    "a stray file": (night(BASE, stray="new.py"), "# restore or move new.py", "no run counts"),
    "another branch": (night(BASE, branch="main", lineage=()), BRANCH, "not the branch"),
    "another branch, edited": (night(BASE, branch="main", changed=True), CHANGES, "not autoresearch/test"),
    "behind the last keep": (night(KEPT), f"git reset -q --keep {A}", "on top"),
    "an idea on no branch": (night(BASE, at=A, branch=""), f"{BRANCH} && git reset -q --keep {A}", "no branch"),
    "elsewhere, on no branch": (night(KEPT, at=B, branch=""), BRANCH, "no branch"),
    # now and then
    "pruning": (night([*KEPT, *tries(7)], at=A), IDEA, "pruning"),
    "not yet pruning": (night([*KEPT, *tries(6)], at=A), IDEA, "commit it"),
    "pruning, done": (night([*KEPT, *tries(7), (B, 1.1, "discard", "prune x, seed 1")], at=A), IDEA, "commit it"),
    "nothing kept, no pruning": (night([*BASE, *tries(9)]), IDEA, "commit it"),
    "drift is due": (night([*KEPT, *tries(18)], at=A), TO_START, "drift"),
    "drift is not yet due": (night([*KEPT, *tries(17)], at=A), IDEA, "pruning"),
    "drift, edited": (night([*KEPT, *tries(18)], at=A, changed=True), FINISH, "git commit"),
    "drift, there": (night([*KEPT, *tries(18)], branch=""), train(1), "drift"),
    "drift, given up": (
        night([*KEPT, *tries(18)], [run_of(S, 1, 1.01, **SLOW)] * 3, branch=""),
        adds("baseline"),
        "3 times",
    ),
    "drift, done": (night([*KEPT, *tries(18), BASE[0]], branch=""), BRANCH, "last keep"),
    "nothing kept, no drift": (night([*BASE, *tries(20)]), IDEA, "commit it"),
    # the end
    "before the time": (night(KEPT, at=A, until=END, time="2026-11-28T06:59:59+00:00"), IDEA, "commit it"),
    "at the time": (night(KEPT, at=A, until=END, time=END), TO_START, "the end"),
    "before the number": (night(KEPT, at=A, until="6"), IDEA, "commit it"),
    "the end, edited": (night(KEPT, changed=True, **HOME), DROP, "no new idea"),
    "the end, an idea that never ran": (night(KEPT, at=B, lineage=(S, A, B), until="5"), back(B, A), "not kept"),
    "the end, promising": (night(FIRST, at=A, until="4"), train(2), "promising"),
    "the end, baseline incomplete": (night(BASE[:2], until="1"), OVER, "nothing was kept"),
    "the end, baseline disturbed": (night(new=[run_of(S, 1, 1.0, **SLOW)], until=END, time=END), OVER, "nothing"),
    "final baseline, 4": (night(KEPT, **AWAY), train(4), "the end"),
    "final baseline, run": (night(KEPT, [run_of(S, 4, 1.0)], **AWAY), adds("baseline, final"), "row"),
    "then the last keep": (night([*KEPT, *FINALS[:1]], **AWAY), BRANCH, "in turns"),
    "final keep, run": (night([*KEPT, *FINALS[:1]], [run_of(A, 4, 0.9)], **HOME), adds("last keep, final"), "row"),
    "final baseline, 5, away": (night([*KEPT, *FINALS[:2]], **HOME), TO_START, "in turns"),
    "final keep, 5": (night([*KEPT, *FINALS[:3]], **HOME), train(5), "the end"),
    "a final run crashed": (night([*KEPT, *FINAL_CRASHES[:1]], **HOME), train(4), "the end"),
    "over, on no branch": (night([*KEPT, *FINALS], **AWAY), BRANCH, "back"),
    "over": (night([*KEPT, *FINALS[:3], (A, 0.97, "keep", "x, final, seed 5")], **HOME), OVER, "+0.010000"),
    "over, all finals crashed": (night([*KEPT, *FINAL_CRASHES], **HOME), OVER, "no gain"),
    # waves
    "wave: the baseline": (wave([], []), submits(f"{S}:1", f"{S}:2", f"{S}:3"), "baseline"),
    "wave: out, on this machine": (wave(BASE, [job(A, 1, "out")], running="77"), COLLECT, "out: 1"),
    "wave: a stranger trains": (wave(BASE, [], running="77"), TAIL, "not yours"),
    "wave: one came in, one is out": (wave(BASE, [job(A, 2, "scored"), job(A, 3, "out")]), COLLECT, "out: 1"),
    "wave: a crash": (wave(BASE, [job(A, 1, "crash", reason="no")]), ADDS, A),
    "wave: the cluster is closed": (wave(BASE, [job(A, 1, "scored")], wave=False), ADDS, A),
    "wave: a crash with its row": (wave([*BASE, CRASH], [job(A, 1, "crash")]), IDEA, "commit it"),
    "wave: two are promising": (
        wave(BOTH, [job(A, 1, "-"), job(B, 1, "-")]),
        submits(f"{A}:2", f"{A}:3", f"{B}:2", f"{B}:3"),
        "promising",
    ),
    "wave: one of them was dropped": (
        wave([*FIRST, DROPPED], [job(A, 1, "-"), job(B, 1, "-")]),
        submits(f"{A}:2", f"{A}:3"),
        "promising",
    ),
    "wave: a node went": (wave(BASE, [job(A, 1, "lost")]), submits(f"{A}:1"), "again"),
    "wave: disturbed": (wave(BASE, [job(A, 1, "scored", **SLOW)]), submits(f"{A}:1"), "again"),
    "wave: lost three times": (wave(BASE, [job(A, 1, "lost", n) for n in (1, 2, 3)]), ADDS, A),
    "wave: an idea on the branch": (wave(BASE, [], A), submits(f"{A}:1"), "a new idea"),
    "wave: no drift": (wave([*KEPT, *tries(18)], [], A), IDEA, "pruning"),
    "wave: the end": (wave(KEPT, [], **HOME), submits(f"{S}:4", f"{A}:4", f"{S}:5", f"{A}:5"), "the end"),
}


@pytest.mark.parametrize("name", NIGHTS)
def test_next_step(name):
    state, command, word = NIGHTS[name]
    step = next_step(state)
    assert step.command == command
    assert word in step.reason


STATES = [state for state, _, _ in NIGHTS.values()]
MIXED = {
    field.name: st.sampled_from([getattr(state, field.name) for state in STATES]) for field in dataclasses.fields(Night)
}


@settings(max_examples=300, deadline=None)
@given(state=st.builds(Night, **MIXED | {"subject": st.text()}))
def test_any_mix_of_nights_has_a_next_step(state):
    step = next_step(state)
    assert step.command and step.reason
    if "ledger.py add" in step.command:
        assert re.fullmatch(r"uv run ledger.py add ('[ -&(-~]+'|--wave)", step.command)


class Player:
    """Does what next_step says in a night of its own, with chance for scores, crashes and slips."""

    def __init__(self, until, chance):
        self.night = night(until=str(until))
        self.chance = chance
        self.lines = {S: (S,)}  # of every commit: those from the first to it
        self.tip = S
        self.counted = []

    def go(self, commit, branch):
        self.night.head, self.night.branch, self.night.lineage = commit, branch, self.lines[commit]
        if branch:
            self.tip = commit

    def do(self, command):
        seed = re.match(r"AUTORESEARCH_SEED=(\d)", command)
        if seed:
            self.train(int(seed[1]))
        elif command.startswith("uv run ledger.py add"):
            self.add()
        elif command == IDEA:
            commit = f"{len(self.lines):07}"
            self.lines[commit] = (*self.lines[self.night.head], commit)
            self.go(commit, self.night.branch)
        else:
            for line in command.split(" && "):
                self.git(line.split())

    def git(self, words):
        assert words[1] in ("checkout", "reset", "update-ref")
        if words[1] == "reset":
            self.go(words[-1], self.night.branch)
        elif "--detach" in words:
            self.go(words[-1], "")
        elif words[1] == "checkout":
            self.go(self.tip, "autoresearch/test")

    def train(self, seed):
        fate = self.chance.choice(["score"] * 6 + ["crash", "slip", "disturbed", "cut off"])
        head = self.night.head
        reason = {"crash": "ValueError: no", "slip": "SyntaxError: no"}.get(fate, "")
        self.night.log = log(head, 0 if fate == "slip" else seed, reason)["log"]
        slow = SLOW if fate == "disturbed" else {}
        if fate in ("score", "disturbed"):
            self.night.runs.append(run_of(head, seed, self.chance.gauss(1 - 0.001 * len(self.lines), 0.003), **slow))
        if fate == "score" and (head, seed) != (S, 1):  # which runs again, for drift
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
        command = next_step(player.night).command
        if command == OVER or command.startswith("tail"):
            break
        if chance.random() < 0.03:  # a slip: the agent is suddenly elsewhere
            player.go(chance.choice(list(player.lines)), "")
        else:
            player.do(command)
    else:
        raise AssertionError(f"it does not end: {next_step(player.night)}")
    assert len(set(player.counted)) == len(player.counted), "a run that counted ran again"
    scored = worth.counting(player.night.runs, player.night.runs)
    assert worth.pair(player.night.rows, scored)[1] == [], "a run has no row"


# --------------------------------------
# Jobs of a wave


def test_one_commit_of_a_wave_is_kept():
    """The best of those that the rule keeps; the first run of each, which was the luckiest, says nothing."""
    scores = {A: [0.93, 0.95, 0.96], B: [0.955, 0.94, 0.95], "ccccccc": [0.98, 0.99, 1.01]}
    jobs = []
    for commit, (first, second, third) in scores.items():
        jobs += [job(commit, seed, "scored", val_bpb=score) for seed, score in ((1, first), (2, second), (3, third))]
    for sent, expected in ((jobs, B), (jobs[6:], None)):
        state = wave(BASE, sent)
        assert waves.winner(state, waves.unwritten(state)) == expected


@pytest.mark.parametrize(
    ("changes", "counts", "problems"),
    [
        ({}, 1, 0),
        ({"benchmark": "another"}, 0, 1),
        ({"device": "A100"}, 0, 1),
        ({"commit": S + 33 * "0", "seed": 1}, 0, 0),
    ],
    ids=["like the baseline", "another benchmark", "another device", "the journal has it"],
)
def test_runs_of_a_wave_compare(changes, counts, problems):
    runs = [run_of(S, 1, 1.0, device="H100", time="1")]
    sent = run_of(A, 1, 0.9, device="H100", time="1", benchmark="this", state="scored", job="x") | changes
    assert len(waves.add_runs(runs, [sent], {"id": "this"}, runs[0]["commit"])) == problems
    assert len(runs) == 1 + counts


# --------------------------------------
# What is read of a results.tsv, whoever wrote it

LINE = "a1b2c3d\t0.998100\t44.0\tkeep\tbaseline, seed 1\n"
ROW = ("a1b2c3d", 0.9981, 44.0, "keep", "baseline, seed 1")
SIX = HEADER.replace("\tval", "\tsteps\tval")
SAME = {  # the same row
    "as it is written": HEADER + LINE,
    "no header": LINE,
    "no last newline": HEADER + LINE.strip(),
    "blank lines": f"\n{HEADER}\n{LINE}\n\n",
    "a full hash": LINE.replace("a1b2c3d", "a1b2c3d" + "4" * 33),
    "upper case": LINE.replace("a1b2c3d", "A1B2C3D").replace("keep", "KEEP"),
    "byte order mark": (HEADER + LINE).encode("utf-8-sig"),
    "UTF-16": (HEADER + LINE).encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + (HEADER + LINE).encode("utf-16-be"),
    "UTF-16 appended to UTF-8": HEADER.encode() + LINE.encode("utf-16-le"),
    "CRLF": (HEADER + LINE).replace("\n", "\r\n"),
    "CR": (HEADER + LINE).replace("\n", "\r"),
    "spaces for tabs": (HEADER + LINE).replace("\t", "  "),
    "written-out tabs": (HEADER + LINE).replace("\t", "\\t"),
    "semicolons": (HEADER + LINE).replace("\t", ";"),
    "semicolons, decimal commas": LINE.replace("\t", ";").replace(".", ","),
    "commas": LINE.replace("\t", ","),
    "commas and quotes": 'a1b2c3d,0.9981,44.0,keep,"baseline, seed 1"',
    "a table of Markdown": LINE.replace("\t", " | ").replace("a1", "| a1").replace("\n", " |"),
    "one tab, then spaces": "a1b2c3d\t0.9981 44.0 keep baseline, seed 1",
    "decimal commas": LINE.replace("0.9981", "0,9981"),
    "a number too many": LINE.replace("\tkeep", "\t8\tkeep"),
    "five columns under six": SIX + LINE,
    "six columns under six": SIX + LINE.replace("\t0.99", "\t800\t0.99"),
    "a word for keep": LINE.replace("keep", "Kept!"),
}
LEDGERS = {name: (content, [ROW], []) for name, content in SAME.items()} | {
    "nothing": ("", [], []),
    "a header alone": (HEADER, [], []),
    "a header twice": (HEADER + LINE + HEADER + LINE, [ROW] * 2, []),
    "a hash of 6": (LINE.replace("a1b2c3d", "a1b2c3"), [("a1b2c3", *ROW[1:])], []),
    "Windows-1252": (LINE.replace("base", "b\xe4se").encode("cp1252"), [(*ROW[:4], "b\xe4seline, seed 1")], []),
    "U+2028 in a description": (LINE.replace("line,", "\u2028,"), [(*ROW[:4], "base\u2028, seed 1")], []),
    "commas between spaces": ("a1b2c3d 0.9981 44.0 keep wide, seed 1", [(*ROW[:4], "wide, seed 1")], []),
    "tabs in a description": (LINE.replace("baseline, ", "base\tline, "), [(*ROW[:4], "base\tline, seed 1")], []),
    "no memory": (LINE.replace("\t44.0", ""), [(*ROW[:2], None, *ROW[3:])], []),
    "no description": ("a1b2c3d\t0.9981\t44.0\tkeep", [(*ROW[:4], "")], []),
    "other columns": ("Status\tVal_BPB\tCommit\nkeep\t0.9981\ta1b2c3d\n", [(*ROW[:2], None, "keep", "")], []),
    "an unknown word": ("a1b2c3d\t0.9981\t44.0\tgood\tkeep", [(*ROW[:3], "discard", "keep")], []),
    "a crash without numbers": ("a1b2c3d\t-\t\tfailed\tno", [("a1b2c3d", None, None, "crash", "no")], []),
    "a discard of zero": ("a1b2c3d\t0\t0\tdiscard\tno", [("a1b2c3d", None, 0.0, "crash", "no")], []),
    "not a score": (HEADER + LINE.replace("0.998100", "n/a"), [], [":2: not a row"]),
    "not a hash": (HEADER + LINE.replace("a1b2c3d", "HEAD") + LINE, [ROW], [":2: not a row"]),
    "words": ("# my notes\n" + LINE, [ROW], [":1: not a row"]),
    "another tool": ("step\tval_bpb\n1\t2.5\n", [], [":1: a ledger of another tool", ":2: not a row"]),
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
    assert again == problems
    assert [row[:1] + row[3:5] for row in more[:-1]] == [row[:1] + row[3:5] for row in rows]
    assert more[-1][:5] == ("e" * 7, 1.0, 1.0, "keep", "one more line")
    assert not list(tmp_path.glob("*.tmp"))


@given(content=st.binary())
def test_reading_never_raises(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    path.write_bytes(content)
    rows, problems = read_rows(path)
    assert len(rows) + len(problems) <= len(content)


NAMED = "commit a1b2c3d, seed 2, x\n"
LOGS = {
    "scored": (NAMED + "---\nval_bpb: 0.9\ndepth: 8\n", ("a1b2c3d", 2, "")),
    "an error": (NAMED + "Traceback\nValueError: no\n\n", ("a1b2c3d", 2, "ValueError: no")),
    "cut off in mid-run": (NAMED + "step 00010 | 5%\rstep 00020 | 9%", ("a1b2c3d", 2, "")),
    "interrupted": (NAMED + "Traceback\nKeyboardInterrupt\n", ("a1b2c3d", 2, "")),
    "a syntax error": ("  File x\nSyntaxError: no\n", ("eeeeeee", 0, "SyntaxError: no")),
    "the device was taken": ("another training is running on cpu (pid 7): wait for it or end it\n", ()),
    "empty": ("", ()),
    "a long one": (NAMED + "word\n" * 99_999 + "MemoryError\n", ("a1b2c3d", 2, "MemoryError")),
}


@pytest.mark.parametrize("name", LOGS)
def test_logs(name, tmp_path):
    text, expected = LOGS[name]
    (tmp_path / "run.log").write_text(text)
    assert tuple(load.read_log(tmp_path / "run.log", "e" * 40).values()) == expected

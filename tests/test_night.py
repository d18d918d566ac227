"""
Defects of night/: a wrong noise floor or verdict, a wrong or endless next step, a wave's job that counts wrongly, a
results.tsv or run.log of other hands that is misread. No repository, no training.
"""

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev

import pytest
from conftest import HEADER
from hypothesis import given, settings
from hypothesis import strategies as st

from night import load
from night.rows import Row, append_rows, read_rows
from night.rules import OVER, next_step
from night.worth import Night, gain, kept_commits, noise_floor, pair, scores_of, verdict

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


@pytest.mark.parametrize(
    ("second", "expected"), [(0.994, "keep"), (0.996, "discard")], ids=["over half of the floor", "under it"]
)
def test_the_second_run_decides_alone(second, expected):
    """However lucky the first was, which also moves no floor; that of the baseline is 0.010."""
    assert verdict("new", "base", {"base": [0.995, 1.0, 1.005], "new": [0.9, second], "wide": [2.0]}) == expected


def test_no_rounded_row_takes_the_run_of_another():
    rows = [Row("abcdef0", score, 1.0, "keep", "", 0) for score in (1.0, 1.0004)]
    runs = [run_of("abcdef0", seed, score) for seed, score in ((1, 1.0004), (2, 1.00001))]
    assert pair(rows, runs) == ({0: runs[1], 1: runs[0]}, [])


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


BASE = [(S, score, "keep", f"baseline, seed {seed}") for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005))]
FIRST = [*BASE, (A, 0.997, "discard", "wider, seed 1")]  # the noise floor is 0.010, and 0.0025 is promising
LUCKY = [*BASE, (A, 0.9, "discard", "wider, seed 1")]
KEPT = [*LUCKY, (A, 0.994, "keep", "wider, seed 2")]  # which is judged by its second run alone, against 0.005
TRIED = [*KEPT, *((f"{number:07}", 1.1, "discard", "no, seed 1") for number in range(1, 19))]
FINALS = [(commit, 0.99, "keep", f"x, final, seed {seed}") for seed in (4, 5) for commit in (S, A)]
FINAL_CRASHES = [(commit, 0, "crash", f"x, seed {seed}") for seed in (4, 5) for commit in (S, A)]
SENT = [job(A, 1, "-"), job(B, 1, "-")]
CRASH = (A, 0, "crash", "wider: ValueError: no, seed 1")
DROPPED = (B, 0.9, "discard", "x, dropped, seed 1")
SLOW = dict(slow_steps_percent=30.0)
RUN, SLOW_RUN = run_of(A, 1, 0.9), run_of(A, 1, 0.9, **SLOW)
SLOW_SECOND = [run_of(S, 2, 1.1, **SLOW)] * 3
DISTURBED_ONCE = [job(A, 1, "scored", 1, time="1", val_bpb=1.0, **SLOW), job(A, 1, "scored", 2, time="2")]
HOME = dict(at=A, until="5")  # at the last keep, at the end
AWAY = dict(branch="", until="5")  # at the baseline, at the end
END = "2026-11-28T07:00:00+00:00"
FINISH, CHANGES = "# a new idea is in train.py: finish it", "# train.py has changes: commit them, or drop them"
IDEA, DROP, BRANCH = "# a new idea: edit train.py", "git checkout HEAD -- train.py", "git checkout -q autoresearch/test"
TO_START, TAIL = f"git checkout -q --detach {S}", "tail -c 300 run.log"
ADDS, COLLECT = "uv run ledger.py add --wave", "uv run --group cluster swarm/wave.py collect"

NIGHTS = {
    # the baseline
    "in the first run, cut off": (night(**log(S, reason="")), train(1), "cut off"),
    "a baseline by hand, without seeds": (night([(S, 1.0, "keep", "baseline")] * 2), train(3), "baseline"),
    "the baseline is away": (night(BASE[:2], at=A), TO_START, "not complete"),
    "an edit before the baseline": (night(BASE[:2], changed=True), DROP, "untouched"),
    "it has crashed twice": (night([(S, 0, "crash", f"x, seed {n}") for n in (1, 2)]), "tail -c 1500 run.log", "human"),
    "half the steps": (night(BASE[:2], [run_of(S, 3, 1.1, steps=490)]), train(3), "disturbed"),
    "disturbed after a crash": (night([(S, 0, "crash", "x, seed 1")], SLOW_SECOND), adds("baseline"), "3 times"),
    "complete, on a hub": (night(BASE, tag="test/ada", branch="autoresearch/test/ada"), IDEA, "exchange"),
    "complete, detached": (night(BASE, branch=""), BRANCH, "last keep"),
    # an idea
    "edited": (night(BASE, changed=True), FINISH, "git commit"),
    "edited, detached": (night(BASE, changed=True, branch=""), DROP, "on the branch"),
    "committed and edited": (night(BASE, at=A, changed=True), CHANGES, "to drop them"),
    "edited on top of a discard": (night(LUCKY, at=A, changed=True), f"# note your idea, then drop it: {DROP}", "keep"),
    "in mid-run": (night(BASE, at=A, running="77", **log(A, reason="")), TAIL, "this commit's"),
    "another trains": (night(BASE, at=A, running="77"), TAIL, "perhaps not yours"),
    "the run was killed": (night(BASE, at=A, **log(A, reason="")), train(1), "--crash"),
    "edited after the run": (night(BASE, [RUN], A, changed=True), f"# note your idea, then drop it: {DROP}", "no row"),
    "after a run, detached": (night(BASE, [RUN], A, branch=""), adds("wider"), "row"),
    "two runs without a row": (night(BASE, [RUN, run_of(A, 2, 0.9)], A), adds("wider"), "without a row: 2"),
    "quotes": (night(BASE, [RUN], A, subject="--it's\u2028`ß`;"), adds("it s ` `;"), "row"),
    "no subject": (night(BASE, [RUN], A, subject=""), adds("no subject"), "row"),
    "promising, by hand": (night([*BASE, (A, 0.997, "discard", "wider")], at=A), train(2), "promising"),
    "not promising": (night([*BASE, (A, 0.998, "discard", "wider, seed 1")], at=A), back(A), "if it is simpler"),
    "it does not": (night([*LUCKY, (A, 0.996, "discard", "wider, seed 2")], at=A), back(A), "not kept"),
    "a crash before its first line": (night(BASE, at=A, **log(A, 0)), adds("wider"), "crashed: ValueError"),
    "the second run crashed": (night([*FIRST, (A, 0, "crash", "x, seed 2")], at=A), back(A), "not kept"),
    "a run of files that differ": (night(BASE, [RUN | {"dirty": True}], A), train(1), "a new idea"),
    "a run of another commit": (night(BASE, [run_of(B, 1, 0.9)]), f"git checkout -q --detach {B}", "has no row"),
    # disturbed runs
    "disturbed, then well": (night(FIRST, at=A, runs=[SLOW_RUN, *night(FIRST).runs]), train(2), "promising"),
    "given up": (night([*BASE, CRASH], [SLOW_RUN] * 3, A), back(A), "not kept"),
    "the end, an idea disturbed": (night(BASE, [SLOW_RUN], A, until="3"), back(A), "not kept"),
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
    "pruning": (night(TRIED[:12], at=A), IDEA, "pruning"),
    "not yet pruning": (night(TRIED[:11], at=A), IDEA, "commit it"),
    "pruning, done": (night([*TRIED[:12], (B, 1.1, "discard", "prune x, seed 1")], at=A), IDEA, "commit it"),
    "drift is due": (night(TRIED, at=A), TO_START, "drift"),
    "drift is not yet due": (night(TRIED[:-1], at=A), IDEA, "pruning"),
    "drift, there": (night(TRIED, branch=""), train(1), "drift"),
    "nothing kept, no drift": (night([*BASE, *TRIED[5:], *TRIED[5:]]), IDEA, "commit it"),
    # the end
    "before the time": (night(KEPT, at=A, until=END, time="2026-11-28T06:59:59+00:00"), IDEA, "commit it"),
    "at the time": (night(KEPT, at=A, until=END, time=END), TO_START, "the end"),
    "before the number": (night(KEPT, at=A, until="6"), IDEA, "commit it"),
    "the end, edited": (night(KEPT, changed=True, **HOME), DROP, "no new idea"),
    "the end, promising": (night(FIRST, at=A, until="4"), train(2), "promising"),
    "the end, baseline incomplete": (night(BASE[:2], until="1"), OVER, "nothing was kept"),
    "final baseline, crashed": (night(KEPT, **AWAY, **log(S, 4)), adds("baseline, final"), "crashed"),
    "then the last keep": (night([*KEPT, *FINALS[:1]], **AWAY), BRANCH, "in turns"),
    "final keep, run": (night([*KEPT, *FINALS[:1]], [run_of(A, 4, 0.9)], **HOME), adds("last keep, final"), "row"),
    "final keep, 5": (night([*KEPT, *FINALS[:3]], **HOME), train(5), "the end"),
    "over, but extended": (night([*KEPT, *FINALS], at=A, until="6"), IDEA, "commit it"),
    "over, on no branch": (night([*KEPT, *FINALS], **AWAY), BRANCH, "back"),
    "over": (night([*KEPT, *FINALS[:3], (A, 0.97, "keep", "x, final, seed 5")], **HOME), OVER, "+0.010000"),
    "over, all finals crashed": (night([*KEPT, *FINAL_CRASHES], **HOME), OVER, "no gain"),
    # waves
    "wave: the baseline": (wave([], []), submits(f"{S}:1", f"{S}:2", f"{S}:3"), "baseline"),
    "wave: out, on this machine": (wave(BASE, [job(A, 1, "out")], running="77"), COLLECT, "out: 1"),
    "wave: one came in, one is out": (wave(BASE, [job(A, 2, "scored"), job(A, 3, "out")]), COLLECT, "out: 1"),
    "wave: the cluster is closed": (wave(BASE, [job(A, 1, "scored")], wave=False), ADDS, A),
    "wave: a crash with its row": (wave([*BASE, CRASH], [job(A, 1, "crash")]), IDEA, "commit it"),
    "wave: one is promising, one was dropped": (
        wave([*FIRST, DROPPED], SENT),
        submits(f"{A}:2", f"{A}:3"),
        "promising",
    ),
    "wave: disturbed": (wave(BASE, [job(A, 1, "scored", **SLOW)]), submits(f"{A}:1"), "again"),
    "wave: disturbed, then well": (
        wave([*BASE, (A, 0.9, "discard", "x")], DISTURBED_ONCE),
        submits(f"{A}:2", f"{A}:3"),
        "promising",
    ),
    "wave: lost three times": (wave(BASE, [job(A, 1, "lost", n) for n in (1, 2, 3)]), ADDS, A),
    "wave: an idea on the branch": (wave(BASE, [], A), submits(f"{A}:1"), "a new idea"),
    "wave: no drift": (wave(TRIED, [], A), IDEA, "pruning"),
    "wave: the end": (wave(KEPT, [], **HOME), submits(f"{S}:4", f"{A}:4", f"{S}:5", f"{A}:5"), "the end"),
}


@pytest.mark.parametrize("name", NIGHTS)
def test_next_step(name):
    state, command, word = NIGHTS[name]
    step = next_step(state)
    assert step.command == command
    assert word in step.reason


def test_a_second_run_that_is_not_kept_asks_for_no_other():
    assert next_step(NIGHTS["it does not"][0]).reason == "it is not kept: store it and go back"


STATES = [state for state, _, _ in NIGHTS.values()]
MIXED = {"tag": st.just("test"), "subject": st.text()}
for field in vars(STATES[0]).keys() - MIXED:
    MIXED[field] = st.sampled_from([vars(state)[field] for state in STATES])
LINES = {S: (S,), A: (S, A), B: (S, A, B)}  # of each commit, those from the first to it


def moved(state, command):
    """The night after a git command: somewhere else, or with a train.py that has no changes."""
    *_, target = command.split()
    if target == "train.py":
        return dataclasses.replace(state, changed=False, conflict=False)
    if target == "HEAD^":
        target = LINES[state.head][-2]
    branch = state.branch
    if "checkout" in command:
        branch = "autoresearch/test" if BRANCH in command else ""
    if target == "autoresearch/test":
        target = kept_commits(state)[-1]
    lineage = LINES.get(target, (S, target))
    return dataclasses.replace(state, head=target, branch=branch, lineage=lineage, conflict=False)


@settings(max_examples=500, deadline=None)
@given(state=st.builds(Night, **MIXED))
def test_any_mix_of_nights_has_a_next_step_and_no_endless_moves(state):
    state.lineage = LINES[state.head]
    for _ in range(5):
        step = next_step(state)
        assert step.command and step.reason
        if "ledger.py add" in step.command:
            assert re.fullmatch(r"uv run ledger.py add ('[ -&(-~]+'|--wave)", step.command)
        if not step.command.startswith("git "):
            return
        state = moved(state, step.command)
    raise AssertionError(f"it goes on moving: {step}")


# --------------------------------------
# What is read of a results.tsv, whoever wrote it

LINE = "a1b2c3d\t0.998100\t44.0\tkeep\tbaseline, seed 1\n"
ROW = ("a1b2c3d", 0.9981, 44.0, "keep", "baseline, seed 1")
SAME = {  # the same row
    "no last newline": HEADER + LINE.strip(),
    "a full hash": LINE.replace("a1b2c3d", "a1b2c3d" + "4" * 33),
    "upper case": LINE.replace("a1b2c3d", "A1B2C3D").replace("keep", "KEEP"),
    "byte order mark": (HEADER + LINE).encode("utf-8-sig"),
    "UTF-16": (HEADER + LINE).encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + (HEADER + LINE).encode("utf-16-be"),
    "UTF-16 appended to UTF-8": HEADER.encode() + LINE.encode("utf-16-le"),
    "CR": (HEADER + LINE).replace("\n", "\r"),
    "spaces for tabs": (HEADER + LINE).replace("\t", "  "),
    "written-out tabs": (HEADER + LINE).replace("\t", "\\t"),
    "semicolons, decimal commas": LINE.replace("\t", ";").replace(".", ","),
    "commas": LINE.replace("\t", ","),
    "commas and quotes": 'a1b2c3d,0.9981,44.0,keep,"baseline, seed 1"',
    "a table of Markdown": LINE.replace("\t", " | ").replace("a1", "| a1").replace("\n", " |"),
    "one tab, then spaces": "a1b2c3d\t0.9981 44.0 keep baseline, seed 1",
    "a number too many": LINE.replace("\tkeep", "\t8\tkeep"),
    "five columns under six": HEADER.replace("\tval", "\tsteps\tval") + LINE,
    "a word for keep": LINE.replace("keep", "Kept!"),
}
LEDGERS = {name: (content, [ROW], []) for name, content in SAME.items()} | {
    "nothing": ("", [], []),
    "a hash of 6": (LINE.replace("a1b2c3d", "a1b2c3"), [("a1b2c3", *ROW[1:])], []),
    "Windows-1252": (LINE.replace("base", "b\xe4se").encode("cp1252"), [(*ROW[:4], "b\xe4seline, seed 1")], []),
    "U+2028 in a description": (LINE.replace("line,", "\u2028,"), [(*ROW[:4], "base\u2028, seed 1")], []),
    "no memory": (LINE.replace("\t44.0", ""), [(*ROW[:2], math.nan, *ROW[3:])], []),
    "other columns": ("Status\tVal_BPB\tCommit\nkeep\t0.9981\ta1b2c3d\n", [(*ROW[:2], math.nan, "keep", "")], []),
    "an unknown word": ("a1b2c3d\t0.9981\t44.0\tgood\tkeep", [(*ROW[:3], "discard", "keep")], []),
    "a crash without numbers": ("a1b2c3d\t-\t\tfailed\tno", [("a1b2c3d", math.nan, math.nan, "crash", "no")], []),
    "a discard of zero": ("a1b2c3d\t0\t0\tdiscard\tno", [("a1b2c3d", math.nan, 0.0, "crash", "no")], []),
    "not a score": (HEADER + LINE.replace("0.998100", "n/a"), [], [":2: not a row"]),
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
    assert str([row[:5] for row in rows]) == str(expected)  # as texts: NaN is no equal of its own
    assert len(problems) == len(said) and all(words in line for words, line in zip(said, problems)), problems

    # a row more, and all is there that was
    append_rows(path, [("e" * 7, "1.000000", "1.0", "keep", "one\u2028more\nline")])
    more, again = read_rows(path)
    assert again == problems
    assert [row[:1] + row[3:5] for row in more[:-1]] == [row[:1] + row[3:5] for row in rows]
    assert more[-1][:5] == ("e" * 7, 1.0, 1.0, "keep", "one more line")
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_that_are_appended_at_once_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path))
    path = tmp_path / "results.tsv"
    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            pool.submit(append_rows, path, [(f"{number:07}", "1.0", "1.0", "keep", "x")])
    lines = path.read_text().splitlines(keepends=True)
    assert lines[0] == HEADER and len(lines) == 41 == len(set(lines))


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
    "cut off while it compiles": (NAMED + "cpu; compiling what is new, a minute the first time\n", ("a1b2c3d", 2, "")),
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

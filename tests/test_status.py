"""`prepare.py --status` and its functions, which analysis.ipynb uses, too, against a brute-force reading."""

import json
import math
import os
import re
import subprocess
from statistics import mean, stdev

import pytest
from conftest import HEADER
from hypothesis import given
from hypothesis import strategies as st

import ledger
import prepare
from harness import journal as harness_journal


@given(runs=st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.5, 2)), max_size=30))
def test_noise_floor_and_worth_against_brute_force(runs):
    rows = [{"commit": commit, "val_bpb": score} for commit, score in runs]
    scores = ledger.scores_of([*rows, {"commit": "f", "val_bpb": math.nan}])
    assert scores == {c: [s for other, s in runs if other == c] for c in dict.fromkeys(c for c, _ in runs)}
    repeated = [group for group in scores.values() if len(group) > 1]
    if not repeated:
        assert math.isnan(ledger.noise_floor(scores))
    else:
        pooled = sum(stdev(g) ** 2 * (len(g) - 1) for g in repeated) / sum(len(g) - 1 for g in repeated)
        assert ledger.noise_floor(scores) == pytest.approx(2 * math.sqrt(pooled), abs=1e-9)
    for commit, group in scores.items():
        assert ledger.worth(commit, scores) == pytest.approx(mean(group))
        for best in scores:
            decisive = group if commit == best or len(group) == 1 else group[1:]
            assert ledger.gain(commit, best, scores) == pytest.approx(mean(scores[best]) - mean(decisive), abs=1e-9)


@pytest.mark.parametrize(
    ("tried", "expected"),
    [  # against a baseline of 1.000 with a noise floor of 0.010
        ([0.980], "repeat"),
        ([0.998], "discard"),
        ([1.100], "discard"),
        ([0.980, 0.991], "keep"),
        ([0.980, 0.996], "discard"),  # however lucky the first run was
        ([0.997, 0.980], "keep"),
        ([0.980, 0.990, 1.002], "discard"),
    ],
)
def test_verdict(tried, expected):
    scores = {"base": [0.995, 1.0, 1.005], "new": tried, "wide": [2.0]}
    if len(tried) == 1:  # more runs of a commit change the floor a little
        assert ledger.noise_floor(scores) == pytest.approx(0.01)
    assert ledger.verdict("new", "base", scores) == expected


def test_sparkline():
    assert ledger.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert ledger.sparkline([2, 2]) == "▁▁" and ledger.sparkline([1]) == "▁"
    assert len(ledger.sparkline(list(range(500)))) == 60 and ledger.sparkline(list(range(500)))[-1] == "█"


# --------------------------------------
# The command, in a night


@pytest.fixture
def night(own, tmp_path, monkeypatch, capsys):
    """A repository with a ledger and a journal, to which runs are added; `status()` is what the command prints."""
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.setattr(harness_journal, "ROOT", folder)
    monkeypatch.chdir(folder)
    journal = own.path / "journal.jsonl"

    class Night:
        def git(self, *words):
            git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *words]
            return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()

        def commit(self):
            self.git("commit", "-q", "--allow-empty", "-m", "an idea")
            return self.git("rev-parse", "--short=7", "HEAD")

        def run(self, score, seed=1, **changes):
            run = {"time": prepare.now(), "commit": self.git("rev-parse", "HEAD"), "dirty": False, "seed": seed}
            run |= {"same_harness": True, "val_bpb": score, "peak_memory_mb": 2048.0, **changes}
            with open(journal, "a") as file:
                file.write(json.dumps(run) + "\n")

        def row(self, score, status, commit=None):
            commit = commit or self.git("rev-parse", "--short=7", "HEAD")
            with open("results.tsv", "a") as file:
                file.write(f"{commit}\t{score:.6f}\t2.0\t{status}\tan idea\n")

        def status(self):
            capsys.readouterr()
            prepare.main(["--status"])
            return capsys.readouterr().out

        def next(self):
            return next_of(self.status())

    night = Night()
    night.git("init", "-q")
    night.commit()
    (folder / "results.tsv").write_text(HEADER)
    return night


def next_of(text):
    (line,) = [line for line in text.splitlines() if line.startswith("next: ")]
    return line.removeprefix("next: ")


def test_a_night(night):
    assert night.next() == "run the baseline with seed 1"
    start = night.git("rev-parse", "--short=7", "HEAD")
    for seed, score in ((1, 0.995), (2, 1.0), (3, 1.005)):
        night.run(score, seed)
        assert night.next() == f"write the row: {start} {score:.6f} 2.0 keep"
        night.row(score, "keep")
        assert night.next() == (f"run the baseline with seed {seed + 1}" if seed < 3 else "a new idea, before <until>")
    text = night.status()
    assert "noise floor: 0.010000; promising from 0.002500, keep from 0.005000\n" in text
    assert f"to beat:     1.000000, {start}\n" in text

    idea = night.commit()
    assert night.next().startswith("run it with seed 1; if it has crashed write the row: ")
    night.run(0.980)
    text = night.status()
    assert "  0.980000 seed 1, 0 steps, gain 0.020000, no row yet\n" in text
    assert next_of(text) == f"write the row: {idea} 0.980000 2.0 discard (promising)"
    night.row(0.980, "discard")
    text = night.status()
    assert "no row" not in text and next_of(text) == "promising, run it with seed 2"
    assert night.status() == text, "looking again counts nothing twice"
    night.run(0.985, 2)
    assert night.next() == f"write the row: {idea} 0.985000 2.0 keep"
    night.row(0.985, "keep")
    text = night.status()
    assert next_of(text) == "a new idea, before <until>" and f"to beat:     0.982500, {idea}\n" in text
    assert "1.0000 to 0.9825\n" in text and "5 rows" in text

    crash = night.commit()
    night.row(0, "crash")
    text = night.status()
    assert (
        next_of(text) == f"store it as refs/tries/{crash}, reset to {idea}" and f"  {crash} nan crash   an idea" in text
    )
    night.git("reset", "-q", "--hard", "HEAD^")
    worse = night.commit()
    night.run(1.2)
    text = night.status()
    assert next_of(text) == f"write the row: {worse} 1.200000 2.0 discard"
    assert "  0.980000 seed 1, 0 steps\n  0.985000 seed 2, 0 steps\n" in text, "the runs of the one to beat"
    night.row(1.2, "discard")
    assert night.next() == f"store it as refs/tries/{worse}, reset to {idea}"

    night.git("reset", "-q", "--hard", "HEAD^")
    for rows in range(7, 24):
        drift = f"run the baseline, {start}, once more, to see drift; then a new idea, before <until>"
        assert night.next() == (drift if rows > 22 else "a new idea, before <until>")
        night.row(1.3, "discard", commit=worse)

    # the baseline once more, and both of them at the end: what is to beat stays what it was
    for commit, seed, score in ((start, 1, 1.01), (start, 4, 1.0), (idea, 4, 0.984)):
        night.git("checkout", "-q", "--detach", commit)
        night.run(score, seed)
        assert night.next() == f"write the row: {commit} {score:.6f} 2.0 keep"
        night.row(score, "keep")
        assert f"{idea}\n" in re.search("to beat: .*\n", night.status())[0]


def test_disturbed_runs_do_not_count_and_end(night):
    start = night.git("rev-parse", "--short=7", "HEAD")
    for seed, score in ((1, 0.995), (2, 1.005)):
        if seed == 2:
            night.run(1.5, seed, steps=1000, slow_steps_percent=30.0)
            assert night.next() == "disturbed, is the machine idle? Run it again with seed 2"
        night.run(score, seed, steps=1000, slow_steps_percent=1.0)
        assert night.next() == f"write the row: {start} {score:.6f} 2.0 keep"
        night.row(score, "keep")
        assert night.next() == f"run the baseline with seed {seed + 1}"
    night.run(1.1, 3, steps=490)  # the load was steady: no step was slower than others
    assert night.next() == "disturbed, is the machine idle? Run it again with seed 3"
    night.run(1.2, 3, steps=490)
    text = night.status()
    assert "  1.200000 seed 3, 490 steps, does not count\n" in text
    assert next_of(text) == f"disturbed three times, give it up: write the row: {start} 0.000000 0.0 crash"
    night.row(0, "crash")
    text = night.status()
    assert next_of(text) == "a new idea, before <until>" and "to beat:     1.000000" in text


def test_an_older_night_at_the_same_commit_does_not_count(night):
    night.run(0.9, time="2020-01-01T00:00:00+00:00")
    assert night.next() == "run the baseline with seed 1"
    night.run(1.0)
    night.row(1.0, "keep")
    assert night.next() == "run the baseline with seed 2" and "0.900000" not in night.status()


def test_without_a_ledger(night):
    os.remove("results.tsv")
    assert night.next() == "run the baseline with seed 1"


def test_warnings(night):
    night.run(1.0, slow_steps_percent=40.0, training_seconds=3.2, time_budget=3.0, gpus=2)
    prepare.Path("run.log").write_text("COMPILE: torch.compile does not work\nattention: varlen not used (x)\n---\n")
    text = night.status()
    for words in ("40% of the time in slow steps", "trained for 3.2 s, budget 3 s", "used 2 GPUs"):
        assert words in text
    assert "  warning: run.log: COMPILE: torch" in text and "  warning: run.log: attention: varlen not used" in text

"""The harness at run time: dataloader, clock, metric, journal."""

import itertools
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Function, parquet, score, start, stories

import prepare
from harness import journal
from harness.journal import map_rows, read_journal


class Bigram(torch.nn.Module):
    """Logits depend on the last token only."""

    def __init__(self, vocab_size, spread=1.0):
        super().__init__()
        table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(1))
        self.table = torch.nn.Parameter(spread * table)

    def forward(self, inputs):
        return self.table[inputs]


@pytest.fixture
def clock(benchmark):
    """A clock of a run that was fair."""
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    clock.stop()
    yield clock
    clock.lock.release()


# --------------------------------------
# Dataloader


@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_every_row_once_an_epoch_in_another_order(benchmark, batch_size, monkeypatch):
    monkeypatch.setattr(prepare, "map_rows", lambda path, split: map_rows(path, "val"))  # 40 rows
    rows = np.array(map_rows(benchmark.path, "val"))
    loader = prepare.make_dataloader(benchmark, "train", batch_size, "cpu")
    inputs, targets, epochs = zip(*itertools.islice(loader, -(-80 // batch_size)))  # none overwrites an earlier one
    assert all(batch.shape == (batch_size, 64) and batch.dtype == torch.int64 for batch in inputs)
    assert all(batch.is_contiguous() for batch in inputs + targets)  # so that view(-1) works
    assert epochs == tuple(1 + number * batch_size // 40 for number in range(len(epochs)))
    inputs, targets = torch.cat(inputs), torch.cat(targets)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    whole = torch.cat([inputs, targets[:, -1:]], dim=1).numpy()
    for epoch in (whole[:40], whole[40:80]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, rows))
    assert not np.array_equal(whole[:40], whole[40:80])
    loader.close()


def test_same_seed_same_order(benchmark, monkeypatch):
    def first(seed):
        monkeypatch.setenv("AUTORESEARCH_SEED", seed)
        loader = prepare.make_dataloader(prepare.load_benchmark(), "train", 4, "cpu")
        return torch.cat([inputs for inputs, *_ in itertools.islice(loader, 5)])

    assert torch.equal(first("1"), first("1")) and not torch.equal(first("1"), first("2"))


SPACES = """
import prepare, torch
prepare.repair_compiler()
print(torch.__file__, float(torch.compile(lambda x: x.cumsum(0) + 1)(torch.ones(9))[-1]))
"""


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs a virtual environment, to link it")
def test_a_path_with_a_space_compiles(tmp_path, environment):
    """Of the environment, which is linked to, and of the home: torch has the cache elsewhere then."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / ".venv").symlink_to(sys.prefix)
    python = tmp_path / "a b" / ".venv" / "bin" / "python"
    environment |= {"AUTORESEARCH_HOME": str(tmp_path / "a b"), "TORCHDYNAMO_DISABLE": "0"}
    result = subprocess.run([python, "-c", SPACES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == f"{python.parent.parent}/lib/{result.stdout.split('/lib/')[1]}", result.stderr
    assert result.stdout.endswith("__init__.py 10.0\n") and not list((tmp_path / "a b").glob("compiled"))


def test_refused_splits_and_sizes(benchmark):
    for split in ("val", "holdout"):
        with pytest.raises(ValueError, match=f'no dataloader for "{split}"'):
            prepare.make_dataloader(benchmark, split, 4, "cpu")
    with pytest.raises(ValueError, match="at least 1"):
        prepare.make_dataloader(benchmark, "train", 0, "cpu")


def test_a_dropped_loader_leaves_no_thread(benchmark):
    before = threading.active_count()
    for _ in range(5):
        next(prepare.make_dataloader(benchmark, "train", 4, "cpu"))
    assert threading.active_count() <= before


# --------------------------------------
# Clock


def test_nothing_is_free_between_start_and_stop(benchmark):
    clock = prepare.TrainingClock(benchmark, "cpu")
    assert clock.elapsed == clock.progress == 0
    clock.start()
    time.sleep(0.2)
    assert clock.elapsed >= 0.2 and clock.progress == pytest.approx(clock.elapsed / 3, abs=0.05)
    clock.stop()
    frozen = clock.elapsed
    time.sleep(0.01)
    assert clock.elapsed == frozen >= 0.2
    for method in (clock.start, clock.stop):
        with pytest.raises(RuntimeError):
            method()
    clock.started -= 3
    assert clock.progress == 1
    clock.release()


FAST, SLOW = [1.0] * 100, [2.5] * 100
STEPS = {  # seconds of steps, rows of each, percent of the time that is disturbed
    "none": ([], 1, 0),
    "one": ([2], 1, 0),
    "all alike": ([1, 1, 1, 1], 1, 0),
    "two of five": ([1, 1, 3, 1, 2], 1, 62.5),
    "below the limit": ([1, 1.4, 1], 1, 0),
    "another training beside it": (FAST + SLOW + FAST, 1, 100 * 250 / 450),
    "a batch ramp": (FAST + SLOW, [4] * 100 + [10] * 100, 0),
    "longer rows": (FAST + SLOW, 1, 0),
    "a growing model": (list(np.linspace(1, 4, 200)), 1, 0),
    "disturbed before a ramp": ([1.0] * 40 + SLOW[:20] + [1.0] * 40 + SLOW, 1, 100 * 50 / 380),
    "no rows are counted": ([1, 1, 3, 1, 2], 0, 62.5),
}


@pytest.mark.parametrize("kind", STEPS)
def test_slow_steps_are_those_that_something_else_slows(clock, kind):
    seconds, rows, percent = STEPS[kind]
    rows = np.broadcast_to(rows, len(seconds))
    clock.ticks = list(zip(itertools.accumulate([9, *seconds]), itertools.accumulate([7, *rows]), strict=True))
    assert clock.slow_steps_percent == pytest.approx(percent)


def test_a_run_that_hangs_ends_itself(own):
    """In a forward pass that never comes back, with the traceback of where that was."""
    code = """
import prepare, time, torch
prepare.HANG_SECONDS = 1 - 3
clock = prepare.TrainingClock(prepare.load_benchmark(), "cpu")

def forward(inputs):
    time.sleep(100)

clock.start()
forward(None)
"""
    process = start("-c", code)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 1 and "Timeout" in errors and "in forward" in errors
    prepare.TrainingClock(own, "cpu").release()  # the device is free


def test_a_run_that_was_scored_does_not_end_itself(own):
    code = """
import prepare, time, torch
prepare.HANG_SECONDS = 3 - 3
benchmark = prepare.load_benchmark()
clock = prepare.TrainingClock(benchmark, "cpu")
clock.start()
clock.stop()
prepare.evaluate_bpb(torch.nn.Embedding(512, 512), benchmark, 8, clock)
time.sleep(4)
print("still here")
"""
    process = start("-c", code)
    output, errors = process.communicate(timeout=90)
    assert "still here" in output, errors


def test_second_training_on_the_device_is_refused(clock):
    """In a process of its own, which takes the lock alone: it need not wait for torch."""
    second = start("-c", "import prepare, torch; prepare.DeviceLock(torch.device('cpu'))")
    errors = second.communicate()[1]
    assert second.returncode == 1 and f"pid {os.getpid()}" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "fault, words", [("unstarted", "never started"), ("running", "still running"), ("late", "3.4 s")]
)
def test_unfair_runs_are_not_scored(benchmark, fault, words):
    clock = prepare.TrainingClock(benchmark, "cpu")
    if fault != "unstarted":
        clock.start()
    if fault == "late":
        clock.started -= 3.4
        clock.stop()
    before = read_journal(benchmark.path)
    with pytest.raises(RuntimeError, match=words):
        prepare.evaluate_bpb(Bigram(512), benchmark, 4, clock)
    assert read_journal(benchmark.path) == before
    prepare.TrainingClock(benchmark, "cpu").lock.release()  # the device is free again


# --------------------------------------
# Metric


def brute_force(model, benchmark, split):
    """Bits per byte of the text that the targets stand for, token by token, in float64."""
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    bits = total = 0
    for row in np.array(benchmark.rows(split)).astype(np.int64):
        log_probs = torch.log_softmax(model(torch.from_numpy(row[None, :-1])).double(), dim=-1)[0]
        for position, target in enumerate(row[1:].tolist()):
            if target < tokenizer.bos_id:
                bits -= log_probs[position, target].item() / math.log(2)
                total += len(tokenizer.encoding.decode_single_token_bytes(target))
    return bits / total


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_known_model_against_brute_force(home, tmp_path, batch_size):
    """On stories shorter than a row: where the next one begins is a target without bytes."""
    (tmp_path / "stories.parquet").write_bytes(parquet(stories(0, 4000)))
    prepare.main(["--text", str(tmp_path / "stories.parquet"), *TINY])
    benchmark, model = prepare.load_benchmark(), Bigram(300)
    assert all((benchmark.rows(split)[:, 1:] == 296).any() for split in ("val", "holdout"))
    assert score(benchmark, model, batch_size) == pytest.approx(brute_force(model, benchmark, "val"), rel=2e-6)
    holdout = read_journal(benchmark.path)[0]["holdout_bpb"]
    assert holdout == pytest.approx(brute_force(model, benchmark, "holdout"), rel=2e-6)


def test_scoring_memory_is_bounded(benchmark, clock, monkeypatch):
    sizes = []
    model = Bigram(512)
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    monkeypatch.setattr(prepare, "MAX_LOGIT_BYTES", 3 * 4 * 64 * 512)
    prepare.evaluate_bpb(model, benchmark, 1000, clock)
    assert max(sizes) == 3


def test_the_model_cannot_reach_the_targets(benchmark, clock):
    """Not even through the storage that its inputs are a view of."""

    def greedy(inputs):
        assert inputs.untyped_storage().nbytes() == inputs.numel() * 8
        return torch.zeros(*inputs.shape, 512)

    prepare.evaluate_bpb(Function(greedy), benchmark, 8, clock)


# --------------------------------------
# Journal and best weights


def test_journal_and_best(own, capsys):
    """Of three runs of which the second is the best, and a line between them that a full disk has cut off."""
    scores, path = [], own.path / "journal.jsonl"
    for spread in (0.5, 0.1, 2.0):
        own = prepare.load_benchmark()  # as every run does: it counts what is read
        clock = prepare.TrainingClock(own, "cpu")
        loader = prepare.make_dataloader(own, "train", 4, "cpu")
        next(loader)
        clock.start()
        for _ in range(3):
            next(loader)
        clock.stop()
        scores.append(prepare.evaluate_bpb(Bigram(512, spread), own, 8, clock))
        path.write_text(path.read_text() + '{"val_bpb": 1.0, "see' * (spread == 0.1))
    runs = read_journal(own.path)
    assert "skipped, the line is incomplete" in capsys.readouterr().out
    assert [run["val_bpb"] for run in runs] == scores and scores[1] == min(scores)
    run = runs[-1]
    assert run["tokens"] == 3 * 4 * 64 and run["untimed_rows"] == 4
    assert run["steps"] == 0 and run["seed"] == 42 and run["benchmark"] == own.id
    assert run["same_harness"] and run["harness_sha256"] == journal.harness_sha256()
    assert 0 <= run["training_seconds"] < run["total_seconds"] and run["peak_memory_mb"] > 1
    assert set(run) >= {"time", "commit", "dirty", "train_sha256", "device"}
    best = torch.load(own.path / "best.pt", weights_only=True)
    assert best["val_bpb"] == min(scores) and torch.equal(best["model"]["table"], Bigram(512, 0.1).table)


def test_origin_names_commit_and_dirt(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(journal, "ROOT", tmp_path)
    (tmp_path / "prepare.py").write_text("")
    assert journal.find_origin()["commit"] is None and journal.find_origin()["dirty"] is None  # not a repository
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    (tmp_path / "untracked").write_text("")
    origin = journal.find_origin()
    assert origin["commit"] == git("rev-parse", "HEAD") and origin["dirty"] is False
    (tmp_path / "prepare.py").write_text("x")
    assert journal.find_origin()["dirty"] is True

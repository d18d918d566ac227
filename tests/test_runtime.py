"""The harness at run time: dataloader, clock, metric, journal."""

import itertools
import math
import os
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Function, score, start, stories, write_parquet

import prepare
from harness import journal


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
def test_every_row_once_an_epoch_in_another_order(benchmark, batch_size):
    rows = np.array(benchmark.rows("val"))  # 40
    loader = prepare.make_dataloader(benchmark, "val", batch_size, "cpu")
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


def test_refused_splits_and_sizes(benchmark):
    with pytest.raises(ValueError, match="holdout"):
        prepare.make_dataloader(benchmark, "holdout", 4, "cpu")
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
    assert clock.elapsed == clock.progress == 0 and not clock.expired()
    clock.start()
    time.sleep(0.2)
    assert 0.2 <= clock.elapsed and clock.progress == pytest.approx(clock.elapsed / 3, abs=0.05)
    clock.stop()
    frozen = clock.elapsed
    time.sleep(0.01)
    assert clock.elapsed == frozen >= 0.2
    for method in (clock.start, clock.stop):
        with pytest.raises(RuntimeError):
            method()
    clock.started -= 3
    assert clock.expired() and clock.progress == 1
    clock.lock.release()


@pytest.mark.parametrize(
    ("steps", "percent"), [([], 0), ([2], 0), ([1, 1, 1, 1], 0), ([1, 1, 3, 1, 2], 62.5), ([1, 1.4], 0)]
)
def test_slow_steps_are_those_of_more_than_one_and_a_half_medians(clock, steps, percent):
    clock.ticks = list(itertools.accumulate([9, *steps]))  # the first does not count
    assert clock.slow_steps_percent == pytest.approx(percent)


def test_second_training_on_the_device_is_refused(clock):
    """In a process of its own, which takes the lock alone: it need not wait for torch."""
    second = start(
        "-c", "import prepare, types; prepare.lock_device(prepare.HOME / 'locks', types.SimpleNamespace(type='cpu'))"
    )
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
    before = prepare.read_journal(benchmark.path)
    with pytest.raises(RuntimeError, match=words):
        prepare.evaluate_bpb(Bigram(512), benchmark, 4, clock)
    assert prepare.read_journal(benchmark.path) == before
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
    write_parquet(tmp_path / "stories.parquet", stories(0, 4000))
    prepare.main(["--text", str(tmp_path / "stories.parquet"), *TINY])
    benchmark, model = prepare.load_benchmark(), Bigram(300)
    assert all((benchmark.rows(split)[:, 1:] == 296).any() for split in ("val", "holdout"))
    assert score(benchmark, model, batch_size) == pytest.approx(brute_force(model, benchmark, "val"), rel=2e-6)
    holdout = prepare.read_journal(benchmark.path)[0]["holdout_bpb"]
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
    runs = prepare.read_journal(own.path)
    assert "skipped, the line is incomplete" in capsys.readouterr().out
    assert [run["val_bpb"] for run in runs] == scores and scores[1] == min(scores)
    run = runs[-1]
    assert run["tokens"] == 3 * 4 * 64 and run["untimed_rows"] == 4
    assert run["steps"] == 0 and run["seed"] == 42 and run["benchmark"] == own.id
    assert run["same_prepare"] and run["prepare_sha256"] == prepare.sha256(ROOT / "prepare.py")
    assert 0 <= run["training_seconds"] < run["total_seconds"] and run["peak_memory_mb"] > 1
    assert set(run) >= {"time", "commit", "dirty", "train_sha256", "device"}
    best = torch.load(own.path / "best.pt", weights_only=True)
    assert best["val_bpb"] == min(scores) and torch.equal(best["model"]["table"], Bigram(512, 0.1).table)


def test_origin_names_commit_and_dirt(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(journal, "ROOT", tmp_path)
    (tmp_path / "prepare.py").write_text("")
    assert prepare.find_origin()["commit"] is None and prepare.find_origin()["dirty"] is None  # not a repository
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    (tmp_path / "untracked").write_text("")
    origin = prepare.find_origin()
    assert origin["commit"] == git("rev-parse", "HEAD") and origin["dirty"] is False
    (tmp_path / "prepare.py").write_text("x")
    assert prepare.find_origin()["dirty"] is True

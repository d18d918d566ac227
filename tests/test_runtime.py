"""
Checks that the loader neither skips nor repeats rows, the clock counts every second, the score is the bits per byte of
a brute-force sum, and the journal has every run.
"""

import faulthandler
import hashlib
import itertools
import math
import sys
import threading
import types

import numpy as np
import pytest
import torch
from conftest import TINY, Agent, parquet, refused, score, stories, timed, uniform

import prepare
from harness import common, journal, pace
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
    clock = timed(benchmark)
    yield clock
    clock.release()


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


def test_a_seed_is_an_order_and_a_dropped_loader_leaves_no_thread(benchmark, monkeypatch):
    threads, firsts = threading.active_count(), []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("AUTORESEARCH_SEED", seed)
        loader = prepare.make_dataloader(prepare.load_benchmark(), "train", 4, "cpu")
        firsts.append(torch.cat([inputs for inputs, *_ in itertools.islice(loader, 5)]))
        del loader
    assert torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[0], firsts[2])
    assert threading.active_count() <= threads


@pytest.mark.parametrize(("split", "batch_size"), [("val", 4), ("holdout", 4), ("train", 0)])
def test_refused_splits_and_sizes(benchmark, split, batch_size):
    with pytest.raises(ValueError, match="must be at least 1" if split == "train" else f'no dataloader for "{split}"'):
        prepare.make_dataloader(benchmark, split, batch_size, "cpu")


# --------------------------------------
# Clock


def test_nothing_is_free_between_start_and_score(benchmark, monkeypatch):
    """And what was not timed, or took over a tenth more than the budget of 3 s, is not scored."""
    hands = [100.0]
    monkeypatch.setattr(prepare, "time", types.SimpleNamespace(monotonic=lambda: hands[0]))

    def refused(words):
        with pytest.raises(RuntimeError, match=words):
            clock.check()

    clock = prepare.TrainingClock(benchmark, "cpu")
    assert clock.elapsed == clock.progress == 0
    refused("^not scored: .* never started")
    clock.start()
    hands[0] += 0.75
    assert (clock.elapsed, clock.progress) == (0.75, 0.25)
    hands[0] += 2.5
    assert (clock.elapsed, clock.progress) == (3.25, 1)
    refused("^not scored: .* still running")
    clock.stop()
    for method in (clock.start, clock.stop):
        with pytest.raises(RuntimeError):
            method()
    clock.check()
    hands[0] += 0.125
    assert clock.elapsed == 3.25
    refused("^not scored: trained for 3.4 s of a budget of 3 s")
    clock.release()


FAST, SLOW = [1.0] * 100, [2.5] * 100
STEPS = {  # seconds of steps, rows of each, percent of the time that is disturbed
    "one": ([2], 1, 0),
    "two of five": ([1, 1, 3, 1, 2], 1, 62.5),
    "below the limit": ([1, 1.4, 1], 1, 0),
    "another training beside it": (FAST + SLOW + FAST, 1, 100 * 250 / 450),
    "larger batches for a while": (FAST + SLOW + FAST, [4] * 100 + [10] * 100 + [4] * 100, 0),
    "longer rows": (FAST + SLOW, 1, 0),
    "a growing model": (list(np.linspace(1, 4, 200)), 1, 0),
    "disturbed before a ramp": ([1.0] * 40 + SLOW[:20] + [1.0] * 40 + SLOW, 1, 100 * 50 / 380),
    "no rows are counted": ([1, 1, 3, 1, 2], 0, 62.5),
}


@pytest.mark.parametrize("kind", STEPS)
def test_slow_steps_are_those_that_something_else_slows(clock, kind):
    """The first one may have to prepare."""
    seconds, rows, percent = STEPS[kind]
    rows = np.broadcast_to(rows, len(seconds))
    clock.ticks = list(zip(itertools.accumulate([9, *seconds]), itertools.accumulate([7, *rows]), strict=True))
    assert clock.slow_steps_percent == pytest.approx(percent)


def test_the_speed_of_the_machine_during_a_run(clock, monkeypatch):
    """Checks when products are timed and what is made of their times; and that the model's random numbers stay."""
    seconds = itertools.count(4, 4)

    def timeit(function, number):
        assert number == 4 and function().shape == (2048, 512)
        return next(seconds)

    monkeypatch.setattr(pace.timeit, "timeit", timeit)
    state = torch.get_rng_state()
    for elapsed in (0.1, 0.7, 0.8, 0.9, 1.5, 5, 5.7, 5.9):
        clock.speed.look(elapsed)
    assert clock.speed.milliseconds == [1000, 2000, 3000] and clock.speed.result == 1636.3636
    assert torch.equal(torch.get_rng_state(), state)
    speed = pace.SpeedProbe(types.SimpleNamespace(type="cuda"))
    speed.look(9.0)
    assert speed.result is None, "on a GPU nothing is timed"


def test_a_run_that_was_scored_does_not_end_itself(own, monkeypatch):
    limits = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **options: limits.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", limits.clear)
    clock = timed(own)
    assert limits == [900, 3 + 300]
    prepare.evaluate_bpb(uniform(), own, 8, clock)
    assert limits == []


# --------------------------------------
# Metric


def brute_force(model, benchmark, split):
    """Bits per byte of the text that the targets stand for, token by token, in float64."""
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    bits, total = 0, 0
    for row in np.array(benchmark.rows(split)).astype(np.int64):
        log_probs = torch.log_softmax(model(torch.from_numpy(row[None, :-1])).double(), dim=-1)[0]
        for position, target in enumerate(row[1:].tolist()):
            if target < tokenizer.bos_id:
                bits -= log_probs[position, target].item() / math.log(2)
                total += len(tokenizer.encoding.decode_single_token_bytes(target))
    return bits / total


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_known_model_against_brute_force(home, tmp_path, monkeypatch, batch_size):
    """
    On stories shorter than a row: where the next one begins is a target without bytes. Whatever the batch size, of
    which four rows fit into memory and six are scored; and the model has no view of the whole rows.
    """
    (tmp_path / "stories.parquet").write_bytes(parquet(stories(0, 4000)))
    prepare.main(["--text", str(tmp_path / "stories.parquet"), *TINY])
    benchmark, model, sizes = prepare.load_benchmark(), Bigram(300), []
    assert all((benchmark.rows(split)[:, 1:] == 296).any() for split in ("val", "holdout"))
    monkeypatch.setattr(prepare, "MAX_LOGIT_BYTES", 4 * 4 * 32 * 300)

    def look(model, arguments):
        sizes.append(arguments[0].shape)
        assert arguments[0].untyped_storage().nbytes() == arguments[0].numel() * 8

    with model.register_forward_pre_hook(look):
        val_bpb = score(benchmark, model, batch_size)
    assert max(sizes) == (min(batch_size, 4), 32)
    assert val_bpb == pytest.approx(brute_force(model, benchmark, "val"), rel=2e-6)
    holdout_bpb = read_journal(benchmark.path)[0]["holdout_bpb"]
    assert holdout_bpb == pytest.approx(brute_force(model, benchmark, "holdout"), rel=2e-6)


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
            clock.tick()
        clock.stop()
        scores.append(prepare.evaluate_bpb(Bigram(512, spread), own, 8, clock))
        if spread == 0.1:
            path.write_text(path.read_text() + '{"val_bpb": 1.0, "see')
    runs = read_journal(own.path)
    assert "skipped, the line is incomplete" in capsys.readouterr().err
    assert [run["val_bpb"] for run in runs] == scores and scores[1] == min(scores)
    run = runs[-1]
    assert run["steps"] == 3 and run["tokens"] == 3 * 4 * 64 and run["untimed_rows"] == 4
    assert run["losses"] == []
    assert run["seed"] == 42 and run["benchmark"] == own.id
    assert run["same_harness"] and run["harness_sha256"] == journal.harness_sha256()
    assert 0 <= run["training_seconds"] < run["total_seconds"] and run["peak_memory_mb"] > 1
    assert set(run) >= {"time", "commit", "dirty", "train_sha256", "device"}
    best = torch.load(own.path / "best.pt", weights_only=True)
    assert best["val_bpb"] == min(scores) and torch.equal(best["model"]["table"], Bigram(512, 0.1).table)


def test_a_benchmark_of_an_older_version_is_read(own):
    """Its record has no hash of the whole harness."""
    path = own.path / "benchmark.json"
    path.write_text(path.read_text().replace('"harness_sha256"', '"prepare_sha256"'))
    score(prepare.load_benchmark(), uniform())
    (run,) = read_journal(own.path)
    assert run["same_harness"] is False
    assert "the harness was not the one" in journal.flags(run)[0]
    assert not (own.path / "best.pt").exists()


def test_what_is_run_is_told_by_commit_dirt_and_hash(tmp_path, environment, monkeypatch):
    """Also in a folder of a larger repository."""
    git, folder = Agent(tmp_path, environment).git, tmp_path / "inner"
    monkeypatch.setattr(common, "ROOT", folder)
    hashes = []
    for name, content in {"prepare.py": "", "harness/probe.py": "x", "train.py": "import threading\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        hashes.append(journal.harness_sha256())
    assert hashes[0] != hashes[1] == hashes[2]  # train.py is no part of the harness
    assert journal.find_origin()["commit"] is None and journal.find_origin()["dirty"] is None  # not a repository
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "threads")
    commit = git("rev-parse", "HEAD").strip()
    (folder / "untracked").write_text("")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(folder / "train.py"), raising=False)
    origin = journal.find_origin()
    assert (origin["commit"], origin["dirty"], origin["script"]) == (commit, False, "train.py")
    assert origin["train_sha256"] == hashlib.sha256(b"import threading\n").hexdigest()
    (folder / "train.py").write_text("pass\n")
    assert journal.find_origin()["dirty"] is True

    # a runner trains a commit from files of its own, and names it
    monkeypatch.setenv("AUTORESEARCH_RUN", "an-id")
    monkeypatch.setenv("AUTORESEARCH_COMMIT", "a" * 40)
    origin = journal.find_origin()
    assert (origin["run"], origin["commit"], origin["dirty"]) == ("an-id", "a" * 40, False)


def test_the_benchmark_that_is_named_goes_before_the_current_one(own, monkeypatch):
    (prepare.HOME / "current").write_text("another")
    monkeypatch.setenv("AUTORESEARCH_BENCHMARK", own.id)
    assert prepare.load_benchmark() == own
    monkeypatch.setenv("AUTORESEARCH_BENCHMARK", "gone")
    words = 'benchmark gone: benchmark.json is missing or modified; run "uv run prepare.py <its arguments>" again'
    assert words in refused(prepare.load_benchmark)


def test_the_curve_of_a_run(own, monkeypatch):
    """The mean loss of each tenth of the run, by the time at which it is handed over; the first step has none yet."""
    clock = prepare.TrainingClock(own, "cpu")
    clock.start()
    monkeypatch.setattr(prepare.TrainingClock, "elapsed", property(lambda clock: clock.now))
    for clock.now, loss in ((0.1, None), (0.2, 4.0), (0.25, 3.0), (1.6, 2.0), (9.0, 1.0)):
        clock.tick(loss)
    monkeypatch.undo()
    clock.stop()
    prepare.evaluate_bpb(uniform(), own, 8, clock)
    (run,) = read_journal(own.path)
    assert run["losses"] == [3.5, None, None, None, None, 2.0, None, None, None, 1.0] and run["steps"] == 5

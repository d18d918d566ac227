"""
Checks that ways to a better number without a better model are refused, or shown by the audit: leaks, invalid logits,
unfair runs; and that honest models are scored.
"""

import contextlib
import copy
import functools
import math
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, Agent, Function, new_repository, refused, score, timed, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import train
from harness import common, journal
from harness.journal import read_journal
from harness.probe import Probe

BOS = 508  # of the benchmark


class Cheap(nn.Module):
    """Random logits of the last token, and something added to them: fast, for many probes."""

    def __init__(self, extra=lambda model, x, logits: 0, vocab_size=512):
        super().__init__()
        self.register_buffer("table", torch.randn(vocab_size, vocab_size))
        self.counts = torch.zeros(vocab_size, vocab_size)  # of which token follows which; in no buffer
        self.extra = extra

    def forward(self, x):
        logits = self.table[x]
        return logits + self.extra(self, x, logits)


# --------------------------------------
# What the probe refuses


def position(x):
    return torch.arange(x.size(1)).expand_as(x)


def leak(where=lambda x, after: x >= 0, ahead=1, size=1.0):
    """A later token is added to the logits, where a condition on the tokens and those later ones holds."""

    def extra(model, x, logits):
        after = x.roll(-ahead, dims=1)
        return size * torch.eye(logits.size(-1))[after] * where(x, after)[..., None]

    return extra


def rounding(model, x, logits, least=3e-3):
    """As in bfloat16 on a GPU: other sums when any token of the batch differs, and now and then another expert."""
    generator = torch.Generator().manual_seed(int(x.sum()))
    elsewhere = torch.rand(x.shape, generator=generator) < 1 / 2000
    return torch.randn(logits.shape, generator=generator) * elsewhere[..., None].float().clamp(min=least)


def remembered(model, x, logits):
    """What followed each token in all that the model was given to score."""
    known = (model.counts[x] + 0.1).log()
    model.counts.index_put_((x[:, :-1], x[:, 1:]), torch.tensor(1.0), accumulate=True)
    return known


def counted(model, x, logits):
    """A forward that counts its calls, and turns up a noise with them."""
    model.counts[0, 0] += 1
    return model.counts[0, 0] / 20 * torch.randn(512)


def counted_slowly(model, x, logits):
    """The same, in steps that the probe's first look may miss."""
    model.counts[0, 0] += 1
    return (model.counts[0, 0] // 4) * torch.arange(512) / 100


FUTURE = "the model sees the future: logits at position"
OTHERS = "the model sees other rows"
CHANCE = "gives two answers to the same input"
REFUSED = {  # what is added to the logits, the words of the refusal
    "tiny": (leak(size=1e-2), FUTURE),
    "far ahead": (leak(ahead=20), FUTURE),
    "only in long rows": (leak(lambda x, after: torch.full_like(x, x.size(1) >= 64)), FUTURE),
    "only in odd rows": (leak(lambda x, after: torch.arange(len(x))[:, None].expand_as(x) % 2), FUTURE),
    "only at one place": (leak(lambda x, after: position(x) == 40), FUTURE),
    "only at the first token": (leak(lambda x, after: position(x) == 0), FUTURE),
    "only at the last but one": (leak(lambda x, after: position(x) == x.size(1) - 2), FUTURE),
    "only at a chunk's border": (leak(lambda x, after: position(x) % 32 == 31), FUTURE),
    "only in eval mode": (lambda model, x, logits: 0 if model.training else leak()(model, x, logits), FUTURE),
    "behind a mask": (lambda model, x, logits: leak()(model, x, logits) - 1e9 * (torch.arange(512) >= BOS), FUTURE),
    "behind a constant": (lambda model, x, logits: leak()(model, x, logits) - 1e3, FUTURE),
    "behind rounding": (lambda model, x, logits: leak()(model, x, logits) + rounding(model, x, logits), FUTURE),
    "batch norm": (lambda model, x, logits: F.batch_norm(logits.mT, None, None, training=True).mT, OTHERS),
    "joined in pairs": (lambda model, x, logits: logits.view(-1, 2 * x.size(1), 512).cumsum(1).view_as(logits), OTHERS),
    "dynamic fp8": (lambda model, x, logits: logits * (x.sum() % 7), "a scale over the whole batch .dynamic fp8."),
    "dropout left on": (lambda model, x, logits: F.dropout(logits, 0.01), CHANCE),
    "a memory": (remembered, CHANCE),
    "a counter of calls": (counted, "or change from call to call"),
    "a slow counter of calls": (counted_slowly, "it changes from call to call"),
}
SMALL_BATCHES = [("tiny", 1), ("far ahead", 2), ("joined in pairs", 2)]


@pytest.mark.parametrize(("kind", "batch_size"), [*((kind, 8) for kind in REFUSED), *SMALL_BATCHES])
def test_a_cheat_is_refused(benchmark, kind, batch_size):
    extra, words = REFUSED[kind]
    with pytest.raises(RuntimeError, match=words):
        score(benchmark, Cheap(extra), batch_size)


def test_a_memory_that_lies_low_until_the_probe_is_over(benchmark, monkeypatch):
    monkeypatch.setattr(Probe, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="scores the same rows differently"):
        score(benchmark, Cheap(remembered))


def probe(model, rows, batch_size=8, vocab_size=512):
    return Probe(lambda ids: prepare.predict(model, ids, vocab_size), rows, batch_size, vocab_size)


def zipf_rows(T):
    """64 rows of 60 kinds of tokens that follow Zipf's law; 60 is BOS."""
    tokens = np.random.default_rng(0).zipf(1.5, (64, T + 1)) % 60
    return np.where(np.arange(T + 1) == 0, 60, tokens).astype(np.uint16)


RARE = {
    "the rarest token": lambda x, after: x == 59,
    "before the rarest": lambda x, after: after == 59,
    "after a boundary": lambda x, after: (x == 60) & (position(x) > 0),
    "across a boundary": lambda x, after: after == 60,
}


@pytest.mark.parametrize("kind", RARE)
def test_a_leak_at_a_rare_token_is_seen_by_almost_every_probe(kind):
    """19 of 20 probes find it: to miss 4 of 10 is no chance."""
    missed = 0
    for _ in range(10):
        with contextlib.suppress(RuntimeError):
            probe(Cheap(leak(RARE[kind]), 64), zipf_rows(256), 16, 64).run()
            missed += 1
    assert missed < 4


@given(T=st.integers(2, 40), batch_size=st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_every_cut_is_tried(T, batch_size):
    """Once and more, where there are more rows than cuts; and then one behind the rarest token, if there is a place."""
    found = probe(uniform(64), zipf_rows(T), batch_size, 64)
    each = found.cuts[:-1].flatten().tolist()
    assert set(each) == set(range(1, T)) and len(each) - (T - 1) < batch_size
    for ids, cut in zip(found.ids.tolist(), found.cuts[-1].tolist()):
        rarest = max(token for token in [0, *ids] if token < 60)
        assert 1 <= cut < T and rarest in (ids[cut - 1], ids[-1], 0)


def test_the_probe_is_not_drawn_from_the_generator_that_train_py_seeds(benchmark):
    """A model that knows the seed would know which rows are probed."""
    probes = []
    for _ in range(2):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        probes.append(probe(uniform(), benchmark.rows("holdout")))
        probes[-1].run()
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(probes[0].ids, probes[1].ids)
    assert not torch.equal(probes[0].replace_all(), probes[1].replace_all())


# --------------------------------------
# Honest models


def state_space(x):
    """As a convolution by FFT, of twice the length, so that nothing wraps around."""
    T = x.size(1)
    kernel = 0.9 ** torch.arange(T)[:, None]
    return torch.fft.irfft(torch.fft.rfft(x, 2 * T, dim=1) * torch.fft.rfft(kernel, 2 * T, dim=0), dim=1)[:, :T]


HONEST = {
    "FFT": lambda: nn.Sequential(nn.Embedding(512, 64), Function(state_space), nn.Linear(64, 512)),
    "dropout": lambda: nn.Sequential(Cheap(), nn.Dropout(0.1)),
    "running sums in bfloat16": lambda: nn.Sequential(
        nn.Embedding(512, 64), Function(lambda x: x.cumsum(dim=1)), nn.LayerNorm(64), nn.Linear(64, 512)
    ).bfloat16(),
    "masked logits": lambda: Cheap(lambda model, x, logits: -1e9 * (torch.arange(512) > BOS)),
}


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_model_is_scored(benchmark, kind):
    torch.manual_seed(0)
    assert 0.5 < score(benchmark, HONEST[kind]()) < 60


@pytest.mark.parametrize(("batch_size", "least", "most"), [(8, 3e-3, 0), (1, 0.0, 6)])
def test_rounding_passes_many_probes(benchmark, batch_size, least, most):
    """
    Of a mixture of experts in bfloat16, say; made here, for a CPU rounds alike whatever stands beside. In a batch of
    one, where no other rows tell the noise, 1 of 25 probes refuses it, and 2 of 3 would without another future.
    """
    model = Cheap(functools.partial(rounding, least=least))
    passed = 0
    for _ in range(20):
        with contextlib.suppress(RuntimeError):
            probe(model, benchmark.rows("holdout"), batch_size).run()
            passed += 1
    assert 20 - passed <= most


# --------------------------------------
# Invalid logits

INVALID = {
    "nan": lambda logits: logits * math.nan,
    "infinity": lambda logits: logits.masked_fill(logits > 4, math.inf),
    "minus infinity": lambda logits: logits.masked_fill(logits < -4, -math.inf),
    "short rows": lambda logits: logits[:, :-1],
    "fewer rows": lambda logits: logits[:-1],
    "wider": lambda logits: F.pad(logits, (0, 1)),
    "list": lambda logits: logits.tolist(),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_logits(benchmark, kind):
    with pytest.raises(ValueError, match="not scored: .*logits"):
        score(benchmark, nn.Sequential(Cheap(), Function(INVALID[kind])))


def test_only_modules_are_scored(benchmark):
    with pytest.raises(ValueError, match="must be a torch.nn.Module, not a function"):
        score(benchmark, lambda inputs: torch.zeros(*inputs.shape, 512))


# --------------------------------------
# The clock and the benchmark


def test_work_after_stop_counts(benchmark, monkeypatch):
    """A model that takes its time when it hears that it will be scored."""
    model = uniform()
    monkeypatch.setattr(model, "eval", lambda: time.sleep(0.4))
    monkeypatch.setattr(prepare, "LATE_LIMIT", 0.1)
    with pytest.raises(RuntimeError, match=r"trained for 0.\d s of a budget of 3 s; .*score right after stop"):
        score(benchmark, model)


def test_a_second_score_of_the_same_run(benchmark):
    """Also by a copy of the clock that was made before."""
    clock = timed(benchmark)
    other = copy.copy(clock)
    prepare.evaluate_bpb(uniform(), benchmark, 8, clock)
    for again in (clock, other):
        with pytest.raises(RuntimeError, match="scored or refused before"):
            prepare.evaluate_bpb(uniform(), benchmark, 8, again)


def test_a_score_in_a_fork(benchmark):
    """It is refused, and the lock stays with the process that took it."""
    clock = timed(benchmark)

    def child():
        with contextlib.suppress(RuntimeError):
            prepare.evaluate_bpb(uniform(), benchmark, 8, clock)
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0 and clock.lock.held
    assert "another training is running" in refused(prepare.TrainingClock, benchmark, "cpu")
    prepare.evaluate_bpb(uniform(), benchmark, 8, clock)


def test_another_budget_and_easier_rows(own):
    generous = prepare.Benchmark(**{**own.__dict__, "time_budget": 300.0})
    with pytest.raises(RuntimeError, match="differs from the one on disk"):
        score(generous, uniform())
    rows = np.load(own.path / "val.npy")
    rows[:, 1:] = rows[0, 1]
    np.save(own.path / "val.npy", rows)
    assert "val.npy is missing or modified" in refused(score, own, uniform())


# --------------------------------------
# The audit: what is not refused is flagged


def test_what_a_run_does_beside_its_training_is_flagged(own, environment, tmp_path, monkeypatch):
    """
    Our own train.py, and a run with a harness of its own and a new file, which counts training tokens before the start,
    looks at the holdout and trains a little too long.
    """
    repository = new_repository(tmp_path / "clone", environment)
    monkeypatch.setattr(common, "ROOT", repository)
    for name, value in dict(COMPILE=False, DEPTH=2, NGRAM_ROWS=256, TOTAL_BATCH_SIZE=512).items():
        monkeypatch.setattr(train, name, value)
    train.main()
    (run,) = read_journal(own.path)
    assert journal.flags(run) == journal.time_flags(run)  # the machine may be busy

    (repository / "prepare.py").write_text("LATE_LIMIT = 9")
    Agent(repository, environment).git("commit", "-qam", "mine")
    (repository / "helper.py").write_text("")
    rows = len(own.rows("train"))
    prepare.load_benchmark().rows("holdout")
    prepare.evaluate_bpb(uniform(), own, 8, timed(own, 3.1))
    *harness, late = journal.flags(read_journal(own.path)[-1])
    assert harness == [
        "the harness was not the one that prepared the benchmark",
        "uncommitted changes, .py files that git does not know, or no git at all",
        "read scored rows (validation or holdout): 20",
        f"read {rows} training rows outside of the timed part",
    ]
    assert late.startswith("trained for 3.") and late.endswith(" s, budget 3 s")


UNFLAGGED = dict(same_harness=True, dirty=False, seed=42, time_budget=60)


LIMITS = [  # what is seen of a run, what is said of it
    (dict(seed=5, gpus=1, training_seconds=61.2, scoring_seconds=17, slow_steps_percent=10), []),
    (dict(seed=6), ["seed 6, in a run by hand"]),
    (dict(gpus=2), ["used 2 GPUs"]),
    (dict(training_seconds=61.3), ["trained for 61.3 s, budget 60 s"]),
    (dict(scoring_seconds=17.1), ["scored for 17 s, over a fifth of the budget and 5 s: was the machine busy?"]),
    (dict(slow_steps_percent=11), ["11% of the time in slow steps"]),
]


@pytest.mark.parametrize(("values", "flags"), LIMITS, ids=str)
def test_limits_of_flags(values, flags):
    assert journal.flags(UNFLAGGED | values) == flags


SUSPECT = {  # lines of a train.py: the reason to look at them, None without
    "prepare.LATE_LIMIT = 9": "changes the harness",
    "clock.started += 5": "changes the harness",
    "setattr(prepare, 'predict', mine)": "changes the harness",
    "from harness import probe": "uses private names of the harness",
    "clock.lock.release()": "uses private names of the harness",
    "import threading": "starts threads or processes",
    "if os.fork() == 0:": "starts threads or processes",
    "model.load_state_dict(torch.load('weights.bin'))": "reads files",
    "table = np.memmap('counts.bin')": "reads files",
    "counts = torch.from_file('counts.bin')": "reads files",
    "text = open('notes.txt').read()": "reads files",
    "import socket": "uses the network",
    "frame = sys._getframe(2)": "looks into the interpreter",
    "rows = [x for x in gc.get_objects() if len(x)]": "looks into the interpreter",
    "os.environ['AUTORESEARCH_SEED'] = '7'": "reads or sets the seed",
    "x = x + 1  # not torch.load(...)": None,
    "if clock.progress == 1:": None,
    "benchmark = load_benchmark()": None,
}


def test_lines_to_look_at():
    """And none of our own train.py."""
    source = "\n".join(f"    {line}" for line in SUSPECT)
    expected = [f"train.py:{number} {why}: {line}" for number, (line, why) in enumerate(SUSPECT.items(), 1) if why]
    assert journal.suspects(source) == expected
    assert journal.suspects((ROOT / "train.py").read_text()) == []

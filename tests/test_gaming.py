"""
Ways to a better number without a better model, each tried for real: it ends in a refusal or in a line of the audit.

And the other side: honest models of many kinds, none of which may be refused.
"""

import contextlib
import math
import re
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, SMALL, TEXT, UNHURRIED, Agent, Function, new_repository, score, uniform

import prepare
import ledger
import train


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(DEPTH=2, MODEL_DIM=64, HEAD_DIM=16, NGRAM_ROWS=256, SHORT_WINDOW=1 / 8).items():
        monkeypatch.setattr(train, name, value)


def build(benchmark, dtype=torch.float32, attention=train.banded):
    """The model of train.py, with something in all of its weights, as after a training."""
    torch.manual_seed(0)
    model = train.build_model(benchmark, CPU, dtype, attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


class Cheap(nn.Module):
    """Random logits of the last token, and something added to them: fast, for many probes."""

    def __init__(self, extra=lambda model, inputs, logits: 0, vocab_size=512):
        super().__init__()
        self.register_buffer("table", torch.randn(vocab_size, vocab_size))
        self.extra = extra

    def forward(self, inputs):
        logits = self.table[inputs]
        return logits + self.extra(self, inputs, logits)


# --------------------------------------
# Looking ahead


def masked(ahead):
    """Attention by a plain mask instead of bands, which shows so many later tokens."""

    def attention(q, k, v, window):
        positions = torch.arange(q.size(1))
        distance = positions[:, None] - positions
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = (distance >= -ahead) & (distance <= window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    return attention


def tiny_unmasked(q, k, v, window):
    return train.banded(q, k, v, window) + 1e-3 * masked(ahead=q.size(1))(q, k, v, window)


@pytest.mark.parametrize("attention, batch_size", [(masked(ahead=1), 1), (masked(ahead=1), 8), (tiny_unmasked, 8)])
def test_attention_that_looks_ahead(small, benchmark, attention, batch_size):
    with pytest.raises(RuntimeError, match="the model sees the future: logits at position"):
        score(benchmark, build(benchmark, attention=attention), batch_size)


def leak(where=lambda x, after: x >= 0, ahead=1, size=1.0):
    """A later token is added to the logits, where a condition on the tokens and those later ones holds."""

    def extra(model, x, logits):
        after = x.roll(-ahead, dims=1)
        return size * torch.eye(logits.size(-1))[after] * where(x, after)[..., None]

    return extra


def rounding(model, x, logits):
    """As in bfloat16 on a GPU: other sums when any token of the batch differs, and now and then another expert."""
    generator = torch.Generator().manual_seed(int(x.sum()))
    elsewhere = torch.rand(x.shape, generator=generator) < 1 / 2000
    return torch.randn(logits.shape, generator=generator) * elsewhere[..., None].float().clamp(min=3e-3)


BOS = 508
LEAKS = {
    "tiny": leak(size=1e-2),
    "far ahead": leak(ahead=20),
    "mean of the row": lambda model, x, logits: logits.mean(dim=1, keepdim=True),
    "only in long rows": leak(lambda x, after: torch.full_like(x, x.size(1) >= 64)),
    "only in the last row": leak(lambda x, after: torch.arange(len(x))[:, None].expand_as(x) == 7),
    "only in eval mode": lambda model, x, logits: 0 if model.training else leak()(model, x, logits),
    "behind masked tokens": lambda model, x, logits: leak()(model, x, logits) - 1e9 * (torch.arange(512) >= BOS),
    "behind a constant": lambda model, x, logits: leak()(model, x, logits) - 1e3,
    "behind rounding": lambda model, x, logits: leak()(model, x, logits) + rounding(model, x, logits),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_logits_that_look_ahead(benchmark, kind):
    with pytest.raises(RuntimeError, match="the model sees the future: logits at position"):
        score(benchmark, Cheap(LEAKS[kind]))


def position(x):
    return torch.arange(x.size(1)).expand_as(x)


RARE = {  # leaks at a few places of a row, and the length of the rows
    "the rarest token": (256, lambda x, after: x == 59),
    "after a boundary": (256, lambda x, after: (x == 60) & (position(x) > 0)),
    "last position but one": (600, lambda x, after: position(x) == x.size(1) - 2),
    "chunks of 128": (256, lambda x, after: (position(x) + 1) % 128 == 0),
    "chunks of 512": (2048, lambda x, after: (position(x) + 1) % 512 == 0),
}


@pytest.mark.parametrize("kind", RARE)
def test_the_probe_sees_a_rare_leak_in_almost_every_run(kind):
    """In rows of 60 kinds of tokens that follow Zipf's law. 19 of 20 probes find it: to miss 4 of 10 is no chance."""
    T, where = RARE[kind]
    tokens = np.random.default_rng(0).zipf(1.5, (64, T + 1)) % 60
    rows = np.where(np.arange(T + 1) == 0, 60, tokens).astype(np.uint16)
    missed = 0
    for _ in range(10):
        with contextlib.suppress(RuntimeError):
            prepare.check_causality(Cheap(leak(where), 64), rows, 4096 // T, 64, CPU)
            missed += 1
    assert missed < 4


# --------------------------------------
# Other rows, chance, and memory of what was scored before


def batch_norm(model, x, logits):
    return F.batch_norm(logits.mT, None, None, training=True).mT


def joined_in_pairs(model, x, logits):
    """An agent's longer context: two rows are one of twice the length."""
    return logits.unflatten(0, (-1, 2)).flatten(1, 2).cumsum(dim=1).view_as(logits)


@pytest.mark.parametrize("extra, batch_size", [(batch_norm, 8), (joined_in_pairs, 8), (joined_in_pairs, 2)])
def test_logits_that_depend_on_other_rows(benchmark, extra, batch_size):
    with pytest.raises(RuntimeError, match="the model sees other rows"):
        score(benchmark, Cheap(extra), batch_size)


def test_dropout_that_was_left_on(benchmark):
    model = nn.Sequential(Cheap(), nn.Dropout(0.01))
    model.train = lambda mode: model  # as an agent forgets it, with F.dropout(x, training=True)
    with pytest.raises(RuntimeError, match="gives two answers to the same input"):
        score(benchmark, model)


def test_the_probe_is_not_drawn_from_the_generator_that_train_py_seeds(benchmark):
    """A model that knows the seed would know which rows are probed."""
    seen, model = [], uniform()
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for _ in range(2):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        prepare.check_causality(model, benchmark.rows("holdout"), 8, 512, CPU)
        assert torch.equal(torch.get_rng_state(), state)
    half = len(seen) // 2
    assert not any(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:]))


class Remembers(nn.Module):
    """Counts which token follows which in whatever it is given to score, in no buffer."""

    def __init__(self):
        super().__init__()
        self.counts = torch.zeros(512, 512)

    def forward(self, inputs):
        logits = (self.counts[inputs] + 0.1).log()
        self.counts.index_put_((inputs[:, :-1], inputs[:, 1:]), torch.tensor(1.0), accumulate=True)
        return logits


def test_a_memory_of_scored_rows(benchmark, monkeypatch):
    with pytest.raises(RuntimeError, match="gives two answers"):
        score(benchmark, Remembers())
    monkeypatch.setattr(prepare, "check_causality", lambda *_: None)  # one that lies low until the probe is over
    with pytest.raises(RuntimeError, match="scores the same rows differently"):
        score(benchmark, Remembers())


@pytest.mark.parametrize("register", [nn.Module.register_parameter, nn.Module.register_buffer])
def test_weights_that_change_during_the_scoring(benchmark, register):
    weight = nn.Parameter(torch.zeros(1), requires_grad=False)
    model = Function(lambda inputs: 0 * weight.add_(1e-4) * torch.ones(*inputs.shape, 512))
    register(model, "weight", weight)
    with pytest.raises(RuntimeError, match="parameters or buffers have changed"):
        score(benchmark, model)


# --------------------------------------
# Invalid logits


def test_probabilities_that_do_not_sum_to_one(benchmark):
    """log p = 0 for every token is no certainty but a uniform model; a constant changes nothing."""
    scores = [score(benchmark, Function(lambda x: torch.full((*x.shape, 512), value))) for value in (0.0, -3.0, 50.0)]
    assert scores == pytest.approx([scores[0]] * 3)
    targets, token_bytes = benchmark.rows("val")[:, 1:], benchmark.token_bytes()
    expected = math.log2(512) * (token_bytes[targets] > 0).sum() / token_bytes[targets].sum()
    assert scores[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits: logits * math.nan,
        lambda logits: logits.masked_fill(logits > 4, math.inf),
        lambda logits: logits.masked_fill(logits < -4, -math.inf),
        lambda logits: logits[:, :-1],
        lambda logits: logits[:-1],
        lambda logits: F.pad(logits, (0, 1)),
        lambda logits: logits.tolist(),
    ],
    ids="nan,infinity,minus infinity,short rows,fewer rows,wider,list".split(","),
)
def test_invalid_logits(benchmark, spoil):
    model = Cheap()
    with pytest.raises(ValueError, match="not scored: .*logits"):
        score(benchmark, Function(lambda inputs: spoil(model(inputs))))


def test_only_modules_are_scored(benchmark):
    with pytest.raises(ValueError, match="must be a torch.nn.Module, not a function"):
        score(benchmark, lambda inputs: torch.zeros(*inputs.shape, 512))


# --------------------------------------
# The clock and the benchmark, in this process


@pytest.fixture
def sleepy():
    """A model that takes its time, after the clock was stopped, when it hears that it will be scored."""
    model = uniform()
    model.eval = lambda: time.sleep(0.4)
    return model


def test_work_after_stop_counts(benchmark, sleepy, monkeypatch):
    monkeypatch.setattr(prepare, "LATE_LIMIT", 0.1)
    with pytest.raises(RuntimeError, match=r"trained for 0.\d s of a budget of 3 s; .*score right after stop"):
        score(benchmark, sleepy)


def test_a_patched_time(benchmark, sleepy, monkeypatch):
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() / 4)
    monkeypatch.setattr(prepare, "CLOCK_ERROR", 0.1)
    with pytest.raises(RuntimeError, match="not scored: the clock shows 0.1 s, but 0.4 s have passed"):
        score(benchmark, sleepy)


def test_a_second_score_of_the_same_run(benchmark):
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    clock.stop()
    prepare.evaluate_bpb(uniform(), benchmark, 8, clock)
    with pytest.raises(RuntimeError, match="scored before"):
        prepare.evaluate_bpb(uniform(), benchmark, 8, clock)


def test_another_budget_in_memory(benchmark):
    generous = prepare.Benchmark(**{**benchmark.__dict__, "time_budget": 300.0})
    with pytest.raises(RuntimeError, match="differs from the one on disk"):
        score(generous, uniform())


def test_easier_rows(own):
    rows = np.load(own.path / "val.npy")
    rows[:, 1:] = rows[0, 1]
    np.save(own.path / "val.npy", rows)
    with pytest.raises(SystemExit, match="val.npy is missing or modified"):
        score(own, uniform())


# --------------------------------------
# An edited train.py and prepare.py, run as an agent runs them: what is not refused is flagged

START, STOP = r"^    clock\.start\(\)\n", r"^    clock\.stop\(\)\n"
CHECKPOINT = r"""\g<0>
    torch.save(model.state_dict(), "weights.bin")
    model.load_state_dict(torch.load("weights.bin"))
"""
HEAD_START = r"""
    model.load_state_dict(torch.load("weights.bin"))
    model.load_state_dict(torch.load(benchmark.path / "best.pt")["model"])
    benchmark.rows("holdout")
    prepare.np.load(benchmark.path / "val.npy", mmap_mode="r")
    prepare.np.bincount(benchmark.rows("train").ravel())
\g<0>"""


def test_an_honest_run_and_one_that_tries_everything(prepared, environment, tmp_path):
    """
    The second begins with what the first has learned, counts tokens for nothing, trains on the validation rows, looks
    at the holdout, also past the harness, stops late and has a prepare.py of its own.
    """
    prepare.main(["--text", *TEXT, *SMALL, "--time-budget", "1"])
    agent = Agent(new_repository(tmp_path / "clone", environment), environment, {})

    def flags():
        agent.git("commit", "-qam", "an idea")
        result = agent.run("train.py")
        assert result.returncode == 0, result.stderr
        run = prepare.read_journal(prepare.load_benchmark().path)[-1]
        return [flag for flag in ledger.flags(run) if "slow steps" not in flag]  # the machine may be busy

    agent.edit(*UNHURRIED, (STOP, CHECKPOINT))
    assert flags() == []

    agent.edit((START, HEAD_START), (STOP, r"    while clock.elapsed < 1.2: pass\n\g<0>"))
    agent.edit((r'make_dataloader\(benchmark, "train"', 'make_dataloader(benchmark, "val"'))
    agent.edit((r"^LATE_LIMIT = .*", "LATE_LIMIT = 9.9"), file="prepare.py")
    own_prepare, scored, untimed, files, late = flags()
    assert own_prepare == "prepare.py was not the one that prepared the benchmark"
    assert int(re.fullmatch(r"read scored rows \(validation or holdout\): (\d+)", scored)[1]) > 20  # of the holdout
    assert re.fullmatch(r"read \d+ training rows outside of the timed part", untimed)
    assert files.startswith("read files, perhaps from an earlier run: ")
    assert set(files.split(": ")[1].split(", ")) == {"weights.bin", "best.pt", "val.npy"}
    assert re.fullmatch(r"trained for \d\.\d s, budget 1 s", late)


# --------------------------------------
# Honest models


def embedded(*layers):
    return nn.Sequential(nn.Embedding(512, 64), *layers, nn.Linear(64, 512))


class Experts(nn.Module):
    """Every token goes to one of eight, together with those of other rows."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 8)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        choice = self.router(tokens).argmax(dim=1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = (choice == number).nonzero()[:, 0]
            y[chosen] = expert(tokens[chosen])
        return x + F.gelu(y).view_as(x)


def linear_attention(x):
    """A running sum over all earlier tokens."""
    state = (x.exp().unsqueeze(-1) * x.unsqueeze(-2)).cumsum(dim=1)  # [B, T, K, K]
    return (x.unsqueeze(-2) @ state).squeeze(-2) / 10


def state_space(x):
    """As a convolution by FFT, of twice the length, so that nothing wraps around."""
    T = x.size(1)
    kernel = 0.9 ** torch.arange(T)[:, None]
    return torch.fft.irfft(torch.fft.rfft(x, 2 * T, dim=1) * torch.fft.rfft(kernel, 2 * T, dim=0), dim=1)[:, :T]


def in_chunks(model, length):
    """Rows are cut into chunks of so many tokens, which know nothing of each other, and padded to whole ones."""

    def forward(inputs):
        chunks = F.pad(inputs, (0, -inputs.size(1) % length)).view(-1, length)
        return model(chunks).view(len(inputs), -1, 512)[:, : inputs.size(1)]

    return Function(forward)


def int8():
    model = Cheap(lambda model, x, logits: model.weight[x] / 40)
    model.register_buffer("weight", torch.randint(-127, 128, (512, 512), dtype=torch.int8))
    return model


class Averaged(Cheap):
    """Scored with an average of its weights, which eval() swaps in."""

    def train(self, mode=True):
        if mode != self.training:
            self.table *= 1.1 if mode else 1 / 1.1
        return super().train(mode)


HONEST = {
    "train.py in bfloat16": lambda benchmark: build(benchmark, torch.bfloat16),
    "train.py with a plain mask": lambda benchmark: build(benchmark, attention=masked(ahead=0)),
    "train.py in chunks": lambda benchmark: in_chunks(build(benchmark), 24),
    "compiled linear attention": lambda benchmark: torch.compile(
        embedded(Function(linear_attention)), backend="aot_eager", dynamic=True
    ),
    "FFT": lambda benchmark: embedded(Function(state_space)),
    "experts in bfloat16": lambda benchmark: embedded(Experts(), Experts()).bfloat16(),
    "dropout": lambda benchmark: nn.Sequential(Cheap(), nn.Dropout(0.1)),
    "moving average": lambda benchmark: Averaged(),
    "int8": lambda benchmark: int8(),
    "masked logits": lambda benchmark: Cheap(lambda model, x, logits: -1e9 * (torch.arange(512) > BOS)),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_models_are_scored(small, benchmark, kind):
    torch.manual_seed(0)
    assert 0.5 < score(benchmark, HONEST[kind](benchmark)) < 60


def test_rounding_passes_many_probes(benchmark):
    """On a CPU the experts above round alike whatever stands beside them, so here it is made; no false alarm."""
    for _ in range(15):
        prepare.check_causality(Cheap(rounding), benchmark.rows("holdout"), 8, 512, CPU)

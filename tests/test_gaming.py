"""
Ways to a better number without a better model, each tried for real: it ends in a refusal or in a line of the audit.

And the other side: honest models of many kinds, none of which may be refused.
"""

import math
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, ROOT, SMALL, TEXT, UNHURRIED, Function, replace, run, score, uniform

import prepare
import train


@pytest.fixture
def small(monkeypatch):
    for name, value in dict(DEPTH=2, MODEL_DIM=64, HEAD_DIM=16, SHORT_WINDOW=1 / 8).items():
        monkeypatch.setattr(train, name, value)


def build(benchmark, dtype=torch.float32, attention=train.banded):
    """The model of train.py, with something in all of its weights, as after a training."""
    torch.manual_seed(0)
    model = train.build_model(benchmark, CPU, dtype, attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight, dtype=torch.float32).to(weight.dtype))
    return model


# --------------------------------------
# Looking ahead


def unmasked(q, k, v, window):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def window_off_by_one(q, k, v, window):
    T = q.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= -1) & (distance <= window)).transpose(1, 2)


def one_head_unmasked(q, k, v, window):
    honest, leaky = train.banded(q, k, v, window), unmasked(q, k, v, window)
    return torch.cat([honest[:, :, :-1], leaky[:, :, -1:]], dim=2)


def tiny_unmasked(q, k, v, window):
    return train.banded(q, k, v, window) + 1e-3 * unmasked(q, k, v, window)


@pytest.mark.parametrize(
    "attention, batch_size",
    [(unmasked, 1), (window_off_by_one, 1), (window_off_by_one, 8), (one_head_unmasked, 8), (tiny_unmasked, 8)],
)
def test_attention_that_looks_ahead(small, benchmark, attention, batch_size):
    with pytest.raises(RuntimeError, match="the model sees the future: logits at position"):
        score(benchmark, build(benchmark, attention=attention), batch_size)


class Wrapped(nn.Module):
    """The model of train.py, and something added to its logits."""

    def __init__(self, model, extra):
        super().__init__()
        self.model = model
        self.extra = extra

    def forward(self, inputs):
        logits = self.model(inputs)
        return logits + self.extra(self, inputs, logits)


def next_token(inputs, size=1.0):
    return size * F.one_hot(inputs.roll(-1, dims=1), 512).float()


def position(inputs):
    return torch.arange(inputs.size(1))[:, None]


CONVOLUTION = torch.nn.Conv1d(512, 512, 3, padding=1, groups=512)
BOS = 508


def peek_where(condition):
    """Adds the next token to the logits where the condition, of inputs and the inputs after them, holds."""
    return lambda self, inputs, logits: (
        next_token(inputs) * condition(inputs, inputs.roll(-1, dims=1)).float()[..., None]
    )


def odd_rows(x):
    return (torch.arange(len(x)) % 2 == 1)[:, None]


PEEKS = {
    "shift": lambda self, inputs, logits: next_token(inputs),
    "tiny shift": lambda self, inputs, logits: next_token(inputs, 1e-2),
    "far shift": lambda self, inputs, logits: F.one_hot(inputs.roll(-20, dims=1), 512).float(),
    "convolution": lambda self, inputs, logits: CONVOLUTION(logits.mT).mT.detach(),
    "mean of the row": lambda self, inputs, logits: logits.mean(dim=1, keepdim=True),
    "late positions": lambda self, inputs, logits: next_token(inputs) * (position(inputs) > 0.9 * inputs.size(1)),
    "last position but one": lambda self, inputs, logits: next_token(inputs) * (position(inputs) == inputs.size(1) - 2),
    "across a boundary": peek_where(lambda x, after: after == BOS),
    "after a boundary": peek_where(lambda x, after: x == BOS),
    "only in long rows": lambda self, inputs, logits: next_token(inputs, float(inputs.size(1) >= 64)),
    "behind masked tokens": lambda self, inputs, logits: next_token(inputs) - 1e9 * (torch.arange(512) >= BOS),
    "only in eval mode": lambda self, inputs, logits: next_token(inputs, float(not self.training)),
    "odd rows": peek_where(lambda x, after: odd_rows(x) & (x >= 0)),
    "later rows": peek_where(lambda x, after: (torch.arange(len(x)) >= 5)[:, None] & (x >= 0)),
}


RARE = {  # leaks at about a fiftieth of the tokens or of the positions
    "a class of tokens": lambda x, after: x % 30 == 19,
    "before a class of tokens": lambda x, after: after % 30 == 19,
    "rare tokens": lambda x, after: (x >= 50) & (x < 60),
    "before rare tokens": lambda x, after: (after >= 50) & (after < 60),
    "across a boundary": lambda x, after: after == 60,
    "last position but one": lambda x, after: position(x).mT.expand_as(x) == x.size(1) - 2,
    "chunks of 32": lambda x, after: (position(x).mT.expand_as(x) + 1) % 32 == 0,
    "chunks of 64": lambda x, after: (position(x).mT.expand_as(x) + 1) % 64 == 0,
    "chunks of 128": lambda x, after: (position(x).mT.expand_as(x) + 1) % 128 == 0,
    "chunks of 256": lambda x, after: (position(x).mT.expand_as(x) + 1) % 256 == 0,
}


class Cheap(nn.Module):
    """Random logits of the last token: fast, for many probes."""

    def __init__(self, leak=None, vocab_size=512):
        super().__init__()
        self.table, self.leak = torch.randn(vocab_size, vocab_size), leak

    def forward(self, inputs):
        logits, after = self.table[inputs], inputs.roll(-1, dims=1)
        if self.leak is not None:
            logits = logits + F.one_hot(after, len(self.table)) * self.leak(inputs, after).float()[..., None]
        return logits


@pytest.mark.parametrize("peek, compiled", [("far shift", True), *((peek, False) for peek in PEEKS)])
def test_logits_that_look_ahead(benchmark, peek, compiled):
    model = Wrapped(Cheap(), PEEKS[peek])
    with pytest.raises(RuntimeError, match="the model sees the future: logits at position"):
        score(benchmark, torch.compile(model, backend="aot_eager") if compiled else model)


def detected(leak, T, batch_size, probes):
    """How many of so many probes see a leak, in rows of 60 kinds of tokens that follow Zipf's law."""
    tokens = np.random.default_rng(0).zipf(1.2, (64, T + 1)) % 60
    rows = np.where(np.arange(T + 1) == 0, 60, tokens).astype(np.uint16)
    found = 0
    for _ in range(probes):
        try:
            prepare.check_causality(Cheap(RARE[leak], 64), rows, batch_size, 64, CPU)
        except RuntimeError as error:
            found += "sees the future" in str(error)
    return found


@pytest.mark.parametrize(
    "leak, T", [(leak, 256) for leak in RARE if leak != "chunks of 256"] + [("chunks of 256", 2048)]
)
def test_the_probe_sees_a_rare_leak_in_almost_every_run(leak, T):
    """Its rows and cuts are random: 19 of 20 probes find it, so that 6 of 10 are too few for chance."""
    assert detected(leak, T, 16, 10) > 6


# --------------------------------------
# Other rows, and memory of what was scored before


class BatchNorm(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.norm = nn.BatchNorm1d(512, track_running_stats=False)

    def forward(self, inputs):
        return self.norm(self.model(inputs).flatten(0, 1)).view(*inputs.shape, -1)


def rows_before(self, inputs, logits):
    return F.one_hot(inputs, 512).float().cumsum(dim=0)


def test_batch_norm(benchmark):
    with pytest.raises(RuntimeError, match="the model sees other rows"):
        score(benchmark, BatchNorm(Cheap()))


class Pairs(nn.Module):
    """An agent's longer context: two rows are one of twice the length."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        logits = self.model(inputs)
        B, T, V = logits.shape
        joined = logits.view(B // 2, 2 * T, V)
        return (joined.cumsum(dim=1) / torch.arange(1, 2 * T + 1)[:, None]).view(B, T, V)


@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_rows_that_are_joined_in_pairs(benchmark, batch_size):
    with pytest.raises(RuntimeError, match="the model sees other rows"):
        score(benchmark, Pairs(Cheap()), batch_size)


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_dropout_that_was_left_on(benchmark, rate):
    model = nn.Sequential(Cheap(), nn.Dropout(rate))
    model.train = lambda mode: model  # as an agent forgets it, with F.dropout(x, training=True)
    with pytest.raises(RuntimeError, match="gives two answers to the same input"):
        score(benchmark, model)


def test_the_probe_is_not_drawn_from_the_generator_that_train_py_seeds(benchmark):
    """A model that knows the seed would know which rows are probed."""
    seen = []

    class Spy(Cheap):
        def forward(self, inputs):
            seen.append(inputs)
            return super().forward(inputs)

    for _ in range(2):
        torch.manual_seed(0)
        state, model = torch.get_rng_state(), Spy()
        torch.set_rng_state(state)
        prepare.check_causality(model, benchmark.rows("holdout"), 8, 512, CPU)
        assert torch.equal(torch.get_rng_state(), state)
    half = len(seen) // 2
    assert not any(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:]))


def test_work_in_eval_is_the_runs(benchmark):
    model = Cheap()
    model.eval = lambda: time.sleep(3.4)
    with pytest.raises(RuntimeError, match=r"\d.\d s of a budget of 3 s"):
        score(benchmark, model)


def test_only_modules_are_scored(benchmark):
    with pytest.raises(ValueError, match="must be a torch.nn.Module, not a function"):
        score(benchmark, lambda inputs: torch.zeros(*inputs.shape, 512))


def test_statistics_of_the_rows_before(benchmark):
    with pytest.raises(RuntimeError, match="the model sees other rows"):
        score(benchmark, Wrapped(Cheap(), rows_before))


class Remembers(nn.Module):
    """Counts which token follows which in whatever it is given to score."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        counts = torch.zeros(512, 512)
        if where == "buffer":
            self.register_buffer("counts", counts)
        elif where == "weights":
            self.counts = nn.Parameter(counts)
        else:
            self.__dict__["counts"] = counts

    def forward(self, inputs):
        logits = (self.counts.detach()[inputs] + 0.1).log()
        with torch.no_grad():
            pairs = inputs[:, :-1].flatten(), inputs[:, 1:].flatten()
            self.counts.index_put_(pairs, torch.ones(len(pairs[0])), accumulate=True)
        return logits


@pytest.mark.parametrize("where", ["buffer", "weights", "attribute"])
def test_a_memory_of_scored_rows(benchmark, where):
    with pytest.raises(RuntimeError, match="gives two answers|scores the same rows differently|have changed during"):
        score(benchmark, Remembers(where))


def test_weights_that_change_during_the_scoring(benchmark):
    model = Remembers("weights")
    model.forward = lambda inputs: (model.counts.data.add_(1e-4), torch.zeros(*inputs.shape, 512))[1]
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
        lambda logits: (logits * 1e6).half(),
        lambda logits: logits * math.nan,
        lambda logits: logits.masked_fill(logits > 4, math.inf),
        lambda logits: logits.masked_fill(logits < -4, -math.inf),
        lambda logits: logits[:, :-1],
        lambda logits: logits[:-1],
        lambda logits: logits.mean(dim=1),
        lambda logits: F.pad(logits, (0, 1)),
        lambda logits: logits.tolist(),
        lambda logits: None,
    ],
    ids="overflow,nan,infinity,minus infinity,short rows,fewer rows,2-dimensional,wider,list,none".split(","),
)
def test_invalid_logits(benchmark, spoil):
    model = Cheap()
    with pytest.raises(ValueError, match="not scored"):
        score(benchmark, Function(lambda inputs: spoil(model(inputs))))


# --------------------------------------
# The clock and the benchmark, in this process


def test_work_after_stop_counts(benchmark):
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    clock.stop()
    time.sleep(3.4)
    with pytest.raises(RuntimeError, match=r"\d.\d s of a budget of 3 s; .*score right after stop"):
        prepare.evaluate_bpb(uniform(), benchmark, 8, clock)


@pytest.mark.parametrize("attribute", ["started", "stopped"])
def test_a_clock_that_was_set(benchmark, attribute):
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    time.sleep(3.4)
    clock.stop()
    setattr(clock, attribute, getattr(clock, attribute) + (3 if attribute == "started" else -3))
    with pytest.raises(RuntimeError, match="not scored: "):
        prepare.evaluate_bpb(uniform(), benchmark, 8, clock)


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
    clock = prepare.TrainingClock(own, "cpu")
    clock.start()
    rows = np.load(own.path / "val.npy")
    rows[:, 1:] = rows[0, 1]
    np.save(own.path / "val.npy", rows)
    clock.stop()
    with pytest.raises(SystemExit, match="val.npy is missing or modified"):
        prepare.evaluate_bpb(uniform(), own, 8, clock)
    with pytest.raises(SystemExit, match="val.npy is missing or modified"):
        prepare.load_benchmark()


# --------------------------------------
# An edited train.py or prepare.py, run as an agent runs it: what is not refused is flagged


@pytest.fixture
def attempt(prepared, tmp_path):
    """Commit edits of train.py or prepare.py, run train.py; returns the process and the flags of its run, if scored."""
    prepare.main(["--text", *TEXT, *SMALL, "--time-budget", "1"])
    folder = prepare.load_benchmark().path
    (folder / "best.pt").unlink(missing_ok=True)
    for name in ("train.py", "prepare.py"):
        shutil.copy(ROOT / name, tmp_path)
    replace(tmp_path / "train.py", *UNHURRIED)
    git = ["git", "-c", "user.name=Agent", "-c", "user.email=agent@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)

    def go(*edits):
        (folder / "journal.jsonl").unlink(missing_ok=True)
        for file, old, new in edits:
            source = (tmp_path / file).read_text()
            assert source.count(old) == 1, old
            (tmp_path / file).write_text(source.replace(old, new))
        for words in (["add", "train.py", "prepare.py"], ["commit", "-qm", "x"]):
            subprocess.run(git + words, cwd=tmp_path, check=True)
        result = run("train.py", cwd=tmp_path, TORCHDYNAMO_DISABLE="1", AUTORESEARCH_SEED="1")
        found = [flag for scored in prepare.read_journal(folder) for flag in prepare.flags(scored)]
        return result, [flag for flag in found if "slow steps" not in flag]  # the machine may be busy

    return go


START, STOP = "    clock.start()\n", "    clock.stop()\n"


def test_an_honest_run_with_a_checkpoint_of_its_own(attempt):
    lines = """    torch.save(model.state_dict(), "checkpoint.pt")
    model.load_state_dict(torch.load("checkpoint.pt"))
"""
    result, found = attempt(("train.py", STOP, STOP + lines))
    assert result.returncode == 0 and found == [], result.stderr


def test_rows_that_are_no_training_rows_or_are_read_too_early_and_a_late_stop(attempt):
    """An agent that trains on validation rows and looks at the holdout, counts tokens for nothing and stops late."""
    result, found = attempt(
        ("train.py", 'make_dataloader(benchmark, "train"', 'make_dataloader(benchmark, "val"'),
        (
            "train.py",
            START,
            '    benchmark.rows("holdout")\n    prepare.np.bincount(benchmark.rows("train").ravel())\n' + START,
        ),
        ("train.py", STOP, "    while clock.elapsed < 1.05: pass\n" + STOP),
    )
    assert result.returncode == 0 and len(found) == 3
    for flag, words in zip(found, ("read scored rows", "outside of the timed part", "trained for 1.1 s, budget 1 s")):
        assert words in flag
    assert int(found[0].split(": ")[1]) > 60  # the 20 of the holdout and batches of the 40 of validation


def test_training_before_start(attempt):
    free = "    for _ in range(5):\n        inputs, targets, epoch = next(loader)\n"
    free += "        train_step(model, optimizers, [(inputs, targets)], 0.0)\n"
    result, found = attempt(("train.py", START, free + START))
    assert result.returncode == 0 and any("outside of the timed part" in flag for flag in found)


def test_training_in_a_thread_beyond_stop(attempt):
    thread = f"""{STOP}
    def more():
        while True:
            inputs, targets, _ = next(other)
            train_step(model, optimizers, [(inputs, targets)], 0.5)

    other = make_dataloader(benchmark, "train", rows, device)
    threading.Thread(target=more, daemon=True).start()
"""
    result, found = attempt(("train.py", STOP, thread), ("train.py", "import sys\n", "import sys\nimport threading\n"))
    assert result.returncode != 0 and not found and "---" not in result.stdout, "refused, or torch itself broke off"


def test_what_an_earlier_run_has_learned(attempt):
    """Its weights, from best.pt or a file of its own, its statistics, and the scored rows, read past the harness."""
    line = "    optimizers = build_optimizers(model)\n    batch_tokens"
    warm_start = """
    import numpy as np
    np.load(benchmark.path / "val.npy", mmap_mode="r")
    if os.path.exists("weights.bin"):
        model.load_state_dict(torch.load("weights.bin"))
        model.load_state_dict(torch.load(benchmark.path / "best.pt")["model"])
        np.load("counts.npy")
    torch.save(model.state_dict(), "weights.bin")
    np.save("counts.npy", np.ones(3))
"""
    result, found = attempt(("train.py", line, warm_start + line))
    assert found == ["read files, perhaps from an earlier run: val.npy"]
    result, found = attempt(("train.py", "import gc\n", "import gc\n\n"))
    (flag,) = [flag for flag in found if flag.startswith("read files")]
    assert set(flag.split(": ")[1].split(", ")) == {"val.npy", "weights.bin", "best.pt", "counts.npy"}


def test_a_patched_time(attempt):
    patch = "import time\nreal = time.monotonic\ntime.monotonic = lambda: real() / 4\n"
    result, found = attempt(("train.py", "import time\n", patch))
    assert result.returncode == 1 and "not scored: the clock shows" in result.stderr


def test_a_run_that_is_just_too_long(attempt):
    result, found = attempt(("train.py", STOP, "    time.sleep(1.2)\n" + STOP))
    assert result.returncode == 1 and "s of a budget of 1 s" in result.stderr


def test_an_edited_prepare(attempt):
    result, found = attempt(("prepare.py", "/ math.log(2)\n", "/ math.log(4)\n"))
    assert result.returncode == 0 and found == ["prepare.py was not the one that prepared the benchmark"]


# --------------------------------------
# Honest models


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(512, 64), nn.Linear(64, 512)
        self.layer = nn.GRU(64, 64, batch_first=True)

    def forward(self, inputs):
        return 3 * self.head(self.layer(self.table(inputs))[0])


class Mixture(nn.Module):
    """Two layers of experts; every token goes to one of them, together with those of other rows."""

    def __init__(self, dtype):
        super().__init__()
        self.table = nn.Embedding(512, 64, dtype=dtype)
        self.routers = nn.ModuleList(nn.Linear(64, 8, dtype=dtype) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(64, 64, dtype=dtype) for _ in range(8)) for _ in range(2))
        self.head = nn.Linear(64, 512, dtype=dtype)

    def forward(self, inputs):
        x = self.table(inputs).flatten(0, 1)
        for router, experts in zip(self.routers, self.experts):
            choice = router(x).argmax(dim=1)
            y = torch.zeros_like(x)
            for number, expert in enumerate(experts):
                chosen = (choice == number).nonzero()[:, 0]
                y[chosen] = expert(x[chosen])
            x = x + F.gelu(y)
        return 3 * self.head(x).float().view(*inputs.shape, -1)


class LinearAttention(nn.Module):
    """A running sum over all earlier tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(512, 64), nn.Linear(64, 512)

    def forward(self, inputs):
        x = self.table(inputs)
        state = (x.exp().unsqueeze(-1) * x.unsqueeze(-2)).cumsum(dim=1)  # [B, T, K, K]
        return self.head((x.unsqueeze(-2) @ state).squeeze(-2) / 10)


class StateSpace(nn.Module):
    """A diagonal state space model, as a scan or as a convolution by FFT."""

    def __init__(self, fft):
        super().__init__()
        self.fft, self.table, self.head = fft, nn.Embedding(512, 64), nn.Linear(64, 512)
        self.decay = nn.Parameter(torch.rand(64))

    def forward(self, inputs):
        x, T = self.table(inputs), inputs.size(1)
        kernel = self.decay ** torch.arange(T)[:, None]  # [T, K]
        if self.fft:  # twice the length, so that nothing wraps around
            y = torch.fft.irfft(torch.fft.rfft(x, 2 * T, dim=1) * torch.fft.rfft(kernel, 2 * T, dim=0), dim=1)[:, :T]
        else:
            states = [x[:, 0]]
            for t in range(1, T):
                states.append(self.decay * states[-1] + x[:, t])
            y = torch.stack(states, dim=1)
        return 3 * self.head(y)


class TopK(nn.Module):
    """Every token goes to two of eight experts, weighted, each expert on a batch of its own, in bfloat16."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(512, 64, dtype=torch.bfloat16)
        self.router = nn.Linear(64, 8, dtype=torch.bfloat16)
        self.experts = nn.ModuleList(nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(8))
        self.head = nn.Linear(64, 512, dtype=torch.bfloat16)

    def forward(self, inputs):
        x = self.table(inputs).flatten(0, 1)
        weights, choices = self.router(x).softmax(dim=1).topk(2, dim=1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, rank = (choices == number).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * weights[token, rank, None])
        return (3 * self.head(x + F.gelu(y))).view(*inputs.shape, -1)


class Chunks(nn.Module):
    """Attention within chunks of 24 tokens, padded to whole ones; with `rows` as a view of them, [B T / 32, 32]."""

    def __init__(self, model, length):
        super().__init__()
        self.model, self.length = model, length

    def forward(self, inputs):
        B, T = inputs.shape
        padded = F.pad(inputs, (0, -T % self.length))
        return self.model(padded.view(-1, self.length)).reshape(B, -1, 512)[:, :T]


class Int8(nn.Module):
    """Weights in int8, and activations, each token with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(512, 64)
        self.register_buffer("weight", torch.randint(-127, 128, (512, 64), dtype=torch.int8))

    def forward(self, inputs):
        x = self.table(inputs)
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        return ((x / scale).round() * scale) @ (self.weight.float().mT / 127)


class Averaged(nn.Module):
    """Scored with an exponential moving average of its weights, which eval() swaps in."""

    def __init__(self, model):
        super().__init__()
        self.model, self.average = model, {name: 0.9 * weight for name, weight in model.state_dict().items()}

    def train(self, mode=True):
        if mode != self.training:
            current = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            self.model.load_state_dict(self.average)
            self.average = current
        return super().train(mode)

    def forward(self, inputs):
        return self.model(inputs)


class EarlyExit(nn.Module):
    """Tokens that are sure enough skip the second layer."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(512, 64), nn.Linear(64, 512)
        self.layer = nn.Linear(64, 64)

    def forward(self, inputs):
        x = self.table(inputs)
        unsure = self.head(x).softmax(dim=-1).amax(dim=-1) < 0.01
        x = x.masked_scatter(unsure[..., None], x[unsure] + F.gelu(self.layer(x[unsure])))
        return 3 * self.head(x)


def plain_mask(q, k, v, window):
    """A window by a plain mask instead of bands."""
    T = q.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= window)).transpose(1, 2)


HASH = torch.randn(1000, 512)
HONEST = {
    "train.py": lambda benchmark: build(benchmark),
    "train.py in bfloat16": lambda benchmark: build(benchmark, torch.bfloat16),
    "compiled": lambda benchmark: torch.compile(build(benchmark), backend="aot_eager"),
    "recurrent": lambda benchmark: Recurrent(),
    "mixture of experts": lambda benchmark: Mixture(torch.float32),
    "mixture of experts in bfloat16": lambda benchmark: Mixture(torch.bfloat16),
    "linear attention": lambda benchmark: LinearAttention(),
    "hashed bigrams": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: HASH[(x * 31 + F.pad(x, (1, 0))[:, :-1] * 17) % 1000]
    ),
    "smear": lambda benchmark: Wrapped(build(benchmark), lambda self, x, logits: F.pad(logits, (0, 0, 1, 0))[:, :-1]),
    "causal convolution": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: CONVOLUTION(F.pad(logits, (0, 0, 2, 0)).mT).mT[:, : x.size(1)]
    ),
    "mean of the past": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: logits.cumsum(dim=1) / (position(x) + 1)
    ),
    "since the last boundary": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: (x == BOS).cumsum(dim=1)[..., None].float() * HASH[0]
    ),
    "dropout": lambda benchmark: nn.Sequential(build(benchmark), nn.Dropout(0.1)),
    "uniform": lambda benchmark: uniform(),
    "compiled with dynamic shapes": lambda benchmark: torch.compile(
        LinearAttention(), backend="aot_eager", dynamic=True
    ),
    "state space": lambda benchmark: StateSpace(fft=False),
    "FFT convolution": lambda benchmark: StateSpace(fft=True),
    "top-2 experts in bfloat16": lambda benchmark: TopK(),
    "chunks with padding": lambda benchmark: Chunks(build(benchmark), 24),
    "chunks as rows": lambda benchmark: Chunks(build(benchmark), 32),
    "int8": lambda benchmark: Int8(),
    "bfloat16 logits": lambda benchmark: Wrapped(build(benchmark), lambda self, x, logits: 0).bfloat16(),
    "large logits": lambda benchmark: Wrapped(build(benchmark), lambda self, x, logits: 9 * logits),
    "masked logits": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: -1e9 * (torch.arange(512) > 508).float()
    ),
    "moving average": lambda benchmark: Averaged(build(benchmark)),
    "early exit": lambda benchmark: EarlyExit(),
    "one logit far above": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: 30.0 * F.one_hot(x * 0 + 7, 512)
    ),
    "position embedding alone": lambda benchmark: Wrapped(
        build(benchmark), lambda self, x, logits: torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    ),
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_models_are_scored(small, benchmark, kind):
    torch.manual_seed(0)
    assert 0.5 < score(benchmark, HONEST[kind](benchmark)) < 60


def test_honest_masks_are_scored(small, benchmark):
    assert score(benchmark, build(benchmark, attention=plain_mask)) < 60


def test_noisy_models_pass_many_probes(benchmark):
    """Experts in bfloat16 are rounded differently whenever other tokens change; 15 probes, no false alarm."""
    torch.manual_seed(0)
    model = Mixture(torch.bfloat16)
    for _ in range(15):
        prepare.check_causality(model, benchmark.rows("holdout"), 8, 512, CPU)

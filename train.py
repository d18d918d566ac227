"""
The model and its training: a GPT, Muon and AdamW, and a loop that lasts as long as the benchmark's time budget.
The agent rewrites this file as it likes; prepare.py times the training and scores the model.

    uv run train.py > run.log 2>&1         # on CUDA, MPS or CPU
    AUTORESEARCH_SEED=1 uv run train.py    # another seed, for the noise
"""

import ctypes
import gc
import math
import os
import re
import sys
import time
import timeit
from collections import Counter, defaultdict

import prepare  # before torch: total_seconds count from here
from prepare import Progress, TrainingClock, evaluate_bpb, load_benchmark, make_dataloader

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# --------------------------------------
# Hyperparameters

GPU = torch.cuda.is_available()

# size
DEPTH = 9 if GPU else 2  # blocks
MODEL_DIM = 640 if GPU else 128  # D
HEAD_DIM = 128 if GPU else 32  # K
NGRAM_ROWS = 2**22 if GPU else 2**17  # of the n-gram table, D / 2 floats each: 5.4 GB or 34 MB
TOTAL_BATCH_SIZE = 2**18 if GPU else 2**11  # tokens per optimizer step
DEVICE_BATCH_SIZE = 128 if GPU else 16  # rows per forward pass, halved until they fit
# model
WINDOW_PATTERN = "SSSSL"  # per block, repeated: S short window, L all; the last block, of two the second, is L
SHORT_WINDOW = 1 / 8  # of the row: earlier tokens that an S block sees
MLP_RATIO = 4  # hidden width / D
GATE_CHANNELS = 32  # channels of x that drive the value gates
ROPE_BASE = 200_000
LOGIT_CAP = 15.0 if GPU else None  # not on a CPU: tanh costs more than it gains
INIT_BOUND = 1.18 * MODEL_DIM**-0.5  # of matrices: uniform within so much of zero
X0_INIT = 0.05  # of the embedding that each block adds at first
POINTER = not GPU  # copy some tokens from the row; T x T scores, untried on a GPU
POINTER_ODDS = -9.0  # log of the odds of that, at first, for a match of no weight
POINTER_SCALE = 1.5  # on the similarity of normalized states
# learning rates (of embeddings and head: at D = 768, scaled by 1 / sqrt(D))
MATRIX_LR = 0.04
EMBEDDING_LR = 0.9
NGRAM_LR = 0.25
UNEMBEDDING_LR = 0.005
SCALAR_LR = 0.005
X0_LR = 0.5
# weight decay
MATRIX_DECAY = 0.2  # only where update and weight agree in sign; fades with progress
WTE_DECAY = 0.001
VALUE_DECAY = 0.003
UNEMBEDDING_DECAY = 0.01
# optimizer and schedules
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
ADAM_EPS = 1e-10
MUON_BETA2 = 0.95
MUON_MOMENTUM = (0.85, 0.95)  # at the start, and from MOMENTUM_RAMP on
MOMENTUM_RAMP = 0.16 if GPU else 0.3  # share of the run
WARMDOWN_RATIO = 0.75  # last share of the run, over which the rates fall ...
FINAL_LR_FRAC = 0.05  # ... to this share of themselves
# machine
COMPILE = True  # torch.compile

# --------------------------------------
# Model. Shapes: B rows, T tokens, D model width, H heads, K = D / H, V vocabulary


def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Without bias. The float32 weight is cast to the precision of x."""

    def __init__(self, inputs, outputs, bound=INIT_BOUND):
        super().__init__(inputs, outputs, bias=False)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class GPT(nn.Module):
    """Activations have the precision `dtype`; parameters are float32, cast where used."""

    def __init__(self, vocab_size, max_seq_len, dtype, attention):
        super().__init__()
        self.dtype, self.compiled = dtype, False
        sizes = {"S": max(1, int(max_seq_len * SHORT_WINDOW)), "L": max_seq_len}
        self.windows = [sizes[letter] for letter in (WINDOW_PATTERN * DEPTH)[: DEPTH - 1] + "L"]
        self.wte = nn.Embedding(vocab_size, MODEL_DIM)
        sparse = not torch.backends.mps.is_available()  # gradients of the rows that were used; untried on MPS
        self.ngrams = nn.Embedding(NGRAM_ROWS, MODEL_DIM // 2, sparse=sparse)
        nn.init.zeros_(self.ngrams.weight)
        self.blocks = nn.ModuleList(
            Block(window, attention, vocab_size if layer % 2 == (DEPTH - 1) % 2 else 0)
            for layer, window in enumerate(self.windows)
        )
        self.lm_head = Linear(MODEL_DIM, vocab_size)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        self.pointer = Pointer() if POINTER else None
        self.resid_lambdas = nn.Parameter(torch.ones(DEPTH))
        self.x0_lambdas = nn.Parameter(torch.full((DEPTH,), X0_INIT))
        angles = torch.outer(torch.arange(max_seq_len), ROPE_BASE ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1])
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]).to(dtype), persistent=False)

    def forward(self, inputs, targets=None):
        """Logits, float32 [B, T, V], of token ids [B, T]; with `targets` [B, T] the mean loss in nats instead."""
        x = self.embed(inputs, self.ngrams(hash_ngrams(inputs)))
        x0 = x.view_as(x)  # not x itself: the first block would be one more to compile
        for block, r, z in zip(self.blocks, self.resid_lambdas, self.x0_lambdas, strict=True):
            x = block(x, x0, r, z, inputs, self.rotary)
        return self.logits(x, inputs) if targets is None else self.loss(x, inputs, targets)

    def embed(self, inputs, ngrams):
        """Pairs of tokens add to one half of the channels, triples to the other."""
        return norm(self.wte(inputs) + ngrams.flatten(2)).to(self.dtype)

    def head(self, x):
        logits = self.lm_head(x).float()
        return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP) if LOGIT_CAP else logits

    def logits(self, x, inputs):
        x = norm(x)
        logits = self.head(x)
        if self.pointer is None:
            return logits
        weights, odds = self.pointer(x)
        generated = logits.softmax(-1) * torch.sigmoid(-odds)
        copied = weights * torch.sigmoid(odds)
        return generated.scatter_add(-1, inputs[:, None].expand_as(copied), copied).clamp_min(1e-30).log()

    def loss(self, x, inputs, targets):
        """Mean cross-entropy of `logits`, for which the pointer needs the target alone."""
        x = norm(x)
        logits = self.head(x)
        target = torch.arange(logits.size(-1), device=x.device) == targets[..., None]  # a gather has a scatter backward
        nll = logits.logsumexp(-1) - logits.where(target, 0).sum(-1)
        if self.pointer is not None:
            weights, odds = self.pointer(x)
            odds = odds[..., 0]
            copied = (weights * (inputs[:, None] == targets[..., None])).sum(-1).clamp_min(1e-30).log()
            nll = F.softplus(odds) - torch.logaddexp(-nll, copied + odds)
        return nll.mean()  # other objectives go here

    def compile_parts(self):
        """Per block: blocks of one shape share their code, so that it takes a fraction of the time."""
        torch._dynamo.config.recompile_limit = 64  # one for every kind of block
        for block in self.blocks:
            block.compile(dynamic=False)
        self.compiled = True
        self.embed = torch.compile(self.embed, dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def flops_per_token(self):
        """Forward and backward: 6 per weight of a matrix, and attention within each window."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        pointer = 0 if self.pointer is None else 6 * MODEL_DIM * max(self.windows)
        return 6 * matrices + sum(12 * MODEL_DIM * window for window in self.windows) + pointer


class Block(nn.Module):
    """Attention and an MLP, each on x and, gated per channel, x at the token before."""

    def __init__(self, window, attention, value_vocab_size):
        super().__init__()
        self.attention = Attention(window, attention, value_vocab_size)
        self.mlp = MLP()
        self.smear_gates = nn.Parameter(torch.zeros(2, MODEL_DIM))

    def forward(self, x, x0, r, z, inputs, rotary):
        x = r * x + z * x0
        x = x + self.attention(smear(norm(x), self.smear_gates[0]), inputs, rotary)
        return x + self.mlp(smear(norm(x), self.smear_gates[1]))


class Attention(nn.Module):
    """Half the heads have the keys of the token before, so that they find what followed."""

    def __init__(self, window, attention, value_vocab_size):
        super().__init__()
        assert MODEL_DIM % HEAD_DIM == 0 and MODEL_DIM > HEAD_DIM, "two heads or more"
        self.window = window
        self.attention = attention
        self.query, self.key, self.value = (Linear(MODEL_DIM, MODEL_DIM) for _ in range(3))
        self.out = Linear(MODEL_DIM, MODEL_DIM, bound=0)
        self.value_embeds = None
        if value_vocab_size:
            self.value_embeds = nn.Embedding(value_vocab_size, MODEL_DIM)
            nn.init.uniform_(self.value_embeds.weight, -INIT_BOUND, INIT_BOUND)
            self.gate = Linear(GATE_CHANNELS, MODEL_DIM // HEAD_DIM, bound=0)

    def forward(self, x, inputs, rotary):
        B, T, D = x.shape
        heads = (B, T, D // HEAD_DIM, HEAD_DIM)
        q, k, v = norm(self.query(x).view(heads)), norm(self.key(x).view(heads)), self.value(x).view(heads)
        if self.value_embeds is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))  # [B, T, H], 1 at first
            v = v + gate.unsqueeze(-1) * self.value_embeds(inputs).to(x.dtype).view(heads)
        before, same = k.chunk(2, dim=2)
        k = torch.cat([shift(before), same], dim=2)
        y = self.attention(rotate(q, rotary), rotate(k, rotary), v, self.window)
        return self.out(y.reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM)
        self.down = Linear(MLP_RATIO * MODEL_DIM, MODEL_DIM, bound=0)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Pointer(nn.Module):
    """
    Copies the next token from where in the row the state before was similar to the present one (cf. Merity et al. 2016,
    arXiv 1609.07843): weights over the row's tokens, [B, T, T], and the log of the odds of a copy, [B, T, 1].
    """

    def __init__(self):
        super().__init__()
        self.state = Linear(MODEL_DIM, MODEL_DIM)
        self.gate = Linear(MODEL_DIM, 1, bound=0)

    def forward(self, x):
        q = norm(self.state(x))
        scores = F.pad(q @ q.mT, (1, -1)).float()  # with the state before each token (shift(q) is NaN with AVX-512)
        scores = POINTER_SCALE * scores / math.sqrt(MODEL_DIM)
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -math.inf)
        match = scores.logsumexp(dim=-1, keepdim=True)
        return (scores - match).exp(), self.gate(x).float() + match + POINTER_ODDS


def shift(x):
    """x [B, T, ...] one position later, zero at the first."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (1, -1))


def smear(x, gates):
    return x + gates.to(x.dtype) * shift(x)


def hash_ngrams(inputs):
    """Rows of the n-gram table for the pair and the triple that end at each token: int64 [B, T, 2]."""
    before = shift(inputs)
    pairs = 27_191 * inputs + 36_313 * before
    triples = pairs + 50_411 * shift(before) + 1
    return torch.stack([pairs, triples], dim=-1) % NGRAM_ROWS


def rotate(x, rotary):
    """Rotary positions on x [B, T, H, K]: channels i and i + K / 2 turn by an angle that grows with the position."""
    cos, sin = rotary[:, : x.size(1), None]  # [T, 1, K / 2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# --------------------------------------
# Attention, three back ends: q, k, v [B, T, H, K]; a position sees itself and `window` earlier ones


def banded(q, k, v, window):
    """Plain torch, on any device: four bands of queries, each with the keys that one of them sees."""
    T = q.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bands = []
    for start in range(0, T, -(-T // 4)):
        first, end = max(0, start - window), min(T, start - (-T // 4))
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT).float() / math.sqrt(q.size(-1))
        scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
        bands.append(scores.softmax(dim=-1).to(v.dtype) @ v[:, :, first:end])
    return torch.cat(bands, dim=2).transpose(1, 2)


def varlen(q, k, v, window):
    """FlashAttention-2 in the torch wheel, for CUDA from Ampere on, in bfloat16."""
    B, T, H, K = q.shape
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.reshape(B * T, H, K) for x in (q, k, v))
    return varlen_attn(q, k, v, ends, ends, T, T, window_size=(window, 0)).view(B, T, H, K)


def load_flash3():
    """FlashAttention-3 for A100 and H100, as prepare.py has downloaded it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    flash_attn_func = prepare.load_flash3().flash_attn_func

    def flash3(q, k, v, window):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y

    return flash3


def choose_attention(device, dtype, compiled):
    """The fastest back end that is right here."""
    loaders = {"varlen": lambda: varlen} if device.type == "cuda" else {}
    if loaders and torch.cuda.get_device_capability(device) in prepare.FLASH3_CAPABILITIES:
        loaders = {"flash3": load_flash3} | loaders
    for name, load in loaders.items():
        try:
            back_end = load()
            probe_attention(torch.compile(back_end, dynamic=False) if compiled else back_end, device, dtype)
            return back_end
        except Exception as error:  # missing, failed, wrong: all the same
            print(f"attention: {name} not used ({type(error).__name__}: {prepare.first_line(error)})")
    return banded


def probe_attention(back_end, device, dtype):
    """AssertionError if value or gradients differ from float32 banded by more than bfloat16 noise."""
    q, k, v, dy = (torch.randn(2, 256, 2, HEAD_DIM, device=device).to(dtype).requires_grad_() for _ in range(4))
    for window in (32, 256):
        results = []
        for function, cast in ((back_end, dtype), (banded, torch.float32)):
            y = function(q.to(cast), k.to(cast), v.to(cast), window)
            results.append([y, *torch.autograd.grad(y, (q, k, v), dy.to(cast))])
        for ours, reference in zip(*results, strict=True):
            error = (ours.float() - reference.float()).norm() / reference.float().norm()
            assert error < 0.02, f"differs from the reference by {error:.1%} at window {window}"


# --------------------------------------
# Optimizer: Muon for matrices, row-wise RMSprop for the table of n-grams, torch's AdamW for the rest

# Polar Express (Amsel et al. 2025, arXiv 2505.16932): coefficients of five steps, for a norm scaled by 1.02
POLAR_EXPRESS = [
    (8.15655, -22.4833, 15.8788),
    (4.04293, -2.80892, 0.500018),
    (3.89167, -2.77248, 0.506065),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.423236),
]


def orthogonalize(X, dtype):
    """The nearest matrices with all singular values 1 (about), in `dtype`: X [N, rows, cols] with rows <= cols."""
    X = (X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return X


def muon_update(weights, grads, momenta, second_moments, lr, momentum, beta2, decay, dtype):
    """
    One step of N matrices of one shape, none taller than wide, in place: Nesterov momentum, orthogonalized, with the
    variance reduction of NorMuon (Li et al. 2025, arXiv 2510.05491), a second moment for each column, and cautious
    weight decay. Scalars are 0-d tensors.
    """
    old, grads = torch.stack(weights), torch.stack(grads)
    momenta.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momenta, momentum), dtype).float()
    squares = update.square().mean(dim=-2, keepdim=True)
    second_moments.lerp_(squares, 1 - beta2)
    factor = second_moments.clamp_min(1e-10).rsqrt()
    kept = squares.sum(dim=-1, keepdim=True) / (squares * factor.square()).sum(dim=-1, keepdim=True).clamp_min(1e-10)
    update = update * factor * kept.sqrt()  # as long as before
    new = old - lr * (update + decay * old.where(update * old > 0, 0))
    for weight, matrix in zip(weights, new, strict=True):
        weight.copy_(matrix)


class Muon(torch.optim.Optimizer):
    """Each group has matrices of one shape, which step together and are multiplied in `dtype`."""

    def __init__(self, groups, dtype, compiled):
        super().__init__(groups, {})
        self.dtype = dtype
        self.update = torch.compile(muon_update, dynamic=False) if compiled else muon_update

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
            state = self.state[weights[0]]
            if weights[0].size(0) >= weights[0].size(1):
                weights, grads = ([matrix.mT for matrix in matrices] for matrices in (weights, grads))
            if not state:
                state["momenta"] = torch.zeros_like(torch.stack(weights))
                state["second_moments"] = torch.zeros_like(state["momenta"][:, :1])
            scalars = map(torch.tensor, (group["lr"], group["momentum"], MUON_BETA2, group["weight_decay"]))
            self.update(weights, grads, *state.values(), *scalars, dtype=self.dtype)


class RowwiseRMSprop(torch.optim.Optimizer):
    """RMSprop (Hinton 2012), one mean square a row, on the rows that a sparse gradient has."""

    @torch.no_grad()
    def step(self):
        for weight, lr in ((weight, group["lr"]) for group in self.param_groups for weight in group["params"]):
            if weight.grad is None:
                continue
            grad = weight.grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
            if weight not in self.state:
                self.state[weight]["squares"] = weight.new_zeros(len(weight), 1)
            squares = self.state[weight]["squares"]
            squares[rows] = mean = squares[rows].lerp(values.square().mean(dim=1, keepdim=True), 1 - ADAM_BETAS[1])
            values.div_(mean.sqrt() + ADAM_EPS)
            weight.add_(grad, alpha=-lr)


def build_optimizers(model):
    """Every parameter that trains in one group, by what it is, never by its name; else SystemExit."""
    members, matrices = defaultdict(list), defaultdict(list)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if not weight.requires_grad:
                continue
            elif module in (model.wte, model.lm_head):
                members[module].append(weight)
            elif isinstance(module, nn.Embedding):
                members["sparse" if module.sparse else "dense"].append(weight)
            elif isinstance(module, nn.Linear) and weight.squeeze().ndim == 2:
                matrices[weight.shape].append(weight)
            else:
                members["x0" if weight is model.x0_lambdas else "scalars"].append(weight)
    scale = (MODEL_DIM / 768) ** -0.5
    muon = [
        dict(params=same, lr=MATRIX_LR * max(1, rows / cols) ** 0.5, weight_decay=MATRIX_DECAY, momentum=0.0)
        for (rows, cols), same in matrices.items()
    ]
    adamw = [
        dict(params=members[model.wte], lr=EMBEDDING_LR * scale, weight_decay=WTE_DECAY),
        dict(params=members["dense"], lr=EMBEDDING_LR * scale, weight_decay=VALUE_DECAY),
        dict(params=members[model.lm_head], lr=UNEMBEDDING_LR * scale, weight_decay=UNEMBEDDING_DECAY),
        dict(params=members["scalars"], lr=SCALAR_LR, weight_decay=0.0),
        dict(params=members["x0"], lr=X0_LR, weight_decay=0.0, betas=X0_BETAS),
    ]
    tables = [dict(params=members["sparse"], lr=NGRAM_LR * scale)]
    uses = Counter(weight for group in muon + adamw + tables for weight in group["params"])
    for name, weight in model.named_parameters():
        if weight.requires_grad and uses[weight] != 1:
            raise SystemExit(f"{name} is in {uses[weight]} groups of build_optimizers(), it must be in one")
    adamw = torch.optim.AdamW(adamw, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    return [Muon(muon, model.dtype, model.compiled), adamw, RowwiseRMSprop(tables, {})]


# --------------------------------------
# Schedules: functions of progress, the share of the budget that is used, so that they fit any machine


def lr_factor(progress):
    """Constant, then a line down to FINAL_LR_FRAC. No warm-up: any hurt."""
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * min(1.0, (1 - progress) / WARMDOWN_RATIO)


def set_schedules(optimizers, progress):
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor(progress)
        if "momentum" in group:  # Muon's
            start, end = MUON_MOMENTUM
            group["momentum"] = start + (end - start) * min(1.0, progress / MOMENTUM_RAMP)
            group["weight_decay"] = group.setdefault("initial_decay", group["weight_decay"]) * (1 - progress)


# --------------------------------------
# Main

PEAK_FLOPS = {  # dense, bfloat16 (NVIDIA data sheets), by torch's name
    "NVIDIA B200": 2250e12, "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 4090": 165.2e12,
}  # fmt: skip


def choose_device():
    if not GPU and (why := prepare.why_no_gpu()):
        print(f"CPU: {why}")
    return torch.device("cuda" if GPU else "mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(device):
    """bfloat16 where it is fast."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    size, threads, seconds = 256 if device.type == "cpu" else 2048, torch.get_num_threads(), []
    torch.set_num_threads(1)  # two wait for each other beside others
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(size, size, device=device, dtype=dtype)
        seconds.append(min(timeit.repeat(lambda a=a: (a @ a, prepare.synchronize(device)), number=1, repeat=50)))
    torch.set_num_threads(threads)
    return torch.bfloat16 if seconds[0] < 0.8 * seconds[1] else torch.float32


def set_up(device):
    """The fastest precision, attention and code that is right here. What falls back prints a line."""
    torch.set_float32_matmul_precision("high")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc: keep what is freed; page faults take 10% of a step
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    compiled = COMPILE and device.type != "mps"
    try:
        prepare.mend_compiler()
        x = torch.ones(2**15, device=device, requires_grad=True)
        torch.compile(lambda x: norm(x).sum(), disable=not compiled)(x).backward()
    except Exception as error:  # no compiler, no headers, no Triton: all the same
        why = f"are a C++ compiler and Python.h here? {prepare.first_line(error)}"
        print(f"COMPILE: torch.compile does not work, going on without ({why})")
        compiled = False
    dtype = choose_dtype(device)
    return dtype, choose_attention(device, dtype, compiled), compiled


def build_model(benchmark, device, dtype=torch.float32, attention=banded, compiled=False):
    """A fresh model of a benchmark's vocabulary, row length and seed."""
    gc.collect()  # of an earlier model: compiled modules are cycles
    torch.cuda.empty_cache()
    torch.manual_seed(benchmark.seed)
    with torch.device(device):
        model = GPT(benchmark.vocab_size, benchmark.max_seq_len, dtype, attention)
    if compiled:
        model.compile_parts()
    return model


def train_step(model, optimizers, batches, progress):
    """One step on the mean loss of the batches; as a tensor, so that nobody waits for it."""
    total = 0.0
    model.zero_grad(set_to_none=True)
    for inputs, targets, *_ in batches:
        loss = model(inputs, targets) / len(batches)
        loss.backward()
        total = total + loss.detach()
    set_schedules(optimizers, progress)
    for optimizer in optimizers:
        optimizer.step()
    return total


def rehearse(rows, accumulation, benchmark, device, *setup):
    """Compile everything and fill the memory: two steps and a scoring pass of a throwaway model."""
    model = build_model(benchmark, device, *setup)
    optimizers = build_optimizers(model)
    inputs, targets = torch.randint(benchmark.vocab_size, (2, rows, benchmark.max_seq_len), device=device)
    for _ in range(2):
        train_step(model, optimizers, [(inputs, targets)] * accumulation, progress=0.0)
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.grad is None:
            print(f"{name} has no gradient: it does not train")
    model.eval()
    [model(inputs[: prepare.scoring_rows(benchmark, rows)]).detach() for _ in range(2)]  # the probe holds two


def find_batch(benchmark, device, *setup):
    """Rows per forward pass that fit in memory, and forward passes per step."""
    rows = max(1, min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // benchmark.max_seq_len))
    while True:
        accumulation = max(1, round(TOTAL_BATCH_SIZE / (rows * benchmark.max_seq_len)))
        try:
            rehearse(rows, accumulation, benchmark, device, *setup)
            return rows, accumulation
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not re.search("(of|enough|allocate) memory|ALLOC_FAILED|MemoryError", repr(error)):
                raise
        print(f"DEVICE_BATCH_SIZE: {rows} rows do not fit in memory, trying {rows // 2}; set it to what fits")
        rows //= 2


def checked(loss, step):
    """Its number. NaN, infinity or more than 100 end the run."""
    if not loss.item() <= 100:
        raise SystemExit(f"stopped at step {step}: loss {loss.item()}; lower the learning rates")
    return loss.item()


def main():
    sys.stdout.reconfigure(line_buffering=True)
    device = choose_device()
    benchmark = load_benchmark()
    clock = TrainingClock(benchmark, device)
    dtype, attention, compiled = setup = set_up(device)
    name = prepare.device_name(device)
    print(f"commit {str(clock.origin['commit'])[:7]}, seed {benchmark.seed}, {benchmark.id}")
    print(f"{name}, {dtype}; compiling what is new")
    rows, accumulation = find_batch(benchmark, device, *setup)
    for why in torch._dynamo.utils.counters["unimplemented"]:
        print(f"COMPILE: graph break, {prepare.first_line(why)}; TORCH_LOGS=graph_breaks shows where")
    model = build_model(benchmark, device, *setup)
    optimizers = build_optimizers(model)
    batch_tokens = accumulation * rows * benchmark.max_seq_len

    loader = make_dataloader(benchmark, "train", rows, device)
    status = Progress(max(10, benchmark.time_budget / 50))

    clock.start()
    step, previous, begun = 0, None, clock.elapsed  # preparations go above
    while clock.elapsed + (clock.elapsed - begun) / max(1, step) < benchmark.time_budget:  # one more fits
        progress = clock.progress
        batches = [next(loader) for _ in range(accumulation)]
        loss = train_step(model, optimizers, batches, progress)
        step += 1
        if previous is not None:  # the step before: the device is busy with this one
            status(
                f"step {step:05d} | {progress:.1%} | loss {checked(previous, step - 1):.4f} | epoch {batches[0][2]} | "
                f"{step * batch_tokens / clock.elapsed:,.0f} tok/s | {benchmark.time_budget - clock.elapsed:.0f} s left"
            )
        clock.tick()
        previous = loss
    clock.stop()
    status(f"step {step:05d} | 100% | loss {checked(previous, step):.4f} | done", last=True)
    flops = model.flops_per_token() * step * batch_tokens / clock.elapsed
    val_bpb = evaluate_bpb(model, benchmark, rows, clock)
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{clock.elapsed:.1f}",
        "total_seconds": f"{time.monotonic() - prepare.PROCESS_START:.1f}",
        "peak_vram_mb": f"{prepare.peak_memory_mb(device):.1f}",
        "mfu_percent": f"{100 * flops / PEAK_FLOPS.get(name, math.inf):.2f}",
        "total_tokens_M": f"{step * batch_tokens / 1e6:.1f}",
        "num_steps": step,
        "num_params_M": f"{sum(map(torch.numel, model.parameters())) / 1e6:.1f}",
        "depth": DEPTH,
        "device": name,
        "benchmark": benchmark.id,
        "seed": benchmark.seed,
        "compiled": compiled,
        "attention": attention.__name__,
        "batch": f"{batch_tokens:,} tokens in {accumulation} x {rows} rows",
        "slow_steps_percent": f"{clock.slow_steps_percent:.1f}",
    }
    print("---")
    for key, value in summary.items():
        print(f"{key + ':':<17} {value}")
    return summary


if __name__ == "__main__":
    main()

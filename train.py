"""
The answer: a GPT, its optimizer and a training loop that lasts as long as the benchmark's time budget.
The agent rewrites this file as it likes; prepare.py times the training and scores the model.

    uv run train.py > run.log 2>&1         # on CUDA, MPS or CPU, whichever is there
    AUTORESEARCH_SEED=1 uv run train.py    # the same with another seed: how much of a gain is noise?

Sections: Hyperparameters, Model, Attention, Optimizer, Schedules, Main
"""

import ctypes
import gc
import math
import os
import re
import sys
import threading
import time
from typing import NamedTuple

import prepare  # before torch: the run's total_seconds count from here
from prepare import Progress, TrainingClock, evaluate_bpb, load_benchmark, make_dataloader

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adamw import adamw

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters


class Per(NamedTuple):
    """A constant with one value on an NVIDIA GPU and another on small machines (CPU, MPS)."""

    gpu: object
    small: object


# fmt: off
# size
DEPTH             = Per(gpu=9,     small=2)      # blocks
MODEL_DIM         = Per(gpu=640,   small=128)    # D, a multiple of HEAD_DIM
HEAD_DIM          = Per(gpu=128,   small=32)     # K
TOTAL_BATCH_SIZE  = Per(gpu=2**18, small=2**12)  # tokens per optimizer step
DEVICE_BATCH_SIZE = Per(gpu=128,   small=16)     # rows per forward pass; halved while they don't fit in memory
# model
WINDOW_PATTERN    = "SSSSL"                      # per block, repeated: S short window, L all; the last block is L
SHORT_WINDOW      = 1 / 8                        # of the row: earlier tokens that an S block sees
MLP_RATIO         = 4                            # hidden width of the MLP / D
GATE_CHANNELS     = 32                           # channels of x that drive the value gates
NGRAMS            = Per(gpu=0,     small=2**17)  # rows in the table of hashed n-grams
INDUCTION         = Per(gpu=False, small=True)   # half the heads look for what each earlier token followed
POINTER           = Per(gpu=False, small=True)   # some tokens are copied from the row
POINTER_ODDS      = -9.0                         # log of the odds of that, at first, for a match of no weight
POINTER_SCALE     = 1.5                          # on the similarity of normalised states
SMEAR             = Per(gpu=False, small=True)   # attention and MLP see the token before, too
ROPE_BASE         = 200_000
QK_SCALE          = 1.15                         # on normalised queries and keys; without it attention is too diffuse
LOGIT_CAP         = Per(gpu=15.0,  small=None)   # None: no cap
INIT_SCALE        = 0.68                         # of block matrices: uniform within INIT_SCALE * sqrt(3 / D)
X0_INIT           = 0.05                         # how much of the token embedding each block adds at first
# learning rates (tables: at D = 768, scaled by 1 / sqrt(D))
MATRIX_LR         = 0.04
WTE_LR            = 0.9
NGRAM_LR          = 0.25
VALUE_LR          = 0.9
HEAD_LR           = 0.005
RESIDUAL_LR       = 0.005                        # of gates, too
X0_LR             = 0.5
# weight decay
MATRIX_DECAY      = 0.2                          # only where update and weight agree in sign; fades with progress
WTE_DECAY         = 0.001
VALUE_DECAY       = 0.003
HEAD_DECAY        = 0.01
# optimizer and schedules
ADAM_BETAS        = (0.8, 0.95)
X0_BETAS          = (0.96, 0.95)
ADAM_EPS          = 1e-10
MUON_BETA2        = 0.95
MUON_MOMENTUM     = (0.85, 0.95)                 # at the start, and from MOMENTUM_RAMP on
MOMENTUM_RAMP     = 0.3                          # share of the run
WARMDOWN          = 0.75                         # last share of the run, over which the rates fall ...
FINAL_LR          = 0.05                         # ... to this share of themselves
# machine
COMPILE           = Per(gpu=True,  small=True)   # torch.compile
OVERTIME          = 0.01                         # share of the budget by which the last step may be late
WARMUP_STEPS      = 2                            # before the clock starts; undone afterwards
# fmt: on


def settle(device):
    """Give every two-valued constant the value for this device."""
    for name, value in list(globals().items()):
        if isinstance(value, Per):
            globals()[name] = value.gpu if device.type == "cuda" else value.small


# ---------------------------------------------------------------------------------------------------------------------
# Model. Shapes: B rows, T tokens, D model width, H heads, K = D / H, V vocabulary


def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Without bias. Its weight stays float32 for the optimizer and is cast to the precision of x."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class GPT(nn.Module):
    """The model. Its activations have the precision `dtype`, its parameters are float32."""

    def __init__(self, vocab_size, max_seq_len, dtype):
        super().__init__()
        self.dtype = dtype
        self.windows = window_sizes(max_seq_len)
        self.wte = nn.Embedding(vocab_size, MODEL_DIM)
        self.ngrams = nn.Embedding(NGRAMS, MODEL_DIM // 2) if NGRAMS else None
        if NGRAMS:
            self.ngrams.sparse = self.ngrams.weight.is_cpu  # gradients of the rows that were used; untried elsewhere
        self.blocks = nn.ModuleList(
            Block(window, has_values=layer % 2 == (DEPTH - 1) % 2, vocab_size=vocab_size)
            for layer, window in enumerate(self.windows)
        )
        self.lm_head = Linear(MODEL_DIM, vocab_size)
        self.pointer = Pointer() if POINTER else None
        self.residual_scales = nn.Parameter(torch.empty(DEPTH))
        self.x0_scales = nn.Parameter(torch.empty(DEPTH))
        angles = torch.outer(torch.arange(max_seq_len), ROPE_BASE ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1])
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)  # [T, K / 2]
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Blocks start as the identity: what they write to the residual stream is zero."""
        bound = INIT_SCALE * math.sqrt(3 / MODEL_DIM)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        nn.init.ones_(self.residual_scales)
        nn.init.constant_(self.x0_scales, X0_INIT)
        for name, weight in self.named_parameters():
            if "gate" in name or "ngrams" in name or name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.zeros_(weight)
            elif name.startswith(("blocks", "pointer")):
                nn.init.uniform_(weight, -bound, bound)

    def forward(self, inputs, targets=None):
        """Logits, float32 [B, T, V], of token ids [B, T]; with `targets` [B, T] the mean loss in nats instead."""
        inputs = inputs.contiguous()  # as in scoring, and x0 is not x: each would make the compiler start again
        x = self.wte(inputs)
        if NGRAMS:
            x = x + self.ngrams(hash_ngrams(inputs)).flatten(2)  # half the channels for pairs, half for triples
        x = norm(x).to(self.dtype)
        x0 = x.view_as(x)
        for block, r, z in zip(self.blocks, self.residual_scales, self.x0_scales):
            x = block(x, x0, r, z, inputs, self.cos, self.sin)
        return self.logits(x, inputs) if targets is None else self.loss(x, inputs, targets)

    def logits(self, x, inputs):
        x = norm(x)
        logits = cap(self.lm_head(x).float())
        if self.pointer is None:
            return logits
        logits = logits.log_softmax(-1)
        weights, odds = self.pointer(x)
        same = inputs[:, :, None] == inputs[:, None]
        copied = log(weights @ same.float()) + odds
        places = inputs[:, None].expand_as(copied)
        generated = logits.gather(-1, places)
        first = ~same.tril(-1).any(-1)[:, None] & torch.ones_like(same[0]).tril()  # of each token, up to here
        return logits.scatter_add(-1, places, (torch.logaddexp(generated, copied) - generated).where(first, 0))

    def loss(self, x, inputs, targets):
        """The mean cross-entropy of `logits`, which are never held whole in float32."""
        x = norm(x)
        likelihood = HeadLikelihood.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten()).view(targets.shape)
        if self.pointer is not None:
            weights, odds = self.pointer(x)
            odds = odds[..., 0]
            copied = log((weights * (inputs[:, None] == targets[..., None])).sum(-1))
            likelihood = F.logsigmoid(-odds) + torch.logaddexp(likelihood, copied + odds)
        return -likelihood.mean()

    def compile_parts(self):
        """torch.compile per block: blocks of one shape share their code, so that it takes a fraction of the time."""
        from torch._inductor.cpu_vec_isa import VecISA

        VecISA.check_build = lambda isa, code: True  # every run would try the compiler, 1.7 s an instruction set
        torch._dynamo.config.recompile_limit = 64  # one for every kind of block
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # their code is in its keys
        for block in self.blocks:
            block.compile(dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def flops_per_token(self):
        """Of a forward and backward pass: 6 per matrix weight, and attention over what each window lets through."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        pointer = 0 if self.pointer is None else 6 * MODEL_DIM * len(self.cos)
        return 6 * matrices + sum(12 * MODEL_DIM * window for window in self.windows) + pointer


class Block(nn.Module):
    def __init__(self, window, has_values, vocab_size):
        super().__init__()
        self.attention = Attention(window, has_values, vocab_size)
        self.mlp = MLP()
        self.smear_gates = nn.Parameter(torch.empty(2, MODEL_DIM)) if SMEAR else None

    def forward(self, x, x0, r, z, inputs, cos, sin):
        x = r * x + z * x0
        x = x + self.attention(self.smear(norm(x), 0), inputs, cos, sin)
        return x + self.mlp(self.smear(norm(x), 1))

    def smear(self, x, part):
        """Add to each channel its share of what it was at the token before; none at first."""
        return x if self.smear_gates is None else x + self.smear_gates[part].to(x.dtype) * shift(x)


class Attention(nn.Module):
    """Causal self-attention in a window, with rotary positions, QK-norm and, in every other block, value embeddings."""

    def __init__(self, window, has_values, vocab_size):
        super().__init__()
        self.window = window
        self.query = Linear(MODEL_DIM, MODEL_DIM)
        self.key = Linear(MODEL_DIM, MODEL_DIM)
        self.value = Linear(MODEL_DIM, MODEL_DIM)
        self.out = Linear(MODEL_DIM, MODEL_DIM)
        self.table = nn.Embedding(vocab_size, MODEL_DIM) if has_values else None
        self.gate = Linear(GATE_CHANNELS, MODEL_DIM // HEAD_DIM) if has_values else None

    def forward(self, x, inputs, cos, sin):
        B, T, D = x.shape
        heads = (B, T, D // HEAD_DIM, HEAD_DIM)
        q, k, v = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if self.table is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))  # [B, T, H], 1 at first
            v = v + gate.unsqueeze(-1) * self.table(inputs).to(x.dtype).view(heads)
        if INDUCTION:
            early, same = k.chunk(2, dim=2)
            k = torch.cat([shift(early), same], dim=2)
        q, k = (QK_SCALE * norm(rotate(part, cos, sin)) for part in (q, k))
        return self.out(attention(q, k, v, self.window).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM)
        self.down = Linear(MLP_RATIO * MODEL_DIM, MODEL_DIM)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Pointer(nn.Module):
    """
    Copies the next token from the row, from where the state before it was similar to the present one.

    Of states [B, T, D] it makes weights over the row's tokens, [B, T, T], and the log of the odds that the token is a
    copy, [B, T, 1]; these rise with the similarity, as in pointer sentinel mixtures (Merity et al. 2016, arXiv
    1609.07843).
    """

    def __init__(self):
        super().__init__()
        self.state = Linear(MODEL_DIM, MODEL_DIM)
        self.gate = Linear(MODEL_DIM, 1)

    def forward(self, x):
        q = norm(self.state(x))
        k = shift(q)  # the state before a token, which is compared with the present one
        scores = POINTER_SCALE * (q @ k.mT).float() / math.sqrt(MODEL_DIM)
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
        match = scores.logsumexp(dim=-1, keepdim=True)
        return (scores - match).exp(), self.gate(x).float() + match + POINTER_ODDS


class HeadLikelihood(torch.autograd.Function):
    """
    Log-likelihoods of targets [N] under softmax(cap(x @ weight.T)), x [N, D], weight [V, D]: float32 [N].

    The forward pass keeps the gradient of the logits, but for a factor, in the precision of x: one exponential a logit.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        weight, targets = weight.to(x.dtype), targets[:, None]
        logits = x @ weight.T
        target = cap(logits.gather(1, targets).float())
        logits = cap(logits.float())
        top = logits.amax(dim=1, keepdim=True)
        likelihoods = (logits - top).exp()
        total = likelihoods.sum(dim=1, keepdim=True)
        errors = (likelihoods * slope(logits)).to(x.dtype)
        errors = errors.scatter(1, targets, (((target - top).exp() - total) * slope(target)).to(x.dtype))
        ctx.save_for_backward(x, weight, errors, total)
        return (target - top - total.log())[:, 0]

    @staticmethod
    def backward(ctx, grad):
        x, weight, errors, total = ctx.saved_tensors
        factor = -grad[:, None] / total
        return (errors @ weight * factor).to(x.dtype), (errors.T @ (x * factor).to(x.dtype)).float(), None


def cap(logits):
    return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP) if LOGIT_CAP else logits


def slope(capped):
    """The derivative of `cap`, given its result."""
    return 1 - (capped / LOGIT_CAP).square() if LOGIT_CAP else 1


def log(likelihood):
    return likelihood.clamp_min(1e-10).log()


def shift(x):
    """x [B, T, ...] one position later: at each the value of the one before, zero at the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def hash_ngrams(inputs):
    """Rows of the table of n-grams, for the pair and the triple of tokens that end at each: int64 [B, T, 2]."""
    before = shift(inputs)
    pairs = 27_191 * inputs + 36_313 * before
    triples = pairs + 50_411 * shift(before) + 1
    return torch.stack([pairs, triples], dim=-1) % NGRAMS


def rotate(x, cos, sin):
    """Rotary positions on x [B, T, H, K]: channels i and i + K / 2 turn by an angle that grows with the position."""
    T = x.size(1)
    cos, sin = cos[:T, None], sin[:T, None]  # [T, 1, K / 2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def window_sizes(max_seq_len):
    """Per block, how many earlier tokens a position sees."""
    size = {"S": max(1, int(max_seq_len * SHORT_WINDOW)), "L": max_seq_len}
    pattern = (WINDOW_PATTERN * DEPTH)[: DEPTH - 1] + "L"
    return [size[letter] for letter in pattern]


def build_model(benchmark, device, dtype=torch.float32):
    """A fresh model of a benchmark's vocabulary and row length."""
    settle(device)
    with torch.device(device):
        return GPT(benchmark.vocab_size, benchmark.max_seq_len, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: one function, three back ends. q, k, v are [B, T, H, K]; a position sees itself and `window` earlier ones


def attention(q, k, v, window):
    return BACK_END(q, k, v, window)


def sdpa(q, k, v, window):
    """Plain torch, on any device: bands of queries, each with the keys that one of them sees."""
    T, device = q.size(1), q.device
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    spelled_out = device.type == "cpu" and q.dtype == torch.bfloat16  # there torch's own takes almost twice as long
    if window >= T - 1 and not spelled_out:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    bands = []
    for start in range(0, T, -(-T // 4)):
        first, end = max(0, start - window), min(T, start - (-T // 4))
        distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
        seen = (distance >= 0) & (distance <= window)
        queries, keys, values = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        if spelled_out:
            scores = (queries @ keys.mT).float() / math.sqrt(q.size(-1))
            bands.append(scores.masked_fill(~seen, -math.inf).softmax(dim=-1).to(v.dtype) @ values)
        else:
            bands.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen))
    return torch.cat(bands, dim=2).transpose(1, 2)


def varlen(q, k, v, window):
    """FlashAttention-2 in the torch wheel, for CUDA from Ampere on, in bfloat16."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, K = q.shape
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    size = (-1 if window >= T - 1 else window, 0)
    y = varlen_attn(q.reshape(-1, H, K), k.reshape(-1, H, K), v.reshape(-1, H, K), ends, ends, T, T, window_size=size)
    return y.view(B, T, H, K)


def load_hub_kernel():
    """FlashAttention-3 from the Hugging Face kernels hub, for Ampere and Hopper."""
    if not hub_answers():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a kernel downloaded before still loads; no 23 s of retries
    from kernels import get_kernel

    flash_attn_func = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func

    def hub(q, k, v, window):
        size = (-1 if window >= q.size(1) - 1 else window, 0)
        y = flash_attn_func(q, k, v, causal=True, window_size=size)
        return y[0] if isinstance(y, tuple) else y

    return hub


def hub_answers(seconds=2):
    """Whether the Hugging Face hub answers at once; looked up in a thread because DNS has time limits of its own."""
    import requests

    def knock():
        try:
            answers.append(requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds))
        except requests.RequestException:
            pass

    answers = []
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def choose_attention(device, dtype):
    """The fastest back end that gives the same result as sdpa here, in a probe of value and gradient."""
    candidates = []
    if device.type == "cuda" and dtype == torch.bfloat16:
        if torch.cuda.get_device_capability(device)[0] in (8, 9):
            candidates.append(("FlashAttention-3 of the kernels hub", load_hub_kernel))
        candidates.append(("varlen_attn", lambda: varlen))
    for name, load in candidates:
        try:
            back_end = load()
            probe_attention(torch.compile(back_end, dynamic=False) if COMPILE else back_end, device, dtype)
            return back_end
        except Exception as error:  # missing, not built for this card, no network, failed launch, wrong: all the same
            print(f"attention: no {name} here ({type(error).__name__}: {prepare.first_line(error)})")
    return sdpa


def probe_attention(back_end, device, dtype):
    """Raise AssertionError if a back end differs from float32 sdpa by more than bfloat16 noise."""
    shape = (2, 256, 2, HEAD_DIM)
    q, k, v, dy = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(4))
    for window in (32, 256):
        results = []
        for function, cast in ((back_end, dtype), (sdpa, torch.float32)):
            y = function(q.to(cast), k.to(cast), v.to(cast), window)
            results.append([y, *torch.autograd.grad(y, (q, k, v), dy.to(cast))])
        for ours, reference in zip(*results):
            error = (ours.float() - reference.float()).norm() / reference.float().norm()
            assert error < 0.02, f"differs from the reference by {error:.1%} at window {window}"


BACK_END = sdpa


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

# Amsel et al. 2025, "The Polar Express" (arXiv 2505.16932): coefficients of five steps, for a norm scaled by 1.02
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(X, dtype):
    """The nearest matrices with all singular values 1 (about), in `dtype`: X [N, rows, cols] with rows <= cols."""
    X = (X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return X


def muon_update(weights, grads, scales, momenta, second_moments, lr, momentum, beta2, decay, dtype):
    """
    One Muon step on N matrices of one shape, in place; as [N, rows, cols], rows <= cols: Nesterov momentum,
    orthogonalized, with the variance reduction of NorMuon (Li et al. 2025, arXiv 2510.05491), a second moment for each
    column, and cautious weight decay. `scales` [N, 1, 1] are factors of lr; scalars are 0-d tensors.
    """
    old, grads = torch.stack(wide(weights)), torch.stack(wide(grads))
    momenta.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momenta, momentum), dtype).float()
    squares = update.square().mean(dim=-2, keepdim=True)
    second_moments.lerp_(squares, 1 - beta2)
    factor = second_moments.clamp_min(1e-10).rsqrt()
    kept = squares.sum(dim=-1, keepdim=True) / (squares * factor.square()).sum(dim=-1, keepdim=True).clamp_min(1e-10)
    update = update * (lr * scales * factor * kept.sqrt())  # as long as before
    new = old - update - lr * decay * old.where(update * old >= 0, 0)
    for weight, matrix in zip(wide(weights), new):
        weight.copy_(matrix)


def rows_update(weight, grad, square, lr, beta2):
    """RMSprop (Hinton 2012) with one mean square a row, `square` [R, 1], on the rows that a sparse gradient has."""
    grad = grad.coalesce()
    rows, values = grad.indices()[0], grad.values()
    square[rows] = mean = square[rows].lerp(values.square().mean(dim=1, keepdim=True), 1 - beta2)
    values.div_(mean.sqrt() + ADAM_EPS)
    weight.add_(grad, alpha=-lr)


def wide(matrices):
    """The matrices with at most as many rows as columns: the upright and the square ones are transposed."""
    return [matrix.mT if matrix.size(0) >= matrix.size(1) else matrix for matrix in matrices]


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon for the groups of kind "muon" (matrices of one shape, stepped together), AdamW for those of kind "adamw",
    RMSprop for "rows" (tables with sparse gradients). All state is float32: in bfloat16 a second moment would never
    change. `dtype` is what Muon multiplies in.
    """

    def __init__(self, groups, dtype, compile=False):
        super().__init__(groups, {})
        self.dtype = dtype
        self.muon_update = torch.compile(muon_update, dynamic=False) if compile else muon_update
        for group in self.param_groups:
            group["base_lr"], group["base_decay"] = group["lr"], group["decay"]
            if group["kind"] == "muon":
                scales = [math.sqrt(max(1, weight.size(0) / weight.size(1))) for weight in group["params"]]
                momenta = torch.zeros_like(torch.stack(wide(group["params"])))
                self.state[group["params"][0]] = {
                    "scales": torch.tensor(scales, device=momenta.device)[:, None, None],
                    "momenta": momenta,
                    "second_moments": torch.zeros_like(momenta[:, :1]),
                }
            for weight in group["params"]:
                if group["kind"] == "adamw":
                    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
                    self.state[weight] = {"mean": mean, "square": square, "step": torch.zeros((), device=weight.device)}
                elif group["kind"] == "rows":
                    self.state[weight] = {"square": torch.zeros(len(weight), 1, device=weight.device)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            grads = [weight.grad for weight in weights]
            states = [self.state[weight] for weight in weights]
            lr, decay = group["lr"], group["decay"]
            if group["kind"] == "muon":
                scalars = map(torch.tensor, (lr, group["momentum"], MUON_BETA2, decay))
                self.muon_update(weights, grads, *states[0].values(), *scalars, dtype=self.dtype)
            elif group["kind"] == "rows":
                for weight, grad, state in zip(weights, grads, states):
                    rows_update(weight, grad, state["square"], lr, group["betas"][1])
            else:
                means, squares, steps = ([state[name] for state in states] for name in ("mean", "square", "step"))
                beta1, beta2 = group["betas"]
                scalars = dict(lr=lr, beta1=beta1, beta2=beta2, eps=ADAM_EPS, weight_decay=decay)
                adamw(weights, grads, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, **scalars)


def build_optimizer(model, dtype, compile=False):
    """Every parameter in exactly one group."""
    matrices, small = {}, [model.residual_scales]  # short and long side -> the block matrices, upright or not
    for name, weight in model.named_parameters():
        if "gate" in name:
            small.append(weight)
        elif name.startswith(("blocks", "pointer")) and "table" not in name:
            matrices.setdefault(tuple(sorted(weight.shape)), []).append(weight)
    tables = [block.attention.table.weight for block in model.blocks if block.attention.table is not None]
    scale = (MODEL_DIM / 768) ** -0.5
    # fmt: off
    groups = [
        dict(kind="adamw", params=[model.wte.weight],       lr=WTE_LR * scale,   decay=WTE_DECAY,   betas=ADAM_BETAS),
        dict(kind="adamw", params=tables,                   lr=VALUE_LR * scale, decay=VALUE_DECAY, betas=ADAM_BETAS),
        dict(kind="adamw", params=[model.lm_head.weight],   lr=HEAD_LR * scale,  decay=HEAD_DECAY,  betas=ADAM_BETAS),
        dict(kind="adamw", params=small,                    lr=RESIDUAL_LR,      decay=0.0,         betas=ADAM_BETAS),
        dict(kind="adamw", params=[model.x0_scales],        lr=X0_LR,            decay=0.0,         betas=X0_BETAS),
    ]
    # fmt: on
    if NGRAMS:
        kind, table = "rows" if model.ngrams.sparse else "adamw", model.ngrams.weight
        groups.append(dict(kind=kind, params=[table], lr=NGRAM_LR * scale, decay=0.0, betas=ADAM_BETAS))
    groups += [dict(kind="muon", params=same, lr=MATRIX_LR, decay=MATRIX_DECAY) for same in matrices.values()]
    return MuonAdamW([group for group in groups if group["params"]], dtype, compile)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: functions of progress, the share of the time budget that is used up, so that they fit any machine


def lr_factor(progress):
    """Constant, then a line down to FINAL_LR. No warm-up: any hurt."""
    return FINAL_LR + (1 - FINAL_LR) * min(1.0, (1 - progress) / WARMDOWN)


def muon_momentum(progress):
    start, end = MUON_MOMENTUM
    return start + (end - start) * min(1.0, progress / MOMENTUM_RAMP)


def set_schedules(optimizer, progress):
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor(progress)
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(progress)
            group["decay"] = group["base_decay"] * (1 - progress)


# ---------------------------------------------------------------------------------------------------------------------
# Main

# peak dense bfloat16 FLOP/s by words of the device's name (NVIDIA data sheets); the first that fits
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12,
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_name):
    """Infinite where the device is not known, so that its utilisation prints as 0.00; never a guess."""
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b(?!.*\b(Laptop|Ti|D|NVL)\b)", device_name):
            return flops
    return math.inf


def choose_device():
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(kind)


def choose_dtype(device):
    """bfloat16 where it is fast: on GPUs that have it, elsewhere if a matrix product takes less time in it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32

    def seconds(dtype):
        size = 256 if device.type == "cpu" else 2048
        a = torch.ones(size, size, device=device, dtype=dtype)
        times = []
        for _ in range(10):
            prepare.synchronize(device)
            start = time.perf_counter()
            a @ a
            prepare.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else torch.float32


def warm_up(model, optimizer, inputs, targets, accumulation, scoring_rows):
    """
    Compile everything by running a few steps and a scoring pass of so many rows, then put the weights back, so that
    none of it is training; the optimizer is for this only. Returns the seconds of the last step.
    """
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(WARMUP_STEPS):
        start = time.monotonic()
        train_step(model, optimizer, [(inputs, targets)] * accumulation, progress=0.0)
        prepare.synchronize(inputs.device)
        seconds = time.monotonic() - start
    model.eval()
    model(inputs[:scoring_rows])
    model.train()
    model.load_state_dict(weights)
    return seconds


def train_step(model, optimizer, batches, progress):
    """One optimizer step on the mean loss of the batches; returns it as a tensor, so that nobody waits for it."""
    total = 0.0
    for inputs, targets in batches:
        loss = model(inputs, targets) / len(batches)
        loss.backward()
        total = total + loss.detach()
    set_schedules(optimizer, progress)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def check_loss(loss, step, progress):
    """Stop a run that has diverged: no score is better than a wrong one."""
    if not loss <= 100:  # also true of NaN
        rate = MATRIX_LR * lr_factor(progress)
        raise SystemExit(f"stopped at step {step}: the loss is {loss} (MATRIX_LR now {rate:.4g}); lower the rates")


def keep_freed_memory():
    """glibc hands freed blocks of megabytes back to the system; to get them anew costs 9,000 page faults a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "memory" in str(error) and "alloc" in str(error)


def main():
    global BACK_END, COMPILE
    sys.stdout.reconfigure(line_buffering=True)
    device = choose_device()
    settle(device)
    COMPILE = COMPILE and device.type != "mps"
    benchmark = load_benchmark()
    clock = TrainingClock(benchmark, device)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepare.HOME / "compiled"))  # the second run compiles nothing
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    dtype = choose_dtype(device)
    BACK_END = choose_attention(device, dtype)
    startup_seconds = time.monotonic() - prepare.PROCESS_START

    # Warm-up: compiles, finds out what fits in memory, and is no training
    T = benchmark.max_seq_len
    rows = max(1, min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // T))
    while True:
        torch.manual_seed(benchmark.seed)
        model = build_model(benchmark, device, dtype)
        num_params = sum(weight.numel() for weight in model.parameters())
        accumulation = max(1, round(TOTAL_BATCH_SIZE / (rows * T)))
        batch_tokens = accumulation * rows * T
        print(
            f"{prepare.device_name(device)}, {benchmark.id}, seed {benchmark.seed}: {num_params / 1e6:.1f}M parameters "
            f"in {str(dtype)[6:]}, attention {BACK_END.__name__}, {batch_tokens:,} tokens a step "
            f"({accumulation} x {rows} rows); warming up{', compiling what is new' if COMPILE else ''}"
        )
        tokens = torch.randint(benchmark.vocab_size, (rows, T + 1), device=device)
        try:
            if COMPILE:
                model.compile_parts()
            optimizer = build_optimizer(model, dtype, COMPILE)
            scoring_rows = prepare.scoring_rows(benchmark, rows)
            step_seconds = warm_up(model, optimizer, tokens[:, :-1], tokens[:, 1:], accumulation, scoring_rows)
            break
        except Exception as error:  # of any type: compilers and memory fail in many ways
            if out_of_memory(error) and rows > 1:
                print(f"DEVICE_BATCH_SIZE: {rows} rows do not fit in memory, trying {rows // 2}")
                rows //= 2
            elif COMPILE and not out_of_memory(error):
                print(f"COMPILE: torch.compile failed here, going on without ({prepare.first_line(error)})")
                COMPILE = False
            else:
                raise
        model = optimizer = None
        gc.collect()  # compiled modules are cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    warmup_seconds = time.monotonic() - prepare.PROCESS_START - startup_seconds

    # Training: until another step would end too late
    torch.manual_seed(benchmark.seed)  # whatever the warm-up drew
    optimizer = build_optimizer(model, dtype, COMPILE)
    loader = make_dataloader(benchmark, "train", rows, device)
    status = Progress(max(10, benchmark.time_budget / 50))
    peak = peak_flops(prepare.device_name(device))
    in_flight = 0 if device.type == "cpu" else 1  # steps that the device has yet to finish when one is queued
    step, previous = 0, None

    def mfu_percent():
        return 100 * model.flops_per_token() * step * batch_tokens / clock.elapsed / peak

    clock.start()
    while step == 0 or clock.elapsed + (1 + in_flight) * step_seconds < (1 + OVERTIME) * benchmark.time_budget:
        progress = clock.progress
        batches = []
        for _ in range(accumulation):
            inputs, targets, epoch = next(loader)
            batches.append((inputs, targets))
        loss = train_step(model, optimizer, batches, progress)
        step += 1
        if previous is not None:  # the loss of the step before, by now: the device is busy with this one
            value = previous.item()
            check_loss(value, step - 1, progress)
            step_seconds = clock.elapsed / (step - in_flight)
            speed = step * batch_tokens / clock.elapsed
            status(
                f"step {step:05d} | {progress:.1%} | loss {value:.4f} | lr x{lr_factor(progress):.2f} | "
                f"{speed:,.0f} tok/s | mfu {mfu_percent():.1f}% | epoch {epoch} | "
                f"{benchmark.time_budget - clock.elapsed:.0f} s left"
            )
        previous = loss
    clock.stop()
    loader.close()
    check_loss(previous.item(), step, clock.progress)
    status(f"step {step:05d} | 100% | loss {previous.item():.4f} | done", last=True)

    trained = time.monotonic()
    val_bpb = evaluate_bpb(model, benchmark, rows, clock)
    now = time.monotonic()
    # fmt: off
    summary = {
        "val_bpb":          f"{val_bpb:.6f}",
        "training_seconds": f"{clock.elapsed:.1f}",
        "total_seconds":    f"{now - prepare.PROCESS_START:.1f}",
        "peak_vram_mb":     f"{prepare.peak_memory_mb(device):.1f}",
        "mfu_percent":      f"{mfu_percent():.2f}",
        "total_tokens_M":   f"{step * batch_tokens / 1e6:.1f}",
        "num_steps":        f"{step}",
        "num_params_M":     f"{num_params / 1e6:.1f}",
        "depth":            f"{DEPTH}",
        "device":           prepare.device_name(device),
        "benchmark":        benchmark.id,
        "seed":             f"{benchmark.seed}",
        "overhead_seconds": f"startup {startup_seconds:.1f}, warm-up {warmup_seconds:.1f}, scoring {now - trained:.1f}",
    }
    # fmt: on
    print("---")
    for name, value in summary.items():
        print(f"{name + ':':<17} {value}")
    return summary


if __name__ == "__main__":
    main()

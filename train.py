"""
The model and its training: a GPT, Muon and AdamW, and a loop that lasts as long as the benchmark's time budget.
The agent rewrites this file as it likes; prepare.py times the training and scores the model.

    uv run train.py > run.log 2>&1         # on CUDA, MPS or CPU
    AUTORESEARCH_SEED=1 uv run train.py    # another seed, for the noise

Sections: Hyperparameters, Model, Optimizer, Schedules, Main.
"""

import math
from collections import Counter, defaultdict

import prepare  # before torch: total_seconds count from here
from prepare import Progress, TrainingClock, evaluate_bpb, load_benchmark, make_dataloader, runtime

import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------
# Hyperparameters. D is MODEL_DIM; what differs between machines is in the block at the end

GPU = torch.cuda.is_available()
COMPILE = True  # torch.compile

# Model
WINDOW_PATTERN = "SSSSL"  # per block, repeated: S sees SHORT_WINDOW, L all; the last block is always L
SHORT_WINDOW = 1 / 8  # of the row: earlier tokens that an S block sees
QUERY_GROUP = 1  # query heads per head of keys and values; more than 1 is grouped-query attention
MLP_RATIO = 4  # hidden width / D
GATE_CHANNELS = 32  # channels of x that drive the gates of the value embeddings
ROPE_BASE = 200_000
INIT_SCALE = 1.18  # of matrices: uniform within INIT_SCALE / sqrt(D) of zero
X0_INIT = 0.05  # of the embedding that each block adds
POINTER_BIAS = -9.0  # of the logit of the probability to copy
POINTER_SCALE = 1.5  # of the scores between normalized states

# Learning rates; those of embeddings, n-grams and head are for D = 768, and are multiplied by sqrt(768 / D)
MATRIX_LR = 0.04
EMBEDDING_LR = 0.9
NGRAM_LR = 0.25
UNEMBEDDING_LR = 0.005
SCALAR_LR = 0.005
X0_LR = 0.5

# Weight decay
MATRIX_DECAY = 0.2  # cautious; fades with progress
WTE_DECAY = 0.001
VALUE_DECAY = 0.003
UNEMBEDDING_DECAY = 0.01

# Optimizers and schedules
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
ADAM_EPS = 1e-10
MUON_BETA2 = 0.95
MUON_MOMENTUM = (0.85, 0.95)  # at the start, and from MOMENTUM_RAMP on
WARMDOWN_RATIO = 0.75  # last share of the run, over which the rates fall ...
FINAL_LR_FRAC = 0.05  # ... to this share of themselves; those of n-grams end higher
NGRAM_FADE = 0.4  # an n-gram row with n updates keeps at least 1 - NGRAM_FADE * n / (n + NGRAM_FADE_USES) ...
NGRAM_FADE_USES = 16  # ... of NGRAM_LR, however low the schedule goes

# Sizes, and what pays on one kind of machine only
if GPU:
    DEPTH = 9  # blocks
    MODEL_DIM = 640  # D
    HEAD_DIM = 128  # K
    NGRAM_ROWS = 2**22  # of the n-gram table, D / 2 floats each: 5.4 GB
    TOTAL_BATCH_SIZE = 2**18  # tokens per optimizer step
    DEVICE_BATCH_SIZE = 128  # rows per forward pass, halved until they fit
    MOMENTUM_RAMP = 0.16  # share of the run
    LOGIT_CAP = 15.0
    POINTER = False  # its T x T scores are untried on a GPU
else:
    DEPTH = 2
    MODEL_DIM = 128
    HEAD_DIM = 32
    NGRAM_ROWS = 2**17  # 34 MB
    TOTAL_BATCH_SIZE = 2**11
    DEVICE_BATCH_SIZE = 16
    MOMENTUM_RAMP = 0.3
    LOGIT_CAP = None  # tanh costs more than it gains
    POINTER = True  # copy some tokens from the row

# --------------------------------------
# Model. Shapes: B rows, T tokens, D = MODEL_DIM, K = HEAD_DIM, H = D / K heads, G of keys and values, V vocabulary


def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Without bias. Input and weight, which is float32, are cast to the precision that build_model() sets."""

    dtype = torch.float32

    def __init__(self, inputs, outputs, scale=INIT_SCALE):
        super().__init__(inputs, outputs, bias=False)
        bound = scale * MODEL_DIM**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return F.linear(x.to(self.dtype), self.weight.to(self.dtype))


class GPT(nn.Module):
    """Activations have the precision of `setup`; parameters are float32, cast where they are used."""

    def __init__(self, vocab_size, max_seq_len, setup):
        super().__init__()
        self.setup = setup
        self.windows = window_sizes(max_seq_len)
        self.embed = Embed(vocab_size, setup.dtype)
        # Sparse: only rows that were used have gradients; clip_grad_norm_ fails on these. Untried on MPS
        self.ngrams = nn.Embedding(NGRAM_ROWS, MODEL_DIM // 2, sparse=not torch.backends.mps.is_available())
        nn.init.zeros_(self.ngrams.weight)
        self.blocks = nn.ModuleList(
            Block(layer, window, setup.attention, vocab_size) for layer, window in enumerate(self.windows)
        )
        self.head = Head(vocab_size)

        # Weights of the stream and of the embedding x0 at the start of each block
        self.resid_lambdas = nn.Parameter(torch.ones(DEPTH))
        self.x0_lambdas = nn.Parameter(torch.full((DEPTH,), X0_INIT))

        # Rotary embeddings (Su et al. 2021, arXiv 2104.09864): an angle per position and pair of channels
        frequencies = ROPE_BASE ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1]
        angles = torch.outer(torch.arange(max_seq_len), frequencies)
        self.register_buffer("cos", angles.cos().to(setup.dtype)[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin().to(setup.dtype)[None, :, None], persistent=False)

    def forward(self, inputs, targets=None):
        """Logits, float32 [B, T, V], of token ids [B, T]; with `targets` [B, T] the mean loss in nats instead."""
        cos_sin = self.cos[:, : inputs.size(1)], self.sin[:, : inputs.size(1)]
        x = self.embed(inputs, self.ngrams(hash_ngrams(inputs)))
        x0 = x.view_as(x)  # a view, so that block 1 has the same graph as the others
        for block, r, z in zip(self.blocks, self.resid_lambdas, self.x0_lambdas, strict=True):
            x = block(x, x0, r, z, inputs, cos_sin)
        return self.head(x, inputs, targets)

    def compile_parts(self):
        """Part by part: blocks of one shape share their code, which takes a fraction of the time."""
        # Modules, not bound methods: a copied bound method still uses the original's weights
        if self.setup.compiled:
            torch._dynamo.config.recompile_limit = 64  # Block.forward is compiled anew for each kind of block
            for part in (self.embed, *self.blocks, self.head):
                part.compile(dynamic=False)

    def __setstate__(self, state):
        """A copy (copy.deepcopy, AveragedModel) is compiled as its original is."""
        super().__setstate__(state)
        self.compile_parts()

    def flops_per_token(self, T):
        """Forward and backward in rows of T: 6 per weight of a matrix, counted once, and 12 D per token seen."""
        weights = 0
        for module in self.modules():
            for weight in module.parameters(recurse=False):
                if isinstance(module, nn.Linear) or weight.ndim == 3:
                    weights += weight.numel()
        seen = sum(min(window, T) for window in self.windows)
        if POINTER:
            seen += T / 2  # q @ k alone: half the FLOPs of attention
        return 6 * weights + 12 * MODEL_DIM * seen


def window_sizes(T):
    """How many earlier tokens each block sees: WINDOW_PATTERN, repeated, and L at the end."""
    sizes = {"S": max(1, int(T * SHORT_WINDOW)), "L": T}
    pattern = (WINDOW_PATTERN * DEPTH)[: DEPTH - 1] + "L"
    for letter in pattern:
        if letter not in sizes:
            raise SystemExit(f"WINDOW_PATTERN: there is no window {letter}, only {' and '.join(sizes)}")
    return [sizes[letter] for letter in pattern]


class Embed(nn.Module):
    """Adds rows of the n-gram table to the embeddings: pairs to one half of the channels, triples to the other."""

    def __init__(self, vocab_size, dtype):
        super().__init__()
        self.dtype = dtype
        self.wte = nn.Embedding(vocab_size, MODEL_DIM)

    def forward(self, inputs, ngrams):
        return norm(self.wte(inputs) + ngrams.flatten(2)).to(self.dtype)


class Block(nn.Module):
    """Attention and an MLP. The input of each is x plus the previous token's x times a gate per channel (smear)."""

    def __init__(self, layer, window, attention, vocab_size):
        super().__init__()
        self.attention = Attention(layer, window, attention, vocab_size)
        self.mlp = MLP()
        self.smear_gates = nn.Parameter(torch.zeros(2, MODEL_DIM))

    def forward(self, x, x0, r, z, inputs, cos_sin):
        x = r * x + z * x0
        x = x + self.attention(smear(norm(x), self.smear_gates[0]), inputs, cos_sin)
        return x + self.mlp(smear(norm(x), self.smear_gates[1]))


class Attention(nn.Module):
    """Half the heads (3 of 5) use the previous token's key, so that a match points at the token that followed it."""

    def __init__(self, layer, window, attention, vocab_size):
        super().__init__()
        width = MODEL_DIM // QUERY_GROUP  # of keys and of values
        assert width % HEAD_DIM == 0 and width > HEAD_DIM, "HEAD_DIM: must fit twice into MODEL_DIM / QUERY_GROUP"
        self.window = window
        self.attention = attention
        self.query = Linear(MODEL_DIM, MODEL_DIM)
        self.key = Linear(MODEL_DIM, width)
        self.value = Linear(MODEL_DIM, width)
        self.out = Linear(MODEL_DIM, MODEL_DIM, scale=0)
        self.value_embeds = None
        if layer % 2 == (DEPTH - 1) % 2:  # in every other block, the last one among them
            self.value_embeds = nn.Embedding(vocab_size, width)
            bound = INIT_SCALE * MODEL_DIM**-0.5
            nn.init.uniform_(self.value_embeds.weight, -bound, bound)
            self.ve_gate = Linear(GATE_CHANNELS, width // HEAD_DIM, scale=0)

    def forward(self, x, inputs, cos_sin):
        heads = (*x.shape[:2], -1, HEAD_DIM)
        q = norm(self.query(x).view(heads))
        k = norm(self.key(x).view(heads))
        v = self.value(x).view(heads)

        # Value embeddings (Zhou et al. 2024, arXiv 2410.17897) of the tokens, times a gate per head, 1 at first
        if self.value_embeds is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * self.value_embeds(inputs).to(v.dtype).view(heads)

        before, same = k.chunk(2, dim=2)
        k = torch.cat([shift(before), same], dim=2)
        y = self.attention(apply_rotary_emb(q, *cos_sin), apply_rotary_emb(k, *cos_sin), v, self.window)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    """Squared ReLU (So et al. 2021, arXiv 2109.08668)."""

    def __init__(self):
        super().__init__()
        self.up = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM)
        self.down = Linear(MLP_RATIO * MODEL_DIM, MODEL_DIM, scale=0)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Head(nn.Module):
    """Logits, or the mean loss in nats where there are targets, of the last state x [B, T, D]."""

    def __init__(self, vocab_size):
        super().__init__()
        # To tie it to the embeddings: head.lm_head.weight = embed.wte.weight in GPT, and logits / MODEL_DIM below
        self.lm_head = Linear(MODEL_DIM, vocab_size)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        self.pointer = Pointer() if POINTER else None

    def forward(self, x, inputs, targets=None):
        x = norm(x)
        logits = self.lm_head(x).float()
        if LOGIT_CAP:
            logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        if self.pointer is not None:
            weights, copy_logit = self.pointer(x)

        # Prediction: logits, or log-probabilities, of every token
        if targets is None:
            if self.pointer is None:
                return logits
            copied = torch.zeros_like(logits).scatter_add(-1, inputs[:, None].expand_as(weights), weights)
            return log_mixture(logits.softmax(-1), copied, copy_logit)

        # Training: of the target alone. A masked sum, because the backward of a gather is a scatter, which is slow
        is_target = torch.arange(logits.size(-1), device=x.device) == targets[..., None]
        log_likelihoods = logits.where(is_target, 0).sum(-1) - logits.logsumexp(-1)
        if self.pointer is not None:
            copied = (weights * (inputs[:, None] == targets[..., None])).sum(-1)
            log_likelihoods = log_mixture(log_likelihoods.exp(), copied, copy_logit[..., 0])
        return -log_likelihoods.mean()  # other objectives go here


class Pointer(nn.Module):
    """
    Copies a token that followed a similar state earlier in the row (cf. Merity et al. 2016, arXiv 1609.07843). Returns,
    for x [B, T, D]: weights over the row's tokens, [B, T, T], and the logit of the probability to copy, [B, T, 1].
    """

    def __init__(self):
        super().__init__()
        self.state = Linear(MODEL_DIM, MODEL_DIM)
        self.gate = Linear(MODEL_DIM, 1, scale=0)

    def forward(self, x):
        # scores[:, i, j]: state i with the state before token j. (torch 2.11 makes q @ shift(q).mT NaN on AVX-512)
        q = norm(self.state(x))
        scores = POINTER_SCALE * F.pad(q @ q.mT, (1, -1)).float() / math.sqrt(MODEL_DIM)
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
        # The better the match, the likelier a copy
        match = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - match).exp()
        return weights, self.gate(x).float() + match + POINTER_BIAS


def log_mixture(generated, copied, copy_logit):
    """log((1 - g) * generated + g * copied), with g = sigmoid(copy_logit)."""
    mixture = torch.sigmoid(-copy_logit) * generated + torch.sigmoid(copy_logit) * copied
    return mixture.clamp_min(1e-37).log()


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


def apply_rotary_emb(x, cos, sin):
    """Turn channels i and i + K / 2 of x [B, T, H, K] by the angle of their position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def banded(q, k, v, window):
    """
    Attention: a position sees itself and `window` earlier ones. q [B, T, H, K]; k, v [B, T, G, K], each for H / G heads
    of q. set_up() takes FlashAttention on CUDA if it agrees within 2%; setup._replace(attention=banded) prevents that.
    """
    if k.size(2) < q.size(2):
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))

    # Four bands of queries, each with the keys that any of them sees
    T = q.size(1)
    length = math.ceil(T / 4)
    positions = torch.arange(T, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bands = []
    for start in range(0, T, length):
        first = max(0, start - window)
        end = min(T, start + length)
        distance = positions[start:end, None] - positions[first:end]
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT).float() / math.sqrt(q.size(-1))
        scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
        bands.append(scores.softmax(dim=-1).to(v.dtype) @ v[:, :, first:end])
    return torch.cat(bands, dim=2).transpose(1, 2)


# --------------------------------------
# Optimizer: Muon for matrices, row-wise RMSprop for the table of n-grams, torch's AdamW for the rest

# Polar Express (Amsel et al. 2025, arXiv 2505.16932): coefficients of five steps, for a norm scaled by 1.02
POLAR_EXPRESS = [(8.15655, -22.4833, 15.8788), (4.04293, -2.80892, 0.500018), (3.89167, -2.77248, 0.506065)]
POLAR_EXPRESS += [(3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.423236)]


def orthogonalize(X, dtype):
    """The nearest matrices with all singular values 1 (about), in `dtype`: X [N, rows, cols] with rows <= cols."""
    X = (X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        # X becomes a X + (b A + c A A) X
        A = X @ X.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return X


def muon_update(weights, grads, momenta, second_moments, lr, momentum, beta2, decay, dtype):
    """A step of Muon, in place. Weights and grads: lists of [n, rows, cols]; momenta [N, rows, cols]; rows <= cols."""
    # Nesterov momentum
    grads = torch.cat(grads)
    momenta.lerp_(grads, 1 - momentum)
    update = grads.lerp(momenta, momentum)

    # Orthogonalize (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
    update = orthogonalize(update, dtype).float()

    # Variance reduction (NorMuon, Li et al. 2025, arXiv 2510.05491): columns of equal size, and the norm as before
    squares = update.square().mean(dim=-2, keepdim=True)
    second_moments.lerp_(squares, 1 - beta2)
    factor = second_moments.clamp_min(1e-10).rsqrt()
    scaled_squares = (squares * factor.square()).sum(dim=-1, keepdim=True)
    ratio = squares.sum(dim=-1, keepdim=True) / scaled_squares.clamp_min(1e-10)
    update = update * factor * ratio.sqrt()

    # Cautious weight decay (Chen et al. 2025, arXiv 2510.12402): only where update and weight agree in sign
    old = torch.cat(weights)
    new = old - lr * (update + decay * old.where(update * old > 0, 0))
    for weight, matrices in zip(weights, new.split([len(weight) for weight in weights]), strict=True):
        weight.copy_(matrices)


def as_stack(weight):
    """A view [N, outputs, inputs] of the weight of a Linear, or of those of N experts, [N, inputs, outputs]."""
    return weight.mT if weight.ndim == 3 else weight[None]


class Muon(torch.optim.Optimizer):
    """Each group has matrices of one shape, which step together and are multiplied in the precision of `setup`."""

    def __init__(self, groups, setup):
        super().__init__(groups, dict(momentum=0.0, weight_decay=0.0))  # until set_schedules() sets them
        self.dtype = setup.dtype
        self.update = torch.compile(muon_update, dynamic=False, disable=not setup.compiled)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            state = self.state[group["params"][0]]
            weights = [as_stack(weight) for weight in group["params"]]
            grads = [as_stack(torch.zeros_like(x) if x.grad is None else x.grad) for x in group["params"]]
            if weights[0].size(1) >= weights[0].size(2):  # square ones, too: their second moments are per output
                weights = [weight.mT for weight in weights]
                grads = [grad.mT for grad in grads]
            if not state:
                state["momenta"] = torch.zeros_like(torch.cat(weights))
                state["second_moments"] = torch.zeros_like(state["momenta"][:, :1])

            # Numbers as tensors, so that a new one compiles nothing
            numbers = map(torch.tensor, (group["lr"], group["momentum"], MUON_BETA2, group["weight_decay"]))
            self.update(weights, grads, state["momenta"], state["second_moments"], *numbers, dtype=self.dtype)


class RowwiseRMSprop(torch.optim.Optimizer):
    """RMSprop (Hinton 2012) on rows that have a gradient, one mean square per row. NGRAM_FADE sets the final rate."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["squares"] = weight.new_zeros(len(weight), 1)
                    state["updates"] = weight.new_zeros(len(weight), 1)
                grad = weight.grad.coalesce()
                rows, values = grad.indices()[0], grad.values()
                squares = values.square().mean(dim=1, keepdim=True)
                mean = state["squares"][rows].lerp(squares, 1 - ADAM_BETAS[1])
                state["squares"][rows] = mean
                updates = state["updates"][rows] + 1
                state["updates"][rows] = updates
                least = group["initial_lr"] * (1 - NGRAM_FADE * updates / (updates + NGRAM_FADE_USES))
                values.mul_(least.clamp_min(group["lr"]) / (mean.sqrt() + ADAM_EPS))  # in the memory of grad
                weight.sub_(grad)


def kind_of(weight, module, model):
    """Which group a parameter of a module belongs to: by what it is, never by its name."""
    if module is model.embed.wte:
        return "wte"
    if module is model.head.lm_head:
        return "lm_head"
    if isinstance(module, nn.Embedding):
        return "sparse" if module.sparse else "embedding"

    # Weights of a Linear, and those of experts [N, inputs, outputs]; not single rows or columns, nor small 3-D weights
    if isinstance(module, nn.Linear) and weight.ndim == 2 and min(weight.shape) > 1:
        return "matrix"
    if weight.ndim == 3 and min(weight.shape[1:]) >= HEAD_DIM and not isinstance(module, nn.Conv1d):
        return "matrix"
    return "x0" if weight is model.x0_lambdas else "scalar"


def build_optimizers(model):
    """The optimizers, a list: each weight in one group, else SystemExit; a tied one where it is registered first."""
    members, matrices = defaultdict(list), defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kind = kind_of(weight, model.get_submodule(name.rpartition(".")[0]), model)
            members[kind].append(weight)
    for weight in members["matrix"]:
        matrices[as_stack(weight).shape].append(weight)

    # A matrix that is taller than wide takes larger steps
    muon = [
        dict(params=same, lr=MATRIX_LR * max(1, rows / cols) ** 0.5, initial_decay=MATRIX_DECAY)
        for (_, rows, cols), same in matrices.items()
    ]
    scale = (MODEL_DIM / 768) ** -0.5
    adamw = [
        dict(params=members["wte"], lr=EMBEDDING_LR * scale, weight_decay=WTE_DECAY),
        dict(params=members["embedding"], lr=EMBEDDING_LR * scale, weight_decay=VALUE_DECAY),
        dict(params=members["lm_head"], lr=UNEMBEDDING_LR * scale, weight_decay=UNEMBEDDING_DECAY),
        dict(params=members["scalar"], lr=SCALAR_LR, weight_decay=0.0),
        dict(params=members["x0"], lr=X0_LR, weight_decay=0.0, betas=X0_BETAS),
    ]
    tables = [dict(params=members["sparse"], lr=NGRAM_LR * scale)]
    uses = Counter(weight for group in muon + adamw + tables for weight in group["params"])
    for name, weight in model.named_parameters():
        if weight.requires_grad and uses[weight] != 1:
            raise SystemExit(f"{name} is in {uses[weight]} groups of build_optimizers(), it must be in one")
    optimizers = [torch.optim.AdamW(adamw, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True), RowwiseRMSprop(tables, {})]
    if muon:
        optimizers.insert(0, Muon(muon, model.setup))
    return optimizers


# --------------------------------------
# Schedules: functions of progress, the used share of the budget, so that they fit any machine. A schedule that changes
# the model must set a tensor (an argument or a buffer): a Python number would recompile its part at each change


def lr_factor(progress):
    """Constant, then linear down to FINAL_LR_FRAC. No warm-up: every one that was tried hurt."""
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * min(1.0, (1 - progress) / max(WARMDOWN_RATIO, 1e-9))


def set_schedules(optimizers, progress):
    start, end = MUON_MOMENTUM
    momentum = start + (end - start) * min(1.0, progress / max(MOMENTUM_RAMP, 1e-9))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor(progress)
            if "momentum" in group:
                group["momentum"] = momentum
            if "initial_decay" in group:
                group["weight_decay"] = group["initial_decay"] * (1 - progress)


# --------------------------------------
# Main: build a model, try which batch fits, train, score


def build_model(benchmark, setup):
    """A fresh model of a benchmark's vocabulary, row length and seed."""
    runtime.free_memory()  # of an earlier model
    torch.manual_seed(benchmark.seed)
    with torch.device(setup.device):
        model = GPT(benchmark.vocab_size, benchmark.max_seq_len, setup)

    # Matrices are multiplied in the precision of `setup` even if a float32 factor has made the stream float32
    for module in model.modules():
        if isinstance(module, Linear):
            module.dtype = setup.dtype
    model.compile_parts()
    return model


def rehearse(benchmark, setup, shapes, accumulation):
    """Compile and fill memory with a throwaway model: two steps per shape (rows, T), then score in the first shape."""
    model = build_model(benchmark, setup)
    optimizers = build_optimizers(model)
    for shape in shapes:
        inputs, targets = torch.randint(benchmark.vocab_size, (2, *shape), device=setup.device)
        for _ in range(2):
            train_step(model, optimizers, [(inputs, targets)] * accumulation, progress=0.0)

    # The probe holds the logits of two passes
    model.eval()
    rows = prepare.scoring_rows(benchmark, shapes[0][0])
    inputs = torch.randint(benchmark.vocab_size, (rows, benchmark.max_seq_len), device=setup.device)
    _held = [model(inputs).detach() for _ in range(2)]
    runtime.report_trial(model)


def find_batch(benchmark, setup):
    """Rows per forward pass that fit in memory, and forward passes per step."""
    T = benchmark.max_seq_len
    rows = max(1, min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // T))
    while True:
        accumulation = max(1, round(TOTAL_BATCH_SIZE / (rows * T)))
        try:
            # With all shapes and windows that training will use: others would compile while the clock runs
            rehearse(benchmark, setup, [(rows, T)], accumulation)
            return rows, accumulation
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not runtime.is_out_of_memory(error):
                raise
        print(f"DEVICE_BATCH_SIZE: {rows} rows do not fit in memory, trying {rows // 2}; set it to what fits")
        rows //= 2


def train_step(model, optimizers, batches, progress):
    """One step on the batches. Returns their mean loss, a tensor: reading it here would wait for the device."""
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


def main():
    device = runtime.choose_device()
    benchmark = load_benchmark()
    clock = TrainingClock(benchmark, device)
    setup = runtime.set_up(device, banded, HEAD_DIM, QUERY_GROUP, COMPILE)
    print(f"commit {str(clock.origin['commit'])[:7]}, seed {benchmark.seed}, {benchmark.id}")
    print(f"{prepare.device_name(device)}, {setup.dtype}; compiling what is new, a minute the first time")
    rows, accumulation = find_batch(benchmark, setup)
    model = build_model(benchmark, setup)
    optimizers = build_optimizers(model)
    loader = make_dataloader(benchmark, "train", rows, device)  # of (inputs, targets, epoch)
    status = Progress(max(10, benchmark.time_budget / 50))
    step, loss, loss_before, tokens = 0, None, None, Counter()  # tokens by the length of their rows

    clock.start()
    while clock.elapsed * (1 + 1 / max(1, step)) < benchmark.time_budget:  # one more step fits
        progress = clock.progress
        batches = [next(loader) for _ in range(accumulation)]
        previous, loss = loss, train_step(model, optimizers, batches, progress)
        step += 1
        for inputs, *_ in batches:
            tokens[inputs.size(1)] += inputs.numel()

        # The loss of the step before: the device is busy with this one
        if previous is not None:
            loss_before = previous.item()
            status(
                f"step {step:05d} | {progress:.1%} | loss {loss_before:.4f} | epoch {batches[0][2]} | "
                f"{tokens.total() / clock.elapsed:,.0f} tok/s | {benchmark.time_budget - clock.elapsed:.0f} s left"
            )
            if not loss_before <= 100:  # NaN, too
                raise SystemExit(f"stopped at step {step - 1}: loss {loss_before}; lower the learning rates")
        clock.tick(loss_before)
    clock.stop()
    status(f"step {step:05d} | 100% | loss {loss.item():.4f} | done", last=True)

    val_bpb = evaluate_bpb(model, benchmark, rows, clock)
    flops = sum(model.flops_per_token(T) * count for T, count in tokens.items())
    parameters = sum(map(torch.numel, model.parameters()))
    batch = f"{accumulation * rows * benchmark.max_seq_len:,} tokens in {accumulation} x {rows} rows"
    return runtime.summarize(clock, setup, val_bpb, step, tokens.total(), flops, parameters, DEPTH, batch)


if __name__ == "__main__":
    main()

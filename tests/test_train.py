"""
Checks layers and optimizers of train.py against plain references (naive attention, torch's AdamW, one matrix at a
time), and that runs fall back, stop and report as harness/runtime.py says.
"""

import functools
import http.server
import itertools
import json
import math
import re
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, run, write_files

import prepare
import train
from harness import machine, pace, runtime
from harness.journal import read_journal

SIZES = dict(DEPTH=5, MODEL_DIM=64, HEAD_DIM=32, GATE_CHANNELS=16, NGRAM_ROWS=2**12, TOTAL_BATCH_SIZE=2048)
CPU_CHOICES = dict(COMPILE=False, POINTER=True, LOGIT_CAP=None)
GPU_CHOICES = dict(COMPILE=False, POINTER=False, LOGIT_CAP=15.0)


def set_constants(monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    set_constants(monkeypatch, **SIZES, **CPU_CHOICES)
    torch.manual_seed(0)


@pytest.fixture(params=[CPU_CHOICES, GPU_CHOICES], ids=["CPU", "GPU"])
def choices(request, sizes, monkeypatch):
    set_constants(monkeypatch, **request.param)


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile believes that the compiler knows those of this CPU, and does not try each, which takes 30 s."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.VecISA.check_build", lambda isa, code: True)


def model_and_batch(dtype=torch.float32, vocab_size=512, T=64):
    """A model, and inputs and targets of three rows: the same ones each time."""
    benchmark = types.SimpleNamespace(vocab_size=vocab_size, max_seq_len=T, seed=1)
    model = train.build_model(benchmark, runtime.Setup(CPU, dtype, train.banded))
    ids = torch.randint(vocab_size, (3, T + 1))
    return model, ids[:, :-1], ids[:, 1:]


def awaken(model):
    """Give the layers that start at zero something to say."""
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)


def gradients(loss, model):
    found = torch.autograd.grad(loss, model.parameters())
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]


# --------------------------------------
# Model


def test_import_does_nothing_but_settle_the_constants():
    """Those of a GPU, here, as they stand."""
    code = """
import torch
torch.cuda.is_available = lambda: True
import sys, train
assert not torch.cuda.is_initialized()
assert not {"pyarrow", "requests", "tiktoken", "rustbpe", "kernels", "torch._dynamo"} & set(sys.modules)

with torch.device("meta"):
    model = train.GPT(8192, 2048, train.runtime.Setup("meta", torch.bfloat16, train.banded))
assert model.windows == [256, 256, 256, 256, 2048, 256, 256, 256, 2048]
assert [block.attention.value_embeds is not None for block in model.blocks] == [True, False] * 4 + [True]
dense = sum(weight.numel() for weight in model.parameters()) - model.ngrams.weight.numel()
assert round(dense / 1e6) == 81 and model.ngrams.weight.numel() == 2**22 * 320
matrices = 9 * 12 * 640 * 640 + 8192 * 640 + 5 * 32 * 5
assert model.flops_per_token(2048) == 6 * matrices + 12 * 640 * (7 * 256 + 2 * 2048)
assert model.flops_per_token(1024) == 6 * matrices + 12 * 640 * (7 * 256 + 2 * 1024)
"""
    result = run("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def naive_attention(q, k, v, window):
    """Every score, one mask."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.size(-1))
    distance = torch.arange(q.size(1))[:, None] - torch.arange(q.size(1))
    scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)


def rotated(x):
    """Rotary embeddings of x [B, T, H, K]: a pair of channels is a complex number, which its position turns."""
    half = x.size(-1) // 2
    angles = torch.outer(torch.arange(x.size(1)), train.ROPE_BASE ** -(torch.arange(half) / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def before(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def naive_likelihoods(model, inputs):
    """The model in plain lines: of each token of the vocabulary, [B, T, V]."""
    heads = (*inputs.shape, -1, train.HEAD_DIM)
    x0 = train.norm(model.embed.wte(inputs) + model.ngrams(train.hash_ngrams(inputs)).flatten(2))
    x = x0
    for block, window, r, z in zip(model.blocks, model.windows, model.resid_lambdas, model.x0_lambdas):
        x = r * x + z * x0

        # Half of the heads have keys of the token before; some values an embedding of their token, gated per head
        attention, h = block.attention, train.norm(x)
        h = h + block.smear_gates[0] * before(h)
        q, k, v = (layer(h).view(heads) for layer in (attention.query, attention.key, attention.value))
        k = torch.cat([before(k)[:, :, : k.size(2) // 2], k[:, :, k.size(2) // 2 :]], dim=2)
        if attention.value_embeds is not None:
            gates = 2 * torch.sigmoid(attention.ve_gate(h[..., : train.GATE_CHANNELS]))
            v = v + gates[..., None] * attention.value_embeds(inputs).view(heads)
        y = naive_attention(rotated(train.norm(q)), rotated(train.norm(k)), v, window)
        x = x + attention.out(y.flatten(2))

        h = train.norm(x)
        x = x + block.mlp.down(block.mlp.up(h + block.smear_gates[1] * before(h)).relu() ** 2)

    x, pointer, cap = train.norm(x), model.head.pointer, train.LOGIT_CAP or 1e6
    drawn = (cap * torch.tanh(model.head.lm_head(x) / cap)).softmax(dim=-1)
    if pointer is None:
        return drawn

    # Copied from the row, the likelier, the more the state before a token has in common with the present one
    states = train.norm(pointer.state(x))
    scores = train.POINTER_SCALE * states @ before(states).mT / math.sqrt(train.MODEL_DIM)
    scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
    share = torch.sigmoid(pointer.gate(x) + scores.logsumexp(dim=-1, keepdim=True) + train.POINTER_BIAS)
    copied = scores.softmax(dim=-1) @ F.one_hot(inputs, drawn.size(-1)).float()
    return (1 - share) * drawn + share * copied


def test_logits_and_loss_are_those_of_plain_lines(choices, monkeypatch):
    set_constants(monkeypatch, POINTER_BIAS=-3.0)
    model, inputs, targets = model_and_batch(vocab_size=20)
    awaken(model)
    model.head.lm_head.weight.data *= 1000  # so that tokens differ
    logits = model(inputs)
    assert logits.shape == (3, 64, 20) and logits.dtype == torch.float32
    assert torch.allclose(logits.softmax(dim=-1), naive_likelihoods(model, inputs), atol=1e-5)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(inputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(loss, model), gradients(expected, model)):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.story
def test_gradients_of_the_compiled_head_are_right_in_bfloat16(monkeypatch, quick_compiler):
    """For AVX-512, torch 2.11 compiled a shift of the pointer's keys into NaN."""
    set_constants(monkeypatch, DEPTH=1, MODEL_DIM=128)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model, inputs, targets = model_and_batch(dtype, T=256)
        awaken(model)
        if dtype == torch.bfloat16:
            model.head.compile(dynamic=False)
        torch.manual_seed(0)
        found.append(gradients(model(inputs, targets), model))
    for ours, exact in zip(*found):
        assert (ours - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("n", [2, 3])
def test_ngrams_are_of_a_token_and_those_before(n):
    ids = torch.randint(4096, (4, 50))
    rows = train.hash_ngrams(ids)[..., n - 2]
    assert rows.min() >= 0 and rows.max() < train.NGRAM_ROWS and len(rows.unique()) > 150
    assert torch.equal(train.hash_ngrams(ids[:, 9:])[:, n:, n - 2], rows[:, 9 + n :])  # wherever they stand
    for back in range(4):
        other = ids.clone()
        other[:, 20 - back] += 1
        changed = train.hash_ngrams(other)[:, 20, n - 2] != rows[:, 20]
        assert (changed == (back < n)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.012)])  # scores are float32
@pytest.mark.parametrize("window", [1, 5, 32, 63, 100])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (6, 2)])  # heads of queries; of keys and values
def test_banded_windows(window, dtype, tolerance, H, G):
    parts = [torch.randn(2, 64, heads, 16, dtype=torch.float64) for heads in (H, G, G)]
    results = []
    for attention, cast in ((train.banded, dtype), (naive_attention, torch.float64)):
        q, k, v = (part.to(cast).requires_grad_() for part in parts)
        y = attention(q, k, v, window)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for ours, naive in zip(*results):
        assert (ours - naive).norm() < tolerance * naive.norm()


# --------------------------------------
# Attention of a GPU

KERNEL = """import train
def flash_attn_func(q, k, v, causal, window_size):
    assert causal and window_size[1] == 0
    return train.banded(q, k, v, window_size[0]), None
"""
METADATA = """{"id": "flash_attn3_universal", "name": "flash-attn3", "version": 1, "license": "bsd-3-clause",
    "python-depends": [], "backend": {"type": "cuda"}}"""
HOPPER = """
import torch
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device=None: (9, 0)
import prepare, train, types
from harness import machine, runtime
compare = runtime.compare
runtime.compare = lambda f, setup, *rest: compare(f, setup._replace(device=torch.device("cpu")), *rest)
"""
FETCH = f"{HOPPER}prepare.fetch_flash3()"
CHOOSE = f"""{HOPPER}
for revision in ("v1", "v2"):
    machine.FLASH3["revision"] = revision
    setup = runtime.Setup(types.SimpleNamespace(type="cuda"), torch.bfloat16, train.banded)
    print(runtime.choose_attention(setup, 32, 2).__name__)
"""
COMMIT = "0123456789" * 4


class KernelMirror(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as huggingface.co does: each file has a tag, and all are of one commit."""

    def end_headers(self):
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", Path(self.path).name)
        super().end_headers()


def kernel_files():
    """Of a mirror with one kernel, which has one build for every back end: banded() under another name."""
    repository, build = f"kernels/{machine.FLASH3['repo_id']}", "build/torch-universal"
    files = {f"{build}/__init__.py": KERNEL, f"{build}/metadata.json": METADATA}
    listed = [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
    answers = {
        "organizations/kernels-community/overview": {"trustedKernelPublisher": True},
        f"{repository}/tree/v1/build": [{"type": "directory", "path": build, "oid": "0"}],
        f"{repository}/revision/v1": {"id": machine.FLASH3["repo_id"], "sha": COMMIT},
        f"{repository}/tree/{COMMIT}": listed,
    }
    contents = {f"api/{name}": json.dumps(answer) for name, answer in answers.items()}
    for version in ("v1", COMMIT):
        contents |= {f"{repository}/resolve/{version}/{name}": content for name, content in files.items()}
    return contents


def test_the_kernel_is_fetched_once_and_then_taken_without_network(tmp_path):
    """By the real `kernels`: online, from the cache, and where there is none."""
    handler = functools.partial(KernelMirror, directory=write_files(tmp_path / "mirror", kernel_files()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        threading.Thread(target=mirror.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{mirror.server_port}", "HF_HOME": str(tmp_path / "cache")}
        fetched = run("-c", FETCH, **environment)
        mirror.shutdown()
    assert (fetched.returncode, fetched.stdout) == (0, ""), fetched.stdout + fetched.stderr
    taken = run("-c", CHOOSE, **environment)
    found = "flash3\nattention: flash3 not used (FileNotFoundError: "  # v1, and no v2
    assert taken.stdout.startswith(found), taken.stdout + taken.stderr
    missed = run("-c", FETCH, **environment | {"HF_HOME": str(tmp_path / "empty")})
    assert missed.stdout.startswith("no FlashAttention-3, train.py will take torch's own attention (")


def kernel(q, k, v, causal, window_size, factor=1):
    return train.banded(q, k, v, window_size[0]) * factor


KERNELS = {  # what the hub has, the card, and lines that say why it is not used
    "right": (kernel, (9, 0), 0),
    "wrong": (functools.partial(kernel, factor=1.1), (9, 0), 1),
    "without windows": (lambda q, k, v, causal, window_size: kernel(q, k, v, causal, [q.size(1)]), (9, 0), 1),
    "for no such card": (kernel, (8, 9), 0),
    "built for others": (lambda *arguments, **options: 1 / 0, (9, 0), 1),
}


@pytest.mark.parametrize("group", [1, 2])  # heads of queries for one of keys
@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_is_used_where_it_is_right(monkeypatch, capsys, kind, group):
    found, capability, lines = KERNELS[kind]
    compare, setup = runtime.compare, runtime.Setup(types.SimpleNamespace(type="cuda"), torch.bfloat16, train.banded)
    monkeypatch.setattr(runtime, "load_flash3", lambda: types.SimpleNamespace(flash_attn_func=found))
    monkeypatch.setattr(runtime, "compare", lambda f, setup, *rest: compare(f, setup._replace(device=CPU), *rest))
    monkeypatch.setattr(runtime, "varlen", functools.partial(train.banded))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # it is set, and put back
    chosen = runtime.choose_attention(setup, 32, group)
    assert (chosen is not runtime.varlen) == (kind == "right")
    assert capsys.readouterr().out.count("attention: flash3 not used (") == lines


# --------------------------------------
# Optimizers and schedules


def test_rows_that_were_used_are_updated():
    """Against a loop in which every row that a batch uses is a vector with one mean square."""
    table = torch.nn.Embedding(12, 5, sparse=True)
    expected, squares, updates = table.weight.detach().clone(), torch.zeros(12), torch.zeros(12)
    optimizer = train.RowwiseRMSprop([dict(params=[table.weight], lr=0.1)], {})
    factor = torch.randn(3, 9, 5)
    for step in range(30):
        train.set_schedules([optimizer], step / 30)
        ids = torch.randint([3, 8, 8][step % 3], (3, 9))  # never 8 to 11, and 3 to 7 are rarer
        table.zero_grad(set_to_none=True)
        (table(ids) * factor).sum().backward()
        gradient = table.weight.grad.to_dense()
        optimizer.step()
        for row in ids.unique():
            squares[row] = 0.95 * squares[row] + 0.05 * gradient[row].square().mean()
            updates[row] += 1
            rate = 0.1 * max(train.lr_factor(step / 30), 1 - 0.4 * updates[row] / (updates[row] + 16))
            expected[row] -= rate * gradient[row] / squares[row].sqrt()
        assert torch.allclose(table.weight, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1, 1e4])
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 16, 64), (1, 1, 8)])
def test_orthogonalize_against_svd(shape, size):
    """Whatever the size of the gradient, so that a step has the size that the learning rate says."""
    X = size * torch.randn(shape)
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    Y = train.orthogonalize(X, torch.float32)
    values = torch.linalg.svdvals(Y)
    assert values.max() < 1.3 and values.median() > 0.8
    assert F.cosine_similarity(Y.flatten(1), (U @ V).flatten(1)).min() > 0.95


def step_alone(weight, gradients):
    """Muon for one matrix that is wider than tall."""
    momenta, squares = torch.zeros_like(weight), torch.zeros(weight.size(1))
    for gradient in gradients:
        momenta = 0.9 * momenta + 0.1 * gradient
        update = train.orthogonalize((0.1 * gradient + 0.9 * momenta)[None], torch.float32)[0]
        squares = 0.95 * squares + 0.05 * update.square().mean(dim=0)
        scaled = update / squares.sqrt()
        scaled = scaled * update.norm() / scaled.norm()
        weight = weight - 0.1 * scaled - 0.1 * 0.2 * weight * (scaled * weight >= 0)
    return weight


STACKS = {"tall": (32, 8), "wide": (8, 32), "square": (16, 16), "compiled": (8, 4), "experts": (16, 16)}


@pytest.mark.parametrize("kind", STACKS)
def test_stacked_matrices_step_as_each_alone_would(quick_compiler, kind):
    """Layers, and experts in one parameter [N, inputs, outputs]; decay is cautious."""
    shape = STACKS[kind]
    start, *gradients = (torch.randn(3, *shape) * torch.rand(3, *shape) for _ in range(4))
    weights = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    if kind == "experts":
        weights = [torch.nn.Parameter(start.mT.clone())]
    group = dict(params=weights, lr=0.1, weight_decay=0.2, momentum=0.9)
    optimizer = train.Muon([group], runtime.Setup(CPU, torch.float32, None, kind == "compiled"))
    for gradient in gradients:
        for weight, part in zip(weights, [gradient.mT] if kind == "experts" else gradient):
            weight.grad = part.clone()
        optimizer.step()
    found = weights[0].mT if kind == "experts" else torch.stack(weights)
    if shape[0] >= shape[1]:
        start, found, *gradients = (x.mT for x in (start, found, *gradients))
    for number, matrix in enumerate(found):
        alone = step_alone(start[number], [gradient[number] for gradient in gradients])
        assert torch.allclose(matrix, alone, atol=1e-5)


def test_rates_momentum_and_decay_follow_progress():
    """And rates of matrices grow with their height."""
    assert train.lr_factor(0) == train.lr_factor(1 - train.WARMDOWN_RATIO) == 1
    assert train.lr_factor(1) == pytest.approx(train.FINAL_LR_FRAC) and train.lr_factor(0.625) == pytest.approx(0.525)
    optimizers = train.build_optimizers(model_and_batch()[0])
    ramp, factors = train.MOMENTUM_RAMP, {(64, 64): 1, (256, 64): 2, (64, 256): 1, (2, 16): 1}
    groups = {tuple(group["params"][0].shape): group for group in optimizers[0].param_groups}
    assert groups.keys() == factors.keys()
    for progress, momentum in ((0.0, 0.85), (ramp / 2, 0.9), (ramp, 0.95), (1.0, 0.95)):
        train.set_schedules(optimizers, progress)
        for shape, group in groups.items():
            assert group["momentum"] == pytest.approx(momentum)
            assert group["weight_decay"] == pytest.approx(train.MATRIX_DECAY * (1 - progress))
            assert group["lr"] == pytest.approx(train.MATRIX_LR * factors[shape] * train.lr_factor(progress))


def test_accumulation_is_the_mean():
    results = []
    for split in (1, 3):
        model, *batch = model_and_batch()
        batches = list(zip(*(part.chunk(split) for part in batch)))
        loss = train.train_step(model, train.build_optimizers(model), batches, 0.5)
        results.append((loss.item(), model.head.lm_head.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_with_guesses_and_learns(choices, dtype):
    """The stream alone has the precision: in bfloat16 small steps would be lost, and second moments never change."""
    model, *batch = model_and_batch(dtype)
    streams, optimizers = set(), train.build_optimizers(model)
    model.blocks[0].register_forward_hook(lambda block, inputs, output: streams.add(output.dtype))
    losses = [train.train_step(model, optimizers, [batch], step / 15) for step in range(15)]
    lost_to_copies = 0.3 if train.POINTER else 0  # the pointer takes from the head, and no copy is right
    assert -0.01 < losses[0] - math.log(512) < lost_to_copies + 0.01 and losses[-1] < 0.5 * losses[0]
    state = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
    assert state and {tensor.dtype for tensor in (*losses, *model.parameters(), *state)} == {torch.float32}
    assert streams == {dtype}


# --------------------------------------
# The run

KEYS = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth
device benchmark seed compiled attention batch slow_steps_percent""".split()  # noqa: SIM905
USUAL = [0.05] * 100
TICKS = {  # seconds of the steps, and what is said of them
    "the first one does": ([9.0, *USUAL], "step 1 took 9.0 s, the usual 0.05 s: recompiled, or a busy CPU?\n"),
    "two do": ([*USUAL, 3.0, *USUAL, 4.0], "step 202 took 4.0 s, the usual 0.05 s: recompiled, or a busy CPU?\n"),
    "a short hiccup": ([*USUAL, 0.6, *USUAL * 9], ""),
    "many are slow": (USUAL + [2.0] * 10, ""),  # slow_steps_percent is for that
    "a ramp": (USUAL + [0.4] * 100, ""),
    "few steps": ([5.0, 0.1], ""),
}


@pytest.mark.parametrize("kind", TICKS)
def test_a_step_that_took_far_longer_than_all_others_is_named(capsys, kind):
    seconds, line = TICKS[kind]
    pace.report_slow_step(types.SimpleNamespace(ticks=[(elapsed, 0) for elapsed in itertools.accumulate(seconds)]))
    assert capsys.readouterr().out == line


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    """And what else torch.compile needs; else the error itself."""
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    assert runtime.why_not_compiled(CPU) == "division by zero"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    assert f"a space in the path {tmp_path}/a b: set TORCHINDUCTOR_CACHE_DIR" in runtime.why_not_compiled(CPU)
    monkeypatch.setattr(runtime.sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"no {tmp_path}/Python.h: install the headers" in runtime.why_not_compiled(CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert runtime.why_not_compiled(CPU) == "no C++ compiler no-such-compiler: install one, or set CXX"


@pytest.mark.parametrize(("wheel", "reason"), [(None, "has no CUDA ("), ("13.0", "with a driver before CUDA 13.0\n")])
def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch, capsys, wheel, reason):
    monkeypatch.setattr(prepare.shutil, "which", lambda name: name == "nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", wheel)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.choose_device() == CPU
    assert reason in capsys.readouterr().out


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.0 GB)"),
    RuntimeError("not enough memory: you tried to allocate 99 bytes."),
    MemoryError(),
]
OTHERS = [RuntimeError("out of resource: shared memory, Required: 327680"), RuntimeError("shape '[3]' is invalid")]
ERRORS = {str(error): (error, 8, ["16", "8"]) for error in OUT_OF_MEMORY}
ERRORS |= {str(error): (error, 0, []) for error in (*OTHERS, KeyError(1))}
ERRORS |= {"not even one row": (MemoryError(), 0, ["16", "8", "4", "2", "1"])}


@pytest.mark.parametrize("kind", ERRORS)
def test_rows_are_halved_when_memory_runs_out_and_for_nothing_else(monkeypatch, capsys, kind):
    error, most, tried = ERRORS[kind]

    def rehearse(benchmark, setup, shapes, accumulation):
        if shapes[0][0] > most:
            raise error

    set_constants(monkeypatch, DEVICE_BATCH_SIZE=4096, rehearse=rehearse)
    try:
        found = train.find_batch(types.SimpleNamespace(max_seq_len=64), None)
    except Exception as raised:
        found = raised
    assert found == ((8, 4) if most else error)
    assert re.findall(r"trying (\d+); set it to what fits", capsys.readouterr().out) == tried


@pytest.fixture
def eleven_steps(monkeypatch):
    """The benchmark's 3 seconds are 11 steps, however long they take."""
    monkeypatch.setattr(prepare.TrainingClock, "elapsed", property(lambda clock: len(clock.ticks) / 4))
    monkeypatch.setattr(prepare, "LATE_LIMIT", math.inf)


def test_an_error_in_a_compiled_block_has_its_traceback(benchmark, monkeypatch, capfd):
    """As an agent would make it: no second try in eager mode, and the line that is to blame."""
    clock = types.SimpleNamespace(origin={"commit": None})
    set_constants(monkeypatch, COMPILE=True, TrainingClock=lambda *arguments: clock)
    monkeypatch.setattr(train.MLP, "forward", lambda self, x: self.down(self.up(x) @ x.mT[:, :3]))
    with pytest.raises(RuntimeError, match=re.escape('"forward", lambda self, x: self.down(self.up(x) @ x.mT[:, :3])')):
        train.main()
    assert len(capfd.readouterr().out.splitlines()) == 2  # what it is about to do, and not that it went on without


def test_a_graph_break_is_named(capsys):
    torch._dynamo.utils.counters.clear()
    for function, lines in ((lambda x: 2 * x, 0), (lambda x: x if x.mean() < 100 else 2 * x, 1)):
        torch.compile(function, backend="eager")(torch.ones(3))
        runtime.report_trial(torch.nn.Module())
        assert capsys.readouterr().out.count("COMPILE: graph break, Data-dependent branching; TORCH_LOGS") == lines


def test_a_run_that_had_to_fall_back_says_so(benchmark, eleven_steps, monkeypatch, capfd):
    """No compiler, and half the rows: a line each, and keys of the summary; the journal has the same figures."""

    def forward(self, inputs, targets=None, forward=train.GPT.forward):
        if len(inputs) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, targets)

    set_constants(monkeypatch, DEVICE_BATCH_SIZE=4096, DEPTH=2, COMPILE=True)
    monkeypatch.setattr(runtime, "why_not_compiled", lambda device: "no g++")
    monkeypatch.setattr(train.GPT, "forward", forward)
    summary = train.main()
    log, values = capfd.readouterr().out.split("\n---\n")
    assert "COMPILE: torch.compile does not work, going on without (no g++)\n" in log
    assert "32 rows do not fit in memory, trying 16" in log
    assert len(log.splitlines()) < 60 and max(map(len, log.splitlines())) < 250
    assert list(summary) == KEYS
    assert dict(re.findall(r"^(\S+): +(.*)$", values, re.M)) == {key: str(value) for key, value in summary.items()}
    assert (summary["compiled"], summary["attention"]) == (False, "banded")
    assert (summary["num_steps"], summary["batch"]) == (11, "2,048 tokens in 2 x 16 rows")
    row = read_journal(benchmark.path)[-1]
    assert summary["val_bpb"] == f"{row['val_bpb']:.6f}" and 0 < row["val_bpb"] < 6
    assert (row["steps"], row["tokens"], row["seed"]) == (11, 11 * 2048, 42)


def test_nan_ends_the_run(benchmark, eleven_steps, monkeypatch):
    set_constants(monkeypatch, DEPTH=2, EMBEDDING_LR=math.nan)
    with pytest.raises(SystemExit, match="stopped at step 2: loss nan; lower the learning rates"):
        train.main()


def test_a_training_does_not_depend_on_its_rehearsal(benchmark, eleven_steps, monkeypatch):
    """Neither weights nor random numbers, as dropout draws them, know that there was one."""
    set_constants(monkeypatch, DEPTH=2)
    monkeypatch.setattr(train.MLP, "forward", lambda self, x: self.down(F.dropout(self.up(x), 0.5, self.training)))
    scores = []
    for rehearse in (train.rehearse, lambda *arguments: None):
        set_constants(monkeypatch, rehearse=rehearse)
        scores.append(train.main()["val_bpb"])
    assert scores[0] == scores[1]

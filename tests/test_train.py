"""The model, the optimizer and the loop of train.py."""

import functools
import http.server
import itertools
import json
import math
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, run

import prepare
import train
from harness import machine, runtime
from harness.journal import read_journal

KEYS = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth
device benchmark seed compiled attention batch slow_steps_percent""".split()  # noqa: SIM905
TINY = dict(DEPTH=5, MODEL_DIM=64, HEAD_DIM=32, GATE_CHANNELS=16, NGRAM_ROWS=2**12, COMPILE=False)
TINY |= dict(POINTER=True, LOGIT_CAP=None)


def set_constants(monkeypatch, **constants):
    for name, value in (TINY | constants).items():
        monkeypatch.setattr(train, name, value)
    torch.manual_seed(0)


@pytest.fixture
def small(monkeypatch):
    set_constants(monkeypatch)


@pytest.fixture(params=["GPU", "CPU"])
def both(request, monkeypatch):
    """The choices of a GPU and those of a CPU, in a size for tests."""
    set_constants(monkeypatch, **(dict(POINTER=False, LOGIT_CAP=15.0) if request.param == "GPU" else {}))


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile believes that the compiler knows those of this CPU, and does not try each, which takes 30 s."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.VecISA.check_build", lambda isa, code: True)


def shape(vocab_size=512):
    return types.SimpleNamespace(vocab_size=vocab_size, max_seq_len=64, seed=1)


def on_cpu(dtype=torch.float32, compiled=False):
    return runtime.Setup(CPU, dtype, train.banded, compiled)


def build(vocab_size=512, module=train, **options):
    """A model, and inputs and targets of three rows."""
    model = module.build_model(shape(vocab_size), on_cpu(**options))
    ids = torch.randint(vocab_size, (3, 65))
    return model, ids[:, :-1], ids[:, 1:]


def awaken(model):
    """Give the layers that start at zero something to say."""
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)


# --------------------------------------
# Model


def test_import_does_nothing_but_settle_the_constants():
    """Those of the GPU column, here, as it stands."""
    code = """
import torch
torch.cuda.is_available = lambda: True
import sys, train
assert not torch.cuda.is_initialized()
assert not {"pyarrow", "requests", "tiktoken", "rustbpe", "kernels", "torch._dynamo"} & set(sys.modules)

with torch.device("meta"):
    model = train.GPT(8192, 2048, train.runtime.Setup("meta", torch.bfloat16, train.banded))
assert model.windows == [256, 256, 256, 256, 2048, 256, 256, 256, 2048]
dense = sum(weight.numel() for weight in model.parameters()) - model.ngrams.weight.numel()
assert round(dense / 1e6) == 81 and model.ngrams.weight.numel() == 2**22 * 320
matrices = 9 * 12 * 640 * 640 + 8192 * 640 + 5 * 32 * 5
assert model.flops_per_token(2048) == 6 * matrices + 12 * 640 * (7 * 256 + 2 * 2048)
assert model.flops_per_token(1024) == 6 * matrices + 12 * 640 * (7 * 256 + 2 * 1024)
"""
    result = run("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_logits_and_loss_agree(both):
    model, inputs, targets = build()
    awaken(model)
    logits = model(inputs)
    assert logits.shape == (3, 64, 512) and logits.dtype == torch.float32
    assert not train.LOGIT_CAP or logits.abs().max() < train.LOGIT_CAP
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(inputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(loss, model), gradients(expected, model)):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def gradients(loss, model):
    gradients = torch.autograd.grad(loss, model.parameters())
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]


@pytest.mark.story
def test_gradients_of_the_compiled_head_are_right_in_bfloat16(monkeypatch, quick_compiler):
    """For AVX-512, torch 2.11 compiled a shift of the pointer's keys into NaN."""
    set_constants(monkeypatch, DEPTH=1, MODEL_DIM=128)
    inputs, targets = torch.randint(512, (2, 2, 256))
    benchmark = types.SimpleNamespace(vocab_size=512, max_seq_len=256, seed=1)

    def found(dtype, compiled):
        model = train.build_model(benchmark, on_cpu(dtype))
        awaken(model)
        if compiled:
            model.head.compile(dynamic=False)
        return gradients(model(inputs, targets), model)

    for ours, exact in zip(found(torch.bfloat16, True), found(torch.float32, False)):
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_the_last_block_sees_all_and_has_value_embeddings_as_every_other_one(small):
    layers = [block.attention for block in build()[0].blocks]
    assert [layer.window for layer in layers] == [8, 8, 8, 8, 64]
    assert [layer.value_embeds is not None for layer in layers] == [True, False, True, False, True]


def test_pointer_against_a_naive_loop(small):
    """Weights of the row's tokens: what the states before them have in common with the present one."""
    pointer = train.Pointer()
    x = torch.randn(2, 7, 64)
    weights, odds = pointer(x)
    states = train.norm(pointer.state(x))
    for row in range(2):
        for t in range(7):
            before = [states[row, s - 1] if s else torch.zeros(64) for s in range(t + 1)]
            scores = train.POINTER_SCALE * torch.stack([states[row, t] @ state for state in before]) / 8
            assert torch.allclose(weights[row, t, : t + 1], scores.softmax(dim=0), atol=1e-5)
            assert not weights[row, t, t + 1 :].any()
            expected = pointer.gate(x)[row, t].item() + scores.logsumexp(dim=0).item() + train.POINTER_ODDS
            assert odds[row, t].item() == pytest.approx(expected, abs=1e-4)


def test_logits_are_those_of_a_mixture(small):
    """A token is drawn by the head or, with the pointer's odds, copied from where the row has it."""
    model, inputs, _ = build(vocab_size=20)
    awaken(model)
    x = torch.randn(3, 64, 64)
    likelihoods = model.head(x, inputs).softmax(dim=-1)
    head = torch.nn.functional.linear(train.norm(x), model.head.lm_head.weight).softmax(dim=-1)
    weights, odds = model.head.pointer(train.norm(x))
    for row, t in ((0, 0), (0, 5), (1, 40), (2, 63)):
        copied = torch.zeros(20)
        for s in range(t + 1):
            copied[inputs[row, s]] += weights[row, t, s]
        gate = odds[row, t].sigmoid()
        assert torch.allclose(likelihoods[row, t], (1 - gate) * head[row, t] + gate * copied, atol=1e-6)


def test_smear_adds_a_share_of_the_token_before():
    x, gates = torch.randn(2, 7, 64), torch.randn(64)
    y = train.smear(x, gates)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.allclose(y[:, 1:], x[:, 1:] + gates * x[:, :-1])


def angles(T):
    model = build()[0]
    return model.cos[:, :T], model.sin[:, :T]


def test_half_of_the_keys_are_of_the_token_before(small):
    """A head with such keys sees what stands at a place by what stood before it."""
    seen, cos_sin = [], angles(7)
    attention = train.Attention(1, 64, lambda q, k, v, window: seen.append(k) or v, 512)
    x = torch.randn(2, 7, 64)
    attention(x, None, cos_sin)
    for head, tokens in enumerate((train.shift(x), x)):
        keys = attention.key(tokens).view(2, 7, 2, 32)
        rotated = train.norm(train.apply_rotary_emb(keys, *cos_sin))
        assert torch.allclose(seen[0][:, :, head], rotated[:, :, head], atol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_ngrams_are_of_a_token_and_those_before(small, n):
    def rows_of(ids):
        return train.hash_ngrams(ids)[..., n - 2]

    ids = torch.randint(4096, (4, 50))
    rows = rows_of(ids)
    moved = rows_of(torch.cat([torch.randint(4096, (4, 9)), ids], dim=1))
    assert torch.equal(moved[:, 9 + n - 1 :], rows[:, n - 1 :]) and rows.min() >= 0 and rows.max() < train.NGRAM_ROWS
    assert len(rows.unique()) > 150
    for back in range(4):
        other = ids.clone()
        other[:, 20 - back] += 1
        assert ((rows_of(other)[:, 20] != rows[:, 20]) == (back < n)).all()


def test_rotation_keeps_lengths_and_depends_on_distance(small):
    cos_sin, vectors = angles(64), torch.randn(2, 32)
    q, k = (train.apply_rotary_emb(vector.expand(1, 64, 1, 32), *cos_sin)[0, :, 0] for vector in vectors)
    assert torch.allclose(q.norm(dim=-1), vectors[0].norm(), atol=1e-5)
    scores = (q @ k.T).numpy()
    for distance in (0, 3, 20):
        assert scores.diagonal(-distance) == pytest.approx(scores[distance, 0], abs=1e-4)


def naive_attention(q, k, v, window):
    """Every score, one mask."""
    T, K = q.shape[1], q.shape[-1]
    k, v = (torch.stack([x[:, :, h * x.size(2) // q.size(2)] for h in range(q.size(2))], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(K)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.012)])  # scores are float32
@pytest.mark.parametrize("window", [1, 5, 32, 63, 100])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])  # of queries; of keys and values
def test_banded_windows(window, dtype, tolerance, heads):
    H, G = heads
    parts, results = [torch.randn(2, 64, count, 16, dtype=torch.float64) for count in (H, G, G)], []
    for attention, cast in ((train.banded, dtype), (naive_attention, torch.float64)):
        q, k, v = (part.to(cast).requires_grad_() for part in parts)
        y = attention(q, k, v, window)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for ours, naive in zip(*results):
        assert (ours - naive).norm() < tolerance * naive.norm()


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


class KernelHub(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the hub does: each file has a tag, and all are of one commit."""

    def end_headers(self):
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", Path(self.path).name)
        super().end_headers()


def write_hub(folder):
    """A hub with one kernel, which has one build for every back end: banded() under another name."""
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
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_hub_kernel_is_fetched_once_and_then_taken_without_network(tmp_path):
    """By the real `kernels`, from a stand-in for the hub: online, from the cache, and where there is none."""
    write_hub(tmp_path / "hub")
    handler = functools.partial(KernelHub, directory=tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    fetched = run("-c", FETCH, **hub)
    server.shutdown()
    server.server_close()
    assert (fetched.returncode, fetched.stdout) == (0, ""), fetched.stdout + fetched.stderr
    taken = run("-c", CHOOSE, **hub)
    found = "flash3\nattention: flash3 not used (FileNotFoundError: "  # v1, and no v2
    assert taken.stdout.startswith(found), taken.stdout + taken.stderr
    missed = run("-c", FETCH, **hub | {"HF_HOME": str(tmp_path / "empty")})
    assert missed.stdout.startswith("no FlashAttention-3, train.py will take torch's own attention (")


@pytest.mark.parametrize("group", [1, 2])  # heads of queries for one of keys
@pytest.mark.parametrize("fault", ["wrong", "window", "raises", "missing", "card"])
def test_hub_kernel_falls_through(small, monkeypatch, capsys, fault, group):
    def kernel(q, k, v, causal, window_size):
        if fault == "raises":
            raise RuntimeError("no kernel image is available for execution on the device\nmore lines")
        window = q.size(1) if fault == "window" else window_size[0]
        return train.banded(q, k, v, window) * (1.1 if fault == "wrong" else 1)

    hub = types.SimpleNamespace(get_kernel=lambda **_: types.SimpleNamespace(flash_attn_func=kernel))
    monkeypatch.setitem(sys.modules, "kernels", None if fault == "missing" else hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9) if fault == "card" else (9, 0))
    compare, setup = runtime.compare, runtime.Setup(types.SimpleNamespace(type="cuda"), torch.bfloat16, train.banded)
    monkeypatch.setattr(runtime, "compare", lambda f, setup, *rest: compare(f, setup._replace(device=CPU), *rest))
    monkeypatch.setattr(runtime, "varlen", lambda *arguments: train.banded(*arguments))
    assert runtime.choose_attention(setup, 32, group) is runtime.varlen
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("attention: flash3 not used (") for line in lines] == [True] * (fault != "card")


# --------------------------------------
# Optimizer and schedules


def edited(*edits):
    """train.py as a module after edits of its text, small: what an agent would have written."""
    source = (ROOT / "train.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times: {old}"
        source = source.replace(old, new)
    module = types.ModuleType("edited")
    exec(compile(source, "train.py", "exec"), vars(module))
    vars(module).update(TINY)
    return module


ADDED = """
        self.gain = nn.Parameter(torch.ones(()))
        self.gains = nn.ParameterList(torch.ones(MODEL_DIM) for _ in range(2))
        self.other = nn.Embedding(vocab_size, MODEL_DIM)
        self.mix = nn.Linear(MODEL_DIM, MODEL_DIM)
        self.conv = nn.Conv1d(MODEL_DIM, MODEL_DIM, 3, groups=MODEL_DIM)
        self.frozen = nn.Linear(MODEL_DIM, MODEL_DIM, bias=False).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(()))
        self.idle = Linear(MODEL_DIM, MODEL_DIM)
"""
EMBED = "self.embed(inputs, self.ngrams(hash_ngrams(inputs)))"


def adding(lines):
    """The edit that makes something in GPT.__init__."""
    return "        self.resid_lambdas =", f"{lines}        self.resid_lambdas ="


def test_what_an_agent_adds_trains_and_what_is_unused_is_named(capsys):
    module = edited(
        adding(ADDED),
        (
            f"x = {EMBED}\n",
            f"x = self.mix(self.frozen({EMBED}) + self.other(inputs))\n"
            "        x = self.gain * self.gains[0] * self.gains[1] * self.conv(F.pad(x.mT, (2, 0))).mT\n",
        ),
        ("        self.up = ", "        self.gate = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM)\n        self.up = "),
        ("F.relu(self.up(x)).square()", "F.silu(self.gate(x)) * self.up(x)"),
    )
    module.rehearse(shape(), on_cpu(), [(2, 64)], 1)
    unused = ["unused", "idle.weight"]
    assert [line.split(" has no gradient")[0] for line in capsys.readouterr().out.splitlines()] == unused

    model, *batch = build(module=module)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    added = ["gain", "gains.0", "gains.1", "other.weight", "mix.weight", "mix.bias", "conv.weight", "conv.bias"]
    assert all(before[name].any() for name in [*added, "blocks.0.mlp.gate.weight"]), "initialized where it was made"
    optimizers = module.build_optimizers(model)
    losses = [module.train_step(model, optimizers, [batch], step / 6).item() for step in range(6)]
    assert losses[-1] < losses[0]
    same = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert same == {"frozen.weight", *unused}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (('members["wte"], lr', 'members["wte"] + members["x0"], lr'), "x0_lambdas is in 2 groups of build_optimizers"),
        (('dict(params=members["scalar"], lr=SCALAR_LR, weight_decay=0.0),', ""), "resid_lambdas is in 0 groups"),
    ],
    ids=["twice", "dropped"],
)
def test_a_parameter_that_is_not_in_one_group_is_refused_by_name(edit, message):
    module = edited(edit)
    with pytest.raises(SystemExit, match=message):
        module.build_optimizers(build(module=module)[0])


def test_weights_and_state_are_float32(both):
    """In bfloat16 small steps would be lost, and second moments would never change."""
    model, *batch = build(dtype=torch.bfloat16)
    optimizers = train.build_optimizers(model)
    loss = train.train_step(model, optimizers, [batch], 0.0)
    assert loss.dtype == torch.float32 and {weight.grad.dtype for weight in model.parameters()} == {torch.float32}
    state = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
    assert state and {tensor.dtype for tensor in (*model.parameters(), *state)} == {torch.float32}
    block = model.blocks[0]
    x = torch.zeros(1, 64, 64).bfloat16()
    assert block(x, 0, 1, 0, batch[0][:1], (model.cos, model.sin)).dtype == torch.bfloat16


def test_rows_that_were_used_are_updated(small):
    """Against a loop in which every row that a batch uses is a vector with one mean square."""
    table = torch.nn.Embedding(12, 5, sparse=True)
    expected, squares = table.weight.detach().clone(), torch.zeros(12)
    updates = torch.zeros(12)
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
    assert torch.nn.functional.cosine_similarity(Y.flatten(1), (U @ V).flatten(1)).min() > 0.95


@pytest.mark.parametrize(("shape", "compiled"), [((32, 8), False), ((8, 32), False), ((16, 16), False), ((8, 4), True)])
def test_stacked_matrices_step_as_each_alone_would(quick_compiler, shape, compiled):
    """Against a loop: second moments are per row, of wide matrices per column, and decay is cautious."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    alone = [weight.detach().clone() for weight in weights]
    group = dict(params=weights, lr=0.1, weight_decay=0.2, momentum=0.9)
    optimizer = train.Muon([group], on_cpu(compiled=compiled))
    tall = shape[0] >= shape[1]
    momenta, squares = [torch.zeros(shape) for _ in weights], [torch.zeros(max(shape)) for _ in weights]
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(shape) * torch.rand(shape)
            momenta[i] = 0.9 * momenta[i] + 0.1 * weight.grad
            nesterov = 0.1 * weight.grad + 0.9 * momenta[i]
            update = train.orthogonalize((nesterov.T if tall else nesterov)[None], torch.float32)[0]
            squares[i] = 0.95 * squares[i] + 0.05 * update.square().mean(dim=0)
            scaled = update / squares[i].sqrt()
            scaled = scaled * update.norm() / scaled.norm()
            scaled = scaled.T if tall else scaled
            alone[i] = alone[i] - 0.1 * scaled - 0.1 * 0.2 * alone[i] * (scaled * alone[i] >= 0)
        optimizer.step()
    for weight, expected in zip(weights, alone):
        assert torch.allclose(weight, expected, atol=1e-5)


def test_rates_of_matrices_grow_with_their_height(small):
    groups = train.build_optimizers(build()[0])[0].param_groups
    rates = {tuple(group["params"][0].shape): group["lr"] / train.MATRIX_LR for group in groups}
    assert rates == {(64, 64): 1, (256, 64): 2, (64, 256): 1, (2, 16): 1}


def test_schedules(small):
    assert train.lr_factor(0) == train.lr_factor(1 - train.WARMDOWN_RATIO) == 1
    assert train.lr_factor(1) == pytest.approx(train.FINAL_LR_FRAC) and train.lr_factor(0.625) == pytest.approx(0.525)
    optimizers = train.build_optimizers(build()[0])
    ramp = train.MOMENTUM_RAMP
    for progress, momentum in ((0.0, 0.85), (ramp / 2, 0.9), (ramp, 0.95), (1.0, 0.95)):
        train.set_schedules(optimizers, progress)
        group = optimizers[0].param_groups[0]
        assert group["momentum"] == pytest.approx(momentum)
        assert group["weight_decay"] == pytest.approx(train.MATRIX_DECAY * (1 - progress))
        assert group["lr"] == pytest.approx(train.MATRIX_LR * train.lr_factor(progress))


# --------------------------------------
# The loop

USUAL = [0.05] * 100
TICKS = {  # seconds of the steps, and what is said of them
    "alike": (USUAL, ""),
    "one recompiles": ([*USUAL[:40], 14.2, *USUAL], "step 41 took 14.2 s, the usual 0.05 s: did it recompile?\n"),
    "the first one does": ([9.0, *USUAL], "step 1 took 9.0 s, the usual 0.05 s: did it recompile?\n"),
    "two do": ([*USUAL, 3.0, *USUAL, 4.0], "step 202 took 4.0 s, the usual 0.05 s: did it recompile?\n"),
    "a short hiccup": ([*USUAL, 0.6, *USUAL * 9], ""),
    "many are slow": (USUAL + [2.0] * 10, ""),  # slow_steps_percent is for that
    "a ramp": (USUAL + [0.4] * 100, ""),
    "few steps": ([5.0, 0.1], ""),
    "none": ([], ""),
}


@pytest.mark.parametrize("kind", TICKS)
def test_a_step_that_took_far_longer_than_all_others_is_named(capsys, kind):
    seconds, line = TICKS[kind]
    runtime.name_slow_step(types.SimpleNamespace(ticks=[(elapsed, 0) for elapsed in itertools.accumulate(seconds)]))
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


@pytest.mark.parametrize("wheel", [None, "13.0"])
def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch, capsys, wheel):
    monkeypatch.setattr(prepare.shutil, "which", lambda name: name == "nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", wheel)
    assert runtime.choose_device().type == ("mps" if torch.backends.mps.is_available() else "cpu")
    why = "with a driver before CUDA 13.0\n" if wheel else "has no CUDA ("
    assert why in capsys.readouterr().out


def test_accumulation_is_the_mean(small):
    results = []
    for split in (1, 3):
        model, *batch = build()
        batches = list(zip(*(part.chunk(split) for part in batch)))
        loss = train.train_step(model, train.build_optimizers(model), batches, 0.5)
        results.append((loss.item(), model.head.lm_head.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_training_starts_with_guesses_and_learns(both):
    model, *batch = build()
    optimizers = train.build_optimizers(model)
    losses = [train.train_step(model, optimizers, [batch], step / 15).item() for step in range(15)]
    lost_to_copies = 0.3 if train.POINTER else 0  # the pointer takes from the head, and no copy is right
    assert -0.01 < losses[0] - math.log(512) < lost_to_copies + 0.01 and losses[-1] < 0.5 * losses[0]


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


def raise_beyond(monkeypatch, most, error):
    def rehearse(benchmark, setup, shapes, accumulation):
        if shapes[0][0] > most:
            raise error

    set_constants(monkeypatch, TOTAL_BATCH_SIZE=2048, DEVICE_BATCH_SIZE=4096, rehearse=rehearse)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_halves_the_rows(monkeypatch, capsys, error):
    raise_beyond(monkeypatch, 8, error)
    assert train.find_batch(shape(), on_cpu()) == (8, 4)
    assert re.findall(r"trying (\d+); set it to what fits", capsys.readouterr().out) == ["16", "8"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 327680"),
        RuntimeError("shape '[3]' is invalid"),
        KeyError(1),
    ],
    ids=str,
)
def test_an_error_of_the_code_ends_the_run_at_once(monkeypatch, capsys, error):
    raise_beyond(monkeypatch, 0, error)
    with pytest.raises(type(error)) as raised:
        train.find_batch(shape(), on_cpu())
    assert raised.value is error and capsys.readouterr().out == ""


def test_an_error_in_a_compiled_block_has_its_traceback(benchmark, monkeypatch, capfd):
    """As an agent would make it: no second try in eager mode, and the line that is to blame."""
    clock = types.SimpleNamespace(origin={"commit": None})
    set_constants(monkeypatch, COMPILE=True, TrainingClock=lambda *arguments: clock)
    monkeypatch.setattr(train.MLP, "forward", lambda self, x: self.down(self.up(x) @ x.mT[:, :3]))
    with pytest.raises(RuntimeError, match=re.escape('"forward", lambda self, x: self.down(self.up(x) @ x.mT[:, :3])')):
        train.main()
    assert len(capfd.readouterr().out.splitlines()) == 2  # what it is about to do, and not that it went on without


def test_no_instruction_set_is_tried_and_no_cuda_is_missed(tmp_path):
    """The first takes 5 s each, in every run; the second is a warning that a CPU needs no CUDA_HOME."""
    spy = "import torch._inductor.cpu_vec_isa as cpu; cpu.VecISA.check_build = lambda *_: print('tried') or True\n"
    code = "import torch; from harness import runtime\n"
    code += "print(runtime.set_up(torch.device('cpu'), None, 32, 1, True).compiled)"
    result = run("-c", spy + code, CUDA_HOME=str(tmp_path))
    assert result.stdout.splitlines() == ["True"], result.stdout + result.stderr
    assert "CUDA_HOME" not in result.stderr


def test_a_graph_break_is_named(benchmark, monkeypatch, capfd):
    def forward(self, x, inputs, targets=None, forward=train.Head.forward):
        value = forward(self, x, inputs, targets)
        return value if value.mean() < 100 else 2 * value

    set_constants(monkeypatch, TOTAL_BATCH_SIZE=512, DEPTH=2, COMPILE=True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    train.main()
    assert "COMPILE" not in capfd.readouterr().out
    monkeypatch.setattr(train.Head, "forward", forward)
    train.main()
    assert "COMPILE: graph break, Data-dependent branching; TORCH_LOGS" in capfd.readouterr().out


def test_a_run_that_had_to_fall_back_says_so(benchmark, monkeypatch, capfd):
    """No compiler, and half the rows: a line each, and keys of the summary."""

    def failing(function, disable=False, **options):
        if not disable:
            raise RuntimeError("no such instruction\nmore lines")
        return function

    def forward(self, inputs, targets=None, forward=train.GPT.forward):
        if len(inputs) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, targets)

    set_constants(monkeypatch, TOTAL_BATCH_SIZE=2048, DEVICE_BATCH_SIZE=4096, DEPTH=2, COMPILE=True)
    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(train.GPT, "forward", forward)
    summary = train.main()
    out = capfd.readouterr().out
    assert "COMPILE: torch.compile does not work, going on without (no such instruction)\n" in out
    assert "32 rows do not fit in memory, trying 16" in out
    assert (summary["compiled"], summary["attention"]) == (False, "banded")
    assert summary["batch"] == "2,048 tokens in 2 x 16 rows" and 0 < float(summary["val_bpb"]) < 6


def test_nan_ends_the_run(benchmark, monkeypatch):
    set_constants(monkeypatch, TOTAL_BATCH_SIZE=2048, DEPTH=2, EMBEDDING_LR=math.nan)
    with pytest.raises(SystemExit, match="stopped at step"):
        train.main()


def test_a_training_does_not_depend_on_its_rehearsal(benchmark, monkeypatch):
    """Neither weights nor random numbers (as dropout would draw) know that there was one."""

    models, firsts = [], []

    def remembering(*arguments, build=train.build_model):
        models.append(build(*arguments))
        return models[-1]

    def start(clock):
        weights = torch.cat([weight.detach().flatten() for weight in models[-1].parameters()])
        firsts.append((weights, torch.rand(())))
        raise InterruptedError

    set_constants(monkeypatch, TOTAL_BATCH_SIZE=2048, DEPTH=2, build_model=remembering)
    monkeypatch.setattr(prepare.TrainingClock, "start", start)
    for rehearse in (train.rehearse, lambda *arguments: None):
        monkeypatch.setattr(train, "rehearse", rehearse)
        with pytest.raises(InterruptedError):
            train.main()
    assert all(torch.equal(a, b) for a, b in zip(*firsts))


def test_end_to_end(benchmark):
    """The untouched file in a process of its own, without torch.compile to save a minute: every key, in order."""
    before = read_journal(benchmark.path)
    result = run("train.py", AUTORESEARCH_SEED="3", TORCHDYNAMO_DISABLE="1")
    assert result.returncode == 0, result.stderr
    log, summary = result.stdout.split("\n---\n")
    assert len(log.splitlines()) <= 60 and max(map(len, log.splitlines())) < 250
    values = dict(line.split(": ", 1) for line in summary.splitlines())
    assert list(values) == KEYS and float(values["training_seconds"]) <= 3.3
    assert float(values["total_seconds"]) > float(values["training_seconds"])
    *others, row = read_journal(benchmark.path)
    assert others == before and row["script"] == "train.py" and row["seed"] == 3
    assert row["train_sha256"] == prepare.sha256(ROOT / "train.py")
    assert 0 < row["val_bpb"] < 6 and row["val_bpb"] == pytest.approx(float(values["val_bpb"]), abs=1e-6)
    assert row["slow_steps_percent"] == float(values["slow_steps_percent"]) and row["steps"] == int(values["num_steps"])
    assert row["tokens"] == pytest.approx(1e6 * float(values["total_tokens_M"]), abs=5e4)

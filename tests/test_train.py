"""The model, the optimizer and the loop of train.py."""

import math
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, run

import prepare
import train

KEYS = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth
device benchmark seed overhead_seconds""".split()
CPU = torch.device("cpu")
CONSTANTS = {name: value for name, value in vars(train).items() if name.isupper()}  # with both columns
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


def set_constants(monkeypatch, device, **constants):
    """The column of a device, and other values; every constant is put back afterwards."""
    for name, value in {**CONSTANTS, **constants}.items():
        monkeypatch.setattr(train, name, value)
    train.settle(torch.device(device))
    torch.manual_seed(0)


TINY = dict(DEPTH=5, MODEL_DIM=64, HEAD_DIM=32, GATE_CHANNELS=16, COMPILE=False)


@pytest.fixture
def small(monkeypatch):
    set_constants(monkeypatch, "cpu", **TINY)


@pytest.fixture(params=["cuda", "cpu"])
def both(request, monkeypatch):
    """The model of GPUs and that of small machines, of a size for tests."""
    set_constants(monkeypatch, request.param, **TINY)


def build(vocab_size=512, max_seq_len=64):
    model = train.build_model(types.SimpleNamespace(vocab_size=vocab_size, max_seq_len=max_seq_len), CPU)
    return model, torch.randint(vocab_size, (3, max_seq_len + 1))


def awaken(model):
    """Give the layers that start at zero something to say."""
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def test_import_does_nothing():
    code = (
        "import sys, train, torch; "
        "assert not torch.cuda.is_initialized() and isinstance(train.DEPTH, train.Per); "
        "assert not {'pyarrow', 'requests', 'tiktoken', 'rustbpe', 'kernels', 'torch._dynamo'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_first_loss_is_that_of_guessing(both):
    model, ids = build()
    lost_to_copies = [0.0]  # at most what is taken from the head, where no copy is right
    if train.POINTER:
        softplus = torch.nn.functional.softplus
        model.pointer.register_forward_hook(lambda *call: lost_to_copies.append(softplus(call[2][1]).mean().item()))
    assert -0.01 < model(ids[:, :-1], ids[:, 1:]).item() - math.log(512) < lost_to_copies[-1] + 0.01
    assert len(lost_to_copies) == 1 + train.POINTER


def test_logits_and_loss_agree(both):
    model, ids = build()
    awaken(model)
    logits = model(ids[:, :-1])
    assert logits.shape == (3, 64, 512) and logits.dtype == torch.float32
    assert not train.LOGIT_CAP or logits.abs().max() < train.LOGIT_CAP
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss = model(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(loss, model), gradients(expected, model)):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def gradients(loss, model):
    gradients = torch.autograd.grad(loss, model.parameters())
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]


def test_likelihoods_of_the_head(both):
    """Against torch's cross-entropy in float64, for logits of any size; in bfloat16 within its precision."""
    x, weight, targets = 4 * torch.randn(30, 64), torch.randn(50, 64), torch.randint(50, (30,))
    exact = [part.double().requires_grad_() for part in (x, weight)]
    expected = -torch.nn.functional.cross_entropy(train.cap(exact[0] @ exact[1].T), targets, reduction="none")
    factor = torch.rand(30)
    reference = torch.autograd.grad(expected @ factor.double(), exact)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        parts = x.to(dtype).requires_grad_(), weight.clone().requires_grad_()
        likelihoods = train.HeadLikelihood.apply(*parts, targets)
        assert likelihoods.dtype == torch.float32
        assert (likelihoods - expected).norm() < error * expected.norm()
        for ours, theirs in zip(torch.autograd.grad(likelihoods @ factor, parts), reference):
            assert (ours - theirs).norm() < error * theirs.norm()


def test_windows(small):
    assert train.window_sizes(64) == [8, 8, 8, 8, 64]
    train.DEPTH = 9
    assert train.window_sizes(2048) == [256, 256, 256, 256, 2048, 256, 256, 256, 2048]


def test_value_embeddings_in_every_other_block_and_the_last(small):
    model, _ = build()
    assert [block.attention.table is not None for block in model.blocks] == [True, False, True, False, True]


def test_reference_size_and_flops(monkeypatch):
    """The GPU column, as it stands."""
    set_constants(monkeypatch, "cuda")
    with torch.device("meta"):
        model = train.GPT(8192, 2048, torch.bfloat16)
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == 81
    matrices = 9 * 12 * 640 * 640 + 8192 * 640 + 5 * 32 * 5
    assert model.flops_per_token() == 6 * matrices + 12 * 640 * (7 * 256 + 2 * 2048)


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
    model, ids = build(vocab_size=20)
    awaken(model)
    inputs, x = ids[:, :-1], torch.randn(3, 64, 64)
    likelihoods = model.logits(x, inputs).softmax(dim=-1)
    head = torch.nn.functional.linear(train.norm(x), model.lm_head.weight).softmax(dim=-1)
    weights, odds = model.pointer(train.norm(x))
    for row, t in ((0, 0), (0, 5), (1, 40), (2, 63)):
        copied = torch.zeros(20)
        for s in range(t + 1):
            copied[inputs[row, s]] += weights[row, t, s]
        gate = odds[row, t].sigmoid()
        assert torch.allclose(likelihoods[row, t], (1 - gate) * head[row, t] + gate * copied, atol=1e-6)


def test_smear_adds_a_share_of_the_token_before(small):
    block = train.build_model(types.SimpleNamespace(vocab_size=20, max_seq_len=64), CPU).blocks[0]
    x = torch.randn(2, 7, 64)
    assert torch.equal(block.smear(x, 0), x)
    torch.nn.init.normal_(block.smear_gates)
    for part in (0, 1):
        y = block.smear(x, part)
        assert torch.equal(y[:, 0], x[:, 0])
        assert torch.allclose(y[:, 1:], x[:, 1:] + block.smear_gates[part] * x[:, :-1])


@pytest.mark.parametrize("n", [2, 3])
def test_ngrams_are_of_a_token_and_those_before(small, n):
    def rows_of(ids):
        return train.hash_ngrams(ids)[..., n - 2]

    ids = torch.randint(4096, (4, 50))
    rows = rows_of(ids)
    moved = rows_of(torch.cat([torch.randint(4096, (4, 9)), ids], dim=1))
    assert torch.equal(moved[:, 9 + n - 1 :], rows[:, n - 1 :]) and 0 <= rows.min() and rows.max() < train.NGRAMS
    assert len(rows.unique()) > 150
    for back in range(4):
        other = ids.clone()
        other[:, 20 - back] += 1
        assert ((rows_of(other)[:, 20] != rows[:, 20]) == (back < n)).all()


def test_rotation_keeps_lengths_and_depends_on_distance(small):
    model, _ = build()
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 64, 1, 32)
    q, k = train.rotate(q, model.cos, model.sin), train.rotate(k, model.cos, model.sin)
    assert torch.allclose(q.norm(dim=-1), q.norm(dim=-1)[:, :1].expand(1, 64, 1), atol=1e-5)
    scores = (q[0, :, 0] @ k[0, :, 0].T).numpy()
    for distance in (0, 3, 20):
        assert scores.diagonal(-distance) == pytest.approx(scores[distance, 0], abs=1e-4)


def naive_attention(q, k, v, window):
    """Every score, one mask."""
    T, K = q.shape[1], q.shape[-1]
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(K)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [1, 3, 5, 8, 32, 63, 64, 100])
def test_sdpa_windows(window):
    q, k, v = torch.randn(3, 2, 64, 2, 16, dtype=torch.float64, requires_grad=True)
    ours, naive = train.sdpa(q, k, v, window), naive_attention(q, k, v, window)
    assert torch.allclose(ours, naive)
    ways = [torch.autograd.grad(y.square().sum(), (q, k, v), retain_graph=True) for y in (ours, naive)]
    for mine, theirs in zip(*ways):
        assert torch.allclose(mine, theirs)
    low = [part.detach().bfloat16().requires_grad_() for part in (q, k, v)]
    ours = train.sdpa(*low, window)
    assert (ours - naive).norm() < 0.01 * naive.norm()
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), p) for y, p in ((ours, low), (naive, (q, k, v))))):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@CUDA
@pytest.mark.parametrize("window", [8, 128])
def test_cuda_back_ends(window):
    for back_end in (train.varlen, train.choose_attention(torch.device("cuda"), torch.bfloat16)):
        q, k, v = torch.randn(3, 2, 128, 2, 64, device="cuda", dtype=torch.bfloat16)
        naive = naive_attention(q.float().cpu(), k.float().cpu(), v.float().cpu(), window)
        assert (back_end(q, k, v, window).float().cpu() - naive).norm() < 0.02 * naive.norm()


def stub_kernel(monkeypatch, flash_attn_func):
    """Stand in for the kernels hub, and let the CPU pass for a Hopper GPU."""
    kernel = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    stub = types.SimpleNamespace(get_kernel=lambda name, version: kernel)
    monkeypatch.setitem(sys.modules, "kernels", stub)
    monkeypatch.setattr(train, "hub_answers", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(train, "varlen", lambda q, k, v, window: train.sdpa(q, k, v, window))


def flash_attention(q, k, v, causal, window_size):
    assert causal and window_size[1] == 0
    return train.sdpa(q, k, v, q.size(1) if window_size[0] < 0 else window_size[0]), None


def test_hub_kernel_is_taken_when_it_is_right(small, monkeypatch, capsys):
    stub_kernel(monkeypatch, flash_attention)
    monkeypatch.setattr(
        train, "probe_attention", lambda f, device, dtype, probe=train.probe_attention: probe(f, CPU, dtype)
    )
    chosen = train.choose_attention(types.SimpleNamespace(type="cuda"), torch.bfloat16)
    assert chosen.__name__ == "hub" and capsys.readouterr().out == ""
    q, k, v = torch.randn(3, 1, 64, 2, 32)
    for window in (8, 64):
        assert torch.allclose(chosen(q, k, v, window), naive_attention(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("fault", ["wrong", "window", "raises", "missing"])
def test_hub_kernel_falls_through(small, monkeypatch, capsys, fault):
    def broken(q, k, v, causal, window_size):
        if fault == "raises":
            raise RuntimeError("no kernel image is available for execution on the device\nmore lines")
        return flash_attention(q, k, v, causal, (-1, 0))[0] * (1.1 if fault == "wrong" else 1)

    stub_kernel(monkeypatch, broken)
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setattr(
        train, "probe_attention", lambda f, device, dtype, probe=train.probe_attention: probe(f, CPU, dtype)
    )
    chosen = train.choose_attention(types.SimpleNamespace(type="cuda"), torch.bfloat16)
    lines = capsys.readouterr().out.splitlines()
    assert chosen is train.varlen and len(lines) == 1 and "FlashAttention-3" in lines[0]


def test_no_network_is_noticed_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert train.hub_answers(5) is False


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedules


def test_every_parameter_in_exactly_one_group(both):
    model, _ = build()
    grouped = [
        weight for group in train.build_optimizer(model, torch.float32).param_groups for weight in group["params"]
    ]
    assert len(grouped) == len({id(weight) for weight in grouped})
    assert {id(weight) for weight in grouped} == {id(weight) for weight in model.parameters()}


def test_adamw_against_torch(small):
    ours = torch.nn.Parameter(torch.randn(20, 30))
    theirs = torch.nn.Parameter(ours.detach().clone())
    group = dict(kind="adamw", params=[ours], lr=0.03, decay=0.1, betas=(0.8, 0.95))
    optimizer = train.MuonAdamW([group], torch.float32)
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), eps=train.ADAM_EPS, weight_decay=0.1)
    for _ in range(10):
        ours.grad = torch.randn(20, 30)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_weights_and_state_are_float32(both):
    """In bfloat16 small steps would be lost, and second moments would never change."""
    benchmark = types.SimpleNamespace(vocab_size=512, max_seq_len=64)
    model = train.build_model(benchmark, CPU, torch.bfloat16)
    optimizer = train.build_optimizer(model, torch.bfloat16)
    state = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert state and {tensor.dtype for tensor in (*model.parameters(), *state)} == {torch.float32}
    ids = torch.randint(512, (3, 65))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and {weight.grad.dtype for weight in model.parameters()} == {torch.float32}
    assert model.blocks[0](torch.zeros(1, 64, 64).bfloat16(), 0, 1, 0, ids[:1, :-1], model.cos, model.sin).dtype == (
        torch.bfloat16
    )


def test_rows_that_were_used_are_updated(small):
    """Against a loop in which every row that a batch uses is a vector with one mean square."""
    table = torch.nn.Embedding(12, 5, sparse=True)
    expected, squares = table.weight.detach().clone(), torch.zeros(12)
    optimizer = train.MuonAdamW([dict(kind="rows", params=[table.weight], lr=0.1, betas=(0.8, 0.95), decay=0.0)], None)
    factor = torch.randn(3, 9, 5)
    for _ in range(5):
        ids = torch.randint(8, (3, 9))  # never 8 to 11
        table.zero_grad(set_to_none=True)
        (table(ids) * factor).sum().backward()
        gradient = table.weight.grad.to_dense()
        optimizer.step()
        for row in ids.unique():
            squares[row] = 0.95 * squares[row] + 0.05 * gradient[row].square().mean()
            expected[row] -= 0.1 * gradient[row] / squares[row].sqrt()
        assert torch.allclose(table.weight, expected, atol=1e-6)
    assert torch.allclose(optimizer.state[table.weight]["square"][:, 0], squares)


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 16, 64), (1, 1, 8)])
def test_orthogonalize_against_svd(shape):
    X = torch.randn(shape)
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    Y = train.orthogonalize(X, torch.float32)
    values = torch.linalg.svdvals(Y)
    assert values.max() < 1.3 and values.median() > 0.8
    assert torch.nn.functional.cosine_similarity(Y.flatten(1), (U @ V).flatten(1)).min() > 0.95


def test_muon_update(small):
    """Without decay the step has the size that the learning rate says, whatever the size of the gradient."""
    for shape in ((32, 32), (64, 16), (16, 64)):
        for size in (1e-4, 1e4):
            weight = torch.nn.Parameter(torch.zeros(shape))
            group = dict(kind="muon", params=[weight], lr=0.1, decay=0.0, momentum=0.9)
            weight.grad = size * torch.randn(shape)
            train.MuonAdamW([group], torch.float32).step()
            expected = 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * math.sqrt(min(shape))
            assert weight.norm().item() == pytest.approx(expected, rel=0.15)


def test_upright_and_lying_matrices_in_one_group(small):
    """Together they step as each alone would: second moments are per row of the upright, per column of the lying."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 8), (8, 32), (32, 8))]
    alone = [weight.detach().clone() for weight in weights]
    optimizer = train.MuonAdamW([dict(kind="muon", params=weights, lr=0.1, decay=0.2, momentum=0.9)], torch.float32)
    momenta, squares = [torch.zeros(w.shape) for w in weights], [torch.zeros(32) for w in weights]
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape) * torch.rand(weight.shape)
            momenta[i] = 0.9 * momenta[i] + 0.1 * weight.grad
            nesterov = 0.1 * weight.grad + 0.9 * momenta[i]
            tall = weight.size(0) > weight.size(1)
            update = train.orthogonalize((nesterov.T if tall else nesterov)[None], torch.float32)[0]  # [8, 32]
            squares[i] = 0.95 * squares[i] + 0.05 * update.square().mean(dim=0)
            scaled = update / squares[i].sqrt()
            scaled = scaled * update.norm() / scaled.norm()
            scaled = scaled.T if tall else scaled
            step = 0.1 * (2 if tall else 1) * scaled + 0.1 * 0.2 * alone[i] * (scaled * alone[i] >= 0)
            alone[i] = alone[i] - step
        optimizer.step()
    for weight, expected in zip(weights, alone):
        assert torch.allclose(weight, expected, atol=1e-5)


def test_weight_decay_is_cautious(small):
    weight = torch.nn.Parameter(torch.randn(16, 16))
    steps = []
    for decay in (0.0, 0.5):
        copy = torch.nn.Parameter(weight.detach().clone())
        copy.grad = torch.ones(16, 16).tril() + torch.eye(16)
        train.MuonAdamW([dict(kind="muon", params=[copy], lr=0.1, decay=decay, momentum=0.9)], torch.float32).step()
        steps.append(weight.detach() - copy.detach())
    plain, decayed = steps
    assert torch.allclose(decayed - plain, 0.05 * weight * (plain * weight >= 0), atol=1e-6)


def test_compiled_updates_are_the_same(small):
    def result(compile):
        torch.manual_seed(3)
        weights = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8, 4))]
        groups = [
            dict(kind="muon", params=weights[:1], lr=0.1, decay=0.1, momentum=0.9),
            dict(kind="adamw", params=weights[1:], lr=0.1, decay=0.1, betas=(0.8, 0.9)),
        ]
        optimizer = train.MuonAdamW(groups, torch.float32, compile)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])

    assert torch.allclose(result(False), result(True), atol=1e-5)


def test_schedules():
    assert train.lr_factor(0) == train.lr_factor(1 - train.WARMDOWN) == 1
    assert train.lr_factor(1) == pytest.approx(train.FINAL_LR) and train.lr_factor(0.625) == pytest.approx(0.525)
    assert train.muon_momentum(0) == 0.85 and train.muon_momentum(train.MOMENTUM_RAMP) == train.muon_momentum(1) == 0.95


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.inf),
        ("NVIDIA RTX A1000", math.inf),
        ("NVIDIA A10G", math.inf),
        ("NVIDIA H100 NVL", math.inf),
        ("cpu x86_64 x2", math.inf),
    ],
)
def test_peak_flops(name, flops):
    assert train.peak_flops(name) == flops


def test_warm_up_leaves_no_trace(both):
    model, ids = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert train.warm_up(model, train.build_optimizer(model, torch.float32), ids[:, :-1], ids[:, 1:], 2, 1) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_accumulation_is_the_mean(both):
    results = []
    for split in (1, 3):
        torch.manual_seed(5)
        model, ids = build()
        batches = [(part[:, :-1], part[:, 1:]) for part in ids.chunk(split)]
        loss = train.train_step(model, train.build_optimizer(model, torch.float32), batches, 0.5)
        results.append((loss.item(), model.lm_head.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_training_learns(both):
    model, ids = build()
    optimizer = train.build_optimizer(model, torch.float32)
    losses = [train.train_step(model, optimizer, [(ids[:, :-1], ids[:, 1:])], step / 30).item() for step in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 101.0])
def test_divergence_stops_the_run(loss):
    with pytest.raises(SystemExit, match="stopped at step 7: .*MATRIX_LR"):
        train.check_loss(loss, 7, 0.5)
    train.check_loss(99.0, 7, 0.5)


def sitting(monkeypatch, **constants):
    """Run main() in this process, small and uncompiled."""
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)
    return train.main()


def test_out_of_memory_halves_the_rows(small, benchmark, monkeypatch, capfd):
    forward = train.GPT.forward

    def hungry(self, inputs, targets=None):
        if len(inputs) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(self, inputs, targets)

    monkeypatch.setattr(train.GPT, "forward", hungry)
    summary = sitting(monkeypatch, TOTAL_BATCH_SIZE=2048, DEVICE_BATCH_SIZE=4096, DEPTH=2)
    out = capfd.readouterr().out
    assert "32 rows do not fit in memory, trying 16" in out and "2,048 tokens a step (4 x 8 rows)" in out
    assert 0 < float(summary["val_bpb"]) < 6


def test_a_broken_compiler_is_done_without(small, benchmark, monkeypatch, capfd):
    def failing(*arguments, **options):
        raise RuntimeError("no C++ compiler found\nmore lines")

    monkeypatch.setattr(train.GPT, "compile_parts", failing)
    sitting(monkeypatch, TOTAL_BATCH_SIZE=2048, DEPTH=2, COMPILE=True)
    assert "COMPILE: torch.compile failed here, going on without (no C++ compiler found)" in capfd.readouterr().out


def test_nan_ends_the_run(small, benchmark, monkeypatch):
    with pytest.raises(SystemExit, match="stopped at step"):
        sitting(monkeypatch, TOTAL_BATCH_SIZE=2048, DEPTH=2, HEAD_LR=1e9, WTE_LR=math.nan)
    prepare.TrainingClock(benchmark, "cpu").lock.release()


def test_random_numbers_of_a_training_do_not_depend_on_its_warm_up(small, benchmark, monkeypatch):
    class Enough(Exception):
        pass

    def drawing_step(model, optimizer, batches, progress):
        drawn.append(torch.rand(()).item())  # as dropout would
        if len(drawn) > train.WARMUP_STEPS:
            raise Enough
        return step(model, optimizer, batches, progress)

    step, first = train.train_step, set()
    monkeypatch.setattr(train, "train_step", drawing_step)
    for steps in (1, 2, 3):
        drawn = []
        with pytest.raises(Enough):
            sitting(monkeypatch, TOTAL_BATCH_SIZE=2048, DEPTH=2, WARMUP_STEPS=steps)
        prepare.TrainingClock(benchmark, "cpu").lock.release()
        first.add(drawn[-1])
    assert len(first) == 1


def test_end_to_end(benchmark):
    """The untouched file in a process of its own, without torch.compile to save a minute: every key, in order."""
    before = len(prepare.read_journal(benchmark.path))
    result = run("train.py", AUTORESEARCH_SEED="3", TORCHDYNAMO_DISABLE="1")
    assert result.returncode == 0, result.stderr
    log, summary = result.stdout.split("\n---\n")
    values = dict(line.split(":", 1) for line in summary.splitlines())
    assert list(values) == KEYS and all(line[17] == " " and line[18] != " " for line in summary.splitlines())
    journal = prepare.read_journal(benchmark.path)
    assert len(journal) == before + 1
    assert float(values["val_bpb"]) == pytest.approx(journal[-1]["val_bpb"], abs=1e-6)
    assert journal[-1]["seed"] == 3 and journal[-1]["script"] == "train.py"
    assert journal[-1]["train_sha256"] == prepare.sha256(ROOT / "train.py")
    assert 0 < float(values["val_bpb"]) < 6 and float(values["training_seconds"]) <= 3.3
    assert float(values["total_seconds"]) > float(values["training_seconds"])
    assert journal[-1]["tokens"] == pytest.approx(1e6 * float(values["total_tokens_M"]), abs=5e4)
    assert len(log.splitlines()) <= 60 and max(map(len, log.splitlines())) < 250


@pytest.mark.parametrize("compiled", [False, True])
def test_probe_passes_the_real_model(both, benchmark, compiled):
    model = train.build_model(benchmark, CPU)
    awaken(model)
    if compiled:
        model.compile_parts()
    prepare.check_causality(model, benchmark.rows("val"), 8, 512, CPU)


def test_probe_catches_a_window_that_is_off_by_one(small, benchmark, monkeypatch):
    model = train.build_model(benchmark, CPU)
    awaken(model)
    monkeypatch.setattr(train, "BACK_END", lambda q, k, v, window: train.sdpa(q, k.roll(-1, 1), v.roll(-1, 1), window))
    with pytest.raises(RuntimeError, match="sees the future"):
        prepare.check_causality(model, benchmark.rows("val"), 8, 512, CPU)

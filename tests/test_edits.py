"""Ten edits that an agent makes of train.py: each trains for a second, and is looked at for what it once broke."""

import copy
import functools
import re
import types

import pytest
import torch
from conftest import CPU, ROOT, TEXT, TINY

import prepare
from harness import runtime
from harness.journal import read_journal

SIZES = dict(DEPTH=3, MODEL_DIM=64, HEAD_DIM=16, GATE_CHANNELS=16, NGRAM_ROWS=2**10, TOTAL_BATCH_SIZE=2**9)
SIZES |= dict(COMPILE=False, POINTER=True, LOGIT_CAP=None)


def edited(added="", *edits, **constants):
    """train.py as a module, small, after edits (pattern, replacement) and with code that redefines what it has."""
    source = (ROOT / "train.py").read_text()
    for old, new in edits:
        source, count = re.subn(old, new, source, flags=re.M)
        assert count, f"nothing to edit: {old}"
    module = types.ModuleType("edited")
    exec(compile(source, "train.py", "exec"), vars(module))
    vars(module).update(SIZES | constants)
    exec(compile(added, "added", "exec"), vars(module))
    return module


@pytest.fixture(scope="module")
def tiny(prepared):
    prepare.main(["--text", *TEXT, *TINY])
    return (prepare.HOME / "current").read_text()


@pytest.fixture
def bench(tiny):
    (prepare.HOME / "current").write_text(tiny)
    return prepare.load_benchmark()


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without Inductor: graphs and guards are real, and take no minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


def build(module, bench, dtype=torch.float32, compiled=False):
    return module.build_model(bench, runtime.Setup(CPU, dtype, module.banded, compiled))


def steps(module, bench, model, count=20):
    """Train on one batch; the losses."""
    optimizers = module.build_optimizers(model)
    inputs, targets, _ = next(prepare.make_dataloader(bench, "train", 16, CPU))
    return [module.train_step(model, optimizers, [(inputs, targets)], i / count).item() for i in range(count)]


def groups_of(module, model):
    """Which optimizer has each parameter, by name."""
    names = {weight: name for name, weight in model.named_parameters()}
    return {
        names[weight]: type(optimizer).__name__
        for optimizer in module.build_optimizers(model)
        for group in optimizer.param_groups
        for weight in group["params"]
    }


def ids(bench, rows=4):
    return torch.from_numpy(bench.rows("val")[:rows, :-1].astype("int64"))


# --------------------------------------
# Edits that are code: a class or a function in the place of ours

SWIGLU = """
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Linear(MODEL_DIM, 2 * MODEL_DIM)
        self.up = Linear(MODEL_DIM, 2 * MODEL_DIM)
        self.down = Linear(2 * MODEL_DIM, MODEL_DIM, scale=0)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))
"""
COSINE = """
def lr_factor(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))
"""
STACKED_EXPERTS = """
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Linear(MODEL_DIM, 4)
        self.up = nn.Parameter(torch.randn(4, MODEL_DIM, 32) / 8)
        self.down = nn.Parameter(torch.zeros(4, 32, MODEL_DIM))

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        hidden = torch.einsum("btd,edh->bteh", x, self.up.to(x.dtype)).relu().square()
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.down.to(x.dtype), shares)
"""
EXPERTS = """
class Experts(nn.Module):
    def __init__(self, MLP=MLP):
        super().__init__()
        self.router = Linear(MODEL_DIM, 3)
        self.experts = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x):
        share, chosen = self.router(x)[..., :2].softmax(-1).max(-1)  # the third is never chosen
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                y[mine] = share[mine][:, None] * expert(x[mine])
        return y

MLP = Experts
"""
TIED = """
class Tied(GPT):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.head.lm_head.weight = self.embed.wte.weight

GPT = Tied
"""
GAIN = """
class Gained(GPT):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(MODEL_DIM))

GPT = Gained
"""
EDITS = {  # what an agent adds, its edits of lines, its constants
    "swiglu": (SWIGLU, [], {}),
    "grouped queries": ("", [], dict(QUERY_GROUP=2)),
    "tied": (TIED, [(r"self\.lm_head\(x\)\.float\(\)", r"\g<0> / MODEL_DIM")], {}),
    "cosine": (COSINE, [], {}),
    "AdamW": (
        "",
        [(r"^    adamw = ", "    muon, adamw = [], muon + ")],
        {},
    ),
    "experts in stacks": (STACKED_EXPERTS, [], {}),
    "experts": (EXPERTS, [], {}),
    "gain": (GAIN, [(r"= block\(", "= self.gain * block(")], {}),
}


@pytest.fixture(params=EDITS)
def edit(request):
    added, edits, constants = EDITS[request.param]
    return request.param, edited(added, *edits, **constants)


def test_an_edit_trains_all_that_it_adds_and_is_scored(edit, bench, capfd):
    """By main(), from the trial steps to the score: no error, no parameter left alone, one that is idle is named."""
    kind, module = edit
    models = []
    build_model = module.build_model
    module.build_model = lambda *arguments: models.append(build_model(*arguments)) or models[-1]
    summary = module.main()
    assert 0.5 < float(summary["val_bpb"]) < 5 and read_journal(bench.path)[-1]["steps"] == summary["num_steps"]

    trained, fresh = models[-1], build(module, bench)
    untouched = {
        name for (name, weight), old in zip(trained.named_parameters(), fresh.parameters()) if torch.equal(weight, old)
    }
    idle = {name for name in untouched if ".experts.2." in name}
    assert untouched == idle and bool(idle) == (kind == "experts")
    named = set(re.findall("(.*) has no gradient", capfd.readouterr().out))
    assert named == idle


def test_an_edit_learns(edit, bench):
    losses = steps(edit[1], bench, build(edit[1], bench))
    assert losses[-1] < 0.7 * losses[0]


def test_where_parameters_train(bench):
    """Matrices by Muon, or by what the agent took instead; a gain of the stream and a router as what they are."""
    found = {kind: edited(added, *edits, **constants) for kind, (added, edits, constants) in EDITS.items()}
    found = {kind: groups_of(module, build(module, bench)) for kind, module in found.items()}
    assert found["swiglu"]["blocks.0.mlp.gate.weight"] == found["experts"]["blocks.1.mlp.router.weight"] == "Muon"
    assert found["experts in stacks"]["blocks.0.mlp.up"] == found["experts in stacks"]["blocks.0.mlp.down"] == "Muon"
    assert found["gain"]["gain"] == found["AdamW"]["blocks.0.mlp.up.weight"] == "AdamW"
    assert "Muon" not in found["AdamW"].values()
    assert "head.lm_head.weight" not in found["tied"] and found["tied"]["embed.wte.weight"] == "AdamW"


def test_decay_of_matrices_fades_with_any_optimizer(bench):
    module = edited(*EDITS["AdamW"][:1], *EDITS["AdamW"][1])
    optimizers = module.build_optimizers(build(module, bench))
    module.set_schedules(optimizers, 0.75)
    decays = {tuple(g["params"][0].shape): g["weight_decay"] for g in optimizers[0].param_groups if g["params"]}
    assert decays[256, 64] == pytest.approx(module.MATRIX_DECAY / 4) and decays[300, 64] == module.UNEMBEDDING_DECAY


def test_rates_follow_another_schedule(bench):
    module = edited(COSINE)
    optimizers = module.build_optimizers(build(module, bench))
    for progress, share in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        module.set_schedules(optimizers, progress)
        assert optimizers[0].param_groups[0]["lr"] == pytest.approx(share * module.MATRIX_LR)


def test_an_expert_steps_as_the_matrix_of_a_layer_would(bench):
    """Each of a stack [N, inputs, outputs], in the same direction and as far."""
    module = edited()
    stack = torch.nn.Parameter(torch.randn(3, 8, 24))
    layers = [torch.nn.Parameter(matrix.mT.clone()) for matrix in stack.detach()]
    for weights in ([stack], layers):
        group = dict(params=weights, lr=0.1, weight_decay=0.2)
        optimizer = module.Muon([group], runtime.Setup(CPU, torch.float32, None))
        torch.manual_seed(0)
        for _ in range(3):
            gradient = torch.randn(3, 8, 24)
            stack.grad = gradient
            for layer, matrix in zip(layers, gradient):
                layer.grad = matrix.mT.clone()
            optimizer.step()
    for matrix, layer in zip(stack, layers):
        assert torch.allclose(matrix.mT, layer, atol=1e-5)


def test_flops_count_all_experts(bench):
    """Four of 2 x 64 x 32 weights each, and a router, in three blocks, where an MLP has 2 x 64 x 256."""
    plain, experts = (build(edited(added), bench).flops_per_token(32) for added in ("", STACKED_EXPERTS))
    assert experts - plain == 3 * 6 * (4 * 2 * 64 * 32 + 64 * 4 - 2 * 64 * 256)


@pytest.mark.parametrize("pattern", ["SML", "L8"])
def test_a_window_that_does_not_exist_is_refused(bench, pattern):
    with pytest.raises(SystemExit, match=f"WINDOW_PATTERN: there is no window {pattern[1]}, only S and L"):
        build(edited(WINDOW_PATTERN=pattern, DEPTH=4), bench)


def test_one_head_of_keys_is_refused(bench):
    with pytest.raises(AssertionError, match="HEAD_DIM: must fit twice into"):
        build(edited(QUERY_GROUP=4), bench)


def test_a_float32_gain_leaves_products_of_matrices_in_bfloat16(bench):
    added, edits, _ = EDITS["gain"]
    model = build(edited(added, *edits), bench, torch.bfloat16)
    found = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    streams = []
    model.head.register_forward_hook(lambda module, inputs, output: streams.append(inputs[0].dtype))
    assert model(ids(bench)).isfinite().all()
    assert found == {torch.bfloat16} and streams == [torch.float32]


# --------------------------------------
# A batch ramp with longer rows in the second half, and averages of weights

SHORT = """        short = progress < 0.5
        batches = [next(loader) for _ in range(1 if short else accumulation)]
        if short:
            batches = [(inputs.view(-1, 16), targets.view(-1, 16), epoch) for inputs, targets, epoch in batches]"""
RAMP = [
    (r"^        batches = \[next\(loader\).*$", SHORT),
    (r"\[\(rows, T\)\]", "[(rows, T), (2 * rows, T // 2)]"),
]


def test_a_ramp_and_longer_rows_compile_before_the_clock_starts(bench, monkeypatch, eager_backend):
    graphs = {}

    def marking(method):
        def mark(clock):
            method(clock)
            graphs[method.__name__] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

        return mark

    for name in ("start", "stop"):
        monkeypatch.setattr(prepare.TrainingClock, name, marking(getattr(prepare.TrainingClock, name)))
    monkeypatch.setattr(runtime, "why_not_compiled", lambda device: None)
    edited("", *RAMP, COMPILE=True, DEVICE_BATCH_SIZE=8).main()
    assert graphs["start"] == graphs["stop"] > 10


def test_tokens_and_mfu_are_counted_as_they_are_trained_on(bench, monkeypatch):
    """In a ramp they are not steps times the last batch; and short rows have less attention."""
    module = edited("", *RAMP, DEVICE_BATCH_SIZE=8)
    seen = []
    train_step = module.train_step

    def spy(model, optimizers, batches, progress):
        seen.extend((inputs.shape, model) for inputs, *_ in batches)
        return train_step(model, optimizers, batches, progress)

    def start(clock, start=prepare.TrainingClock.start):
        seen.clear()
        start(clock)

    module.train_step = spy
    monkeypatch.setattr(prepare.TrainingClock, "start", start)
    monkeypatch.setattr(runtime, "peak_flops", lambda device: 1e6)
    summary = module.main()
    assert {shape for shape, _ in seen} == {(8, 32), (16, 16)}
    tokens = sum(shape.numel() for shape, _ in seen)
    flops = sum(shape.numel() * model.flops_per_token(shape[1]) for shape, model in seen)
    assert summary["total_tokens_M"] == f"{tokens / 1e6:.1f}"
    assert float(summary["mfu_percent"]) == pytest.approx(1e-4 * flops / float(summary["training_seconds"]), rel=0.1)


def average(model):
    """As torch does it: a copy of the model that is updated."""
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged


@pytest.mark.parametrize("copied", [copy.deepcopy, average])
def test_a_copy_of_a_compiled_model_has_weights_of_its_own(bench, eager_backend, copied):
    """All of them: a function that is bound to the original would keep its embeddings."""
    module = edited()
    model = build(module, bench, compiled=True)
    model(ids(bench))
    other = copied(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    plain = build(module, bench)
    plain.load_state_dict(getattr(other, "module", other).state_dict())
    assert torch.allclose(other(ids(bench)), plain(ids(bench)), atol=1e-5)
    assert not torch.allclose(other(ids(bench)), model(ids(bench)), atol=1e-2)
    compiled = [part for part in other.modules() if part._compiled_call_impl is not None]
    assert len(compiled) == len(model.blocks) + 2


MEAN = [
    (r"^    optimizers = build_optimizers\(model\)$", "\\g<0>\n    mean = torch.optim.swa_utils.AveragedModel(model)"),
    (r"^        step \+= 1$", "\\g<0>\n        mean.update_parameters(model)"),
]
SCORED = r"evaluate_bpb\(model,"
MEANS = {
    "the copy": [*MEAN, (SCORED, "evaluate_bpb(mean,")],
    "by hand": [*MEAN, (rf"^    val_bpb = {SCORED}", "    model.load_state_dict(mean.module.state_dict())\n\\g<0>")],
}


@pytest.mark.parametrize("kind", MEANS)
def test_an_average_of_weights_is_what_is_scored(bench, eager_backend, monkeypatch, kind):
    """Found again from best.pt, say: the score of these weights in a model that was never trained."""
    module = edited("", *MEANS[kind], COMPILE=True)
    monkeypatch.setattr(runtime, "why_not_compiled", lambda device: None)
    scored = []
    record_run = prepare.journal.record_run
    monkeypatch.setattr(
        prepare.journal, "record_run", lambda path, run, model: scored.append(model) or record_run(path, run, model)
    )
    val_bpb = float(module.main()["val_bpb"])
    plain = build(module, bench)
    plain.load_state_dict(getattr(scored[0], "module", scored[0]).state_dict())
    clock = prepare.TrainingClock(bench, "cpu")
    clock.start()
    clock.stop()
    assert prepare.evaluate_bpb(plain, bench, 8, clock) == pytest.approx(val_bpb, abs=2e-3)

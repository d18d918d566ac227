"""
Checks that edits of train.py, as an agent makes them, train all that they add, compile before the clock runs, are
counted right, and are scored with the weights that they trained.
"""

import copy
import functools
import math
import re
import types

import pytest
import torch
from conftest import CPU, ROOT, score

import prepare
from harness import runtime
from harness.journal import read_journal

SIZES = dict(DEPTH=3, MODEL_DIM=64, HEAD_DIM=16, GATE_CHANNELS=16, NGRAM_ROWS=2**10, TOTAL_BATCH_SIZE=2**10)
SIZES |= dict(COMPILE=False, POINTER=True, LOGIT_CAP=None)


def edited(added="", edits=(), **constants):
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


@pytest.fixture(autouse=True)
def twenty_steps(benchmark, monkeypatch):
    """The benchmark's 3 seconds are 20 steps in float32, however long they take."""
    monkeypatch.setattr(prepare.TrainingClock, "elapsed", property(lambda clock: 3 * len(clock.ticks) / 20.5))
    monkeypatch.setattr(prepare, "LATE_LIMIT", math.inf)
    monkeypatch.setattr(runtime, "has_fast_bfloat16", lambda device: False)


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without Inductor: graphs and guards are real, and take no minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(runtime, "why_not_compiled", lambda device: None)
    torch._dynamo.reset()


def build_edited(module, benchmark, dtype=torch.float32, compiled=False):
    return module.build_model(benchmark, runtime.Setup(CPU, dtype, module.banded, compiled))


# --------------------------------------
# Code in the place of ours

SWIGLU = """
class MLP(MLP):
    def __init__(self):
        super().__init__()
        self.gate = Linear(MODEL_DIM, MLP_RATIO * MODEL_DIM)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))
"""
EXPERTS = """
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
TIED = """
class GPT(GPT):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.head.lm_head.weight = self.embed.wte.weight
"""
GROWN = """
class GPT(GPT):
    def __init__(self, vocab_size, *rest):
        super().__init__(vocab_size, *rest)
        self.gain = nn.Parameter(torch.ones(()))
        self.gains = nn.ParameterList(torch.ones(MODEL_DIM) for _ in range(2))
        self.other = nn.Embedding(vocab_size, MODEL_DIM)
        self.mix = nn.Linear(MODEL_DIM, MODEL_DIM)
        self.conv = nn.Conv1d(MODEL_DIM, MODEL_DIM, 3, groups=MODEL_DIM // 2)
        self.frozen = nn.Linear(MODEL_DIM, MODEL_DIM, bias=False).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(()))
        self.idle = Linear(MODEL_DIM, MODEL_DIM)

    def grow(self, x, inputs):
        x = self.mix(self.frozen(x) + self.other(inputs))
        return self.gain * self.gains[0] * self.gains[1] * self.conv(F.pad(x.mT, (2, 0))).mT
"""
MEAN = "    mean = torch.optim.swa_utils.AveragedModel(model)"
AVERAGE = [
    (r"^    optimizers = build_optimizers\(model\)$", rf"\g<0>\n{MEAN}"),
    (r"^        step \+= 1$", r"\g<0>\n        mean.update_parameters(model)"),
    (r"evaluate_bpb\(model,", "evaluate_bpb(mean,"),
]
EDITS = {
    "swiglu": dict(added=SWIGLU),
    "grouped queries": dict(QUERY_GROUP=2),
    "tied": dict(added=TIED, edits=[(r"self\.lm_head\(x\)\.float\(\)", r"\g<0> / MODEL_DIM")]),
    "AdamW": dict(edits=[(r"^    adamw = ", "    muon, adamw = [], muon + ")]),
    "experts": dict(added=EXPERTS),
    "grown": dict(added=GROWN, edits=[(r"^( +x = )(self\.embed\(.*\))$", r"\1self.grow(\2, inputs)")]),
    "average": dict(edits=AVERAGE, COMPILE=True),
}
NAMED = {"grown": ["unused", "idle.weight"]}  # parameters that nothing reaches


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_trains_all_that_it_adds_and_is_scored(kind, benchmark, eager_backend, monkeypatch, capfd):
    """By main(), from the trial steps to the score, which is that of the trained weights in a model of their own."""
    recorded = []
    monkeypatch.setattr(prepare.journal, "record_run", lambda path, run, model: recorded.append((run, model)))
    module, named = edited(**EDITS[kind]), NAMED.get(kind, [])
    summary = module.main()
    assert re.findall("(.*) has no gradient", capfd.readouterr().out) == named
    run, scored = recorded[0]
    assert run["steps"] == summary["num_steps"] == 20

    model = build_edited(module, benchmark)
    trained = getattr(scored, "module", scored).state_dict()
    fresh = {name for name, weight in model.named_parameters() if torch.equal(weight, trained[name])}
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert fresh == {*named, *frozen}
    untrained = score(benchmark, model)
    model.load_state_dict(trained)
    assert score(benchmark, model) == pytest.approx(run["val_bpb"], abs=2e-3) and run["val_bpb"] < 0.9 * untrained


SCALED = (64 / 768) ** -0.5
GROUPS = [  # the edit, a parameter, its optimizer, its rate
    ("swiglu", "blocks.0.mlp.gate.weight", "Muon", ("MATRIX_LR", 2)),
    ("experts", "blocks.1.mlp.router.weight", "Muon", ("MATRIX_LR", 1)),
    ("experts", "blocks.0.mlp.up", "Muon", ("MATRIX_LR", 1)),
    ("AdamW", "blocks.0.mlp.up.weight", "AdamW", ("MATRIX_LR", 2)),
    ("tied", "head.lm_head.weight", "AdamW", ("EMBEDDING_LR", SCALED)),
    ("grown", "head.lm_head.weight", "AdamW", ("UNEMBEDDING_LR", SCALED)),
    ("grown", "other.weight", "AdamW", ("EMBEDDING_LR", SCALED)),
    ("grown", "mix.weight", "Muon", ("MATRIX_LR", 1)),
    ("grown", "mix.bias", "AdamW", ("SCALAR_LR", 1)),
    ("grown", "conv.weight", "AdamW", ("SCALAR_LR", 1)),
    ("grown", "gain", "AdamW", ("SCALAR_LR", 1)),
    ("grown", "x0_lambdas", "AdamW", ("X0_LR", 1)),
]


@pytest.mark.parametrize(("kind", "name", "optimizer", "rate"), GROUPS, ids=str)
def test_a_parameter_trains_as_what_it_is(benchmark, kind, name, optimizer, rate):
    """And starts as what it was made."""
    module = edited(**EDITS[kind])
    model = build_edited(module, benchmark)
    weight, (constant, factor) = model.get_parameter(name), rate
    places = []
    for owner in module.build_optimizers(model):
        for group in owner.param_groups:
            if any(weight is member for member in group["params"]):
                places.append((type(owner).__name__, group["lr"]))
    assert weight.any() and places == [(optimizer, pytest.approx(factor * getattr(module, constant)))]


def test_decay_of_matrices_fades_with_any_optimizer(benchmark):
    module = edited(**EDITS["AdamW"])
    optimizers = module.build_optimizers(build_edited(module, benchmark))
    module.set_schedules(optimizers, 0.75)
    decays = {tuple(g["params"][0].shape): g["weight_decay"] for g in optimizers[0].param_groups if g["params"]}
    assert decays[256, 64] == pytest.approx(module.MATRIX_DECAY / 4) and decays[512, 64] == module.UNEMBEDDING_DECAY


def test_constants_at_their_ends_divide_by_nothing(benchmark):
    module = edited(WARMDOWN_RATIO=0, MOMENTUM_RAMP=0, NGRAM_FADE_USES=0)
    optimizers = module.build_optimizers(build_edited(module, benchmark))
    for progress, factor in ((0.0, 1.0), (0.999, 1.0), (1.0, module.FINAL_LR_FRAC)):
        module.set_schedules(optimizers, progress)
        rates = {group["lr"] / group["initial_lr"] for optimizer in optimizers for group in optimizer.param_groups}
        assert [min(rates), max(rates)] == pytest.approx([factor, factor])


def test_flops_count_all_experts(benchmark):
    """Four of 2 x 64 x 32 weights each, and a router, in three blocks, where an MLP has 2 x 64 x 256."""
    plain, experts = (build_edited(edited(added), benchmark).flops_per_token(32) for added in ("", EXPERTS))
    assert experts - plain == 3 * 6 * (4 * 2 * 64 * 32 + 64 * 4 - 2 * 64 * 256)


REFUSED = {
    "no such window": (dict(WINDOW_PATTERN="SML"), "WINDOW_PATTERN: there is no window M, only S and L"),
    "one head of keys": (dict(QUERY_GROUP=4), "HEAD_DIM: must fit twice into"),
    "in two groups": (dict(edits=[(r'(members\["wte"\])', r'\1 + members["x0"]')]), "x0_lambdas is in 2 groups of"),
    "in no group": (dict(edits=[(r'^.*members\["scalar"\],.*\n', "")]), "resid_lambdas is in 0 groups of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_edit_that_cannot_be_right_is_refused_by_name(benchmark, kind):
    edit, message = REFUSED[kind]
    module = edited(**edit)
    with pytest.raises((SystemExit, AssertionError), match=message):
        module.build_optimizers(build_edited(module, benchmark))


def test_a_float32_factor_leaves_products_of_matrices_in_bfloat16(benchmark):
    model = build_edited(edited(edits=[(r"= block\(", "= torch.ones(MODEL_DIM) * block(")]), benchmark, torch.bfloat16)
    products, streams = set(), set()
    model.head.register_forward_hook(lambda module, inputs, output: streams.add(inputs[0].dtype))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: products.add(output.dtype))
    assert model(torch.arange(256).view(4, 64)).isfinite().all()
    assert products == {torch.bfloat16} and streams == {torch.float32}


# --------------------------------------
# A batch ramp with longer rows in the second half, and copies of a model

SHORT = """        short = progress < 0.5
        batches = [next(loader) for _ in range(1 if short else accumulation)]
        if short:
            batches = [(inputs.view(-1, 32), targets.view(-1, 32), epoch) for inputs, targets, epoch in batches]"""
RAMP = [(r"^        batches = \[next\(loader\).*$", SHORT), (r"\[\(rows, T\)\]", "[(rows, T), (2 * rows, T // 2)]")]


def test_a_ramp_compiles_before_the_clock_starts_and_is_counted_as_it_is(benchmark, monkeypatch, eager_backend):
    """Its tokens are not steps times the last batch, and short rows have less attention."""
    module, shapes, graphs = edited(edits=RAMP, COMPILE=True, DEVICE_BATCH_SIZE=8), [], []
    train_step, stats = module.train_step, torch._dynamo.utils.counters["stats"]

    def start(clock, start=prepare.TrainingClock.start):
        shapes.clear()
        graphs[:] = [stats["unique_graphs"]]
        start(clock)

    def spy(model, optimizers, batches, progress):
        loss = train_step(model, optimizers, batches, progress)
        shapes.extend(inputs.shape for inputs, *_ in batches)
        graphs.append(stats["unique_graphs"])
        return loss

    module.train_step = spy
    monkeypatch.setattr(prepare.TrainingClock, "start", start)
    monkeypatch.setitem(runtime.PEAK_FLOPS, prepare.device_name(CPU), 1e6)
    summary = module.main()
    assert set(shapes) == {(8, 64), (16, 32)}
    assert graphs[0] > 10 and set(graphs) == {graphs[0]}
    model = build_edited(module, benchmark)
    flops = sum(shape.numel() * model.flops_per_token(shape[1]) for shape in shapes)
    assert summary["total_tokens_M"] == f"{sum(map(torch.Size.numel, shapes)) / 1e6:.1f}"
    assert summary["mfu_percent"] == f"{100 * flops / (60 / 20.5) / 1e6:.2f}"


CHANGING = [(r"^        x = r \* x", "        x = 1.0 * self.share * r * x")]
SHARE = """
def set_schedules(optimizers, progress, before=set_schedules):
    before(optimizers, progress)
    Block.share = {}
Block.share = 1.0
"""


@pytest.mark.parametrize("share, count", [("1.0 + round(progress * 4)", 4), ("torch.tensor(1.0 + progress)", 0)])
def test_what_recompiles_while_the_clock_runs_is_named(share, count, own, eager_backend, capsys):
    """A number of Python's that follows progress; as a tensor it recompiles nothing."""
    module = edited(SHARE.format(share), CHANGING, COMPILE=True, DEPTH=1)
    module.main()
    said = re.findall(r"^recompiled (\d+) times .*", capsys.readouterr().out, re.M)
    assert [int(times) for times in said] == [count] * bool(count)
    assert read_journal(own.path)[-1]["recompiled"] == count


def test_a_copy_is_compiled_as_its_original(benchmark, eager_backend):
    model = build_edited(edited(), benchmark, compiled=True)
    for copied in (model, copy.deepcopy(model)):
        compiled = [part for part in copied.modules() if part._compiled_call_impl is not None]
        assert len(compiled) == len(model.blocks) + 2

"""
What train.py makes of this machine, as ratios measured in one run, for the untouched file and the current benchmark:

    uv run prepare.py && uv run python tools/bench.py

Each figure is the best of ROUNDS segments, which take turns, each in a process of its own. And what it would make of an
H100, predicted from the kernels that torch.compile generates for one that isn't there (null_cuda.py), in minutes:

    uv run python tools/bench.py --gpu

And how long a look at a night of 5,000 runs takes, `uv run ledger.py`, and at a hub of 100 agents with 100,000 runs:

    uv run python tools/bench.py --look
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.null_cuda import build, forgive_values

ROUNDS, SECONDS = 3, 10
LOOK_RUNS = 5000
AGENTS, AGENT_RUNS = 100, 1_000  # of a hub


class Segment:
    """A model that trains as train.py does, or the same one in a plain loop: eager, float32, rows read in step."""

    def __init__(self, plain):
        import torch

        import prepare
        import train

        self.torch, self.prepare, self.train = torch, prepare, train
        self.plain = plain
        self.device = prepare.runtime.choose_device()
        benchmark = prepare.load_benchmark()

        # the plain loop has the same model, and nothing that makes it fast
        if plain:
            self.setup = prepare.runtime.Setup(self.device, torch.float32, train.banded)
        else:
            self.setup = prepare.runtime.set_up(self.device, train.banded, train.HEAD_DIM, train.QUERY_GROUP, True)
        self.rows, self.accumulation = train.find_batch(benchmark, self.setup)
        self.model = train.build_model(benchmark, self.setup)
        self.optimizers = train.build_optimizers(self.model)
        self.T = benchmark.max_seq_len
        self.loader = prepare.make_dataloader(benchmark, "train", self.rows, self.device)
        self.table = benchmark.rows("train")

    def batch(self):
        if not self.plain:
            return next(self.loader)[:2]
        chosen = self.torch.randint(len(self.table), (self.rows,)).numpy()
        ids = self.torch.from_numpy(self.table[chosen].astype("int64")).to(self.device)
        return ids[:, :-1], ids[:, 1:]

    def step(self):
        batches = [self.batch() for _ in range(self.accumulation)]
        self.train.train_step(self.model, self.optimizers, batches, 0.1)

    def now(self):
        """When all that was asked of the device is done."""
        self.prepare.synchronize(self.device)
        return time.perf_counter()

    def speed(self, seconds):
        """Tokens a second."""
        start, steps = self.now(), 0
        while time.perf_counter() - start < seconds:
            self.step()
            steps += 1
            # not too far ahead of the device
            if steps % 10 == 0:
                self.now()
        return steps * self.accumulation * self.rows * self.T / (self.now() - start)

    def optimizer_share(self, steps=50):
        """Of the time of a step."""
        spent = []

        def timed(step):
            def call():
                start = self.now()
                step()
                spent.append(self.now() - start)

            return call

        # waiting for the device around each optimizer makes the step slower, its share stays about the same
        for optimizer in self.optimizers:
            optimizer.step = timed(optimizer.step)
        start = self.now()
        for _ in range(steps):
            self.step()
        return sum(spent) / (self.now() - start)

    def peak(self):
        """FLOPs a second of a product of large matrices."""
        size = {"cpu": 1024}.get(self.device.type, 8192)
        a = self.torch.randn(size, size, device=self.device, dtype=self.setup.dtype)
        seconds = []
        for _ in range(20):
            start = self.now()
            a @ a
            seconds.append(self.now() - start)
        return 2 * size**3 / min(seconds)


def segment(plain):
    """Measure one, in a process of its own, and print its figures as JSON."""
    training = Segment(plain)
    training.speed(2)
    tokens = training.speed(SECONDS)
    setup = training.setup
    figures = {
        "tokens": tokens,
        "peak": training.model.flops_per_token(training.T) * tokens / training.peak(),
        "optimizer": training.optimizer_share(),
        "setup": f"{training.prepare.device_name(setup.device)}, {setup.dtype}, compiled: {setup.compiled}",
    }
    print(json.dumps(figures))


def main():
    # in turns, the fastest of each
    best = {}
    for _ in range(ROUNDS):
        for kind in ("train.py", "plain"):
            output = subprocess.run(
                [sys.executable, __file__, "segment", kind], capture_output=True, text=True, check=True
            ).stdout
            found = json.loads(output.splitlines()[-1])
            best[kind] = max(best.get(kind, found), found, key=lambda figures: figures["tokens"])
    ours, plain = best["train.py"], best["plain"]
    print(f"{ours['setup']}: {ours['tokens']:,.0f} tokens/s")
    print(f"{ours['tokens'] / plain['tokens']:.2f} times a plain loop (eager, float32, rows read in step)")
    print(f"{ours['peak']:.2f} of the machine's matrix-product peak")
    print(f"{ours['optimizer']:.3f} of a step is the optimizer")


# --------------------------------------
# An H100, predicted: each kernel takes the longer of its arithmetic and its memory traffic

PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12  # a second: bfloat16, HBM3 (NVIDIA data sheet of the H100 SXM)
# Shares of these peaks that kernels reach. Of matrix products: what makes the reference's step 316 ms with flash3
# (315 to 318 are published); of attention, FlashAttention-2 and -3 on an H100: Shah et al. 2024, arXiv 2407.08608
MATRIX_SHARE, MEMORY_SHARE, ATTENTION_SHARES = 0.54, 0.9, {"varlen": 0.35, "flash3": 0.6}
ROWS, T, V = 128, 2048, 8192
PLAIN = [  # train.py without what it adds to its model
    ("self.ngrams(hash_ngrams(inputs))", "None"),
    ("self.wte(inputs) + ngrams.flatten(2)", "self.wte(inputs)"),
    ("smear(norm(x), self.smear_gates[0])", "norm(x)"),
    ("smear(norm(x), self.smear_gates[1])", "norm(x)"),
    ("k = torch.cat([shift(before), same], dim=2)", "pass"),
]
LATE_NORM = [  # the reference normalizes what is rotated
    ("norm(self.query(x).view(heads))", "self.query(x).view(heads)"),
    ("norm(self.key(x).view(heads))", "self.key(x).view(heads)"),
    (
        "apply_rotary_emb(q, *cos_sin), apply_rotary_emb(k, *cos_sin)",
        "*(norm(apply_rotary_emb(x, *cos_sin)) for x in (q, k))",
    ),
]
REFERENCE = dict(DEPTH=8, MODEL_DIM=512, WINDOW_PATTERN="SSSL", SHORT_WINDOW=1 / 2, TOTAL_BATCH_SIZE=2**19)
VARIANTS = {
    "train.py": ([], {}),
    "with the pointer": ([], dict(POINTER=True)),
    "without n-grams, smear, shifted keys": (PLAIN, {}),
    "reference": (PLAIN + LATE_NORM, REFERENCE),
}


def load_edited(variant):
    """train.py as a module, as the variant has it."""
    edits, constants = VARIANTS[variant]
    source = (ROOT / "train.py").read_text()
    for old, new in edits:
        if source.count(old) != 1:
            sys.exit(f"bench.py: train.py has {source.count(old)} times what a variant edits: {old}")
        source = source.replace(old, new)
    module = types.ModuleType("train")
    exec(compile(source, "train.py", "exec"), vars(module))
    vars(module).update(constants)
    return module


def count_kernels():
    """From now on, (FLOPs, bytes) of every kernel that torch.compile made and that runs go into the list."""
    from torch._inductor.graph import GraphLowering

    executed = []

    def count(graph, compile_to_module=GraphLowering.compile_to_module):
        module = compile_to_module(graph)
        # attention has no count of FLOPs: it is added from a formula
        nodes = [node for node in graph.scheduler.nodes if "varlen" not in str(getattr(node.node, "op_overload", ""))]
        costs = [(node.estimate_flops() or 0, node.get_read_write_buffers_sizes()) for node in nodes]

        def call(arguments, call=module.call):
            executed.extend(costs)
            return call(arguments)

        module.call = call
        return module

    GraphLowering.compile_to_module = count
    return executed


def predict(variant):
    """Compile a training step on the null H100, count what its kernels do, and print how long an H100 should take."""
    import torch

    import prepare

    # two steps: the first one compiles
    train = load_edited(variant)
    executed = count_kernels()
    forgive_values()
    device = prepare.runtime.choose_device()
    setup = prepare.runtime.set_up(device, train.banded, train.HEAD_DIM, train.QUERY_GROUP, True)
    shape = types.SimpleNamespace(vocab_size=V, max_seq_len=T, seed=42)
    model = train.build_model(shape, setup)
    optimizers = train.build_optimizers(model)
    tokens = train.TOTAL_BATCH_SIZE
    batches = [torch.randint(V, (2, ROWS, T), device=device)] * (tokens // (ROWS * T))
    for _ in range(2):
        executed.clear()
        train.train_step(model, optimizers, batches, 0.0)

    # What runs outside of compiled code: AdamW reads 4 and writes 3 numbers; a row of the table is gathered (2),
    # coalesced (2) and stepped (8)
    dense = sum(weight.numel() for weight in model.parameters()) - model.ngrams.weight.numel()
    lookups = 2 * tokens * train.MODEL_DIM // 2
    if "n-grams" in variant or variant == "reference":
        lookups = 0
    seconds = {
        "matrix products": sum(
            max(flops / MATRIX_SHARE / PEAK_FLOPS, size / MEMORY_SHARE / PEAK_BYTES)
            for flops, size in executed
            if flops
        ),
        "other kernels": sum(size for flops, size in executed if not flops) / MEMORY_SHARE / PEAK_BYTES,
        "AdamW and tables": 4 * (7 * dense + 12 * lookups) / MEMORY_SHARE / PEAK_BYTES,
    }
    print(f"{variant}: {tokens:,} tokens a step")
    for part, duration in seconds.items():
        print(f"  {part:<17} {1000 * duration:6.1f} ms")

    # Attention: 4 FLOPs per pair of tokens and channel forward, 10 backward
    pairs = sum(min(window, T) * (1 - min(window, T) / (2 * T)) for window in model.windows)
    for name, share in ATTENTION_SHARES.items():
        attention = (4 + 10) * train.MODEL_DIM * pairs * tokens / share / PEAK_FLOPS
        step = sum(seconds.values()) + attention
        mfu = model.flops_per_token(T) * tokens / step / PEAK_FLOPS
        print(f"  {'with ' + name:<17} {1000 * attention:6.1f} ms, step {1000 * step:.0f} ms, MFU {100 * mfu:.1f}%")
    print(f"  memory            {torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB", flush=True)


def predict_all():
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | build(Path(folder)) | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        for variant in VARIANTS:
            subprocess.run([sys.executable, __file__, "predict", variant], env=environment, check=True)


# --------------------------------------
# Looks at a long night, and at a hub of many agents


def look():
    """Print the seconds of a look at a night of LOOK_RUNS runs, and of the commands of a hub of AGENTS such nights."""
    with tempfile.TemporaryDirectory() as folder:
        clone, hub, home = Path(folder, "clone"), Path(folder, "hub.git"), Path(folder, "home")
        (home / "local").mkdir(parents=True)
        (home / "current").write_text("local")
        (home / "local" / "benchmark.json").write_text('{"settings": {"time_budget": 60}}')
        options = dict(cwd=clone, env=os.environ | {"AUTORESEARCH_HOME": str(home)}, check=True, text=True)
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        subprocess.run(["git", "clone", "-q", "--bare", ROOT, hub], check=True)
        join = ["swarm/hub.py", "join", hub, "--tag", "long", "--agent", "me", "--until", "never"]
        subprocess.run([sys.executable, *join], stdout=subprocess.DEVNULL, **options)

        # in the record and in the harness's journal
        record = clone / ".git" / "autoresearch" / "long" / "me" / "record.jsonl"
        begun = json.loads(record.read_text())
        runs = [json.dumps(run) + "\n" for run in long_night(begun, LOOK_RUNS, 0)]
        record.write_text("".join([json.dumps(begun) + "\n", *runs]))
        (home / "local" / "journal.jsonl").write_text("".join(runs))
        for state in ("first, which decides all", "next", "next"):
            print_seconds(f"a look at {LOOK_RUNS:,} runs, the {state}", ["ledger.py"], options)
        fill_hub(hub, begun)
        lines = f"{AGENTS} agents, {AGENTS * AGENT_RUNS:,} runs"
        for command in ("exchange", "exchange", "", "look idea", "say hello"):
            print_seconds(f"{lines}: hub.py {command}", ["swarm/hub.py", *command.split()], options)


def print_seconds(title, command, options):
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, **options)
    print(f"{title}: {time.perf_counter() - started:.2f} s")


def long_night(begun, count, agent):
    """Lines of a record: three runs of the baseline, then as many ideas, none of them kept."""
    for number in range(count):
        run = {"kind": "run", "run": f"{agent}-{number}", "time": begun["time"], "role": "baseline", "seed": number + 1}
        run |= {"commit": begun["commit"], "parent": begun["commit"], "train": "1" * 40, "benchmark": "local"}
        run |= {"state": "scored", "val_bpb": 1 + number / 1e6, "memory_gb": 1.0, "slow_steps_percent": 0.5}
        run |= {"device": begun["device"], "steps": 1000, "losses": [1.0] * 10, "description": "an idea"}
        if number >= 3:
            run |= {"commit": f"{agent:020x}{number:020x}", "role": "idea", "seed": 1, "val_bpb": 1.1}
            run |= {"train": f"{number:040x}"}
        yield run


def fill_hub(hub, begun):
    """Write the records of AGENTS agents, and a ref for each of their tries, into a bare repository."""
    refs = []
    for agent in range(AGENTS):
        lines = [json.dumps(line) + "\n" for line in (begun, *long_night(begun, AGENT_RUNS, agent + 1))]
        blob = ask_git(hub, "".join(lines), "hash-object", "-w", "--stdin")
        tree = ask_git(hub, f"100644 blob {blob}\trecord.jsonl\n", "mktree")
        refs.append((f"results/long/agent-{agent}", ask_git(hub, "", "commit-tree", tree, "-m", "record")))
        refs += [(f"tries/long/agent-{agent}/{number:07x}", begun["commit"]) for number in range(AGENT_RUNS // 5)]
    known = ask_git(hub, "", "rev-parse", "HEAD")
    text = "".join(f"create refs/{name} {known if name.startswith('tries') else commit}\n" for name, commit in refs)
    ask_git(hub, text, "update-ref", "--stdin")
    ask_git(hub, "", "gc", "-q")


def ask_git(folder, text, *words):
    command = ["git", "-C", folder, *words]
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["--gpu"]:
            predict_all()
        case ["--look"]:
            look()
        case ["predict", variant]:
            predict(variant)
        case ["segment", kind]:
            segment(kind == "plain")
        case _:
            sys.exit("bench.py: takes nothing, --gpu or --look")

"""
What train.py makes of this machine, as ratios measured in one run, for the untouched file and the current benchmark:

    uv run prepare.py && uv run python tests/bench.py

Each figure is the best of ROUNDS segments, which take turns, each in a process of its own. And what it would make of an
H100, predicted from the kernels that torch.compile generates for one that isn't there (null_cuda.py), in minutes:

    uv run python tests/bench.py --gpu
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
ROUNDS, SECONDS = 3, 10


def segment(plain):
    """Train for SECONDS as train.py does, or with the same model in a plain loop: eager, float32, rows read in step."""
    import torch

    import prepare
    import train

    device, benchmark = train.choose_device(), prepare.load_benchmark()
    setup = dtype, _, compiled = (torch.float32, train.banded, False) if plain else train.set_up(device)
    rows, accumulation = train.find_batch(benchmark, device, *setup)
    model = train.build_model(benchmark, device, *setup)
    optimizers = train.build_optimizers(model)
    T = benchmark.max_seq_len
    loader = prepare.make_dataloader(benchmark, "train", rows, device)
    table = benchmark.rows("train")

    def batch():
        if not plain:
            return next(loader)[:2]
        ids = torch.from_numpy(table[torch.randint(len(table), (rows,)).numpy()].astype("int64")).to(device)
        return ids[:, :-1], ids[:, 1:]

    def run(seconds):
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            batches = [batch() for _ in range(accumulation)]
            train.train_step(model, optimizers, batches, 0.1)
            steps += 1
            if steps % 10 == 0:
                prepare.synchronize(device)
        prepare.synchronize(device)
        return steps * accumulation * rows * T / (time.perf_counter() - start)

    def optimizer_share(steps=50):
        def timed(step):
            def call():
                nonlocal spent
                prepare.synchronize(device)
                start = time.perf_counter()
                step()
                prepare.synchronize(device)
                spent += time.perf_counter() - start

            return call

        spent = 0.0
        for optimizer in optimizers:
            optimizer.step = timed(optimizer.step)
        start = time.perf_counter()
        for _ in range(steps):
            train.train_step(model, optimizers, [batch() for _ in range(accumulation)], 0.1)
        return spent / (time.perf_counter() - start)

    run(2)
    speed = run(SECONDS)
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    peak = 0.0
    for _ in range(20):
        prepare.synchronize(device)
        start = time.perf_counter()
        a @ a
        prepare.synchronize(device)
        peak = max(peak, 2 * size**3 / (time.perf_counter() - start))
    print(
        json.dumps(
            {
                "tokens": speed,
                "peak": model.flops_per_token() * speed / peak,
                "optimizer": optimizer_share(),
                "what": f"{prepare.device_name(device)}, {dtype}, compiled: {compiled}",
            }
        )
    )


def main():
    best = {}
    for _ in range(ROUNDS):
        for kind in ("train.py", "plain"):
            output = subprocess.run(
                [sys.executable, __file__, "segment", kind], capture_output=True, text=True, check=True
            ).stdout
            found = json.loads(output.splitlines()[-1])
            best[kind] = max(best.get(kind, found), found, key=lambda one: one["tokens"])
    ours, plain = best["train.py"], best["plain"]
    print(f"{ours['what']}: {ours['tokens']:,.0f} tokens/s")
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
    (
        "norm(self.query(x).view(heads)), norm(self.key(x).view(heads))",
        "self.query(x).view(heads), self.key(x).view(heads)",
    ),
    ("rotate(q, rotary), rotate(k, rotary), v", "norm(rotate(q, rotary)), norm(rotate(k, rotary)), v"),
]
REFERENCE = dict(DEPTH=8, MODEL_DIM=512, WINDOW_PATTERN="SSSL", SHORT_WINDOW=1 / 2, TOTAL_BATCH_SIZE=2**19)
VARIANTS = {
    "train.py": ([], {}),
    "without n-grams, smear, shifted keys": (PLAIN, {}),
    "reference": (PLAIN + LATE_NORM, REFERENCE),
}


def predict(variant):
    """Compile a training step on the null H100, count what its kernels do, and print how long an H100 should take."""
    import torch
    from torch._inductor.graph import GraphLowering

    import prepare

    edits, constants = VARIANTS[variant]
    source = Path(prepare.__file__).with_name("train.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times: {old}"
        source = source.replace(old, new)
    train = types.ModuleType("train")
    exec(compile(source, "train.py", "exec"), vars(train))
    vars(train).update(constants)
    train.choose_attention = lambda *arguments: train.varlen
    executed = []  # (FLOPs, bytes) of the kernels that ran; attention has no count of FLOPs

    def count(graph, compile_to_module=GraphLowering.compile_to_module):
        module = compile_to_module(graph)
        nodes = [node for node in graph.scheduler.nodes if "varlen" not in str(getattr(node.node, "op_overload", ""))]
        costs = [(node.estimate_flops() or 0, node.get_read_write_buffers_sizes()) for node in nodes]

        def call(arguments, call=module.call):
            executed.extend(costs)
            return call(arguments)

        module.call = call
        return module

    GraphLowering.compile_to_module = count
    device = train.choose_device()
    setup = train.set_up(device)
    shape = types.SimpleNamespace(vocab_size=V, max_seq_len=T, seed=42)
    model = train.build_model(shape, device, *setup)
    optimizers = train.build_optimizers(model)
    batches = [torch.randint(V, (2, ROWS, T), device=device)] * (train.TOTAL_BATCH_SIZE // (ROWS * T))
    for _ in range(2):
        executed.clear()
        train.train_step(model, optimizers, batches, 0.0)

    tokens = train.TOTAL_BATCH_SIZE
    pairs = sum(min(window, T) * (1 - min(window, T) / (2 * T)) for window in model.windows)  # of tokens, per token
    attention = (4 + 10) * train.MODEL_DIM * pairs * tokens
    dense = sum(weight.numel() for weight in model.parameters()) - model.ngrams.weight.numel()
    lookups = 0 if edits else 2 * tokens * train.MODEL_DIM // 2
    eager = 4 * (7 * dense + 12 * lookups)  # AdamW reads 4 and writes 3; a row: gather 2, coalesce 2, RMSprop 8
    seconds = {
        "matrix products": sum(
            max(flops / MATRIX_SHARE / PEAK_FLOPS, size / MEMORY_SHARE / PEAK_BYTES)
            for flops, size in executed
            if flops
        ),
        "other kernels": sum(size for flops, size in executed if not flops) / MEMORY_SHARE / PEAK_BYTES,
        "AdamW and tables": eager / MEMORY_SHARE / PEAK_BYTES,
    }
    print(f"{variant}: {tokens:,} tokens a step")
    for what, one in seconds.items():
        print(f"  {what:<17} {1000 * one:6.1f} ms")
    for name, share in ATTENTION_SHARES.items():
        one = attention / share / PEAK_FLOPS
        step = sum(seconds.values()) + one
        mfu = model.flops_per_token() * tokens / step / PEAK_FLOPS
        print(f"  {'with ' + name:<17} {1000 * one:6.1f} ms, step {1000 * step:.0f} ms, MFU {100 * mfu:.1f}%")
    print(f"  memory            {torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB", flush=True)


def predict_all():
    from null_cuda import build

    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | build(Path(folder)) | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        for variant in VARIANTS:
            subprocess.run([sys.executable, __file__, "predict", variant], env=environment, check=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["--gpu"]:
            predict_all()
        case ["predict", variant]:
            predict(variant)
        case ["segment", kind]:
            segment(kind == "plain")
        case _:
            sys.exit("bench.py: takes nothing, or --gpu")

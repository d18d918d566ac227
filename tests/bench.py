"""
What train.py makes of this machine, as ratios measured in one run, for the untouched file and the current benchmark:

    uv run prepare.py && uv run python tests/bench.py

Each figure is the best of ROUNDS segments, which take turns, each in a process of its own.
"""

import json
import subprocess
import sys
import time
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
            output = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True).stdout
            found = json.loads(output.splitlines()[-1])
            best[kind] = max(best.get(kind, found), found, key=lambda one: one["tokens"])
    ours, plain = best["train.py"], best["plain"]
    print(f"{ours['what']}: {ours['tokens']:,.0f} tokens/s")
    print(f"{ours['tokens'] / plain['tokens']:.2f} times a plain loop (eager, float32, rows read in step)")
    print(f"{ours['peak']:.2f} of the machine's matrix-product peak")
    print(f"{ours['optimizer']:.3f} of a step is the optimizer")


if __name__ == "__main__":
    segment(sys.argv[1] == "plain") if len(sys.argv) > 1 else main()

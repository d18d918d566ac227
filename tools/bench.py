"""
The speed of train.py on this machine, for the current benchmark: tokens/s, also against a plain loop and the peak:

    uv run prepare.py && uv run python tools/bench.py

Both loops run ROUNDS times, in turns, each time in a new process. The figures are those of the fastest process.

The gain of an idea at a fixed number of steps, so that the speed of the machine makes no difference:

    uv run python tools/bench.py --steps 800 --seeds 1-5 <commit> <commit>

The time that `uv run ledger.py` takes in a night of 5,000 runs, and hub.py at a hub of 100 agents with 100,000 runs:

    uv run python tools/bench.py --look
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ROUNDS, SECONDS = 3, 10
TICK_SECONDS = 300  # without a step
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
        # waiting for the device around each optimizer makes the step slower, its share stays about the same
        begun, ended = [], []
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda *_: begun.append(self.now()))
            optimizer.register_step_post_hook(lambda *_: ended.append(self.now()))
        start = self.now()
        for _ in range(steps):
            self.step()
        return (sum(ended) - sum(begun)) / (self.now() - start)

    def peak(self):
        """FLOPs a second of a product of large matrices."""
        size = {"cpu": 1024}.get(self.device.type, 8192)
        a = self.torch.randn(size, size, device=self.device, dtype=self.setup.dtype)
        seconds = timeit.repeat(lambda: (a @ a, self.now()), number=1, repeat=20)
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
            command = [sys.executable, __file__, "segment", kind]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(output.splitlines()[-1])
            best[kind] = max(best.get(kind, found), found, key=lambda figures: figures["tokens"])
    ours, plain = best["train.py"], best["plain"]
    print(f"{ours['setup']}: {ours['tokens']:,.0f} tokens/s")
    print(f"{ours['tokens'] / plain['tokens']:.2f} times a plain loop (eager, float32, rows read in step)")
    print(f"{ours['peak']:.2f} of the machine's matrix-product peak")
    print(f"{ours['optimizer']:.3f} of a step is the optimizer")


# --------------------------------------
# Ideas at fixed steps: how fast the machine is today makes no difference


def compare(steps, seeds, commits):
    """Train each commit's train.py for so many steps, seed by seed in turns; print scores, and gains over the first."""
    # not above: this loads our harness, and train_steps() needs that of its commit
    from harness.common import find_home
    from night.runner import write_files

    found = {commit: [] for commit in commits}
    with tempfile.TemporaryDirectory() as folder:
        for commit in commits:
            write_files(Path(folder, commit), commit)
        for seed in seeds:
            for commit in commits:
                environment = os.environ | {"AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_HOME": str(find_home())}
                command = [sys.executable, __file__, "train", str(steps)]
                options = dict(cwd=Path(folder, commit), env=environment, check=True, text=True)
                output = subprocess.run(command, stdout=subprocess.PIPE, **options).stdout
                run = json.loads(output.splitlines()[-1])
                found[commit].append(run)
                figures = f"{run['val_bpb']:.6f}, {run['steps']} steps of {run['step_ms']:.1f} ms"
                print(f"{commit} seed {seed}: {figures}", flush=True)

    # pairs of one seed see the same rows
    first = found[commits[0]]
    for commit in commits[1:]:
        gains = [before["val_bpb"] - after["val_bpb"] for before, after in zip(first, found[commit], strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        gain = f"{statistics.mean(gains):+.6f}, standard error {error:.6f}"
        print(f"{commit}: gain over {commits[0]} {gain}, {step_ms(found[commit]) / step_ms(first):.3f} of its time")


def step_ms(runs):
    return statistics.median(run["step_ms"] for run in runs)


def train_steps(steps):
    """Train and score the train.py of this folder, which calls clock.tick() once a step. No journal has the score."""
    # its own harness, too
    sys.path.insert(0, os.getcwd())
    import prepare

    score = prepare.score  # which very old commits do not have

    class Clock(prepare.TrainingClock):
        """Each step takes the same share of the budget."""

        def watch(self, seconds):
            pass

        @property
        def elapsed(self):
            if not self.ticks and self.started and time.monotonic() - self.started > TICK_SECONDS:
                sys.exit("bench.py: this train.py does not call clock.tick()")
            return len(self.ticks) / (steps + 0.5) * self.benchmark.time_budget

    def evaluate_bpb(model, benchmark, batch_size, clock):
        # not the clock's elapsed
        seconds = clock.stopped - clock.started
        run = {"steps": len(clock.ticks), "step_ms": 1000 * seconds / len(clock.ticks)}
        run["val_bpb"] = score(model.eval(), benchmark, batch_size, clock.device)["val_bpb"]
        print(json.dumps(run))
        sys.exit()

    # train.py takes these names when it is imported
    prepare.TrainingClock, prepare.evaluate_bpb = Clock, evaluate_bpb
    import train

    train.main()


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
    """Lines of a record: three runs of the baseline, then ideas, none of them kept."""
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
    from harness.common import call_git

    known = call_git("rev-parse", "HEAD", folder=hub)
    refs = {}
    for agent in range(AGENTS):
        lines = [json.dumps(line) + "\n" for line in (begun, *long_night(begun, AGENT_RUNS, agent + 1))]
        blob = call_git("hash-object", "-w", "--stdin", folder=hub, text="".join(lines))
        tree = call_git("mktree", folder=hub, text=f"100644 blob {blob}\trecord.jsonl\n")
        refs[f"results/long/agent-{agent}"] = call_git("commit-tree", tree, "-m", "record", folder=hub)
        refs |= {f"tries/long/agent-{agent}/{number:07x}": known for number in range(AGENT_RUNS // 5)}
    text = "".join(f"create refs/{name} {commit}\n" for name, commit in refs.items())
    call_git("update-ref", "--stdin", folder=hub, text=text, seconds=600)
    call_git("gc", "-q", folder=hub, seconds=600)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["--steps", steps, "--seeds", seeds, *commits] if commits:
            first, _, last = seeds.partition("-")
            compare(int(steps), range(int(first), int(last or first) + 1), commits)
        case ["--look"]:
            look()
        case ["train", steps]:
            train_steps(int(steps))
        case ["segment", kind]:
            segment(kind == "plain")
        case _:
            sys.exit("bench.py: takes nothing, --look, or --steps N --seeds 1-5 COMMIT...")

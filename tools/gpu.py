"""
The first hour on a GPU: does train.py start there, how fast is it, and what do its variants score?

    uv run python tools/gpu.py                             # all variants, while time is left
    uv run python tools/gpu.py train.py pointer other.py   # these; a file stands for itself
    uv run python tools/gpu.py --seconds 300 train.py      # longer runs

A call takes about --minutes. Variants take turns, seed by seed. A result is a line of gpu.jsonl in the folder --out; a
later call skips what is in there of the same file. The text is `local`, in rows as long as climbmix's: no network.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from harness.common import sha256

SHAPE = ["--dataset", "local", "--seq-len", "2048", "--vocab-size", "8192"]
SHAPE += ["--val-rows", "1024", "--holdout-rows", "256"]
OVERHEAD = 60  # seconds that a run takes beside its training, until one has been seen
SMOKE_SECONDS = 20  # of the first two runs, cold and warm
REPORTS = "attention:.*not used|COMPILE:|DEVICE_BATCH|step .*usual|recompiled"  # lines of a log that are shown

# The best public run of five minutes has these
SMALL_BATCH = dict(TOTAL_BATCH_SIZE=2**17, MATRIX_LR=0.02, EMBEDDING_LR=0.7, UNEMBEDDING_LR=0.008)
SMALL_BATCH |= dict(ADAM_BETAS=(0.8, 0.98), MUON_BETA2=0.85, WARMDOWN_RATIO=0.9, FINAL_LR_FRAC=0.02)

NO_NGRAMS = [("self.ngrams(hash_ngrams(inputs))", "None"), ("self.wte(inputs) + ngrams.flatten(2)", "self.wte(inputs)")]
VARIANTS = {  # of train.py: edits of its text, and constants
    "no n-grams": (NO_NGRAMS, {}),
    "pointer": ([], dict(POINTER=True)),
    "batch 2^17": ([], SMALL_BATCH),
}


def path_of(name):
    """The file of a variant: its own, or train.py."""
    return ROOT / (name if name.endswith(".py") else "train.py")


def load_variant(name):
    """A file as a module; or train.py, with the edits and constants of a variant."""
    edits, constants = VARIANTS.get(name, ([], {}))
    path = path_of(name)
    source = path.read_text()
    for old, new in edits:
        if source.count(old) != 1:
            sys.exit(f"gpu.py: {path} has {source.count(old)} times what the variant {name} edits: {old}")
        source = source.replace(old, new)
    module = types.ModuleType("train")
    exec(compile(source, str(path), "exec"), vars(module))
    vars(module).update(constants)
    return module


class Session:
    """Runs of at most `minutes` altogether, whose results are kept in a file."""

    def __init__(self, out, minutes, environment):
        self.end = time.monotonic() + 60 * minutes
        self.environment = environment
        self.overhead = OVERHEAD
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "gpu.jsonl"
        self.results = []
        if self.path.exists():
            self.results = [json.loads(line) for line in self.path.read_text().splitlines()]

    def prepare(self, seconds):
        """The benchmark of this length, which is then the current one."""
        command = [sys.executable, "prepare.py", *SHAPE, "--time-budget", str(seconds)]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def run(self, name, seed, seconds, kind="variant"):
        """One run, unless it was done before or does not fit any more."""
        key = dict(kind=kind, name=name, seed=seed, seconds=seconds, source=sha256(path_of(name))[:8])

        # done in an earlier call, or too late?
        is_done = any(key.items() <= result.items() and "error" not in result for result in self.results)
        if is_done or time.monotonic() + seconds + self.overhead > self.end:
            return

        # in a process of its own, so that no run finds the memory or compiled code of another; none outlasts the call
        started = time.monotonic()
        command = ["timeout", "--foreground", "--kill-after=10", f"{self.end - started:.0f}"]
        command += [sys.executable, __file__, "--run", name]
        environment = self.environment | {"AUTORESEARCH_SEED": str(seed)}
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        result = key | {"total": round(time.monotonic() - started, 1)}

        # the summary is the last line; of the others, those that report a fallback or a stall
        if process.returncode == 0:
            *log, summary = process.stdout.splitlines()
            result |= json.loads(summary)
            result["log"] = [line for line in log if re.match(REPORTS, line)]
            self.overhead = result["total"] - float(result["training_seconds"]) + 5
        else:
            result["error"] = [*process.stderr.strip().splitlines()[-1:], f"exit code {process.returncode}"]

        # kept at once: a call may be cut off
        self.results.append(result)
        with open(self.path, "a") as file:
            file.write(json.dumps(result) + "\n")
        print_result(result)


def print_result(result):
    # a run that failed has no summary
    if "error" in result:
        print(f"{result['kind']:<8} {result['name']:<12} seed {result['seed']}: {result['error']}", flush=True)
        return
    seconds = float(result["training_seconds"])
    milliseconds = 1000 * seconds / max(1, result["num_steps"])
    columns = [
        f"{result['val_bpb']} in {result['num_steps']} steps of {milliseconds:.0f} ms",
        f"{1e6 * float(result['total_tokens_M']) / seconds:,.0f} tokens/s, MFU {result['mfu_percent']}%",
        f"{float(result['peak_vram_mb']) / 1024:.1f} GiB, {result['attention']}, compiled: {result['compiled']}",
        f"overhead {result['total'] - seconds:.1f} s",
    ]
    print(f"{result['kind']:<8} {result['name']:<12} seed {result['seed']}: {', '.join(columns)}", flush=True)
    for line in result["log"]:
        print(f"    {line}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("variants", nargs="*", metavar="VARIANT", help=f"{', '.join(VARIANTS)}, or a file; default: all")
    add("--seconds", type=float, default=90, help="of training in each run")
    add("--seeds", type=int, default=3, help="rounds")
    add("--minutes", type=float, default=9.5, help="of this call")
    add("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of gpu.jsonl")
    add("--run", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.variants:
        if name not in VARIANTS and not (name.endswith(".py") and path_of(name).exists()):
            parser.error(f"no variant {name}; there are {', '.join(VARIANTS)}, and files, seen from {ROOT}")
    return options


def main():
    options = parse_arguments()
    if options.run:
        # in a process of its own: train and score; the summary is the last line
        print(json.dumps(load_variant(options.run).main(), default=str))
        return

    import torch

    # the benchmark and compiled code are new, unless a home is set
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"AUTORESEARCH_HOME": os.environ.get("AUTORESEARCH_HOME", f"{folder}/home")}
        if not torch.cuda.is_available():
            sys.exit("gpu.py: needs a GPU")
        session = Session(options.out, options.minutes, environment)

        # The first run compiles everything (cold); the second finds the compiled code in the cache (warm)
        short = min(SMOKE_SECONDS, options.seconds)
        session.prepare(short)
        for kind in ("cold", "warm"):
            session.run("train.py", 1, short, kind)
        session.prepare(options.seconds)

        # in turns, so that a machine that slows down slows all of them
        for seed in range(1, options.seeds + 1):
            for name in options.variants or ["train.py", *VARIANTS]:
                session.run(name, seed, options.seconds)

    print(f"\nAll results in {session.path}:")
    for result in session.results:
        print_result(result)


if __name__ == "__main__":
    main()

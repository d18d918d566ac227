"""
The fixed harness: data, tokenizer, dataloader, training clock and metric. The agent edits train.py only.

    uv run prepare.py                                   # once: build the benchmark that suits this machine
    uv run prepare.py --dataset local --text notes/     # or one from your own text; --help lists every flag
    uv run prepare.py --status                          # where the night stands

A benchmark is a folder under $AUTORESEARCH_HOME (default ~/.cache/autoresearch): a tokenizer, packed rows of tokens for
training, validation and a holdout, and benchmark.json with the constants that make two runs comparable. All of it is
settled when it is prepared: nothing in train.py or in the environment, but for the seed, changes a run on it.

The metric is val_bpb, bits per byte of the validation text, lower is better, whatever the vocabulary.

Sections: Constants, Benchmark, Text, Download, Tokenizer, Packing, Build, Dataloader, Clock, Metric, Journal, Status,
Command line
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

PROCESS_START = time.monotonic()  # before the imports that take seconds, so that total_seconds counts them
sys.dont_write_bytecode = False  # containers like to set it, and then torch takes 3 s longer to import in every run

import numpy as np  # noqa: E402
from filelock import FileLock  # noqa: E402

from harness.journal import (  # noqa: E402
    find_origin,
    first_line,
    git,
    lock_device,
    now,
    open_rows,
    read_journal,
    save_best,
    sha256,
)
from harness.packing import Progress, pack, write_rows  # noqa: E402, F401
from harness.probe import Lazy, check_causality, predict, read  # noqa: E402
from harness.sources import fetch, find_text, local_batches, parquet_batches  # noqa: E402
from harness.tokenizer import Tokenizer, encode_batches  # noqa: E402


torch, F = Lazy("torch"), Lazy("torch.nn.functional")

# --------------------------------------
# Constants

HOME = Path(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch").expanduser()

# fmt: off
SETTINGS =     ("max_seq_len", "vocab_size", "time_budget", "val_rows", "holdout_rows", "long_documents")
PRESETS = {
    "climbmix":    (2048,          8192,         300,         10_240,     2_560,          "crop"),
    "tinystories": (512,           4096,         300,          2_048,       512,          "split"),
    "local":       (256,           4096,          60,            512,       256,          "split"),
}
# fmt: on
FILES = {"tokenizer.tiktoken", "token_bytes.npy", "train.npy", "val.npy", "holdout.npy"}
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"
VALIDATION_SHARD = 6542  # climbmix: the last shard, never trained on
DEFAULT_SHARDS = 10
LARGE_GPU = 16 << 30  # bytes of memory; what has no more is mostly too slow to score climbmix
SEED = 42


FLASH3 = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}  # with `version` it is not found offline
FLASH3_CAPABILITIES = ((8, 0), (9, 0))  # A100 and H100: on others it calls exit(1)

TOO_SMALL = "text too small: add more, or lower --val-rows and --holdout-rows, which leave nothing to train on"


LATE_LIMIT = 1.1  # a run that trained for more than this multiple of its budget is not scored
CLOCK_ERROR = 1.0  # seconds that the system's clock may be ahead of Python's
SLOW_STEP = 1.5  # a step that took longer than this many median steps was disturbed
MAX_LOGIT_BYTES = 1 << 30  # of one scoring step, in float32; their log-softmax takes as much again
SAME_SCORE = 1e-3  # relative difference of a row that is scored twice


# Where Python, torch and the system keep what they read for themselves (see watch_files)
LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
LIBRARIES = (*LIBRARIES, "/usr/lib", "/usr/share", "/proc/", "/sys/", "/dev/", "/etc/", str(HOME / "compiled"), "<")


# --------------------------------------
# Benchmark


@dataclass(frozen=True)
class Benchmark:
    """One prepared benchmark: the constants of benchmark.json, where it lies, and the seed of this run."""

    id: str
    name: str  # climbmix, tinystories or local
    max_seq_len: int  # T, tokens
    vocab_size: int  # V, special tokens included
    time_budget: float  # seconds of training
    val_rows: int
    holdout_rows: int
    long_documents: str  # "crop" or "split"
    path: Path
    seed: int
    prepared_by: str = field(compare=False)  # sha256 of the prepare.py that built it
    rows_served: Counter = field(default_factory=Counter, compare=False)  # per split, for the journal

    def rows(self, split):
        """The packed rows of "train", "val" or "holdout": uint16 [rows, T + 1], memory-mapped, read-only."""
        rows = open_rows(self.path, split)
        self.rows_served[split] += len(rows)
        return rows

    def token_bytes(self):
        """Raw byte length of every token, 0 for special tokens: int32 [V]."""
        return np.load(self.path / "token_bytes.npy")


def load_benchmark():
    """
    The benchmark that prepare.py built or chose last. Its seed is 42, or $AUTORESEARCH_SEED to repeat the same file.

    Raises SystemExit, with a line that says how to fix it, if there is none or if a file is missing or modified. Of the
    training rows only the size is checked; `uv run prepare.py` with the same arguments checks, and fixes, every byte.
    """
    try:
        return open_benchmark(HOME / Path((HOME / "current").read_text().strip()).name)
    except FileNotFoundError:
        raise SystemExit('no benchmark prepared: run "uv run prepare.py" first') from None


def open_benchmark(path):
    record, seed = read_record(path), os.environ.get("AUTORESEARCH_SEED", str(SEED))
    if not seed.isdecimal():
        raise SystemExit(f"AUTORESEARCH_SEED={seed}: must be a whole number")
    settings, prepared_by = record["settings"], record["prepare_sha256"]
    return Benchmark(record["id"], record["dataset"], **settings, path=path, seed=int(seed), prepared_by=prepared_by)


def read_record(path, every_byte=False):
    """benchmark.json of a prepared folder. Raises SystemExit, with the command that fixes it, if a file is damaged."""
    record, damaged = {}, "benchmark.json"
    try:
        record = json.loads((path / "benchmark.json").read_text())
        intact = benchmark_id(record) == record["id"] == path.name
        if intact and set(record["settings"]) == set(SETTINGS) and set(record["files"]) == FILES:
            for damaged, file in record["files"].items():
                size = (path / damaged).stat().st_size if (path / damaged).is_file() else None
                hashed = every_byte or damaged != "train.npy"
                if size != file["bytes"] or hashed and sha256(path / damaged) != file["sha256"]:
                    break
                if damaged.endswith(".npy"):
                    np.load(path / damaged, mmap_mode="r")
            else:
                return record
    except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, other JSON, no array
        pass
    command = f"uv run prepare.py {record.get('arguments', '') if isinstance(record, dict) else ''}".strip()
    raise SystemExit(f'benchmark {path.name}: {damaged} is missing or modified; run "{command}" again, which fixes it')


def benchmark_id(record):
    """Same id, same benchmark: it hashes every constant and the content of every file."""
    content = json.dumps([record["dataset"], record["settings"], record["files"]], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    sizes = "T{max_seq_len}-V{vocab_size}-{time_budget:g}s".format(**record["settings"])
    return f"{record['dataset']}-{sizes}-{digest}"


# --------------------------------------
# Text: every source is a stream of batches, and a batch is a list of documents (str) that stay on one side of the split


# --------------------------------------
# Download


def load_flash3():
    """FlashAttention-3 from the kernels hub. Called here, so that what it reads is not held against train.py."""
    from kernels import get_kernel

    return get_kernel(**FLASH3)


def fetch_flash3():
    """The attention kernel that train.py, which uses no network, takes on the GPUs that have it."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in FLASH3_CAPABILITIES:
        try:
            load_flash3()
        except Exception as error:  # no network, no build for this torch or system, moved: all the same
            print(f"no FlashAttention-3, train.py will take torch's own attention ({first_line(error)})")


# --------------------------------------
# Tokenizer


# --------------------------------------
# Packing


# --------------------------------------
# Build


def build(dataset, settings, groups, num_shards):
    """Write a benchmark's files into the folder .building under HOME. Returns it, and what was counted."""
    folder = HOME / ".building"
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed: we hold the lock, so nobody is using it
    folder.mkdir()
    row_length, split = settings["max_seq_len"] + 1, settings["long_documents"] == "split"
    wanted = {"val": settings["val_rows"], "holdout": settings["holdout_rows"]}
    counts = Counter()
    if dataset == "local":
        read = lambda: local_batches(groups, counts)  # noqa: E731
    else:
        shards = [f"shard_{i:05}.parquet" for i in (VALIDATION_SHARD, *range(num_shards))]
        files = fetch(HOME / "downloads" / dataset, dataset, shards if dataset == "climbmix" else [TINYSTORIES_FILE])
        read = lambda: itertools.chain.from_iterable(map(parquet_batches, files))  # noqa: E731
    first = sum(1 for _ in parquet_batches(files[0])) if dataset == "climbmix" else 0  # batches of the validation shard
    characters_per_token = 5  # a first guess, doubled until it is enough
    while True:  # scored text comes first: that shard, or groups of their own for validation and then for the holdout
        reserved, parts = first, []
        for count in () if first else wanted.values():
            needed = count * row_length * characters_per_token
            parts.append((reserved, reserved + count_batches(itertools.islice(read(), reserved, None), needed)))
            reserved = parts[-1][1]
        tokenizer = Tokenizer.train(itertools.islice(read(), reserved, None), settings["vocab_size"])
        texts = (encode_batches(tokenizer, itertools.islice(read(), *part)) for part in parts or [(0, first)])
        streams = [pack(text, row_length, tokenizer.bos_id, split) for text in texts]
        streams = streams if parts else 2 * streams  # on climbmix the holdout goes on where validation ends
        rows = {name: list(itertools.islice(rest, wanted[name])) for name, rest in zip(wanted, streams)}
        if first or all(len(rows[name]) == count for name, count in wanted.items()):
            break
        characters_per_token *= 2
    training = encode_batches(tokenizer, itertools.islice(read(), reserved, None))
    rows["train"] = pack(training, row_length, tokenizer.bos_id, split)
    tokenizer.save(folder)
    token_bytes = tokenizer.token_bytes()
    np.save(folder / "token_bytes.npy", token_bytes)
    written = {name: write_rows(folder / f"{name}.npy", rows[name], row_length) for name in rows}
    if any(written[name] < count for name, count in (*wanted.items(), ("train", 1))):
        raise SystemExit(TOO_SMALL)
    bytes_per_token = round(float(token_bytes[np.concatenate(rows["val"])].mean()), 3)
    return folder, {"train_rows": written["train"], "bytes_per_token": bytes_per_token, **counts}


def count_batches(batches, characters):
    """How many batches have that many characters. Raises SystemExit if nothing comes after them."""
    for count, batch in enumerate(batches):
        if characters <= 0:
            return count
        characters -= sum(map(len, batch))
    raise SystemExit(TOO_SMALL)


def install(folder, dataset, settings, counts, arguments):
    """Move a finished build to its place. benchmark.json comes last. Returns the record in it."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    record = {"dataset": dataset, "settings": settings, "files": files, "counts": counts, "arguments": arguments}
    record |= {"id": benchmark_id(record), "prepared": now(), "prepare_sha256": sha256(__file__)}
    target = HOME / record["id"]
    target.mkdir(exist_ok=True)  # may hold the same benchmark, with its journal, built by an older prepare.py
    for name in files:
        os.replace(folder / name, target / name)
    write_atomically(target / "benchmark.json", json.dumps(record, indent=1))
    folder.rmdir()
    return record


def write_atomically(path, content):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


# --------------------------------------
# Dataloader


def make_dataloader(benchmark, split, batch_size, device):
    """
    Endless batches of "train" or "val": (inputs, targets, epoch), int64 [B, T] on `device`, targets one token ahead.

    Rows come in an order shuffled per epoch by the benchmark's seed; epochs count from 1. The next batch is read in a
    thread meanwhile. On CUDA it waits in pinned memory of its own, which torch does not hand out again before the copy
    from it is done. Raises ValueError for another split or a batch size below 1.
    """
    if split not in ("train", "val"):
        raise ValueError(f'no dataloader for "{split}": take "train" or "val"')
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    rows = open_rows(benchmark.path, split)

    def shuffled():
        for epoch in itertools.count(1):
            for index in np.random.default_rng((benchmark.seed, epoch)).permutation(len(rows)):
                yield index, epoch

    def read_batch():
        indices, epochs = zip(*itertools.islice(order, batch_size))
        batch = read(rows, np.array(indices))
        return batch.pin_memory() if torch.device(device).type == "cuda" else batch, epochs[0]

    def batches():
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(read_batch)
            while True:
                ids, epoch = ahead.result()
                ahead = pool.submit(read_batch)
                ids = ids.to(device, non_blocking=True)
                benchmark.rows_served[split] += batch_size
                yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), epoch

    order = shuffled()
    return batches()


# --------------------------------------
# Clock


class TrainingClock:
    """
    The clock of one run. Between start() and stop() every second counts, whatever it is used for.

    Takes the lock of the device at once and holds it until the run is scored or the process ends: a second training
    there would halve the speed of both. Raises SystemExit, naming the other process, if the device is taken.
    """

    def __init__(self, benchmark, device):
        self.benchmark = benchmark
        self.device = torch.device(device)
        self.started = self.stopped = None
        self.scored = False
        self.ticks = []
        self.lock = lock_device(HOME / "locks", self.device)
        self.origin = find_origin()

    def start(self):
        """The run begins. Raises RuntimeError the second time."""
        if self.started is not None:
            raise RuntimeError("the clock was started before: one clock, one run")
        synchronize(self.device)
        self.rows_before = self.benchmark.rows_served["train"]
        self.system_started = os.times().elapsed
        self.started = time.monotonic()

    def stop(self):
        """The run is over, with all that it asked the device to do. Freezes `elapsed`."""
        synchronize(self.device)
        if self.started is None or self.stopped is not None:
            raise RuntimeError("the clock is not running")
        self.stopped = time.monotonic()
        self.rows = self.benchmark.rows_served["train"] - self.rows_before

    def tick(self):
        """Mark the end of a step; used only for `slow_steps_percent` and the count of steps in the journal."""
        self.ticks.append(self.elapsed)

    @property
    def slow_steps_percent(self):
        """
        The share of the time in steps of over SLOW_STEP medians; 0 for fewer than three. The first does not count: it
        may hold what a run prepares, such as tables.
        """
        steps = np.diff(self.ticks)
        return 100 * float(steps[steps > SLOW_STEP * np.median(steps)].sum() / steps.sum()) if len(steps) > 1 else 0.0

    @property
    def elapsed(self):
        """Seconds since start()."""
        return 0.0 if self.started is None else (self.stopped or time.monotonic()) - self.started

    @property
    def progress(self):
        """Share of the budget that is used up, in [0, 1]."""
        return min(1.0, self.elapsed / self.benchmark.time_budget)

    def expired(self):
        return self.elapsed >= self.benchmark.time_budget

    def check(self):
        """Raise RuntimeError unless the run was timed from start to stop, kept to its budget and is scored at once."""
        if self.started is None or self.stopped is None:
            state = "never started" if self.started is None else "still running"
            raise RuntimeError(f"not scored: the training clock is {state}; start() and stop() it around the training")
        if self.scored:
            raise RuntimeError("not scored: this run was scored before; one run, one score")
        self.scored = True
        seconds = time.monotonic() - self.started  # what was done between stop() and here counts too
        system_seconds = os.times().elapsed - self.system_started  # always 0 on Windows
        if system_seconds > seconds + CLOCK_ERROR:
            raise RuntimeError(f"not scored: the clock shows {seconds:.1f} s, but {system_seconds:.1f} s have passed")
        if seconds > LATE_LIMIT * self.benchmark.time_budget:
            raise RuntimeError(
                f"not scored: trained for {seconds:.1f} s of a budget of {self.benchmark.time_budget:g} s; "
                "make the steps shorter, and score right after stop()"
            )


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


files_read, imported = set(), time.time()


def watch_files(event, arguments):
    """An audit hook: which files does a run bring along, such as the weights or statistics of an earlier one?"""
    if event != "open" or not isinstance(arguments[0], (str, bytes)) or arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if path.startswith(LIBRARIES) or path.endswith((".py", ".pyc")) or not os.path.exists(path):
        return
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    own = (__file__, str(Path(__file__).with_name("harness")))
    if (
        frame and not frame.f_code.co_filename.startswith(own) and os.path.getmtime(path) < imported
    ):  # else it is its own
        files_read.add(path)


sys.addaudithook(watch_files)


# --------------------------------------
# Metric


def evaluate_bpb(model, benchmark, batch_size, clock):
    """
    Score a finished run: bits per byte of all validation rows, a float. The run goes into the journal, and when it is
    the benchmark's best so far its weights are kept as best.pt.

    `model(inputs)`, an nn.Module, takes int64 [B, T] and returns logits [B, T, vocab_size]; it never sees the targets.
    `batch_size` is only a matter of speed. Raises RuntimeError if the run was not timed or too long, if the model sees
    the future or other rows, is random, or changes while it is scored; ValueError if it is no module or its logits have
    another shape or are not finite; SystemExit if the benchmark is damaged or the journal can't be written. Frees the
    device in any case.
    """
    try:
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"not scored: the model must be a torch.nn.Module, not a {type(model).__name__}")
        was_training = model.training
        model.eval()  # may be the run's own code, and so may parameters(): before the clock is read
        weights = checksums(model)
        clock.check()
        scoring_started = time.monotonic()
        if not open_benchmark(benchmark.path) == benchmark == clock.benchmark:
            raise RuntimeError("not scored: the benchmark differs from the one on disk; use load_benchmark()")
        device, served = clock.device, Counter(benchmark.rows_served)
        val_rows, holdout_rows = (open_rows(benchmark.path, split) for split in ("val", "holdout"))
        token_bytes, batch_size = benchmark.token_bytes(), scoring_rows(benchmark, batch_size)
        check_causality(model, holdout_rows, batch_size, benchmark.vocab_size, device)
        bits = bits_of_rows(model, val_rows, token_bytes, batch_size, device)
        holdout_bits = bits_of_rows(model, holdout_rows, token_bytes, batch_size, device)
        again = bits_of_rows(model, val_rows[:batch_size], token_bytes, batch_size, device)
        if not np.allclose(again, bits[: len(again)], rtol=SAME_SCORE):
            raise RuntimeError("not scored: the model scores the same rows differently once it has seen others")
        if not np.array_equal(checksums(model), weights, equal_nan=True):
            raise RuntimeError("not scored: parameters or buffers have changed during the scoring")
        val_bpb = float(bits.sum() / token_bytes[val_rows[:, 1:]].sum())
        model.train(was_training)
        record_run(
            model,
            clock,
            benchmark,
            val_bpb=val_bpb,
            holdout_bpb=float(holdout_bits.sum() / token_bytes[holdout_rows[:, 1:]].sum()),
            scoring_seconds=round(time.monotonic() - scoring_started, 3),
            untimed_rows=served["train"] - clock.rows,
            scored_rows_read=served["val"] + served["holdout"],
        )
        return val_bpb
    finally:
        clock.lock.release()


def scoring_rows(benchmark, batch_size):
    """Rows that are scored at once: at most `batch_size`, and so few that their logits stay under MAX_LOGIT_BYTES."""
    return max(1, min(batch_size, MAX_LOGIT_BYTES // (4 * benchmark.max_seq_len * benchmark.vocab_size)))


def bits_of_rows(model, rows, token_bytes, batch_size, device):
    """
    Per row, the sum of -log2 p over the targets that have bytes: float64 [R], for rows uint16 [R, T + 1].

    The log-softmax is done here, in float32, so that probabilities sum to one. Sums stay on the device until the end.
    """
    has_bytes = torch.from_numpy(token_bytes > 0).to(device)
    nats = torch.zeros(len(rows), device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for start in range(0, len(rows), batch_size):
        index = np.arange(start, start + batch_size) % len(rows)  # wraps at the end: one shape, so one compiled graph
        ids = read(rows, index).to(device)
        logits = predict(model, ids[:, :-1], len(token_bytes))
        finite &= torch.isfinite(logits.amin()) & torch.isfinite(logits.amax())
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        nats[start : start + batch_size] = losses.where(has_bytes[targets], 0).sum(dim=1)[: len(rows) - start]
        del logits, losses  # not beside those of the next step
    if not finite:
        raise ValueError("not scored: invalid logits: some are not finite")
    return nats.cpu().double().numpy() / math.log(2)


def checksums(model):
    """Sum and norm of all parameters and buffers, an array [tensors, 2]: changes when any of them does."""
    tensors = (tensor.detach().float() for tensor in (*model.parameters(), *model.buffers()))  # one at a time
    return np.array([[float(tensor.sum()), float(torch.linalg.vector_norm(tensor))] for tensor in tensors])


# --------------------------------------
# Journal


def record_run(model, clock, benchmark, **scores):
    """Append the run to journal.jsonl; keep its weights and commit in best.pt when no run before scored better."""
    cuda = range(torch.cuda.device_count() if clock.device.type == "cuda" else 0)
    run = {
        "time": now(),
        "benchmark": benchmark.id,
        "time_budget": benchmark.time_budget,
        **clock.origin,
        "same_prepare": clock.origin["prepare_sha256"] == benchmark.prepared_by,
        "seed": benchmark.seed,
        **scores,
        "training_seconds": round(clock.elapsed, 3),
        "total_seconds": round(time.monotonic() - PROCESS_START, 3),
        "slow_steps_percent": round(clock.slow_steps_percent, 1),
        "steps": len(clock.ticks),
        "tokens": clock.rows * benchmark.max_seq_len,
        "files_read": sorted(files_read)[:20],
        "peak_memory_mb": round(peak_memory_mb(clock.device), 1),
        "device": device_name(clock.device),
        "gpus": sum(torch.cuda.max_memory_allocated(index) > 0 for index in cuda),
    }
    path, best_path = benchmark.path / "journal.jsonl", benchmark.path / "best.pt"
    try:
        with FileLock(path.with_suffix(".lock")):  # runs on other devices may finish at the same moment
            best = min((r["val_bpb"] for r in read_journal(benchmark.path) if r["same_prepare"]), default=math.inf)
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a full disk
            with open(path, "a") as journal:
                journal.write("\n" * torn + json.dumps(run) + "\n")
            if run["val_bpb"] < best and run["same_prepare"]:
                origin = {"commit": run["commit"], "val_bpb": run["val_bpb"], "device": clock.device.type}
                save_best(best_path, model, origin)
    except OSError as error:
        why = f"scored, val_bpb {run['val_bpb']:.6f}, but not recorded: {error}; fix it and run again"
        raise SystemExit(why) from None


def device_name(device):
    """The GPU's name, or what kind of processor this is and how many cores of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} x{os.cpu_count()}"


def why_no_gpu():
    """Why torch does not see the NVIDIA GPU of this machine; None if it seems to have none."""
    if not shutil.which("nvidia-smi"):
        return None
    why = "has no CUDA (pip's default on Windows); pytorch.org names a wheel that has"
    if torch.version.cuda:
        why = f"finds no GPU: hidden (sandbox, CUDA_VISIBLE_DEVICES) or with a driver before CUDA {torch.version.cuda}"
    return f"torch {torch.__version__} {why}"


def peak_memory_mb(device):
    """Most device memory that was allocated at once; on a CPU the most resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --------------------------------------
# Status: what results.tsv and the journal say. The rules are those of program.md, and analysis.ipynb uses them, too


# --------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


# option: the constant that it sets, its type, least and most, what it is
NUMBERS = {
    "--num-shards": ("num_shards", int, 1, VALIDATION_SHARD, "climbmix: training shards, 10 by default"),
    "--seq-len": ("max_seq_len", int, 2, 2**20, "tokens in a row"),
    "--vocab-size": ("vocab_size", int, 260, 2**16, "4 special tokens included"),
    "--time-budget": ("time_budget", float, 0.1, 10**6, "seconds of training"),
    "--val-rows": ("val_rows", int, 1, 10**9, "rows that are scored"),
    "--holdout-rows": ("holdout_rows", int, 1, 10**9, "rows that are scored, but not shown"),
}


def parse_arguments(arguments=None):
    parser = OneLineParser(description="Build the benchmark that train.py is scored on, or show where a night stands.")
    add = parser.add_argument
    add("--status", action="store_true", help="what was tried, what it was worth, what comes next; builds nothing")
    add("--dataset", choices=PRESETS, help="default: climbmix with CUDA and over 16 GiB, tinystories with CUDA, local")
    add("--text", nargs="+", metavar="PATH", default=[], help="local: files or folders; default: installed Python")
    add("--long-documents", choices=("crop", "split"), help="what becomes of documents longer than a row")
    for option, (name, kind, *_, words) in NUMBERS.items():
        add(option, dest=name, type=kind, metavar="N", help=words)
    options = parser.parse_args(arguments)
    for option, (name, _, least, most, _) in NUMBERS.items():
        if getattr(options, name) is not None and not least <= getattr(options, name) <= most:
            parser.error(f"{option} {getattr(options, name)}: must be between {least:,} and {most:,}")
    options.dataset = options.dataset or ("local" if options.text else "climbmix" if options.num_shards else None)
    if options.text and options.dataset != "local" or options.num_shards and options.dataset != "climbmix":
        parser.error(f"--dataset {options.dataset}: --text goes with local and --num-shards with climbmix")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.status:
        import ledger  # which imports this

        return ledger.print_status()
    branch = git("branch", "--show-current") or ""
    if branch.startswith("autoresearch/"):
        raise SystemExit(f"branch {branch} is a night under way, whose benchmark is fixed: leave the branch first")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    oldest = min((int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list() if "sm_" in name), default=0)
    if gpu and 10 * gpu.major + gpu.minor < oldest:
        way_out = "take a wheel that has (see pytorch.org), or the CPU (CUDA_VISIBLE_DEVICES= before every command)"
        raise SystemExit(f"torch {torch.__version__} has no code for a {gpu.name}: {way_out}")
    if not options.dataset:
        memory = gpu.total_memory if gpu else 0
        options.dataset = "climbmix" if memory > LARGE_GPU else "tinystories" if memory else "local"
        why = f"the GPU has {memory / 2**30:.0f} GiB" if memory else why_no_gpu() or "no CUDA here"
        print(f"benchmark: {options.dataset}, because {why}; choose with --dataset {' | '.join(PRESETS)}")
    settings = dict(zip(SETTINGS, PRESETS[options.dataset]))
    settings |= {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    groups = find_text(options.text) if options.dataset == "local" else {}
    files = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in sum(groups.values(), [])]
    num_shards = options.num_shards or DEFAULT_SHARDS
    request = repr((options.dataset, settings, num_shards, files, sha256(__file__)))  # times of change included
    request = HOME / "requests" / hashlib.sha256(request.encode()).hexdigest()
    arguments = shlex.join(sys.argv[1:] if arguments is None else arguments)

    try:
        request.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(HOME / "prepare.lock"):
            try:
                record = read_record(HOME / request.read_text(), every_byte=True)
            except (OSError, SystemExit):  # not prepared yet, or damaged
                started = time.monotonic()
                folder, counts = build(options.dataset, settings, groups, num_shards)
                record = install(folder, options.dataset, settings, counts, arguments)
                write_atomically(request, record["id"])
                print(f"prepared in {time.monotonic() - started:.1f} s")
            write_atomically(HOME / "current", record["id"])
    except OSError as error:
        raise SystemExit(f"prepare.py: {error}; fix it and run this again") from None
    fetch_flash3()
    counts, T = record["counts"], settings["max_seq_len"]
    kinds = [name for name in ("documents", "duplicates", "skipped files") if counts.get(name)]
    seen = " of " * bool(kinds) + ", ".join(f"{counts[name]:,} {name}" for name in kinds)
    print(f"\nbenchmark: {record['id']}, in {HOME}")
    print(f"training:  {settings['time_budget']:g} s on {counts['train_rows'] * T:,} tokens{seen}")
    print(f"scored:    {settings['val_rows'] * T:,} tokens of {counts['bytes_per_token']:.2f} bytes")
    print(f"holdout:   {settings['holdout_rows'] * T:,} tokens\n\nnext: uv run train.py")


if __name__ == "__main__":
    main()

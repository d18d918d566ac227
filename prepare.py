"""
The fixed harness: data, tokenizer, dataloader, training clock and metric. The agent edits train.py only.

    uv run prepare.py                                   # once: build the benchmark that suits this machine
    uv run prepare.py --dataset local --text notes/     # or one from your own text; --help lists every flag

A benchmark is a folder under $AUTORESEARCH_HOME (default ~/.cache/autoresearch): a tokenizer, packed rows of tokens for
training, validation and a holdout, and benchmark.json with the constants that make two runs comparable. prepare.py
fixes these constants: neither train.py nor the environment can change them. Only the seed is free.

The metric is val_bpb, bits per byte of the validation text, lower is better, whatever the vocabulary.

Sections: Constants, Benchmark, Build, Dataloader, Clock, Metric, Command line. The rest is in harness/: where
text comes from, the tokenizer, packing, the record of what was prepared, the probe that looks for leaks, the journal of
runs, the machine.
"""

import argparse
import faulthandler
import getpass
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from harness.common import OneLineParser, explain, find_home, now, sha256, write_atomically

PROCESS_START = time.monotonic()  # before the imports that take seconds, so that total_seconds counts them

import numpy as np
from filelock import FileLock

from harness import journal
from harness.journal import map_rows, rows_served

HOME = find_home()

# Set before torch is imported, here or in harness/. HOME keeps compiled code for later runs, unless its path has a
# space: Inductor can't compile there. Inductor also calls getpass.getuser(), which fails for a uid without a name
if " " not in str(HOME):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HOME / "compiled"))
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ["USER"] = "nobody"

import torch
import torch.nn.functional as F

from harness import pace, runtime
from harness.documents import parquet_batches
from harness.downloads import fetch
from harness.machine import (
    DeviceLock,
    device_name,
    fetch_flash3,
    peak_memory_mb,
    refuse_old_gpu,
    synchronize,
    why_no_gpu,
)
from harness.packing import Progress, pack, write_rows
from harness.probe import Probe
from harness.record import benchmark_id, find_record, read_record
from harness.sources import LocalText
from harness.tokenizer import Tokenizer, encode_batches

# What train.py takes from here; some of it lives in harness/
__all__ = ["load_benchmark", "TrainingClock", "make_dataloader", "evaluate_bpb", "Tokenizer", "Progress", "runtime"]

# --------------------------------------
# Constants

SEED = 42

PRESETS = {
    # web text for one large GPU: the rows of the reference project, so that scores are comparable
    "climbmix": dict(
        max_seq_len=2048, vocab_size=8192, time_budget=300, val_rows=10_240, holdout_rows=2_560, long_documents="crop"
    ),
    # short stories in simple English, for small GPUs and Macs
    "tinystories": dict(
        max_seq_len=512, vocab_size=4096, time_budget=300, val_rows=2_048, holdout_rows=512, long_documents="split"
    ),
    # text files of your own, or the Python source that is installed: any machine, offline
    "local": dict(
        max_seq_len=256, vocab_size=4096, time_budget=60, val_rows=512, holdout_rows=256, long_documents="split"
    ),
}
VALIDATION_SHARD = 6542  # climbmix: the last shard, never trained on
DEFAULT_SHARDS = 10  # climbmix: of training text
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"
LARGE_GPU = 16 << 30  # bytes of memory; GPUs with no more are usually too slow to score climbmix
TOO_SMALL = "text too small: add more, or lower --val-rows and --holdout-rows, which leave nothing to train on"

LATE_LIMIT = 1.1  # a run that trained for more than this multiple of its budget is not scored
SETUP_SECONDS = 900  # from the lock of the device to clock.start(); a run that takes longer ends itself
HANG_SECONDS = 300  # from the end of the budget to the score; a run that takes longer ends itself, too
TENTHS = 10  # parts of a run whose mean losses go into the journal
MAX_LOGIT_BYTES = 1 << 30  # of one scoring step, in float32; their log-softmax takes as much again
SAME_SCORE = 1e-3  # relative difference of a row that is scored twice

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
    prepared_by: str = field(compare=False)  # the hash of the harness that built it

    def rows(self, split):
        """The packed rows of "train", "val" or "holdout", counted: uint16 [rows, T + 1], memory-mapped, read-only."""
        rows = map_rows(self.path, split)
        rows_served[split] += len(rows)
        return rows

    def token_bytes(self):
        """Raw byte length of every token, 0 for special tokens: int32 [V]."""
        return np.load(self.path / "token_bytes.npy")


def load_benchmark():
    """
    The benchmark that $AUTORESEARCH_BENCHMARK names (the runner of a night sets it), else the one that prepare.py built
    or chose last. Its seed is 42, or $AUTORESEARCH_SEED if that is set.

    Raises SystemExit, with a line that says how to fix it, if there is none or if a file is missing or modified. Of the
    training rows only the size is checked; `uv run prepare.py` with the same arguments checks, and fixes, every byte.
    """
    try:
        name = os.environ.get("AUTORESEARCH_BENCHMARK") or (HOME / "current").read_text().strip()
        return open_benchmark(HOME / Path(name).name)
    except FileNotFoundError:
        raise SystemExit('no benchmark prepared: run "uv run prepare.py" first') from None


def open_benchmark(path):
    record = read_record(path)
    seed = os.environ.get("AUTORESEARCH_SEED", str(SEED))
    if not seed.isdecimal():
        raise SystemExit(f"AUTORESEARCH_SEED={seed}: must be a whole number")
    return Benchmark(
        id=record["id"],
        name=record["dataset"],
        path=path,
        seed=int(seed),
        prepared_by=record.get("harness_sha256", ""),
        **record["settings"],
    )


# --------------------------------------
# Build: text is read as batches, lists of documents (str) that stay on one side of the split


def build_climbmix(settings, num_shards):
    """
    One shard is the validation text: its first rows are val, the next ones holdout. train comes from the other shards.

    Returns (tokenizer, val rows, holdout rows, training rows), the last one an iterator.
    """
    names = [f"shard_{number:05}.parquet" for number in (VALIDATION_SHARD, *range(num_shards))]
    validation, *training = fetch(HOME / "downloads" / "climbmix", "climbmix", names)
    tokenizer = Tokenizer.train(read_shards(training), settings["vocab_size"])
    scored = packed(tokenizer, parquet_batches(validation), settings)
    val = list(itertools.islice(scored, settings["val_rows"]))
    holdout = list(itertools.islice(scored, settings["holdout_rows"]))
    if len(holdout) < settings["holdout_rows"]:
        raise SystemExit(TOO_SMALL)
    return tokenizer, val, holdout, packed(tokenizer, read_shards(training), settings)


def read_shards(files):
    return itertools.chain.from_iterable(map(parquet_batches, files))


def build_split(settings, read):
    """
    Text that is split by size, in the order [val, holdout, train]. `read()` begins to read it anew. Returns what
    build_climbmix does.
    """
    row_length = settings["max_seq_len"] + 1

    def text(start, end=None):
        return itertools.islice(read(), start, end)

    # The tokenizer is trained on the rest of the text, so how many characters fill a row is not known before: guess,
    # then double the guess until all scored rows are full
    characters_per_token = 5
    while True:
        characters = row_length * characters_per_token
        val_end = count_batches(text(0), settings["val_rows"] * characters)
        holdout_end = val_end + count_batches(text(val_end), settings["holdout_rows"] * characters)
        tokenizer = Tokenizer.train(text(holdout_end), settings["vocab_size"])
        val = list(itertools.islice(packed(tokenizer, text(0, val_end), settings), settings["val_rows"]))
        holdout = packed(tokenizer, text(val_end, holdout_end), settings)
        holdout = list(itertools.islice(holdout, settings["holdout_rows"]))
        if len(val) == settings["val_rows"] and len(holdout) == settings["holdout_rows"]:
            return tokenizer, val, holdout, packed(tokenizer, text(holdout_end), settings)
        characters_per_token *= 2


def count_batches(batches, characters):
    """How many batches have that many characters. Raises SystemExit if nothing comes after them."""
    for count, batch in enumerate(batches):
        if characters <= 0:
            return count
        characters -= sum(map(len, batch))
    raise SystemExit(TOO_SMALL)


def packed(tokenizer, batches, settings):
    """The rows of a text: an iterator of uint16 [T + 1]."""
    split = settings["long_documents"] == "split"
    return pack(encode_batches(tokenizer, batches), settings["max_seq_len"] + 1, tokenizer.bos_id, split)


def write_benchmark(folder, settings, tokenizer, val, holdout, train):
    """Write the files of a benchmark; returns what was counted. Raises SystemExit if nothing is left to train on."""
    row_length = settings["max_seq_len"] + 1
    tokenizer.save(folder)
    token_bytes = tokenizer.token_bytes()
    np.save(folder / "token_bytes.npy", token_bytes)

    # No scored row is a training row: a long licence, say, can fill the same row in two files
    scored = {row.tobytes() for row in (*val, *holdout)}
    unscored = (row for row in train if row.tobytes() not in scored)

    write_rows(folder / "val.npy", val, row_length)
    write_rows(folder / "holdout.npy", holdout, row_length)
    train_rows = write_rows(folder / "train.npy", unscored, row_length)
    if train_rows == 0:
        raise SystemExit(TOO_SMALL)
    # a loss in nats per token is about val_bpb * bytes_per_token * ln 2
    bytes_per_token = float(token_bytes[np.concatenate(val)].mean())
    return {"train_rows": train_rows, "bytes_per_token": round(bytes_per_token, 3)}


def build(request, source):
    """Write a benchmark into the folder .building under HOME, and move it to its place. Returns its record."""
    settings = request["settings"]
    folder = HOME / ".building"
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed: we hold the lock, so nobody is using it
    folder.mkdir()
    if request["dataset"] == "climbmix":
        parts = build_climbmix(settings, request["num_shards"])
    elif request["dataset"] == "tinystories":
        files = fetch(HOME / "downloads" / "tinystories", "tinystories", [TINYSTORIES_FILE])
        parts = build_split(settings, lambda: read_shards(files))
    else:
        parts = build_split(settings, source.batches)
    counts = write_benchmark(folder, settings, *parts)
    if source:
        source.refuse_changes()  # it was read several times, and has to have been the same each time
        counts |= source.counts
    return install(folder, request, counts)


def install(folder, request, counts):
    """Move a finished build to its place. benchmark.json comes last. Returns the record in it."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    record = {
        "dataset": request["dataset"],
        "settings": request["settings"],
        "files": files,
        "counts": counts,
        "arguments": request["arguments"],
        "request": hash_request(request),
        "prepared": now(),
        "harness_sha256": journal.harness_sha256(),
    }
    record["id"] = benchmark_id(record)

    # The folder may hold the same benchmark, with its journal, built by an older harness
    target = HOME / record["id"]
    target.mkdir(exist_ok=True)
    for name in files:
        os.replace(folder / name, target / name)
    write_atomically(target / "benchmark.json", json.dumps(record, indent=1))
    folder.rmdir()
    return record


def hash_request(request):
    """The hash of all that a build depends on: constants, files of text with their times of change, and this code."""
    parts = [request["dataset"], request["settings"], request["num_shards"], request["files"], journal.harness_sha256()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --------------------------------------
# Dataloader


def make_dataloader(benchmark, split, batch_size, device):
    """
    Endless batches of "train": (inputs, targets, epoch), int64 [B, T] on `device`, targets one token ahead.

    Rows come in an order shuffled per epoch by the benchmark's seed; epochs count from 1. The next batch is read in a
    thread meanwhile. On CUDA each batch is pinned anew: torch reuses that memory only after the copy from it is
    done. Raises ValueError for another split or a batch size below 1.
    """
    if split != "train":
        raise ValueError(f'no dataloader for "{split}": a run learns from "train" alone')
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    return batches_of(map_rows(benchmark.path, split), benchmark.seed, batch_size, torch.device(device))


def batches_of(rows, seed, batch_size, device):
    order = shuffled(len(rows), seed)

    def read_batch():
        indices, epochs = zip(*itertools.islice(order, batch_size), strict=True)
        ids = read(rows, np.array(indices))
        if device.type == "cuda":
            ids = ids.pin_memory()
        return ids, epochs[0]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read_batch)
        while True:
            ids, epoch = ahead.result()
            ahead = pool.submit(read_batch)
            ids = ids.to(device, non_blocking=True)
            rows_served["train"] += batch_size
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), epoch


def shuffled(count, seed):
    """Endless pairs (index of a row, epoch)."""
    for epoch in itertools.count(1):
        for index in np.random.default_rng((seed, epoch)).permutation(count):
            yield index, epoch


def read(rows, index):
    """A copy of the rows at `index`, an array: int64 [B, T + 1]."""
    return torch.from_numpy(rows[index].astype(np.int64))


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
        self.started = None
        self.stopped = None
        self.ticks = []  # (elapsed seconds, training rows so far) at the end of each step
        self.losses = [[] for _ in range(TENTHS)]
        self.speed = pace.SpeedProbe(self.device)
        journal.refuse_unwritable(benchmark.path)
        self.lock = DeviceLock(self.device)
        self.watch(SETUP_SECONDS)
        self.origin = journal.find_origin()

    def watch(self, seconds):
        # a run that hangs ends itself after so long, with the traceback of where it hung and exit code 1
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def start(self):
        """The run begins. Raises RuntimeError the second time."""
        if self.started is not None:
            raise RuntimeError("the clock was started before: one clock, one run")
        synchronize(self.device)
        self.watch(self.benchmark.time_budget + HANG_SECONDS)
        self.rows_before = rows_served["train"]
        self.graphs_before = pace.count_graphs()
        self.started = time.monotonic()

    def stop(self):
        """The run is over, with all that it asked the device to do. Freezes `elapsed`."""
        synchronize(self.device)
        if self.started is None or self.stopped is not None:
            raise RuntimeError("the clock is not running")
        self.stopped = time.monotonic()
        self.rows = rows_served["train"] - self.rows_before
        self.recompiled = max(0, pace.count_graphs() - self.graphs_before)

    def tick(self, loss=None):
        """Call this after each step. `loss`: a float for the mean losses in the journal; may be of an earlier step."""
        self.ticks.append((self.elapsed, rows_served["train"]))
        self.speed.look(self.elapsed)
        if loss is not None:
            self.losses[min(int(self.progress * TENTHS), TENTHS - 1)].append(float(loss))

    @property
    def mean_losses(self):
        """The mean loss of each tenth of the run, None where no step ended in it; [] without any losses."""
        if not any(self.losses):
            return []
        return [round(sum(tenth) / len(tenth), 4) if tenth else None for tenth in self.losses]

    @property
    def slow_steps_percent(self):
        """The share of the time in steps that something else has slowed down. See pace.slow_share."""
        if len(self.ticks) < 3:
            return 0.0
        seconds, rows = np.diff(np.array(self.ticks), axis=0).T
        return 100 * pace.slow_share(seconds, rows)

    @property
    def elapsed(self):
        """Seconds from start() to stop(), or until now."""
        if self.started is None:
            return 0.0
        return (self.stopped or time.monotonic()) - self.started

    @property
    def progress(self):
        """Share of the budget that is used up, in [0, 1]."""
        return min(1.0, self.elapsed / self.benchmark.time_budget)

    @property
    def total_seconds(self):
        """Seconds since this process began."""
        return time.monotonic() - PROCESS_START

    def check(self):
        """Before scoring: raise RuntimeError unless the run was timed, kept to its budget and was not scored yet."""
        if self.started is None:
            raise RuntimeError("not scored: the clock was never started; start() and stop() it around training")
        if self.stopped is None:
            raise RuntimeError("not scored: the training clock is still running; stop() it first")
        if not self.lock.held:
            raise RuntimeError(
                "not scored: this run was scored or refused before, or in another process; one run, one score"
            )

        # What was done between stop() and here counts, too
        synchronize(self.device)
        self.training_seconds = time.monotonic() - self.started
        if self.training_seconds > LATE_LIMIT * self.benchmark.time_budget:
            raise RuntimeError(
                f"not scored: trained for {self.training_seconds:.1f} s of a budget of {self.benchmark.time_budget:g} "
                "s; make the steps shorter (did one recompile?), and score right after stop()"
            )

    def release(self):
        """Free the device, and count the rows of the next run from zero. Does nothing the second time."""
        if self.lock.held:
            faulthandler.cancel_dump_traceback_later()
            rows_served.clear()
            self.lock.release()


# --------------------------------------
# Metric


def evaluate_bpb(model, benchmark, batch_size, clock):
    """
    Score a finished run: bits per byte of all validation rows, a float. The run goes into the journal, its weights into
    best.pt if it beats all runs of this harness, and this harness prepared the benchmark.

    `model(inputs)`, an nn.Module, takes int64 [B, T] and returns logits [B, T, vocab_size]; it never sees the targets.
    `batch_size` is only a matter of speed. Raises RuntimeError if the run was not timed or too long, if the model sees
    the future or other rows, is random, or remembers what it was scored on; ValueError if it is no module or its logits
    have another shape or are not finite; SystemExit if the benchmark is damaged or the journal can't be written. Frees
    the device in any case. journal.flags lists what does not refuse a run but deserves a look.
    """
    try:
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"not scored: the model must be a torch.nn.Module, not a {type(model).__name__}")
        model.eval()  # before clock.check() takes the time: train.py may override eval() and compute in it
        clock.check()
        pace.report_slow_step(clock)
        pace.report_recompiling(clock.recompiled)
        journal.refuse_unwritable(benchmark.path)  # the disk may have filled up, or gone, during the training
        if benchmark != open_benchmark(benchmark.path) or benchmark != clock.benchmark:
            raise RuntimeError("not scored: the benchmark differs from the one on disk; use load_benchmark()")
        scores = score(model, benchmark, batch_size, clock.device)
        run = describe_run(benchmark, clock, scores)
        journal.record_run(benchmark.path, run, model)
        return scores["val_bpb"]
    finally:
        clock.release()


def score(model, benchmark, batch_size, device):
    """Probe the model, then score validation and holdout: a dict with both and the seconds that it took."""
    started = time.monotonic()
    batch_size = scoring_rows(benchmark, batch_size)
    val_rows, holdout_rows = map_rows(benchmark.path, "val"), map_rows(benchmark.path, "holdout")
    token_bytes = benchmark.token_bytes()

    def predict_ids(ids):
        return predict(model, ids.to(device), benchmark.vocab_size)

    Probe(predict_ids, holdout_rows, batch_size, benchmark.vocab_size).run()
    bits = bits_of_rows(model, val_rows, token_bytes, batch_size, device)
    holdout_bits = bits_of_rows(model, holdout_rows, token_bytes, batch_size, device)

    # The first rows again: a model that learns from what it is scored on knows them by now
    again = bits_of_rows(model, val_rows[:batch_size], token_bytes, batch_size, device)
    if not np.allclose(again, bits[: len(again)], rtol=SAME_SCORE):
        raise RuntimeError("not scored: the model scores the same rows differently once it has seen others")
    return {
        "val_bpb": float(bits.sum() / token_bytes[val_rows[:, 1:]].sum()),
        "holdout_bpb": float(holdout_bits.sum() / token_bytes[holdout_rows[:, 1:]].sum()),
        "scoring_seconds": round(time.monotonic() - started, 3),
    }


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
        # wraps around at the end: one shape, so one compiled graph
        ids = read(rows, np.arange(start, start + batch_size) % len(rows)).to(device)
        logits = predict(model, ids[:, :-1], len(token_bytes))
        finite &= torch.isfinite(logits.amin()) & torch.isfinite(logits.amax())
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        nats[start : start + batch_size] = losses.where(has_bytes[targets], 0).sum(dim=1)[: len(rows) - start]
        del logits, losses  # not beside those of the next step
    if not finite:
        raise ValueError("not scored: invalid logits: some are not finite")
    return nats.cpu().double().numpy() / math.log(2)


def predict(model, inputs, vocab_size):
    """
    The model's logits, float32 [B, T, V]. It gets a copy of the inputs: their storage holds the targets too.

    Not under no_grad: a compiled model would need other graphs than in training, which takes longer than it saves.
    """
    logits = model(inputs.clone())
    shape = (*inputs.shape, vocab_size)
    found = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
    if found != shape:
        raise ValueError(f"not scored: model(inputs) must return logits of shape {shape}, not {found}")
    return logits.detach().float()


def describe_run(benchmark, clock, scores):
    """A line of the journal: a dict."""
    return {
        "time": now(),
        "benchmark": benchmark.id,
        "time_budget": benchmark.time_budget,
        **clock.origin,
        "same_harness": clock.origin["harness_sha256"] == benchmark.prepared_by,
        "seed": benchmark.seed,
        **scores,
        "training_seconds": round(clock.training_seconds, 3),
        "total_seconds": round(clock.total_seconds, 3),
        "slow_steps_percent": round(clock.slow_steps_percent, 1),
        "recompiled": clock.recompiled,
        "product_ms": clock.speed.result,
        "steps": len(clock.ticks),
        "losses": clock.mean_losses,
        "tokens": clock.rows * benchmark.max_seq_len,
        "untimed_rows": rows_served["train"] - clock.rows,
        "scored_rows_read": rows_served["val"] + rows_served["holdout"],
        "peak_memory_mb": round(peak_memory_mb(clock.device), 1),
        "device": device_name(clock.device),
        "gpus": sum(torch.cuda.max_memory_allocated(index) > 0 for index in range(torch.cuda.device_count())),
    }


# --------------------------------------
# Command line


def number(kind, least, most):
    """A type for argparse: a number of this kind in this range."""

    def number(text):
        value = kind(text)  # argparse reports a ValueError
        if float(value).is_integer():
            value = int(value)  # 60.0 s make the benchmark that 60 s make
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be between {least:,} and {most:,}")
        return value

    return number


def parse_arguments(arguments=None):
    parser = OneLineParser(description="Build the benchmark that scores train.py.", argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--dataset", choices=PRESETS, help="default: climbmix (GPU over 16 GiB), tinystories (other GPU), local (none)")
    add("--text", nargs="+", metavar="PATH", help="local: files or folders; default: installed Python")
    add(
        "--num-shards", metavar="N", type=number(int, 1, VALIDATION_SHARD), help="climbmix: training shards, default 10"
    )
    add("--seq-len", metavar="N", type=number(int, 2, 2**20), dest="max_seq_len", help="tokens in a row")
    add("--vocab-size", metavar="N", type=number(int, 260, 2**16), help="4 special tokens included")
    add("--time-budget", metavar="N", type=number(float, 0.1, 10**6), help="seconds of training")
    add("--val-rows", metavar="N", type=number(int, 1, 10**9), help="rows that are scored")
    add("--holdout-rows", metavar="N", type=number(int, 1, 10**9), help="rows that are scored, but not shown")
    options = vars(parser.parse_args(arguments))

    # --text and --num-shards name their dataset, and go with no other
    for name, dataset in (("text", "local"), ("num_shards", "climbmix")):
        if name in options and options.setdefault("dataset", dataset) != dataset:
            parser.error(f"--dataset {options['dataset']}: --text goes with local and --num-shards with climbmix")
    return options


def choose_dataset():
    """The benchmark that suits this machine; says which one it is, and why."""
    if not torch.cuda.is_available():
        dataset, reason = "local", why_no_gpu() or "no CUDA here"
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        dataset = "climbmix" if memory > LARGE_GPU else "tinystories"
        reason = f"the GPU has {memory / 2**30:.0f} GiB"
    print(f"benchmark: {dataset}, because {reason}; choose with --dataset {' | '.join(PRESETS)}")
    return dataset


def print_summary(record):
    counts, settings = record["counts"], record["settings"]
    T = settings["max_seq_len"]
    text = ""
    if "documents" in counts:
        text = f" of {counts['documents']:,} documents"
    if counts.get("duplicates"):
        text += f", {counts['duplicates']:,} duplicates"
    print(f"\nbenchmark: {record['id']}, in {HOME}")
    print(f"training:  {settings['time_budget']:g} s on {counts['train_rows'] * T:,} tokens{text}")
    print(f"scored:    {settings['val_rows'] * T:,} tokens of {counts['bytes_per_token']:.2f} bytes")
    print(f"holdout:   {settings['holdout_rows'] * T:,} tokens")
    print("\nnext: uv run train.py")


def prepare(request, source):
    """Find or build the benchmark, and make it current unless AUTORESEARCH_BENCHMARK is set. Returns its record."""
    HOME.mkdir(parents=True, exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")  # it may lie in the clone
    with FileLock(HOME / "prepare.lock"):
        record = find_record(HOME, hash_request(request))
        if record is None:
            started = time.monotonic()
            record = build(request, source)
            print(f"prepared in {time.monotonic() - started:.1f} s")
        # a cluster node builds the benchmark that AUTORESEARCH_BENCHMARK names, and leaves the current one alone
        named = os.environ.get("AUTORESEARCH_BENCHMARK")
        if not named:
            write_atomically(HOME / "current", record["id"])
        elif named != record["id"]:
            raise SystemExit(f"these arguments make {record['id']}, but AUTORESEARCH_BENCHMARK is {named}")
    return record


def main(arguments=None):
    options = parse_arguments(arguments)
    if torch.cuda.is_available():
        refuse_old_gpu()

    dataset = options.get("dataset") or choose_dataset()
    settings = dict(PRESETS[dataset])
    settings.update((name, value) for name, value in options.items() if name in settings)
    source = LocalText(options.get("text", [])) if dataset == "local" else None
    request = {
        "dataset": dataset,
        "settings": settings,
        "num_shards": options.get("num_shards", DEFAULT_SHARDS),
        "files": source.signature() if source else [],
        "arguments": shlex.join(sys.argv[1:] if arguments is None else arguments),
    }
    try:
        record = prepare(request, source)
    except OSError as error:
        raise SystemExit(f"prepare.py: {explain(error)}") from None
    finally:
        for line in source.skipped.lines() if source else []:
            print(line)
    fetch_flash3()
    print_summary(record)


if __name__ == "__main__":
    main()

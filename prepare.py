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
import base64
import csv
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from bisect import bisect_right, insort
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

PROCESS_START = time.monotonic()  # before the imports that take seconds, so that total_seconds counts them
sys.dont_write_bytecode = False  # containers like to set it, and then torch takes 3 s longer to import in every run

import numpy as np  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402


class Lazy:
    """A module that is imported when it is first used: --status, beside a training, must not take 4 s for torch."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


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
REPOSITORIES = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"
VALIDATION_SHARD = 6542  # climbmix: the last shard, never trained on
DEFAULT_SHARDS = 10
LARGE_GPU = 16 << 30  # bytes of memory; what has no more is mostly too slow to score climbmix
SEED = 42

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # after the merges; the first is BOS
TOKENIZER_CHARACTERS = 1_000_000_000  # of training text for the tokenizer, at most ...
TOKENIZER_DOCUMENT_CHARACTERS = 10_000  # ... and this many of one document

PACKING_BUFFER = 1_000  # documents that best-fit packing chooses from
DOCUMENT_BATCH = 128  # documents that enter that buffer together

FLASH3 = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}  # with `version` it is not found offline
FLASH3_CAPABILITIES = ((8, 0), (9, 0))  # A100 and H100: on others it calls exit(1)

LOCAL_PACKAGES = ("torch", "sympy", "numpy", "networkx")  # the default text, with the standard library
LOCAL_SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")  # the last two hold many documents
FEW_GROUPS = 10  # with fewer groups of local text than this, files are cut into blocks, each a group of its own ...
BLOCK = r"(?s:.{1,65536})[^\n]{0,65536}\n?"  # ... of 65,536 characters and the rest of the line, if it is not too long
TOO_SMALL = "text too small: add more, or lower --val-rows and --holdout-rows, which leave nothing to train on"

DOWNLOAD_WORKERS = 4
DOWNLOAD_ATTEMPTS = 4
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
RETRY_SECONDS = 1.0  # before the second attempt; doubles with each

LATE_LIMIT = 1.1  # a run that trained for more than this multiple of its budget is not scored
CLOCK_ERROR = 1.0  # seconds that the system's clock may be ahead of Python's
SLOW_STEP = 1.5  # a step that took longer than this many median steps was disturbed
MAX_LOGIT_BYTES = 1 << 30  # of one scoring step, in float32; their log-softmax takes as much again
SAME_SCORE = 1e-3  # relative difference of a row that is scored twice

PROBE_CUTS = 256  # futures that the probe replaces, or T / 4 if that is more
PROBE_CONTROLS = 4  # times that it changes other rows only
PROBE_REPEATS = 4  # a leak moves logits every time, chance does not
PROBE_NOISE = 1e-4  # rounding may move logits by this share of their standard deviation ...
PROBE_MARGIN = 3  # ... and by so many times what was seen without a new future
MOVED_SHARE = 0.05  # but if they move by more than this without one, at more than ...
MOVED_POSITIONS = 0.01  # ... this share of the positions, it is no rounding

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


def open_rows(path, split):
    return np.load(path / f"{split}.npy", mmap_mode="r")


def benchmark_id(record):
    """Same id, same benchmark: it hashes every constant and the content of every file."""
    content = json.dumps([record["dataset"], record["settings"], record["files"]], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    sizes = "T{max_seq_len}-V{vocab_size}-{time_budget:g}s".format(**record["settings"])
    return f"{record['dataset']}-{sizes}-{digest}"


def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Progress:
    """A status line: rewritten in place on a terminal, a new line every `seconds` in a file, which agents `tail`."""

    def __init__(self, seconds=10):
        self.terminal = sys.stdout.isatty()
        self.seconds = 0.2 if self.terminal else seconds
        self.printed = time.monotonic()

    def __call__(self, line, last=False):
        if last or time.monotonic() - self.printed >= self.seconds:
            self.printed = time.monotonic()
            start, end = ("\r\033[K", "\n" if last else "") if self.terminal else ("", "\n")  # erases the line before
            print(f"{start}{line}", end=end, flush=True)


# --------------------------------------
# Text: every source is a stream of batches, and a batch is a list of documents (str) that stay on one side of the split


def parquet_batches(path):
    """Documents of column `text`, at most DOCUMENT_BATCH at a time and never across a row group."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
                for start in range(0, len(texts), DOCUMENT_BATCH):
                    yield [text or "" for text in texts[start : start + DOCUMENT_BATCH]]
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise SystemExit(f"{path}: not a parquet file with a column `text` ({first_line(error)})") from None


def jsonl_batches(path):
    """The `text` fields of a file's lines, DOCUMENT_BATCH lines at a time."""
    with open(path, "rb") as lines:
        numbered = enumerate(lines, 1)
        while some := list(itertools.islice(numbered, DOCUMENT_BATCH)):
            batch = []
            for number, line in some:
                try:
                    if line.strip():
                        batch.append(json.loads(line)["text"].encode(errors="replace").decode())  # no lone surrogates
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise SystemExit(f"{path}:{number}: not a JSON object with a string `text`") from None
            yield batch


def find_text(paths):
    """
    The text files under the user's paths by group, {name: files}: top-level folders and lone files. Without paths: the
    Python source of the standard library and of LOCAL_PACKAGES, without their tests. Groups come in the order of a hash
    of their name; validation takes the first ones.
    """
    groups, skipped, suffixes = {}, (), TEXT_SUFFIXES
    roots = [("", Path(path)) for path in paths]
    if not paths:
        skipped, suffixes = LOCAL_SKIPPED, (".py",)
        roots = [(f"{name}/", Path(importlib.util.find_spec(name).origin).parent) for name in LOCAL_PACKAGES]
        roots.append(("", Path(sysconfig.get_path("stdlib"))))
    for prefix, root in roots:
        if not root.exists():
            raise SystemExit(f"--text {root}: no such file or folder")
        if root.is_file():
            groups.setdefault(root.name, []).append(root)
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(s for s in subfolders if s not in skipped and s[0] != "." and s != "__pycache__")
            for file in (Path(folder, name) for name in sorted(names)):
                if file.suffix in suffixes and file.name[0] != "." and file.is_file():
                    groups.setdefault(prefix + file.relative_to(root).parts[0], []).append(file)
    if not groups:
        raise SystemExit(f"--text {' '.join(paths)}: no {' '.join(TEXT_SUFFIXES)} file in there")
    return dict(sorted(groups.items(), key=lambda group: hashlib.sha256(group[0].encode()).digest()))


def local_batches(groups, counts):
    """
    A batch per group, so that validation text is not a near-copy of training text; or per block of text if there are
    few groups. Records of .jsonl and .parquet files stand alone. Exact duplicates are dropped, files that can't be read
    or are not UTF-8 are skipped, and both are counted.
    """
    counts.clear()
    seen = set()

    def distinct(texts):
        fresh = []
        for text in filter(None, texts):
            digest = hashlib.sha256(text.encode()).digest()[:16]
            counts["duplicates" if digest in seen else "documents"] += 1
            fresh += [] if digest in seen else [text]
            seen.add(digest)
        return fresh

    for files in groups.values():
        group = []
        for file in files:
            if file.suffix in (".jsonl", ".parquet"):
                yield from map(distinct, jsonl_batches(file) if file.suffix == ".jsonl" else parquet_batches(file))
                continue
            try:
                text = file.read_bytes().decode()  # no newline translation: bytes are counted as they are
            except (OSError, UnicodeDecodeError):
                counts["skipped files"] += 1
                continue
            if len(groups) < FEW_GROUPS:
                yield from (distinct([block]) for block in re.findall(BLOCK, text))
            else:
                group += distinct([text])
        yield group


# --------------------------------------
# Download


def fetch(dataset, names):
    """Download files of a Hugging Face dataset that are not here yet, in parallel. Returns their paths."""
    folder = HOME / "downloads" / dataset
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/datasets/{REPOSITORIES[dataset]}/resolve/main"
    stop = threading.Event()  # partial downloads are kept for the next run
    with ThreadPoolExecutor(DOWNLOAD_WORKERS) as pool:
        missing = [name for name in names if not (folder / name).exists()]
        downloads = [pool.submit(download, f"{url}/{name}", folder / name, stop) for name in missing]
        try:
            for count, one in enumerate(as_completed(downloads), 1):
                print(f"{dataset}: {count} of {len(missing)} files, {one.result().name} is here", flush=True)
        except KeyboardInterrupt:
            print("interrupted; run this again to resume")
            os._exit(130)  # at once: a thread that waits for a stalled server would hold the process up
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return [folder / name for name in names]


def download(url, path, stop):
    """
    Fetch one parquet file; an interrupted download resumes. The name appears only when it is complete.

    Raises SystemExit, naming the file and the reason, when DOWNLOAD_ATTEMPTS in a row have failed.
    """
    import requests

    part = path.with_name(path.name + ".part")
    for attempt in range(DOWNLOAD_ATTEMPTS):
        if stop.wait(attempt and RETRY_SECONDS * (2**attempt / 2 + random.random())):
            raise SystemExit("another download failed")
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
                if response.status_code != 416:  # else there is no more than we have
                    response.raise_for_status()
                    with open(part, "ab" if response.status_code == 206 else "wb") as file:
                        for chunk in response.iter_content(1 << 14):
                            file.write(chunk)
                            if stop.is_set():
                                raise SystemExit("another download failed")
            tags = [reply.headers.get("X-Linked-ETag", "").strip('"') for reply in (*response.history, response)]
            if any(len(tag) == 64 and tag != sha256(part) for tag in tags):
                raise SystemExit("its sha256 is not the one that the server announced")
            next(parquet_batches(part), None)
            os.replace(part, path)
            return path
        except requests.HTTPError as error:
            reason = f"HTTP {error.response.status_code} {error.response.reason}"
            if error.response.status_code < 500 and error.response.status_code not in (408, 429):
                break
            retry_after = error.response.headers.get("Retry-After", "")
            stop.wait(min(60, int(retry_after)) if retry_after.isdecimal() else 0)
        except requests.RequestException as error:  # truncated bodies included
            reason = first_line(error)
        except SystemExit as error:
            if stop.is_set():
                raise
            part.unlink()  # complete, but not what it should be
            reason = str(error)
    raise SystemExit(
        f"could not download {url}: {reason}; check the network or name a mirror in HF_ENDPOINT, and run this again "
        "(it resumes); offline, use --dataset local"
    )


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


class Tokenizer:
    """
    Byte-pair encoding: trained with rustbpe, used through tiktoken, stored as tiktoken's text (base64 token, rank).

        tokenizer = Tokenizer.load(load_benchmark().path)
        tokenizer.decode(tokenizer.encode("any text")) == "any text"
    """

    def __init__(self, ranks):
        import tiktoken

        self.ranks = ranks  # bytes -> id
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = len(ranks) + len(specials)
        self.bos_id = len(ranks)

    @classmethod
    def train(cls, batches, vocab_size):
        """Learn merges from batches of documents. Raises SystemExit if the text has too few for `vocab_size`."""
        import rustbpe

        def texts():
            characters = 0
            for text in itertools.chain.from_iterable(batches):
                yield text[:TOKENIZER_DOCUMENT_CHARACTERS]
                characters += min(len(text), TOKENIZER_DOCUMENT_CHARACTERS)
                if characters >= TOKENIZER_CHARACTERS:
                    return

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
            most = len(ranks) + len(SPECIAL_TOKENS)
            raise SystemExit(f"--vocab-size {vocab_size}: the training text supports {most} at most; add text")
        return cls(ranks)

    @classmethod
    def load(cls, folder):
        """Read tokenizer.tiktoken in a benchmark's folder. (tiktoken's own loader would cache it by path.)"""
        lines = (line.split() for line in (folder / "tokenizer.tiktoken").read_bytes().splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    def save(self, folder):
        lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in self.ranks.items())
        (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))

    def encode(self, text):
        """Token ids of a str: uint16 [N], no BOS. Text that spells a special token is plain text."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:  # the split pattern ran out of stack on a run of a million spaces: halve it
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def decode(self, ids):
        """The str of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self):
        """Raw byte length of every token, 0 for special tokens: int32 [V]. Never the length of a decoded string."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.bos_id)]
        return np.array(lengths + [0] * len(SPECIAL_TOKENS), dtype=np.int32)


def encode_batches(tokenizer, batches):
    """Tokenize batches of documents on all cores, in order, reading only a little ahead."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(lambda texts: [tokenizer.encode(text) for text in texts], batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --------------------------------------
# Packing


def pack(batches, row_length, bos, split):
    """
    Best-fit packing: rows of exactly `row_length` tokens, every one of them real text.

    A document is BOS and its tokens. Of the documents in the buffer the longest that fits the space left goes next (the
    earliest among equals); when none fits, the shortest is cropped to fill the row. With `split`, documents longer than
    a row come in row-sized pieces and the rest of a cropped one becomes a piece of its own (BOS first), so that no text
    is lost but that of the last, incomplete row; without, the rest is thrown away. So every row starts with BOS.

    Args: `batches` yields lists of token arrays without BOS; a list enters the buffer whole whenever that holds fewer
    than PACKING_BUFFER documents. Yields uint16 [row_length].
    """
    batches = iter(batches)
    lengths = []  # of the documents in the buffer: sorted, each once
    waiting = {}  # length -> documents, in order of arrival
    count = 0

    def add(tokens):
        nonlocal count
        count += 1
        length = len(tokens) + 1
        if length not in waiting:
            waiting[length] = deque()
            insort(lengths, length)
        waiting[length].append(tokens)

    while True:
        row = np.full(row_length, bos, dtype=np.uint16)
        filled = 0
        while filled < row_length:
            while count < PACKING_BUFFER and (batch := next(batches, None)) is not None:
                for tokens in batch:
                    piece = row_length - 1 if split else max(1, len(tokens))
                    for start in range(0, max(1, len(tokens)), piece):
                        add(tokens[start : start + piece])
            if not count:
                return
            space = row_length - filled
            index = max(0, bisect_right(lengths, space) - 1)
            length = lengths[index]
            tokens = waiting[length].popleft()
            count -= 1
            if not waiting[length]:
                del waiting[length], lengths[index]
            taken = min(len(tokens), space - 1)
            row[filled + 1 : filled + 1 + taken] = tokens[:taken]
            filled += 1 + taken
            if split and taken < len(tokens):
                add(tokens[taken:])
        yield row


def write_rows(path, rows, row_length):
    """Stream rows into an .npy file; returns how many. The header has room for any count (numpy pads it for that)."""
    progress, count = Progress(), 0
    with open(path, "wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (0, row_length)}
        np.lib.format.write_array_header_1_0(file, header)
        for count, row in enumerate(rows, 1):
            file.write(row.astype("<u2", copy=False))
            progress(f"packing {path.name}: {count:,} rows")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, row_length)})
    return count


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
        files = fetch(dataset, shards if dataset == "climbmix" else [TINYSTORIES_FILE])
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


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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
        self.started = self.stopped = None
        self.scored = False
        self.ticks = []
        self.lock = lock_device(self.device)
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


def lock_device(device):
    """An exclusive lock on this device, by its own name on this machine. A file beside it tells whose it is."""
    name = f"{device.type}-{platform.node()}"
    if device.type == "cuda":
        name = f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    holder = HOME / "locks" / f"{name}.pid"
    lock = FileLock(holder.with_suffix(".lock"))  # the system frees it when the process ends
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(str(os.getpid()))
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise SystemExit(f"another training is running on {device} (pid {pid}): wait for it or end it") from None
    except OSError as error:
        raise SystemExit(f"cannot write to AUTORESEARCH_HOME: {error}; fix it and run again") from None
    return lock


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def git(*words):
    """What a git command prints in the folder of this file, or None."""
    try:
        result = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # not installed
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def find_origin():
    """What is being run: the commit, whether .py files differ from it, and hashes of the script and of this file."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    script = getattr(sys.modules["__main__"], "__file__", None)
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "script": script and Path(script).name,
        "train_sha256": script and sha256(script),
        "prepare_sha256": sha256(__file__),
    }


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
    if frame and frame.f_code.co_filename != __file__ and os.path.getmtime(path) < imported:  # else it is its own
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


def predict(model, inputs, vocab_size):
    """
    The model's logits, float32 [B, T, V]. It gets a copy of the inputs: their storage holds the targets too.

    Not under no_grad: a compiled model would need other graphs than in training, which takes longer than it saves.
    """
    logits = model(inputs.clone())
    shape = (*inputs.shape, vocab_size)
    if not torch.is_tensor(logits) or logits.shape != shape:
        got = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"not scored: model(inputs) must return logits of shape {shape}, not {got}")
    return logits.detach().float()


def check_causality(model, rows, batch_size, vocab_size, device):
    """
    The probe: a logit may depend on its own token and on earlier ones of its row, and on nothing else.

    Many times, the tokens of each row after a cut of its own are replaced; logits before the cut must not move.
    Rounding may move them (in a mixture of experts, say, other tokens change the order of sums): by how much is seen
    when nothing changes and when only other rows do. A suspect is tried again, with the same future and other rows
    around it, against controls: a leak moves it every time, chance does not. Raises RuntimeError naming the first
    position.
    """
    generator = torch.Generator()  # of its own: train.py seeds torch's
    generator.seed()

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def predict_below_largest(ids):
        """Relative to the largest logit and not below -50, or logits masked with -1e9 would dominate the deviation."""
        logits = predict(model, ids.to(device), vocab_size)
        return ((row - row.amax(dim=-1, keepdim=True)).clamp(min=-50) for row in logits)  # row by row, for the memory

    def movement(ids):
        """By how much logits moved, in standard deviations: [B, T]."""
        rows = zip(predict_below_largest(ids), before)
        return torch.stack([(new - old).abs().amax(dim=-1) / old.std() for new, old in rows]).cpu()

    def altered(kept):
        """Other tokens wherever the mask [B, T] does not keep them."""
        return torch.where(kept, ids, (ids + draw(1, vocab_size, B, T)) % vocab_size)

    def choose(candidates):
        """Some of the candidate rows, a mask [B]: at most half of all rows, or one. A mask [B, 1]."""
        ranks = torch.rand(B, generator=generator) * candidates
        return ((ranks >= ranks.sort().values[-max(1, B // 2)]) & candidates)[:, None]

    def control(chosen, others):
        """How far do the chosen rows move when only the others change?"""
        nonlocal noise
        noise = torch.maximum(noise, movement(torch.where(chosen, ids, others)).where(chosen, 0))
        moved = (noise > MOVED_SHARE).nonzero()
        if len(moved) > MOVED_POSITIONS * noise.numel():
            raise RuntimeError(
                f"the model sees other rows: logits at position {int(moved[0, 1])} changed when only other rows of the "
                "batch changed"
            )

    index = torch.randperm(len(rows), generator=generator).numpy()
    ids = read(rows, np.resize(index, batch_size))[:, :-1].clone()
    B, T = ids.shape
    positions, nothing = torch.arange(T), torch.zeros(B, T, dtype=torch.bool)
    bos, starts = int(ids[0, 0]), draw(1, max(2, T - 1), B)
    ids[torch.arange(B), starts] = bos  # a document starts in each row

    before = list(predict_below_largest(ids))
    noise = movement(ids)
    if (noise > MOVED_SHARE).float().mean() > MOVED_POSITIONS:
        raise RuntimeError("the model gives two answers to the same input: is dropout on, or does it draw at random?")
    for _ in range(PROBE_CONTROLS):
        control(choose(nothing[:, 0] == 0), altered(nothing))

    shape = -(-max(PROBE_CUTS, T // 4) // B), B
    share = (torch.arange(math.prod(shape)) + torch.rand(math.prod(shape), generator=generator)) / math.prod(shape)
    cuts = 1 + ((T - 1) * share).long().view(shape)
    kinds = (torch.randperm(math.prod(shape), generator=generator) % 8).view(shape)
    chunks = 2 ** draw(5, 9, *shape)  # 32 to 256 tokens, whose border may be off by one
    borders = chunks * (1 + draw(0, 2**30, *shape) % (T // chunks).clamp(min=1)) + draw(-1, 2, *shape)
    cuts = torch.where(kinds < 2, borders, cuts)
    rarest = ids.where(ids < bos, 0).argmax(dim=1)  # the highest id: cut just before it and just after
    cuts = torch.where(kinds == 2, rarest + draw(0, 2, *shape), cuts)
    cuts = torch.where(kinds == 3, starts + draw(0, 2, *shape), cuts)
    cuts[0, 0] = T - 1  # the last token alone
    for cut in cuts.clamp(1, T - 1):
        kept = positions < cut[:, None]
        changed = altered(kept)
        leaks = kept & (movement(changed) > PROBE_NOISE + PROBE_MARGIN * noise)
        for _ in range(PROBE_REPEATS):
            if not leaks.any():
                break
            suspects, others = choose(leaks.any(dim=1)), altered(nothing)
            control(suspects, others)
            changed = altered(kept) if B == 1 else changed  # without other rows another future is all that can differ
            moved = movement(torch.where(suspects, changed, others))
            leaks &= suspects & (moved > PROBE_NOISE + PROBE_MARGIN * noise)
        if leaks.any():
            raise RuntimeError(
                f"the model sees the future: logits at position {int(leaks.nonzero()[0, 1])} changed when only later "
                "tokens changed"
            )


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


def save_best(path, model, origin):
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    try:
        torch.save({**origin, "model": weights}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        path.with_suffix(".tmp").unlink(missing_ok=True)
        print(f"best.pt was not saved: {first_line(error)}")


def read_journal(folder):
    """The scored runs of a benchmark's folder, oldest first: a list of dicts."""
    path = folder / "journal.jsonl"
    runs = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            run = json.loads(line or "null")
            runs += [{"same_prepare": None, **run, "val_bpb": float(run["val_bpb"])}] if line else []
        except (ValueError, KeyError, TypeError):
            print(f"{path}:{number}: skipped, the line is incomplete")
    return runs


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

LEDGER = ("commit", "val_bpb", "memory_gb", "status", "description")
CRASH = "0.000000\t0.0\tcrash"  # these columns of a run without a score
PROMISING = 1 / 4  # of the noise floor: what a first run must gain to be repeated ...
KEEP = 1 / 2  # ... and what the runs after it must gain
SEEDS = (1, 2, 3, 4, 5)  # that program.md names, three for the baseline
LATE_FLAG = 1.02  # budgets of training
SLOW_FLAG = 10  # percent of the time in slow steps
SLOW_RUN = 0.5  # of the most steps that a run of the same commit has made


def read_ledger(path="results.tsv"):
    """
    One dict a run, a crash without val_bpb (NaN). Takes ledgers of other tools, too: missing columns, commas instead of
    tabs, decimal commas, any case.
    """
    text = Path(path).read_text(errors="replace") if Path(path).exists() else ""
    header, *lines = [line for line in text.splitlines() if line.strip()] or [""]
    tabs = header.count("\t")
    split = (lambda line: line.split("\t", tabs)) if tabs else (lambda line: next(csv.reader([line])))
    names = [name.strip().lower() for name in split(header)] if header else []
    rows = []
    for line in lines:
        row = dict.fromkeys(LEDGER, "") | dict(zip(names, map(str.strip, split(line))))
        row["status"] = row["status"].lower()
        for name in ("val_bpb", "memory_gb"):
            number = row[name].replace(",", ".")
            number = float(number) if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", number) else 0.0
            row[name] = number if 0 < number < math.inf else math.nan
        row["val_bpb"] = math.nan if row["status"] == "crash" else row["val_bpb"]
        rows.append({name: row[name] for name in LEDGER})
    return rows


def scores_of(ledger):
    """The scores of every commit, in order: {commit: [val_bpb]}."""
    scores = {}
    for row in ledger:
        if row["commit"] and not math.isnan(row["val_bpb"]):
            scores.setdefault(row["commit"], []).append(row["val_bpb"])
    return scores


def noise_floor(scores):
    """Twice the standard deviation between runs of one commit, pooled over all commits; NaN if none ran twice."""
    repeats = sum(len(runs) - 1 for runs in scores.values())
    squares = sum((score - statistics.fmean(runs)) ** 2 for runs in scores.values() for score in runs)
    return 2 * math.sqrt(squares / repeats) if repeats else math.nan


def worth(commit, scores):
    """The mean of a commit's runs."""
    return statistics.fmean(scores[commit])


def gain(commit, best, scores):
    """How far below the best a commit is, by the runs that decide: not the first, which selected it, if it has more."""
    runs = scores[commit]
    return worth(best, scores) - statistics.fmean(runs[1:] if len(runs) > 1 and commit != best else runs)


def verdict(commit, best, scores):
    """What the runs of a commit say about it, against those of the last keep: keep, discard or repeat."""
    gained, floor = gain(commit, best, scores), noise_floor(scores)
    floor = 0.0 if math.isnan(floor) else floor
    if len(scores[commit]) == 1:
        return "repeat" if gained > PROMISING * floor else "discard"
    return "keep" if gained > KEEP * floor else "discard"


def match_runs(ledger, journal, since=""):
    """
    Which runs of the journal have a row, {number of the row: run}, and which have none: those after the first match, or
    else after `since`. (An earlier night may have begun at the same commit.)
    """
    matched, rest = {}, sorted(journal, key=lambda run: run["time"])
    for number, row in enumerate(ledger):
        for run in rest:
            same = row["commit"] and str(run["commit"]).startswith(row["commit"])
            if same and abs(run["val_bpb"] - row["val_bpb"]) < 1e-6:
                matched[number] = run
                rest = [other for other in rest if other is not run]
                break
    since = min((run["time"] for run in matched.values()), default=since)
    return matched, [run for run in rest if run["time"] >= since]


def flags(run):
    """Reasons to look at a run of the journal more closely: a list of sentences. (Older runs have fewer keys.)"""
    run = defaultdict(int, time_budget=math.inf) | run
    seconds, budget = run["training_seconds"], run["time_budget"]
    files = ", ".join(os.path.basename(file) for file in run["files_read"] or ())
    raised = {
        "prepare.py was not the one that prepared the benchmark": run["same_prepare"] is False,
        "uncommitted changes": run["dirty"] is not False,
        f"seed {run['seed']}, which program.md does not name": run["seed"] not in (SEED, *SEEDS),
        f"read scored rows (validation or holdout): {run['scored_rows_read']}": run["scored_rows_read"],
        f"read {run['untimed_rows']} training rows outside of the timed part": run["untimed_rows"] > 0,
        f"read files, perhaps from an earlier run: {files}": files,
        f"trained for {seconds:.1f} s, budget {budget:g} s": seconds > LATE_FLAG * budget,
        f"scored for {run['scoring_seconds']:.0f} s, was the machine busy?": run["scoring_seconds"] > max(60, budget),
        f"{run['slow_steps_percent']:.0f}% of the time in slow steps": run["slow_steps_percent"] > SLOW_FLAG,
        f"used {run['gpus']} GPUs": run["gpus"] > 1,
    }
    return [sentence for sentence, flag in raised.items() if flag]


def read_logs(benchmark):
    """The runs of a wave, from its logs wave/<tag>-<commit>-<seed>.log; val_bpb is NaN where there is no score."""
    runs = []
    for path in sorted(Path("wave").glob("*-*-*.log")):
        name = re.search(r"-([0-9a-z]{7})-(\d+)(?:-\d+)?$", path.stem)
        if not name:
            continue
        summary = defaultdict(str, re.findall(r"^(\w+): +(.*)", path.read_text(errors="replace"), re.M))
        score = float(summary["val_bpb"] or "nan") if summary["benchmark"] == benchmark.id else math.nan
        run = {"id": path.stem, "commit": name[1], "seed": int(name[2]), "val_bpb": score}
        run |= {"device": summary["device"] or "unknown", "steps": summary["num_steps"] or "no"}
        runs.append(run | {"memory": float(summary["peak_vram_mb"] or 0) / 1024})
    return runs


def print_wave(benchmark, ledger, kept):
    """
    What the logs of a wave are worth against the last of the commits that were kept (the first is the baseline), and a
    line `row` for each log that has none yet, as results.tsv takes it.
    """
    base, best, logs = kept[0], kept[-1], sorted(read_logs(benchmark), key=lambda run: run["seed"])
    device = next((run["device"] for run in logs if run["commit"] == base and run["val_bpb"] > 0), None)
    new = [run for run in logs if not any(f"[{run['id']} on " in row["description"] for row in ledger)]
    if new and device is None:
        return print(f"wave:        no log has a score of {base}, the baseline: submit it")
    for run in [run for run in new if run["val_bpb"] > 0 and run["device"] != device]:
        print(f"wave:        {run['id']} ran on {run['device']}, not on {device}: does not compare")
        new.remove(run)
    scores = scores_of([*ledger, *new])

    def rank(commit):
        return commit != base, -gain(commit, best, scores) if commit in scores else math.inf

    for commit in sorted({run["commit"] for run in new}, key=rank):
        what = "keep" if commit in kept else verdict(commit, best, scores) if commit in scores else "crash"
        if commit in scores:
            gained, count = gain(commit, best, scores), len(scores[commit])
            advice = what.replace("repeat", "promising, submit seeds 2 and 3")
            print(f"wave:        {commit} gains {gained:.6f} in {count} runs: {advice}")
        for run in (run for run in new if run["commit"] == commit):
            words = "baseline" if commit == base else git("log", "-1", "--format=%s", commit)
            words = f"{words}, seed {run['seed']}, {run['steps']} steps [{run['id']} on {run['device']}]"
            row = f"{run['val_bpb']:.6f}\t{run['memory']:.1f}\t{what.replace('repeat', 'discard')}"
            print(f"row\t{commit}\t{row if run['val_bpb'] > 0 else CRASH}\t{words}")


def read_notes():
    """The results that agents share in git notes (program_swarm.md), oldest first; other lines are left out."""
    lines = (git("grep", "-h", "^time=", "refs/notes/results") or "").splitlines()
    results = []
    for line in sorted(set(lines)):
        keys, *row = line.split("\t", len(LEDGER))
        result = dict(word.split("=", 1) for word in keys.split() if "=" in word) | dict(zip(LEDGER, row))
        if {"agent", "benchmark", "device", *LEDGER} <= set(result) and re.fullmatch(r"\d+\.\d+", result["val_bpb"]):
            results.append(result | {"val_bpb": float(result["val_bpb"]) or math.nan})
    return results


def print_hub(benchmark, ledger):
    """The best commits that anybody kept on this benchmark and kind of device, and tries that nobody has a row of."""
    device, notes = git("config", "autoresearch.device"), read_notes()
    shared = [result for result in notes if (result["benchmark"], result["device"]) == (benchmark.id, device)]
    scores, kept = scores_of(shared), {result["commit"]: result for result in shared if result["status"] == "keep"}
    means = {commit: statistics.fmean(scores[commit]) for commit in kept if commit in scores}
    for commit in sorted(means, key=means.get)[:5]:
        words = f"{kept[commit]['agent']}: {kept[commit]['description']}"
        print(f"hub:         {means[commit]:.6f} in {len(scores[commit])} runs, {commit}, {words}")
    listed = {row["commit"] for row in (*ledger, *notes)}
    for line in (git("for-each-ref", "--format=%(refname:lstrip=2) %(subject)", "refs/tries") or "").splitlines():
        if line.split()[0] not in listed:
            print(f"no row yet:  {line}")


def fallbacks(path="run.log"):
    """The lines of a log in which train.py says what did not work or does not train."""
    log = Path(path).read_text(errors="replace") if Path(path).exists() else ""
    said = r"^(?:CPU|COMPILE|DEVICE_BATCH_SIZE): .*|^attention: \w+ not used.*|^\S+ has no gradient.*"
    return re.findall(said, log, re.M)


def sparkline(values, width=60):
    """Values as one line of block characters, at most `width` of them."""
    width = min(width, len(values))
    values = [values[len(values) * (part + 1) // width - 1] for part in range(width)]
    low, span = min(values), max(values) - min(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span) if span else 0] for value in values)


def print_status():
    """Where the night stands, from results.tsv in this folder, the journal and git, and what program.md says next."""
    benchmark, ledger, path = load_benchmark(), read_ledger(), Path("results.tsv")
    created = datetime.fromtimestamp(path.stat().st_mtime if path.exists() else time.time(), timezone.utc)
    journal = read_journal(benchmark.path)
    matched, unlisted = match_runs(ledger, journal, created.isoformat(timespec="seconds"))
    head = (git("rev-parse", "HEAD") or "no git")[:7]
    rows = [row for row in ledger if row["commit"] == head]
    new = [run for run in unlisted if str(run["commit"]).startswith(head) and not run.get("dirty")]
    listed = [id(run) for number, run in matched.items() if ledger[number]["commit"] == head]
    runs = [run for run in journal if run in new or id(run) in listed]
    most = max((run.get("steps", 0) for run in runs), default=0)
    slow = [run for run in new if run.get("slow_steps_percent", 0) > SLOW_FLAG or run.get("steps", 0) < SLOW_RUN * most]
    counted = [run for run in new if run not in slow]
    scores = scores_of([*ledger, *({"commit": head, "val_bpb": run["val_bpb"]} for run in counted)])
    keeps = [row["commit"] if row["status"] == "keep" and row["commit"] in scores else None for row in ledger]
    kept = list(dict.fromkeys(filter(None, keeps)))
    best, floor = kept[-1] if kept else head, noise_floor(scores)

    print(f"benchmark:   {benchmark.id}, {benchmark.time_budget:g} s a run, {len(ledger)} rows")
    limits = f"; promising from {PROMISING * floor:.6f}, keep from {KEEP * floor:.6f}"
    print(f"noise floor: {floor:.6f}{limits}" if floor > 0 else "noise floor: unknown, no commit ran twice")
    if len(kept) > 1:
        low = itertools.accumulate((worth(commit, scores) if commit else math.inf for commit in keeps), min)
        low = [score for score in low if score < math.inf]
        print(f"best so far: {sparkline(low)} {low[0]:.4f} to {low[-1]:.4f}")
    if kept:
        print(f"to beat:     {worth(best, scores):.6f}, {best}")
    for run in (run for number, run in matched.items() if ledger[number]["commit"] == best != head):
        print(f"  {run['val_bpb']:.6f} seed {run['seed']}, {run.get('steps', 0):,} steps")
    branch = git("branch", "--show-current") or "no branch"
    print(f"this commit: {head} on {branch}" + ", the one to beat" * (head == best))
    for run in runs:
        gained = f", gain {worth(best, scores) - run['val_bpb']:.6f}" if head not in kept and kept else ""
        state = ", does not count" if run in slow else ", no row yet" if run in new else ""
        print(f"  {run['val_bpb']:.6f} seed {run['seed']}, {run.get('steps', 0):,} steps{gained}{state}")
        for words in flags(run):
            print(f"  warning: {words}")
    for line in fallbacks():
        print(f"  warning: run.log: {line}")
    print_wave(benchmark, ledger, kept or [head])
    print_hub(benchmark, ledger)
    for row in ledger[-10:]:
        print(f"  {row['commit']} {row['val_bpb']:.6f} {row['status']:<7} {row['description']:.100}")

    what = "keep" if head in (best, *kept) else verdict(head, best, scores) if head in scores else "crash"
    seeds = [run["seed"] for run in runs if run not in slow]
    crashed = any(row["status"] == "crash" for row in rows)
    enough = crashed or len(scores.get(head, [])) > 2
    seed = next((seed for seed in SEEDS[:3] if seed not in seeds and not enough), None)
    if counted:
        memory, status = counted[0]["peak_memory_mb"] / 1024, what.replace("repeat", "discard (promising)")
        print(f"next: write the row: {head} {counted[0]['val_bpb']:.6f} {memory:.1f} {status}")
    elif len(slow) > 2 and not crashed:
        print(f"next: disturbed three times, give it up: write the row: {head} 0.000000 0.0 crash")
    elif slow and runs[-1] is slow[-1] and not crashed:
        print(f"next: disturbed, is the machine idle? Run it again with seed {slow[-1]['seed']}")
    elif len(scores) < 2 and head == best and seed:
        print(f"next: run the baseline with seed {seed}")
    elif not rows and head != best:
        print(f"next: run it with seed {seed}; if it has crashed write the row: {head} 0.000000 0.0 crash")
    elif what == "repeat" and seed:
        print(f"next: promising, run it with seed {seed}")
    elif head in kept and head != best:
        print(f"next: go back to {best}, the branch")
    elif what != "keep":
        print(f"next: store it as refs/tries/{head}, reset to {best}")
    elif len(ledger) > 20 and kept[0] not in [row["commit"] for row in ledger[-20:]]:
        print(f"next: run the baseline, {kept[0]}, once more, to see drift; then a new idea, before <until>")
    else:
        print("next: a new idea, before <until>")


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
        return print_status()
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

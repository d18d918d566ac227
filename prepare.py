"""
The exam: data, tokenizer, dataloader, training clock and metric. It is fixed: the agent edits train.py only.

    uv run prepare.py                                   # once: build the benchmark that suits this machine
    uv run prepare.py --dataset local --text notes/     # or one from your own text; --help lists every flag

A benchmark is a folder under $AUTORESEARCH_HOME (default ~/.cache/autoresearch): a tokenizer, packed rows of tokens for
training, validation and a holdout, and benchmark.json with the constants that make two runs comparable. All of it is
settled when it is prepared: nothing in the environment or in train.py changes a prepared exam.

The metric is val_bpb, bits per byte of the validation text, lower is better. It does not depend on the vocabulary.

Sections: Constants, Benchmark, Text, Download, Tokenizer, Packing, Build, Dataloader, Clock, Metric, Command line
"""

import argparse
import base64
import hashlib
import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from bisect import bisect_right, insort
from collections import Counter, deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

PROCESS_START = time.monotonic()  # before the imports that take seconds, so that total_seconds counts them
sys.dont_write_bytecode = False  # containers like to set it, and then torch takes 3 s longer to import in every run

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

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
VALIDATION_SHARD = 6542  # climbmix: the last shard, never trained on
TINYSTORIES_FILES = ["tinystories_gpt4_clean.parquet"]
DEFAULT_SHARDS = 10
SEED = 42

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # after the merges; the first is BOS
TOKENIZER_CHARACTERS = 1_000_000_000  # of training text for the tokenizer, at most ...
TOKENIZER_DOCUMENT_CHARACTERS = 10_000  # ... and this many of one document

GATHER_ROWS = 128  # that the dataloader gathers at a time, or one batch

PACKING_BUFFER = 1_000  # documents that best-fit packing chooses from
DOCUMENT_BATCH = 128  # documents that enter that buffer together

FLASH3 = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}  # with `version` it is not found offline
FLASH3_CAPABILITIES = ((8, 0), (9, 0))  # A100 and H100: on others it calls exit(1)

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")
RECORD_SUFFIXES = (".jsonl", ".parquet")  # files of many documents
FEW_GROUPS = 10  # with fewer groups of local text than this, files are cut into blocks of ...
BLOCK_CHARACTERS = 65_536  # ... this size, each a group of its own
TOO_SMALL = "text too small: add some, or lower --val-rows and --holdout-rows, which leave nothing to train on"

DOWNLOAD_WORKERS = 4
DOWNLOAD_ATTEMPTS = 4
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
RETRY_SECONDS = 1.0  # before the second attempt; doubles with each

LATE_LIMIT = 1.1  # a run that trained for longer than this many budgets is not scored
CLOCK_ERROR = 1.0  # seconds that file time stamps may be ahead of Python's clock, and ...
CLOCK_DRIFT = 0.01  # ... this share of the run
MAX_LOGIT_BYTES = 1 << 30  # of one scoring step, in float32; their log-softmax takes as much again
PROBE_ROWS = 8  # rows whose future the probe replaces ...
PROBE_ROUNDS = 4  # ... at this many cuts each
PROBE_REPEATS = 3  # a leak moves logits every time, chance does not
PROBE_NOISE = 1e-4  # rounding may move logits by this share of their standard deviation ...
PROBE_MARGIN = 3  # ... and by so many times what other rows alone move them by
MIXED_SHARE = 0.05  # but if those move them by more than this, at more than ...
MIXED_POSITIONS = 0.01  # ... this share of the positions, the model sees other rows
SAME_SCORE = 1e-3  # relative difference of a row that is scored twice
SLOW_STEP = 1.5  # a step that took so many medians was disturbed


# --------------------------------------
# Benchmark


@dataclass(frozen=True)
class Benchmark:
    """One prepared exam: the constants of benchmark.json, where it lies, and the seed of this run."""

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
        if split != "train":
            self.rows_served[split] += len(rows)
        return rows

    def token_bytes(self):
        """Raw byte length of every token, 0 for special tokens: int32 [V]."""
        return np.load(self.path / "token_bytes.npy")


def load_benchmark(read_everything=False):
    """
    The benchmark that prepare.py built or chose last. Its seed is 42, or $AUTORESEARCH_SEED to repeat the same file.

    Raises SystemExit, with a line that says how to mend it, if there is none or if it was changed or is not whole. Of
    the training rows only the size is checked, if not `read_everything`.
    """
    try:
        return open_benchmark(HOME / Path((HOME / "current").read_text().strip()).name, read_everything)
    except FileNotFoundError:
        raise SystemExit('no benchmark prepared: run "uv run prepare.py" first') from None


def open_benchmark(path, read_everything=False):
    try:
        record = json.loads((path / "benchmark.json").read_text())
    except ValueError:
        record, reason = {}, "benchmark.json is not valid JSON"
    else:
        reason = find_damage(path, record, read_everything)
    if reason:
        command = f"uv run prepare.py {record.get('arguments', '')}".strip()
        raise SystemExit(f'benchmark {path.name} is damaged: {reason}; run "{command}" again, which mends it')
    seed = os.environ.get("AUTORESEARCH_SEED", str(SEED))
    if not seed.isdecimal():
        raise SystemExit(f"AUTORESEARCH_SEED={seed}: must be a whole number")
    return Benchmark(
        id=record["id"],
        name=record["dataset"],
        path=path,
        seed=int(seed),
        prepared_by=record["prepare_sha256"],
        **record["settings"],
    )


def open_rows(path, split):
    return np.load(path / f"{split}.npy", mmap_mode="r")


def find_damage(path, record, read_everything):
    """What is wrong with a prepared benchmark, or None."""
    try:
        if not benchmark_id(record) == record["id"] == path.name:
            return "benchmark.json was changed after it was prepared"
        settings = record["settings"]
        if set(settings) != set(SETTINGS) or set(record["files"]) != FILES:
            return "benchmark.json names other things than prepare.py writes"
        for name, file in record["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != file["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {file['bytes']}"
            if (read_everything or name != "train.npy") and sha256(path / name) != file["sha256"]:
                return f"{name} was changed after it was prepared"
        for split, count in row_counts(record).items():
            rows = open_rows(path, split)
            if rows.dtype != np.uint16 or rows.shape != (count, settings["max_seq_len"] + 1):
                return f"{split}.npy has other rows than benchmark.json says"
    except (KeyError, TypeError, AttributeError):
        return "benchmark.json is incomplete"
    except ValueError as error:  # numpy loads no pickles
        return f"not an array ({first_line(error)})"


def row_counts(record):
    settings = record["settings"]
    return {"train": record["counts"]["train_rows"], "val": settings["val_rows"], "holdout": settings["holdout_rows"]}


def benchmark_id(record):
    """Same id, same exam: it hashes every constant and the content of every file."""
    content = json.dumps([record["dataset"], record["settings"], record["files"]], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    settings = record["settings"]
    sizes = f"T{settings['max_seq_len']}-V{settings['vocab_size']}-{settings['time_budget']:g}s"
    return f"{record['dataset']}-{sizes}-{digest}"


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
    """Documents of the `text` field of every line, at most DOCUMENT_BATCH at a time."""
    with open(path, "rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        while some := list(itertools.islice(numbered, DOCUMENT_BATCH)):
            batch = []
            for number, line in some:
                try:
                    batch.append(json.loads(line)["text"] + "")
                except (ValueError, KeyError, TypeError):
                    raise SystemExit(f"{path}:{number}: not a JSON object with a string `text`") from None
            yield batch


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class LocalText:
    """
    Text files of the user's own, or by default the running Python's standard library without its test folders.

    `batches()` yields a batch per group: a top-level package, folder or lone file, in the order of a hash of its name,
    so that validation text is not a near-copy of training text. Records of .jsonl and .parquet files stand alone.
    Exact duplicates are dropped; what is not UTF-8 or can't be read is skipped; both are counted in `counts`.
    """

    def __init__(self, paths):
        self.groups = {}  # name -> files
        self.counts = Counter()
        skipped = ()
        if not paths:
            paths = [sysconfig.get_path("stdlib")]
            skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages")
        for root in map(Path, paths):
            if root.is_file():
                self.groups.setdefault(root.name, []).append(root)
            elif root.is_dir():
                self.walk(root, skipped)
            else:
                raise SystemExit(f"--text {root}: no such file or folder")
        if not self.groups:
            raise SystemExit(f"--text {' '.join(map(str, paths))}: no {' '.join(TEXT_SUFFIXES)} file in there")
        self.groups = dict(sorted(self.groups.items(), key=lambda group: hashlib.sha256(group[0].encode()).digest()))
        self.in_blocks = len(self.groups) < FEW_GROUPS

    def walk(self, root, skipped):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(s for s in subfolders if s not in skipped and s[0] != "." and s != "__pycache__")
            for file in (Path(folder, name) for name in sorted(names)):
                wanted = file.suffix == ".py" if skipped else file.suffix in TEXT_SUFFIXES and file.name[0] != "."
                if wanted and file.is_file():
                    self.groups.setdefault(file.relative_to(root).parts[0], []).append(file)

    def fingerprint(self):
        """Changes when a file is added, removed or touched. Reads no content."""
        files = [file for files in self.groups.values() for file in files]
        stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def batches(self):
        self.counts.clear()
        seen = set()
        for files in self.groups.values():
            group = []
            for file in files:
                if file.suffix in RECORD_SUFFIXES:
                    for batch in parquet_batches(file) if file.suffix == ".parquet" else jsonl_batches(file):
                        yield self.distinct(batch, seen)
                    continue
                try:
                    text = file.read_bytes().decode()  # no newline translation: bytes are counted as they are
                except (OSError, UnicodeDecodeError):
                    self.counts["skipped files"] += 1
                    continue
                if self.in_blocks:
                    yield from ([block] for block in self.distinct(blocks(text), seen))
                else:
                    group += self.distinct([text], seen)
            yield group

    def distinct(self, texts, seen):
        """The texts that are neither empty nor seen before."""
        fresh = []
        for text in texts:
            try:
                digest = hashlib.sha256(text.encode()).digest()[:16]
            except UnicodeEncodeError:  # a lone surrogate, which only JSON can spell
                self.counts["skipped documents"] += 1
                continue
            if digest in seen or not text:
                self.counts["duplicates"] += 1
                continue
            seen.add(digest)
            self.counts["documents"] += 1
            fresh.append(text)
        return fresh


def blocks(text):
    """Cut a text into blocks of BLOCK_CHARACTERS and what is left of the line, or twice as many in a very long one."""
    start, cuts = 0, []
    while start < len(text):
        limit = start + 2 * BLOCK_CHARACTERS
        end = text.find("\n", start + BLOCK_CHARACTERS, limit) + 1 or limit
        cuts.append(text[start:end])
        start = end
    return cuts


# --------------------------------------
# Download


def fetch(dataset, names):
    """Download files of a Hugging Face dataset that are not here yet, in parallel. Returns their paths."""
    folder = HOME / "downloads" / dataset
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        received = Counter()
        progress = Progress()
        with ThreadPoolExecutor(DOWNLOAD_WORKERS) as pool:
            url = f"{endpoint}/datasets/{REPOSITORIES[dataset]}/resolve/main"
            pending = {pool.submit(download, f"{url}/{name}", folder / name, received) for name in missing}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    state = f"{len(missing) - len(pending)} of {len(missing)} files"
                    size = f"{sum(received.values()) / 1e6:,.0f} MB"
                    progress(f"downloading {dataset}: {state}, {size}", last=not pending)
            except KeyboardInterrupt:
                print("interrupted; run this again to go on")
                os._exit(130)  # at once: a thread that waits for a stalled server would hold the process up
            except BaseException:
                received["stop"] = 1  # ends the other downloads; what they have stays for the next time
                pool.shutdown(cancel_futures=True)
                raise
    return [folder / name for name in names]


def download(url, path, received):
    """
    Fetch one parquet file; an interrupted download goes on where it stopped. The name appears only when it is whole.

    Raises SystemExit, naming the file and the reason, when DOWNLOAD_ATTEMPTS in a row have failed.
    """
    import requests

    part = path.with_name(path.name + ".part")
    pause = RETRY_SECONDS
    for attempt in range(DOWNLOAD_ATTEMPTS):
        if attempt:
            time.sleep(pause + random.random() * RETRY_SECONDS)
            pause *= 2
        if received["stop"]:
            raise SystemExit("another download failed")
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=DOWNLOAD_TIMEOUT) as response:
                if response.status_code == 416:  # nothing lies beyond what we have, so what we have is not this file
                    part.unlink()
                    reason = "the part of it that was here did not match"
                    continue
                if not response.ok:
                    reason = f"HTTP {response.status_code} {response.reason}"
                    if response.status_code < 500 and response.status_code not in (408, 429):
                        break
                    if response.headers.get("Retry-After", "").isdecimal():
                        pause = max(pause, min(60, int(response.headers["Retry-After"])))
                    continue
                have = have if response.status_code == 206 else 0
                length = have + int(response.headers.get("Content-Length", -1))
                with open(part, "ab" if have else "wb") as file:
                    for chunk in response.iter_content(1 << 14):
                        file.write(chunk)
                        received[path.name] = file.tell()
                        if received["stop"]:
                            raise SystemExit("another download failed")
            size = part.stat().st_size
            if length >= have and size != length:
                reason = f"{size} bytes arrived instead of {length}"
                if size > length:
                    part.unlink()
                continue
            announced = [r.headers.get("X-Linked-ETag", "").strip('"') for r in (*response.history, response)]
            if any(len(tag) == 64 and tag != sha256(part) for tag in announced):
                reason = "its sha256 is not the one that the server announced"
                part.unlink()
                continue
            next(parquet_batches(part), None)
            os.replace(part, path)
            return
        except requests.RequestException as error:
            reason = first_line(error)
        except SystemExit as error:
            if received["stop"]:
                raise
            part.unlink()  # whole but not a parquet file: nothing to go on from
            reason = str(error)
    raise SystemExit(
        f"could not download {url}: {reason}; check the network or name a mirror in HF_ENDPOINT, and run this again "
        "(it resumes); offline, use --dataset local"
    )


def fetch_flash3():
    """The attention kernel that train.py, which uses no network, takes on the GPUs that have it."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in FLASH3_CAPABILITIES:
        try:
            from kernels import get_kernel

            get_kernel(**FLASH3)
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


def take_rows(batches, count, row_length, bos, split):
    """Pack as few whole batches as give `count` rows, so that no group of documents is on two sides of a split."""
    taken, tokens = [], 0
    for batch in batches:
        taken.append(batch)
        tokens += sum(len(document) + 1 for document in batch)
        if tokens >= count * row_length:
            rows = list(itertools.islice(pack(taken, row_length, bos, split), count))
            if len(rows) == count:
                return rows
    return []


def write_rows(path, rows, row_length):
    """Stream rows into an .npy file; returns how many. The header has room for any count (numpy pads it for that)."""

    def header(count):
        fields = {"descr": "<u2", "fortran_order": False, "shape": (count, row_length)}
        np.lib.format.write_array_header_1_0(file, fields)

    progress = Progress()
    with open(path, "wb") as file:
        header(0)
        count = 0
        for count, row in enumerate(rows, 1):
            file.write(row.astype("<u2", copy=False))
            progress(f"packing {path.name}: {count:,} rows")
        file.seek(0)
        header(count)
    return count


# --------------------------------------
# Build


def build(dataset, settings, local_text, num_shards):
    """Write a benchmark's files into the folder .building under HOME. Returns it, and what was counted."""
    folder = HOME / ".building"
    shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed; the lock says that nobody is at it
    folder.mkdir()
    row_length = settings["max_seq_len"] + 1
    wanted = {"val": settings["val_rows"], "holdout": settings["holdout_rows"]}
    split = settings["long_documents"] == "split"
    if dataset == "climbmix":  # a shard of its own is scored: one stream of rows, as in the reference project
        *shards, scored = fetch(dataset, [f"shard_{i:05}.parquet" for i in (*range(num_shards), VALIDATION_SHARD)])
        read = lambda: itertools.chain.from_iterable(map(parquet_batches, shards))  # noqa: E731
        tokenizer = Tokenizer.train(read(), settings["vocab_size"])
        stream = pack(encode_batches(tokenizer, parquet_batches(scored)), row_length, tokenizer.bos_id, split)
        rows = {name: list(itertools.islice(stream, count)) for name, count in wanted.items()}
        training = encode_batches(tokenizer, read())
    else:  # validation takes what it needs from the front of one stream of documents, then holdout, then training
        read = local_text.batches if local_text else lambda: parquet_batches(fetch(dataset, TINYSTORIES_FILES)[0])
        for guess in (4 * 2**i for i in itertools.count()):  # characters per token
            reserved = count_batches(read(), sum(wanted.values()) * row_length * guess)
            tokenizer = Tokenizer.train(itertools.islice(read(), reserved, None), settings["vocab_size"])
            taken = itertools.count()
            training = (batch for batch, _ in zip(encode_batches(tokenizer, read()), taken))
            rows = {name: take_rows(training, n, row_length, tokenizer.bos_id, split) for name, n in wanted.items()}
            if next(taken) <= reserved:
                break  # else the tokenizer has seen text that is scored: set more aside, until nothing is left

    documents = 0

    def counted():
        nonlocal documents
        for batch in training:
            documents += len(batch)
            yield batch

    tokenizer.save(folder)
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes())
    rows["train"] = pack(counted(), row_length, tokenizer.bos_id, split)
    written = {name: write_rows(folder / f"{name}.npy", rows[name], row_length) for name in rows}
    if any(written[name] < count for name, count in (*wanted.items(), ("train", 1))):
        raise SystemExit(TOO_SMALL)
    scored_ids = np.concatenate(rows["val"])
    return folder, {
        "train_documents": documents,
        "train_rows": written["train"],
        "bytes_per_token": round(float(tokenizer.token_bytes()[scored_ids].sum() / len(scored_ids)), 3),
        **(local_text.counts if local_text else {}),
    }


def count_batches(batches, characters):
    """How many batches have that many characters. Raises SystemExit if nothing comes after them."""
    for count, batch in enumerate(batches):
        if characters <= 0:
            return count
        characters -= sum(map(len, batch))
    raise SystemExit(TOO_SMALL)


def install(folder, request, settings, counts, arguments):
    """Move a finished build to its place and make it the current benchmark. benchmark.json comes last."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    record = {"dataset": request["dataset"], "settings": settings, "files": files, "counts": counts}
    record = {"id": benchmark_id(record), **record, "request": request, "arguments": arguments}
    record |= {"prepare_sha256": sha256(__file__), "prepared": now()}
    target = HOME / record["id"]
    target.mkdir(exist_ok=True)  # may hold the same exam, with its journal, built by an older prepare.py
    for name in files:
        os.replace(folder / name, target / name)
    write_atomically(target / "benchmark.json", json.dumps(record, indent=1).encode())
    return record


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_atomically(path, content):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def find_prepared(request):
    """The record of a whole benchmark that this same prepare.py built for the same request, or None."""
    for path in sorted(HOME.glob("*/benchmark.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError:
            continue
        same = record.get("request") == request and record.get("prepare_sha256") == sha256(__file__)
        if same and not find_damage(path.parent, record, read_everything=True):
            return record


# --------------------------------------
# Dataloader


def make_dataloader(benchmark, split, batch_size, device):
    """
    Endless batches of "train" or "val": (inputs, targets, epoch), int64 [B, T] on `device`, targets one token ahead.

    Rows come in an order shuffled per epoch by the benchmark's seed; epochs count from 1. The next rows are gathered in
    a thread meanwhile. On CUDA they wait in pinned memory of their own, which torch does not hand out again before the
    copy from it is done. Raises ValueError for another split or a batch size below 1.
    """
    if split not in ("train", "val"):
        raise ValueError(f'no dataloader for "{split}": take "train" or "val"')
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    device = torch.device(device)
    rows = benchmark.rows(split)

    def shuffled():
        for epoch in itertools.count(1):
            for index in np.random.default_rng((benchmark.seed, epoch)).permutation(len(rows)):
                yield index, epoch

    def gather():  # several small batches at a time: a thread has a price
        count = max(1, GATHER_ROWS // batch_size)
        indices, epochs = zip(*itertools.islice(order, count * batch_size))
        batch = read(rows, np.array(indices))
        return batch.pin_memory() if device.type == "cuda" else batch, epochs[::batch_size]

    def batches():
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(gather)
            while True:
                gathered, epochs = ahead.result()
                ahead = pool.submit(gather)
                for ids, epoch in zip(to_ids(gathered, device).split(batch_size), epochs):
                    benchmark.rows_served[split] += batch_size
                    yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), epoch

    order = shuffled()
    return batches()


def read(rows, index):
    """A copy of the rows at `index`, an array: int16 [B, T + 1], the same bits as uint16, which fewer devices know."""
    return torch.from_numpy(rows[index].view(np.int16))


def to_ids(batch, device):
    """What `read` gives, as int64 on `device`."""
    return batch.to(device, non_blocking=device.type == "cuda").to(torch.int64) & 0xFFFF  # pinned or staged there only


# --------------------------------------
# Clock


class TrainingClock:
    """
    The clock of one run. Between start() and stop() every second counts, whatever it is used for.

    Takes the lock of the device at once and holds it until the run is scored or the process ends: a second training
    there would halve both. Raises SystemExit, naming the other process, if the device is taken.
    """

    def __init__(self, benchmark, device):
        self.benchmark = benchmark
        self.device = torch.device(device)
        self.started = self.stopped = None
        self.scored = False
        self.ticks = []
        self.lock, self.holder = lock_device(self.device)
        self.origin = find_origin()

    def start(self):
        """The run begins. Raises RuntimeError the second time."""
        if self.started is not None:
            raise RuntimeError("the clock was started before: one clock, one run")
        synchronize(self.device)
        self.rows_before = self.benchmark.rows_served["train"]
        self.stamp = self.file_time()
        self.started = time.monotonic()

    def stop(self):
        """The run is over, with all that it asked the device to do. Freezes `elapsed`."""
        synchronize(self.device)
        if self.started is None or self.stopped is not None:
            raise RuntimeError("the clock is not running")
        self.stopped = time.monotonic()
        self.rows = self.benchmark.rows_served["train"] - self.rows_before

    def tick(self):
        """A step is over. Of no consequence but for `slow_steps_percent`, which the journal keeps."""
        self.ticks.append(self.elapsed)

    @property
    def slow_steps_percent(self):
        """The share of the time that went into steps of over SLOW_STEP medians; 0 for fewer than two steps."""
        steps = np.diff(self.ticks, prepend=0.0)
        return 100 * float(steps[steps > SLOW_STEP * np.median(steps)].sum() / steps.sum()) if len(steps) > 1 else 0.0

    @property
    def elapsed(self):
        """Seconds since start()."""
        if self.started is None:
            return 0.0
        return (self.stopped or time.monotonic()) - self.started

    @property
    def progress(self):
        """Share of the budget that is used up, in [0, 1]."""
        return min(1.0, self.elapsed / self.benchmark.time_budget)

    def expired(self):
        return self.elapsed >= self.benchmark.time_budget

    def file_time(self):
        """Seconds, as the system stamps them on a file: no clock of Python's."""
        self.holder.touch()
        return self.holder.stat().st_mtime

    def check(self):
        """Raise RuntimeError unless the run was timed from start to stop, kept to its budget and is scored at once."""
        if self.started is None or self.stopped is None:
            state = "never started" if self.started is None else "still running"
            raise RuntimeError(f"not scored: the training clock is {state}; start() and stop() it around the training")
        if self.scored:
            raise RuntimeError("not scored: this run was scored before; one run, one score")
        self.scored = True
        seconds = time.monotonic() - self.started  # what was done between stop() and here counts too
        passed = self.file_time() - self.stamp
        if passed - seconds > CLOCK_ERROR + CLOCK_DRIFT * passed:
            raise RuntimeError(
                f"not scored: the clock shows {seconds:.1f} s, but {passed:.1f} s have passed; did the machine sleep? "
                "Run it again"
            )
        if seconds > LATE_LIMIT * self.benchmark.time_budget:
            raise RuntimeError(
                f"not scored: trained for {seconds:.1f} s of a budget of {self.benchmark.time_budget:g} s; "
                "make the steps shorter, and score right after stop()"
            )


def lock_device(device):
    """An exclusive lock on this device, by its own name on this machine, and the file that tells whose it is."""
    if device.type == "cuda":
        name = f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    else:
        name = f"{device.type}-{platform.node()}"
    holder = HOME / "locks" / f"{name}.pid"
    lock = FileLock(HOME / "locks" / f"{name}.lock")  # the system frees it when the process ends
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(str(os.getpid()))
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise SystemExit(f"another training is running on {device} (pid {pid}): wait for it or end it") from None
    except OSError as error:
        raise SystemExit(f"cannot write to AUTORESEARCH_HOME: {error}; mend it and run again") from None
    return lock, holder


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def find_origin():
    """What is being run: the commit, whether .py files differ from it, and hashes of the script and of this file."""

    def git(*words):
        try:
            output = subprocess.check_output(["git", *words], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
            return None
        return output.decode().strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    script = getattr(sys.modules["__main__"], "__file__", None)
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "script": script and Path(script).name,
        "train_sha256": script and sha256(script),
        "prepare_sha256": sha256(__file__),
    }


# --------------------------------------
# Metric


def evaluate_bpb(model, benchmark, batch_size, clock):
    """
    Score a finished run: bits per byte of all validation rows, a float. The run goes into the journal, and when it is
    the benchmark's best so far its weights are kept as best.pt.

    `model(inputs)` takes int64 [B, T] and returns logits [B, T, vocab_size]; it never sees the targets. `batch_size` is
    only a matter of speed. Raises RuntimeError if the run was not timed or too long, if the model sees the future or
    other rows, or changes while it is scored; ValueError if its logits have another shape or are not finite; SystemExit
    if the benchmark is damaged or the journal can't be written. Frees the device in any case.
    """
    try:
        clock.check()
        if not open_benchmark(benchmark.path) == benchmark == clock.benchmark:
            raise RuntimeError("not scored: another benchmark than the one on disk; take it from load_benchmark()")
        device, served = clock.device, Counter(benchmark.rows_served)
        val_rows, holdout_rows = (open_rows(benchmark.path, split) for split in ("val", "holdout"))
        token_bytes, batch_size = benchmark.token_bytes(), scoring_rows(benchmark, batch_size)
        if was_training := getattr(model, "training", False):
            model.eval()
        weights = checksums(model)
        check_causality(model, holdout_rows, batch_size, benchmark.vocab_size, device)
        bits = bits_of_rows(model, val_rows, token_bytes, batch_size, device)
        holdout_bits = bits_of_rows(model, holdout_rows, token_bytes, batch_size, device)
        again = bits_of_rows(model, val_rows[:batch_size], token_bytes, batch_size, device)
        if not np.allclose(again, bits[: len(again)], rtol=SAME_SCORE):
            raise RuntimeError("not scored: the model scores the same rows differently once it has seen others")
        if not np.array_equal(checksums(model), weights, equal_nan=True):
            raise RuntimeError("not scored: parameters or buffers have changed during the scoring")
        val_bpb = float(bits.sum() / token_bytes[val_rows[:, 1:]].sum())
        holdout_bpb = float(holdout_bits.sum() / token_bytes[holdout_rows[:, 1:]].sum())
        if was_training:
            model.train()
        record_run(model, benchmark, clock, served, val_bpb, holdout_bpb)
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
        ids = to_ids(read(rows, index), device)
        logits = predict(model, ids[:, :-1], len(token_bytes))
        finite &= torch.isfinite(logits.amin()) & torch.isfinite(logits.amax())
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        nats[start : start + batch_size] = losses.where(has_bytes[targets], 0).sum(dim=1)[: len(rows) - start]
        del logits, losses  # not beside those of the next step
    if not finite:
        raise ValueError("not scored: the model's logits are not all finite")
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

    In every second row, what comes after a cut becomes random, and so do all other rows; logits before the cut must
    stay. Rounding may move them (in a mixture of experts, say, other tokens change the order of sums), by how much is
    seen when only the other rows change. Raises RuntimeError naming the first position that moved by more.
    """
    ids = to_ids(read(rows, np.arange(batch_size) % len(rows)), device)[:, :-1]
    B, T = ids.shape
    probed = torch.arange(0, B, 2)[:PROBE_ROWS]
    starts = torch.randint(1, max(2, T - 1), (len(probed),))
    ids[probed, starts] = int(ids[0, 0])  # every row begins with BOS: now each has the start of a document within
    positions = torch.arange(T, device=device)

    def logits_of(ids):
        """Of the probed rows, below the largest: what masks tokens with -1e9 would hide all else."""
        logits = predict(model, ids, vocab_size)[probed]
        return (logits - logits.amax(dim=2, keepdim=True)).clamp_(min=-50)

    def movement(cuts):
        """By how much they move with random tokens in all other rows, and from the cuts on: [probed, T]."""
        changed = (ids + torch.randint(1, vocab_size, ids.shape, device=device)) % vocab_size  # differs everywhere
        changed[probed] = torch.where(positions < cuts[:, None], ids[probed], changed[probed])
        return (logits_of(changed) - before).abs().amax(dim=2) / before.std(dim=(1, 2))[:, None]

    def rounding(rounds):
        return torch.stack([movement(torch.full_like(starts, T, device=device)) for _ in range(rounds)]).amax(dim=0)

    before = logits_of(ids)
    noise = rounding(PROBE_ROUNDS)
    mixed = (noise > MIXED_SHARE).nonzero()
    if len(mixed) > MIXED_POSITIONS * noise.numel():
        raise RuntimeError(
            f"the model sees other rows: logits at position {int(mixed[0, 1])} changed when only other rows of the "
            "batch changed"
        )
    parts = PROBE_ROUNDS * len(probed)  # of a row, with a cut in each
    cuts = 1 + ((T - 1) * (torch.arange(parts) + torch.rand(parts)) / parts).long().clamp(max=T - 2)
    cuts = cuts.view(PROBE_ROUNDS, -1)
    cuts[0, -1] = starts[-1]  # BOS goes, too
    cuts[1, -1] = min(int(starts[-1]) + 1, T - 1)  # what follows it
    cuts[2, -1] = T - 1  # the last token alone
    for cut in cuts.to(device):
        leaks = positions < cut[:, None]
        for _ in range(PROBE_REPEATS):
            leaks = leaks & (movement(cut) > PROBE_NOISE + PROBE_MARGIN * noise)
            if not leaks.any():
                break
            noise = torch.maximum(noise, rounding(PROBE_ROUNDS))
        else:
            raise RuntimeError(
                f"the model sees the future: logits at position {int(leaks.nonzero()[0, 1])} changed when only later "
                "tokens changed"
            )


def checksums(model):
    """Sum and norm of all parameters and buffers, an array [tensors, 2]: changes when any of them does."""
    if not isinstance(model, torch.nn.Module):
        return np.zeros(0)
    tensors = (tensor.detach().float() for tensor in (*model.parameters(), *model.buffers()))  # one at a time
    return np.array([[float(tensor.sum()), float(torch.linalg.vector_norm(tensor))] for tensor in tensors])


def record_run(model, benchmark, clock, served, val_bpb, holdout_bpb):
    """Append the run to journal.jsonl; keep its weights and commit in best.pt when no run before scored better."""
    run = {
        "time": now(),
        "benchmark": benchmark.id,
        **clock.origin,
        "same_prepare": clock.origin["prepare_sha256"] == benchmark.prepared_by,
        "seed": benchmark.seed,
        "val_bpb": val_bpb,
        "holdout_bpb": holdout_bpb,
        "training_seconds": round(clock.elapsed, 3),
        "total_seconds": round(time.monotonic() - PROCESS_START, 3),
        "slow_steps_percent": round(clock.slow_steps_percent, 1),
        "tokens": clock.rows * benchmark.max_seq_len,
        "untimed_rows": served["train"] - clock.rows,
        "scored_rows_read": served["val"] + served["holdout"],
        "peak_memory_mb": round(peak_memory_mb(clock.device), 1),
        "device": device_name(clock.device),
    }
    path, best_path = benchmark.path / "journal.jsonl", benchmark.path / "best.pt"
    try:
        with FileLock(path.with_suffix(".lock")):  # other devices may be done at the same moment
            best = min((r["val_bpb"] for r in read_journal(benchmark.path) if r["same_prepare"]), default=math.inf)
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a full disk
            with open(path, "a") as journal:
                journal.write("\n" * torn + json.dumps(run) + "\n")
            if val_bpb < best and run["same_prepare"] and isinstance(model, torch.nn.Module):
                weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
                origin = {"commit": run["commit"], "val_bpb": val_bpb, "device": clock.device.type}
                try:
                    torch.save({**origin, "model": weights}, best_path.with_suffix(".tmp"))
                    os.replace(best_path.with_suffix(".tmp"), best_path)
                except (OSError, RuntimeError) as error:  # torch has its own for a full disk
                    best_path.with_suffix(".tmp").unlink(missing_ok=True)
                    print(f"best.pt was not saved: {first_line(error)}")
    except OSError as error:
        raise SystemExit(f"scored, val_bpb {val_bpb:.6f}, but not recorded: {error}; mend it and run again") from None


def read_journal(folder):
    """The scored runs of a benchmark's folder, oldest first: a list of dicts."""
    path = folder / "journal.jsonl"
    runs = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        if not line:
            continue
        try:
            run = json.loads(line)
            runs.append({"same_prepare": None, **run, "val_bpb": float(run["val_bpb"])})
        except (ValueError, KeyError, TypeError):
            print(f"{path}:{number}: skipped, not a whole line")
    return runs


def device_name(device):
    """The GPU's name, or what kind of processor this is and how many cores of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} x{os.cpu_count()}"


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
# Command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, least, most=math.inf):
    """An argument type: a finite number between two bounds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be a number, {bounds}")
        return value

    return parse


def parse_arguments(arguments=None):
    parser = OneLineParser(description="Build the benchmark that train.py is scored on.")
    add = parser.add_argument
    add("--dataset", choices=PRESETS, help="default: climbmix where CUDA is available, local elsewhere")
    add("--text", nargs="+", metavar="PATH", help="local: files or folders; default: Python's standard library")
    add(
        "--num-shards",
        type=number(int, 1, VALIDATION_SHARD),
        metavar="N",
        help=f"climbmix: training shards ({DEFAULT_SHARDS})",
    )
    add("--seq-len", dest="max_seq_len", type=number(int, 2, 2**20), metavar="T", help="tokens in a row")
    add("--vocab-size", type=number(int, 260, 2**16), metavar="V", help="4 special tokens included")
    add("--time-budget", type=number(float, 0.1, 1e6), metavar="S", help="seconds of training")
    add("--val-rows", type=number(int, 1), metavar="N", help="rows that are scored")
    add("--holdout-rows", type=number(int, 1), metavar="N", help="rows that are scored in secret")
    add("--verify", action="store_true", help="check every byte of the current benchmark and do nothing else")
    add("--long-documents", choices=("crop", "split"), help="what becomes of documents longer than a row")
    options = parser.parse_args(arguments)
    if options.text and options.dataset not in (None, "local"):
        parser.error(f"--text goes with --dataset local, not {options.dataset}")
    if options.text or options.num_shards and not options.dataset:
        options.dataset = "local" if options.text else "climbmix"
    if options.num_shards and options.dataset != "climbmix":
        parser.error(f"--num-shards goes with --dataset climbmix, not {options.dataset}")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.verify:
        print(f"{load_benchmark(read_everything=True).id}: every file is as it was prepared")
        return
    if not options.dataset:
        options.dataset = "climbmix" if torch.cuda.is_available() else "local"
        why = "this machine has CUDA" if torch.cuda.is_available() else "no CUDA here"
        print(f"benchmark: {options.dataset}, because {why}; choose with --dataset {' | '.join(PRESETS)}")
    settings = dict(zip(SETTINGS, PRESETS[options.dataset]))
    settings |= {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    num_shards = options.num_shards or DEFAULT_SHARDS
    local_text = LocalText(options.text) if options.dataset == "local" else None
    request = {"dataset": options.dataset, **settings, "sources": options.text or [], "num_shards": num_shards}
    request["fingerprint"] = local_text and local_text.fingerprint()
    arguments = shlex.join(sys.argv[1:] if arguments is None else arguments)

    try:
        HOME.mkdir(parents=True, exist_ok=True)
        with FileLock(HOME / "prepare.lock"):
            started = time.monotonic()
            record = find_prepared(request)
            if not record:
                folder, counts = build(options.dataset, settings, local_text, num_shards)
                record = install(folder, request, settings, counts, arguments)
                shutil.rmtree(folder)
                print(f"prepared in {time.monotonic() - started:.1f} s")
            write_atomically(HOME / "current", record["id"].encode())
    except OSError as error:
        raise SystemExit(f"prepare.py: {error}; mend it and run this again") from None
    fetch_flash3()
    print_card(record)


def print_card(record):
    settings, counts = record["settings"], record["counts"]
    dropped = {name: counts[name] for name in ("duplicates", "skipped files", "skipped documents") if counts.get(name)}
    print(
        f"""
benchmark:        {record["id"]}
folder:           {HOME / record["id"]}
budget:           {settings["time_budget"]:g} s of training
documents:        {counts["train_documents"]:,} to train on""",
        *(f"({n:,} {name})" for name, n in dropped.items()),
    )
    for name, count in row_counts(record).items():
        print(f"{name + ' rows:':<17} {count:,} ({count * settings['max_seq_len']:,} tokens)")
    print(f"bytes per token:  {counts['bytes_per_token']:.2f}\n\nnext: uv run train.py")


if __name__ == "__main__":
    main()

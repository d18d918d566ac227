"""benchmark.json, the record of a prepared benchmark: what its folder holds, and whether that is whole."""

import contextlib
import hashlib
import json

from harness.common import sha256

FILES = {"tokenizer.tiktoken", "token_bytes.npy", "train.npy", "val.npy", "holdout.npy"}
SETTINGS = {"max_seq_len", "vocab_size", "time_budget", "val_rows", "holdout_rows", "long_documents"}


def read_record(path, every_byte=False):
    """benchmark.json of a prepared folder. Raises SystemExit, with the command that fixes it, if a file is damaged."""
    arguments = "<its arguments>"  # where benchmark.json can't be read
    try:
        record = json.loads((path / "benchmark.json").read_text())
        arguments = record.get("arguments", "")
        damaged = find_damage(path, record, every_byte)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        # no JSON, or other JSON
        damaged = "benchmark.json"
    if damaged is None:
        return record

    # the same arguments build it again
    command = f"uv run prepare.py {arguments}".strip()
    problem = f"benchmark {path.name}: {damaged} is missing or modified"
    raise SystemExit(f'{problem}; run "{command}" again, which fixes it')


def find_damage(path, record, every_byte):
    """The name of the first file that is not as it was prepared, or None."""
    # the id hashes all that the files and settings are
    intact = benchmark_id(record) == record["id"] == path.name
    if not intact or set(record["files"]) != FILES or set(record["settings"]) != SETTINGS:
        return "benchmark.json"
    for name, expected in record["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            return name
        # the training rows are large: to hash them would take seconds of every run
        if (every_byte or name != "train.npy") and sha256(file) != expected["sha256"]:
            return name
    return None


def benchmark_id(record):
    """Same id, same benchmark: it hashes every constant and the content of every file."""
    content = json.dumps([record["dataset"], record["settings"], record["files"]], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    sizes = "T{max_seq_len}-V{vocab_size}-{time_budget:g}s".format(**record["settings"])
    return f"{record['dataset']}-{sizes}-{digest}"


def find_record(home, request):
    """The record of a benchmark that the request with this hash has built, if there is one that is whole; else None."""
    for path in sorted(home.glob("*/benchmark.json")):
        with contextlib.suppress(SystemExit):  # damaged: built again, if it is the one
            if read_record(path.parent).get("request") == request:
                return read_record(path.parent, every_byte=True)
    return None

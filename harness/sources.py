"""Where documents come from: parquet, jsonl, text files, downloads. A source is a stream of batches, lists of str."""

import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from harness.journal import first_line, sha256

REPOSITORIES = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}
DOCUMENT_BATCH = 128  # documents that enter that buffer together
LOCAL_PACKAGES = ("torch", "sympy", "numpy", "networkx")  # the default text, with the standard library
LOCAL_SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")  # the last two hold many documents
FEW_GROUPS = 10  # with fewer groups of local text than this, files are cut into blocks, each a group of its own ...
BLOCK = r"(?s:.{1,65536})[^\n]{0,65536}\n?"  # ... of 65,536 characters and the rest of the line, if it is not too long
DOWNLOAD_WORKERS = 4
DOWNLOAD_ATTEMPTS = 4
DOWNLOAD_TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
RETRY_SECONDS = 1.0  # before the second attempt; doubles with each


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


def fetch(folder, dataset, names):
    """Download files of a Hugging Face dataset that are not here yet, in parallel. Returns their paths."""
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

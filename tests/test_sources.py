"""Where documents come from: kinds of files, folders and names, and downloads from a server of our own."""

import bz2
import gzip
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SHARD, VALIDATION, parquet, serving, stories, write_files
from huggingface_hub import constants

from harness import downloads, sources
from harness.documents import BLOCK_CHARACTERS, Skipped, cut, parquet_batches
from harness.sources import LocalText

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def read_all(text):
    """All documents of a pass, sorted."""
    return sorted(document for batch in text.batches() for document in batch)


def refused(function, *arguments):
    """The one line that ends the command."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert len(str(stop.value).splitlines()) == 1
    return str(stop.value)


# --------------------------------------
# Files


ODD = {
    "NUL bytes": "a\0b\0" * 500,
    "emoji": "🦙👩‍🚀🏳️‍🌈" * 500,
    "right to left": "שלום עולם مرحبا بالعالم " * 200,
    "Windows line ends": "one\r\ntwo\r\n" * 300,
    "one long line": "word " * 9_000,
    "special token": "<|reserved_0|> is plain text " * 100,
    "byte order mark": "\ufeffhello " * 100,
    "about Git LFS": POINTER * 50,
}
PLENTY = {f"other{number}.txt": f"other {number}" for number in range(sources.FEW_GROUPS)}
RECORDS = '{"text": "a"}\n\n{"text": "b"}\n'
KINDS = {  # name of a file: its content, the documents in it
    **{f"{name}.txt": (content, [content]) for name, content in ODD.items()},
    "a.md": ("a", ["a"]),
    "a.rst": ("a", ["a"]),
    "a.txt.gz": (gzip.compress(b"a") + gzip.compress(b"b"), ["ab"]),
    "a.md.bz2": (bz2.compress(b"a"), ["a"]),
    "a.py.zst": (zstd(b"a"), ["a"]),
    "a.jsonl": (RECORDS, ["a", "b"]),
    "a.jsonl.zst": (zstd(RECORDS.encode()), ["a", "b"]),
    "half of a character.jsonl": (r'{"text": "\ud83d"}', ["?"]),
    "byte order mark.jsonl": ('\ufeff{"text": "a"}', ["a"]),
    "a.parquet": (parquet(["a", "b", ""]), ["a", "b"]),
    "a.parquet.gz": (gzip.compress(parquet(["a"])), []),
    "a.png": ("a", []),
    ".hidden.txt": ("a", []),
    ".git/a.txt": ("a", []),
    "__pycache__/a.txt": ("a", []),
    "empty.txt": ("", []),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(tmp_path, name):
    content, documents = KINDS[name]
    text = LocalText([write_files(tmp_path, {name: content, **PLENTY})])
    assert read_all(text) == sorted(documents + list(PLENTY.values()))
    assert text.skipped.lines() == []
    assert text.counts == {"documents": len(documents) + len(PLENTY)}


LEFT_OUT = {  # files: the line that says so
    "not UTF-8": ({"a/x.txt": b"\xe9", "b/y.txt": b"\xe9"}, "2 files that are not UTF-8, first {}/"),
    "compressed, not UTF-8": ({"a.txt.gz": gzip.compress(b"\xe9")}, "1 file that is not UTF-8, {}/a.txt.gz"),
    "null in jsonl": ({"a.jsonl": '{"text": null}\n{}'}, "2 records without text, first {}/a.jsonl:1"),
    "null in parquet": ({"a.parquet": parquet([None, "c"])}, "1 record without text, {}/a.parquet"),
    "binary": ({"a.parquet": parquet([b"c", b"\xe9"])}, "1 record that is not UTF-8, {}/a.parquet"),
    "LFS": ({"a.txt": POINTER}, '1 file not fetched yet (run "git lfs pull"), {}/a.txt'),
    "LFS, parquet": ({"a.parquet": POINTER}, '1 file not fetched yet (run "git lfs pull"), {}/a.parquet'),
    "LFS, compressed": ({"a.txt.gz": POINTER}, '1 file not fetched yet (run "git lfs pull"), {}/a.txt.gz'),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_said(tmp_path, case):
    """And the others are read. A second pass counts afresh."""
    files, line = LEFT_OUT[case]
    text = LocalText([write_files(tmp_path, {**files, **PLENTY})])
    for _ in range(2):
        assert set(PLENTY.values()) <= set(read_all(text)) <= {*PLENTY.values(), "c"}
        assert len(text.skipped.lines()) == 1
        assert text.skipped.lines()[0].startswith(f"skipped: {line.format(tmp_path)}")


def test_what_cannot_be_opened_is_said(tmp_path, monkeypatch):
    """A link to nowhere, a pipe, a folder that is somebody else's."""
    write_files(tmp_path, {"a/a.txt": "a", "locked/b.txt": "b"})
    (tmp_path / "broken.txt").symlink_to("broken.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    scandir = os.scandir

    def forbid(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    text = LocalText([tmp_path])
    assert read_all(text) == ["a"]
    assert text.skipped.lines() == [
        f"skipped: 1 folder that cannot be read, {tmp_path}/locked",
        f"skipped: 2 files that cannot be read, first {tmp_path}/broken.txt",
    ]


DEEP = '{"text": "a", "more": ' + "[" * 100_000
BAD = {  # name of a file: its content, words of the line that refuses it
    "broken.jsonl": (RECORDS + "{", "broken.jsonl:4: not JSON"),
    "not UTF-8.jsonl": (b'{"text": "\xe9"}', "not UTF-8.jsonl:1: not JSON"),
    "deep.jsonl": (DEEP, "deep.jsonl:1: not JSON"),
    "list.jsonl": ("[]", "list.jsonl:1: not a JSON object with a string `text`, but of type list"),
    "number.jsonl": (RECORDS + '{"text": 7}', "number.jsonl:4: `text` is not a string, but of type int"),
    "words.jsonl": ('{"text": ["a"]}', "words.jsonl:1: `text` is not a string, but of type list"),
    "no.jsonl.gz": (b"{}", "no.jsonl.gz: damaged or cut off"),
    "cut.txt.gz": (gzip.compress(b"a" * 9999)[:-1], "cut.txt.gz: damaged or cut off"),
    "cut.txt.bz2": (bz2.compress(b"a" * 9999)[:-9], "cut.txt.bz2: damaged or cut off"),
    "cut.jsonl.zst": (zstd(RECORDS.encode())[:-1], "cut.jsonl.zst: damaged or cut off"),
    "cut.parquet": (parquet(["a"])[:-1], "cut.parquet: not a parquet file with a column `text`"),
    "lists.parquet": (parquet([["a"]]), "lists.parquet: column `text` holds list<element: string>, not text"),
    "numbers.parquet": (parquet([1, 2]), "numbers.parquet: column `text` holds int64, not text"),
    "structs.parquet": (parquet([{"a": "b"}]), "structs.parquet: column `text` holds struct<a: string>, not text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, name):
    content, words = BAD[name]
    text = LocalText([write_files(tmp_path, {name: content})])
    assert words in refused(list, text.batches())


STRINGS = ["a", "", "é"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_columns_of_text(tmp_path, kind):
    """An empty document stays one: the scored rows of climbmix are those of the reference."""
    values = pyarrow.array(STRINGS)
    values = values.dictionary_encode() if pyarrow.types.is_dictionary(kind) else values.cast(kind)
    write_files(tmp_path, {"a.parquet": parquet(values)})
    assert list(parquet_batches(tmp_path / "a.parquet")) == [STRINGS]


def test_strings_that_are_not_utf8(tmp_path):
    values = pyarrow.array([b"a", b"\xe9"]).view(pyarrow.string())
    write_files(tmp_path, {"a.parquet": parquet(values)})
    skipped = Skipped()
    assert list(parquet_batches(tmp_path / "a.parquet", skipped)) == [["a"]]
    assert skipped.counts == {"bad record": 1}


def test_parquet_batches_stay_within_row_groups(tmp_path):
    documents = stories(0, 500)
    write_files(tmp_path, {"a.parquet": parquet(documents, row_group_size=200)})
    batches = list(parquet_batches(tmp_path / "a.parquet"))
    assert [len(batch) for batch in batches] == [128, 72, 128, 72, 100]
    assert sum(batches, []) == documents


BLOCKS = {  # characters of lines: of blocks
    "short": ([5], [5]),
    "just one block": ([BLOCK_CHARACTERS], [BLOCK_CHARACTERS]),
    "the rest of a line": ([BLOCK_CHARACTERS - 1, 9, 9], [BLOCK_CHARACTERS + 8, 9]),
    "a long line": ([2 * BLOCK_CHARACTERS + 1, 9], [2 * BLOCK_CHARACTERS + 1, 9]),
    "too long a line": ([2 * BLOCK_CHARACTERS + 2, 9], [2 * BLOCK_CHARACTERS, 11]),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case):
    lines, blocks = BLOCKS[case]
    text = "".join("x" * (length - 1) + "\n" for length in lines)
    assert [len(block) for block in cut(text)] == blocks
    assert "".join(cut(text)) == text


# --------------------------------------
# Groups


def test_a_batch_is_a_group_without_duplicates(tmp_path):
    """In the order of a hash of the names, which tells nothing about the content."""
    files = {f"g{group}/{part}.txt": f"{group} {part}" for group in range(12) for part in range(2)}
    text = LocalText([write_files(tmp_path, files | {"g3/copy.txt": files["g9/0.txt"]})])
    names = sorted((f"g{group}" for group in range(12)), key=lambda name: hashlib.sha256(name.encode()).digest())
    list(text.batches())  # another pass, which counts for itself
    batches = list(text.batches())
    assert names.index("g3") > names.index("g9")
    assert batches == [[files[f"{name}/0.txt"], files[f"{name}/1.txt"]] for name in names]
    assert text.counts == {"documents": 24, "duplicates": 1}


def test_few_files_are_cut_into_blocks(tmp_path):
    book = "".join(stories(0, 9000))
    batches = list(LocalText([write_files(tmp_path, {"book.txt": book})]).batches())
    assert batches == [[block] for block in cut(book)]


def test_records_stand_alone(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in stories(0, 300))
    files = {"a/lines.jsonl": lines, "a/table.parquet": parquet(stories(300, 300), row_group_size=100)}
    batches = list(LocalText([write_files(tmp_path, files | PLENTY)]).batches())
    assert sorted(len(batch) for batch in batches) == [*[1] * len(PLENTY), 44, 100, 100, 100, 128, 128]


def test_the_default_text():
    """Python's own source, without tests; the same at each pass."""
    text = LocalText([])
    names = [Path(name) for _, name, _, _ in text.signature()]
    assert {name.suffix for name in names} == {".py"}
    assert not any({"test", "tests"} & set(name.parts) for name in names)
    assert {"torch/nn", "sympy/core", "numpy/linalg", "networkx/algorithms", "asyncio"} <= set(text.groups)
    assert [len(batch) for batch in text.batches()] == [len(batch) for batch in text.batches()]
    text.refuse_changes()


def test_names_that_are_not_utf8(tmp_path):
    """They are groups like others, and can be printed."""
    for name in (b"caf\xe9", b"two\nlines"):
        folder = tmp_path / os.fsdecode(name)
        write_files(folder, {"a.txt": f"{name}", "b.txt": b"\xe9", os.fsdecode(b"\xe9.parquet"): parquet([f"p{name}"])})
    text = LocalText([tmp_path])
    assert len(read_all(text)) == 4
    names = sorted([b"caf\xe9", b"two\nlines"], key=lambda name: hashlib.sha256(name).digest())
    assert [os.fsencode(name) for name in text.groups] == names
    shown = os.fsdecode(names[0]).replace("\udce9", "?").replace("\n", "?")
    assert text.skipped.lines() == [f"skipped: 2 files that are not UTF-8, first {tmp_path}/{shown}/b.txt"]
    repr(text.signature()).encode()


def test_links_to_folders_are_followed_once(tmp_path):
    """Without loops; a folder wins over a link to it, whatever its name; links may lead to links."""
    files = {"root/z/a.txt": "a", "elsewhere/b.txt": "b", "elsewhere/deep/c.txt": "c", "third/d.txt": "d"}
    write_files(tmp_path, files)
    links = {"root/a": "z", "root/loop": ".", "root/l": "../elsewhere", "root/m": "../elsewhere/deep"}
    links |= {"elsewhere/back": "../root", "elsewhere/on": "../third", "root/lost": "nowhere"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    text = LocalText([tmp_path / "root"])
    found = {group: sorted(path.name for path in paths) for group, paths in text.groups.items()}
    assert found == {"z": ["a.txt"], "l": ["b.txt", "c.txt", "d.txt"]}
    assert len(text.signature()) == 4


def test_other_groups_of_the_same_files_are_another_text(tmp_path):
    """A benchmark of the one must not be taken for one of the other: its split is another."""
    write_files(tmp_path, {"x/1/a.txt": "a", "y/1/b.txt": "b"})
    assert LocalText([tmp_path]).signature() != LocalText([tmp_path / "x", tmp_path / "y"]).signature()


PATHS = {  # paths: words of the line that refuses them
    "missing": (["nowhere"], "--text nowhere: no such file or folder"),
    "no text": (["pictures"], "--text pictures: no .txt .md .py .rst .jsonl .parquet file in there"),
    "pointers only": (["lfs"], 'skipped: 1 file not fetched yet (run "git lfs pull"), lfs/a.parquet'),
}


@pytest.mark.parametrize("case", PATHS)
def test_bad_paths(tmp_path, monkeypatch, case):
    paths, words = PATHS[case]
    monkeypatch.chdir(write_files(tmp_path, {"pictures/a.png": "", "lfs/a.parquet": POINTER}))
    assert words in refused(LocalText, paths)


def grow(path):
    with open(path, "a") as file:
        file.write("more")


CHANGES = {
    "grown": grow,
    "touched": lambda path: os.utime(path, ns=(0, 0)),
    "gone": os.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_text_that_changes_while_it_is_read(tmp_path, change):
    text = LocalText([write_files(tmp_path, PLENTY)])
    before = text.signature()
    text.refuse_changes()
    CHANGES[change](tmp_path / "other3.txt")
    assert refused(text.refuse_changes).startswith(f"{tmp_path}/other3.txt: changed while it was read; run this again")
    assert text.signature() == before
    if change != "gone":
        assert LocalText([tmp_path]).signature() != before


# --------------------------------------
# Downloads


@pytest.fixture
def fetch(tmp_path):
    """Fetch both shards, or some; returns their content by name."""

    def function(names=(SHARD, VALIDATION)):
        paths = downloads.fetch(tmp_path / "downloads", "climbmix", names)
        assert [path.name for path in paths] == list(names)
        return {path.name: path.read_bytes() for path in paths}

    return function


def status(code, **headers):
    def fault(handler, content):
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return fault


def answer(change=bytes, **options):
    """The file, changed or in part."""
    return lambda handler, content: handler.answer(change(content), **options)


HTML = answer(lambda content: b"<html>Please log in</html>")


def wait(handler, content):
    time.sleep(1.5)


def stall(handler, content):
    handler.answer(content, end=-20_000)
    wait(handler, content)


def reset(handler, content):
    handler.answer(content, end=-10_000)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def another_column(handler, content):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), sink)
    handler.answer(sink.getvalue().to_pybytes())


def etag(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'


def redirect(handler, content):
    """As Hugging Face does: the hash comes with the redirection."""
    status(302, Location=f"/elsewhere/{SHARD}", X_Linked_ETag=etag(content))(handler, content)


def flipped(handler, content, **headers):
    handler.answer(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:], **headers)


def flipped_and_tagged(handler, content):
    flipped(handler, content, X_Linked_ETag=etag(content))


RECOVERS = {
    "server error": [status(500), status(502), status(503)],
    "429": [status(429, Retry_After="0")],
    "no answer": [wait],
    "cut off": [stall, reset, answer(end=-100)],
    "no ranges": [answer(end=-100), answer(resume=False)],
    "not parquet": [HTML, answer(lambda content: b"x" * len(content)), answer(lambda content: content + b"x" * 100)],
    "flipped bit": [flipped_and_tagged, redirect, flipped],
}


@pytest.mark.parametrize("fault", RECOVERS)
def test_a_download_recovers(hub, fetch, fault):
    hub.faults += RECOVERS[fault]
    assert fetch() == hub.files
    ranges = [part for name, part, _ in hub.seen if name == SHARD]
    assert len(ranges) == len(RECOVERS[fault]) + (fault != "no ranges")
    if fault in ("cut off", "no ranges"):
        assert all(ranges[1:]), "the next request goes on where the last ended"


FAILS = {  # words of the line that refuses it: what the server answers
    "HTTP 404": status(404),
    "HTTP 500": status(500),
    "HTTP 401 .*HF_TOKEN": status(401),
    "HTTP 403 .*HF_TOKEN": status(403),
    "HTTP 429 .*HF_TOKEN": status(429),
    "not a parquet file": HTML,
    "column `text`": another_column,
    "sha256": flipped_and_tagged,
    "timed out": wait,
}


@pytest.mark.parametrize("words", FAILS)
def test_a_download_fails_by_name(hub, fetch, tmp_path, monkeypatch, words):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.faults += [FAILS[words]] * 9
    with pytest.raises(SystemExit, match=f"could not download .*{SHARD}: .*{words}.* run this again") as stop:
        fetch()
    assert len(str(stop.value).splitlines()) == 1 and "hf_secret" not in str(stop.value)
    assert not (tmp_path / "downloads" / SHARD).exists()


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "not a URL"])
def test_an_unreachable_host(hub, fetch, monkeypatch, host):
    monkeypatch.setenv("HF_ENDPOINT", host)
    assert "HF_ENDPOINT" in refused(fetch)


@pytest.mark.parametrize(("asked", "pause"), [("7", 7), ("3600", 60)])
def test_retry_after_is_obeyed_up_to_a_minute(hub, fetch, monkeypatch, asked, pause):
    pauses = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", pauses.append)
    hub.faults += [status(429, Retry_After=asked)]
    assert fetch([SHARD]) == {SHARD: hub.files[SHARD]}
    assert pauses == [pause]


def test_what_is_here_is_not_asked_for(hub, fetch):
    for _ in range(2):
        fetch()
    assert sorted(name for name, _, _ in hub.seen) == [SHARD, VALIDATION]


def test_an_interrupted_file_is_completed(hub, fetch, tmp_path):
    write_files(tmp_path, {f"downloads/{SHARD}.part": hub.files[SHARD][:5000]})
    assert fetch() == hub.files
    assert (SHARD, "bytes=5000-", None) in hub.seen


# Hugging Face's own settings


@pytest.mark.parametrize("source", ["HF_TOKEN", "hf auth login"])
def test_the_token_is_sent_to_the_hub_alone(hub, fetch, tmp_path, monkeypatch, capfd, source):
    if source == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    else:
        (tmp_path / "token").write_text("hf_secret\n")
    with serving() as store:
        hub.faults += [status(302, Location=f"{store.url}/{SHARD}")]
        assert fetch() == hub.files
        assert store.seen == [(SHARD, None, None)]
    assert {authorization for _, _, authorization in hub.seen} == {"Bearer hf_secret"}
    assert "hf_secret" not in "".join(capfd.readouterr())


def test_the_token_wins_over_netrc(hub, fetch, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch([SHARD])
    assert hub.seen == [(SHARD, None, "Bearer hf_secret")]


def test_a_token_that_is_none(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    line = refused(fetch)
    assert "HF_TOKEN" in line and "cret" not in line and not hub.seen


@pytest.fixture
def cached(hub, tmp_path):
    """SHARD lies where `hf download` puts it."""
    repository = tmp_path / "cache" / "datasets--karpathy--climbmix-400b-shuffle"
    write_files(repository, {"refs/main": "0123", f"snapshots/0123/{SHARD}": hub.files[SHARD]})


@pytest.mark.parametrize("offline", [False, True])
def test_files_in_the_cache_of_hugging_face(hub, fetch, cached, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert fetch([SHARD]) == {SHARD: hub.files[SHARD]}
    assert not hub.seen


def test_offline_nothing_is_asked_for(hub, fetch, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(fetch)
    assert not hub.seen
    assert line.startswith(
        f"{VALIDATION} is neither in {tmp_path}/downloads nor in {tmp_path}/cache, and HF_HUB_OFFLINE"
    )


# Processes that end


@pytest.fixture
def start(tmp_path):
    """A process that fetches both shards."""
    code = "import pathlib, sys\nfrom harness import downloads\n"
    code += "downloads.TIMEOUT = (10, 1000)\n"  # of a server that stalls for good
    code += "downloads.fetch(pathlib.Path(sys.argv[1]), 'climbmix', sys.argv[2:])"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def function():
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "downloads"), SHARD, VALIDATION],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
        )

    return function


def wait_for_bytes(part):
    end = time.monotonic() + 80
    while not (part.exists() and part.stat().st_size >= 16_000):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on(hub, fetch, start, tmp_path, kind):
    """The first answer stalls in mid-file; there the process is stopped, and ends before the stall does."""
    stalled = threading.Event()
    hub.faults.append(lambda handler, content: (handler.answer(content, end=20_000), stalled.wait(100)))
    process = start()
    part = tmp_path / "downloads" / f"{SHARD}.part"
    wait_for_bytes(part)
    process.send_signal(kind)
    output, errors = process.communicate(timeout=80)
    assert not stalled.is_set()
    if kind == signal.SIGINT:
        assert (process.returncode, errors) == (130, "") and "run this again" in output
    else:
        assert process.returncode == -kind
    stalled.set()
    assert fetch() == hub.files
    assert (SHARD, "bytes=16384-", None) in hub.seen


def test_a_failure_ends_the_process_although_others_stall(hub, start, tmp_path):
    part = tmp_path / "downloads" / f"{SHARD}.part"
    stalled = threading.Event()

    def do_GET(handler):
        if handler.path.endswith(SHARD):
            handler.answer(hub.files[SHARD], end=20_000)
            stalled.wait(100)
        else:
            wait_for_bytes(part)
            time.sleep(0.2)  # until it waits for more
            handler.send_error(404)

    hub.do_GET = do_GET
    process = start()
    output, errors = process.communicate(timeout=80)
    assert not stalled.is_set()
    assert process.returncode == 1 and f"could not download {hub.url}" in errors and VALIDATION in errors
    stalled.set()

"""
Checks where documents come from: no text is lost, changed or read twice without a word, groups are the same each time,
bad input gets one line, and downloads trust no bad file, leak no token and end.
"""

import bz2
import gzip
import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pyarrow
import pytest
from conftest import SHARD, VALIDATION, parquet, refused, serving, start, stories, wait_for, write_files
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from harness import documents, downloads, sources
from harness.sources import LocalText


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def name_hash(name):
    return hashlib.sha256(os.fsencode(name)).digest()


# --------------------------------------
# Files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NOT_FETCHED = 'files not fetched yet (run "git lfs pull") (1)'
RECORDS = '{"text": "a"}\n\n{"text": "b"}\n'
BAD_STRINGS = pyarrow.array([b"a", b"\xe9"]).view(pyarrow.string())
COMPANY = {f"other{number}.txt": f"other {number}" for number in range(sources.FEW_GROUPS)}
TEXTS = {  # name of a file: its content, the documents in it, what is said of it
    "a.md": ("a", "a"),
    "Windows.txt": ("\ufeffone\r\ntwo\r\n\0🦙", ["\ufeffone\r\ntwo\r\n\0🦙"]),
    "about LFS.txt": (POINTER * 50, [POINTER * 50]),
    "a.txt.gz": (gzip.compress(b"a") + gzip.compress(b"b"), ["ab"]),
    "a.md.bz2": (bz2.compress(b"a"), "a"),
    "a.py.zst": (zstd(b"a"), "a"),
    "a.jsonl": (RECORDS, "ab"),
    "half of a character.jsonl": (r'{"text": "\ud83d"}', "?"),
    "byte order mark.jsonl": ('\ufeff{"text": "a"}', "a"),
    "a.parquet": (parquet(["a", "b", ""]), "ab"),
    "a.parquet.gz": (gzip.compress(parquet(["a"])), ""),
    "a.png": ("a", ""),
    ".hidden.txt": ("a", ""),
    ".git/a.txt": ("a", ""),
    "__pycache__/a.txt": ("a", ""),
    "empty.txt": ("", ""),
    "not UTF-8.txt": (b"\xe9", "", "files that are not UTF-8 (1)"),
    "null.jsonl": ('{"text": null}\n{}', "", "records without text (2)"),
    "null.parquet": (parquet([None, "a"]), "a", "records without text (1)"),
    "strings.parquet": (parquet(BAD_STRINGS), "a", "records that are not UTF-8 (1)"),
    "lfs.txt": (POINTER, "", NOT_FETCHED),
    "lfs.parquet": (POINTER, "", NOT_FETCHED),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_read_and_what_is_said(tmp_path, name):
    """Among other files, which are read in any case; and a second pass counts afresh."""
    content, expected, *said = TEXTS[name]
    text = LocalText([write_files(tmp_path, {name: content, **COMPANY})])
    for _ in range(2):
        read = sum(text.batches(), [])
        assert sorted(read) == sorted([*expected, *COMPANY.values()])
        assert text.counts == {"documents": len(read)}
        lines = [line.partition(f", first {tmp_path}/{name}")[0] for line in text.skipped.lines()]
        assert lines == [f"skipped: {words}" for words in said]


def test_what_cannot_be_opened_is_said(tmp_path, monkeypatch):
    """A link to nowhere, a pipe, a folder that is somebody else's."""
    write_files(tmp_path, {"a/a.txt": "a", "locked/b.txt": "b"})
    (tmp_path / "broken.txt").symlink_to("broken.txt")
    os.mkfifo(tmp_path / "pipe.txt")

    def forbid(path, scandir=os.scandir):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    text = LocalText([tmp_path])
    assert list(text.batches()) == [["a"]]
    assert text.skipped.lines() == [
        f"skipped: files that cannot be read (2), first {tmp_path}/broken.txt",
        f"skipped: folders that cannot be read (1), first {tmp_path}/locked",
    ]


BAD = {  # name of a file: its content, what is said after the name
    "broken.jsonl": (RECORDS + "{", ":4: not JSON"),
    "not UTF-8.jsonl": (b'{"text": "\xe9"}', ":1: not JSON"),
    "deep.jsonl": ('{"text": "a", "more": ' + "[" * 100_000, ":1: not JSON"),
    "list.jsonl": ("[]", ":1: not a JSON object with a string `text`, but of type list"),
    "number.jsonl": (RECORDS + '{"text": 7}', ":4: `text` is not a string, but of type int"),
    "cut.txt.gz": (gzip.compress(b"a" * 9999)[:-1], ": damaged or cut off"),
    "cut.txt.bz2": (bz2.compress(b"a" * 9999)[:-9], ": damaged or cut off"),
    "cut.jsonl.zst": (zstd(RECORDS.encode())[:-1], ": damaged or cut off"),
    "cut.parquet": (parquet(["a"])[:-1], ": not a parquet file with a column `text`"),
    "lists.parquet": (parquet([["a"]]), ": column `text` holds list<element: string>, not text"),
    "numbers.parquet": (parquet([1, 2]), ": column `text` holds int64, not text"),
    "only.png": ("", ": no .txt .md .py .rst .jsonl .parquet file in there"),
    "lfs.parquet": (POINTER, f": no .txt .md .py .rst .jsonl .parquet file in there; skipped: {NOT_FETCHED}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_refused_by_name(tmp_path, name):
    content, words = BAD[name]
    write_files(tmp_path / name, {name: content})
    assert f"{name}{words}" in refused(lambda: list(LocalText([tmp_path / name]).batches()))


DICTIONARY = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
KINDS = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary()]


@pytest.mark.parametrize("kind", [*KINDS, DICTIONARY], ids=str)
def test_columns_of_text(tmp_path, kind):
    """Batches stay within row groups, and an empty document stays one: as in the rows of the reference."""
    texts = ["", "é", *stories(0, 498)]
    values = pyarrow.array(texts).dictionary_encode()
    if kind != DICTIONARY:
        values = pyarrow.array(texts).cast(kind)
    write_files(tmp_path, {"a.parquet": parquet(values, row_group_size=200)})
    batches = list(documents.parquet_batches(tmp_path / "a.parquet"))
    assert [len(batch) for batch in batches] == [128, 72, 128, 72, 100]
    assert sum(batches, []) == texts


@given(st.text("ab\n", max_size=40))
def test_blocks_end_with_a_line_or_at_twice_their_size(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_CHARACTERS", 4)
        assert documents.cut(text) == re.findall(r"(?s)....[^\n]{0,4}\n|.{1,8}", text)


# --------------------------------------
# Groups


def test_a_batch_is_a_group_without_duplicates(tmp_path):
    """In the order of a hash of the names, which tells nothing about the content."""
    files = {f"g{group}/{part}.txt": f"{group} {part}" for group in range(sources.FEW_GROUPS) for part in range(2)}
    text = LocalText([write_files(tmp_path, files | {"g3/copy.txt": files["g9/0.txt"]})])
    names = sorted((f"g{group}" for group in range(sources.FEW_GROUPS)), key=name_hash)
    assert names.index("g3") > names.index("g9")
    assert list(text.batches()) == [[files[f"{name}/0.txt"], files[f"{name}/1.txt"]] for name in names]
    assert text.counts == {"documents": 20, "duplicates": 1}


def test_few_files_are_cut_into_blocks(tmp_path):
    book = "".join(stories(0, 9000))
    batches = list(LocalText([write_files(tmp_path, {"book.txt": book})]).batches())
    assert batches == [[block] for block in documents.cut(book)]


def test_records_stand_alone(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in stories(0, 300))
    files = {"a/lines.jsonl": lines, "a/table.parquet": parquet(stories(300, 300), row_group_size=100)}
    batches = list(LocalText([write_files(tmp_path, files | COMPANY)]).batches())
    assert sorted(len(batch) for batch in batches) == [*[1] * len(COMPANY), 44, 100, 100, 100, 128, 128]


def test_the_default_text():
    """Python's own source, without tests; the same at each pass."""
    text = LocalText([])
    assert {"torch/nn", "sympy/core", "numpy/linalg", "networkx/algorithms", "asyncio"} <= set(text.groups)
    paths = sum(text.groups.values(), [])
    assert {path.suffix for path in paths} == {".py"}
    assert not [path for path in paths if re.search("/lib/python.*/tests?/", str(path))]
    assert [len(batch) for batch in text.batches()] == [len(batch) for batch in text.batches()]
    text.refuse_changes()


def test_names_that_are_not_utf8(tmp_path):
    """They are groups like others, and can be printed."""
    names = sorted([b"caf\xe9", b"two\nlines"], key=name_hash)
    for name in names:
        files = {"a.txt": f"{name}", "b.txt": b"\xe9", os.fsdecode(b"\xe9.parquet"): parquet([f"p{name}"])}
        write_files(tmp_path / os.fsdecode(name), files)
    text = LocalText([tmp_path])
    assert len(sum(text.batches(), [])) == 4
    assert [os.fsencode(name) for name in text.groups] == names
    shown = os.fsdecode(names[0]).replace("\udce9", "?").replace("\n", " ")
    assert text.skipped.lines() == [f"skipped: files that are not UTF-8 (2), first {tmp_path}/{shown}/b.txt"]
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
    found = [(group, path.name) for group, paths in text.groups.items() for path in paths]
    assert sorted(found) == [("l", "b.txt"), ("l", "c.txt"), ("l", "d.txt"), ("z", "a.txt")]
    assert len(text.signature()) == 4


def test_other_groups_of_the_same_files_are_another_text(tmp_path):
    """A benchmark of the one must not be taken for one of the other: its split is another."""
    write_files(tmp_path, {"x/1/a.txt": "a", "y/1/b.txt": "b"})
    assert LocalText([tmp_path]).signature() != LocalText([tmp_path / "x", tmp_path / "y"]).signature()


CHANGES = {
    "grown": lambda path: path.write_text("more"),
    "touched": lambda path: os.utime(path, ns=(0, 0)),
    "gone": os.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_text_that_changes_while_it_is_read(tmp_path, change):
    text = LocalText([write_files(tmp_path, COMPANY)])
    before = text.signature()
    text.refuse_changes()
    CHANGES[change](tmp_path / "other3.txt")
    assert refused(text.refuse_changes).startswith(f"{tmp_path}/other3.txt: changed while it was read; run this again")
    assert text.signature() == before != LocalText([tmp_path]).signature()


# --------------------------------------
# Downloads: a server spoils its next answers for SHARD


@pytest.fixture
def fetch(tmp_path):
    """Fetch both shards, or some; returns their content by name."""

    def function(names=(SHARD, VALIDATION)):
        paths = downloads.fetch(tmp_path / "downloads", "climbmix", names)
        assert [path.name for path in paths] == list(names)
        return {path.name: path.read_bytes() for path in paths}

    return function


def status(code, **headers):
    return lambda handler, content: handler.answer(b"", code, resume=False, **headers)


def answer(change=bytes, **options):
    """The file, changed or in part."""
    return lambda handler, content: handler.answer(change(content), **options)


def wait(handler, content):
    time.sleep(1.5)


def stall(handler, content):
    handler.answer(content, end=-20_000)
    wait(handler, content)


def etag(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'


def redirect(handler, content):
    """As Hugging Face does: the hash comes with the redirection."""
    status(302, Location=f"/elsewhere/{SHARD}", X_Linked_ETag=etag(content))(handler, content)


def flip(content):
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


def flipped_and_tagged(handler, content):
    handler.answer(flip(content), X_Linked_ETag=etag(content))


HTML = answer(lambda content: b"<html>Please log in</html>")
RECOVERS = {
    "server error": [status(500), status(502), status(503)],
    "429": [status(429, Retry_After="0")],
    "no answer": [wait],
    "cut off": [stall, answer(end=-100), answer(end=-10_000)],
    "no ranges": [answer(end=-100), answer(resume=False)],
    "not parquet": [HTML, answer(lambda content: b"x" * len(content)), answer(lambda content: content + b"x" * 100)],
    "flipped bit": [flipped_and_tagged, redirect, answer(flip)],
}


@pytest.mark.parametrize("fault", RECOVERS)
def test_a_download_recovers(mirror, fetch, fault):
    mirror.faults += RECOVERS[fault]
    assert fetch() == mirror.files
    ranges = [part for name, part, _ in mirror.seen if name == SHARD]
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
    "sha256": flipped_and_tagged,
    "timed out": wait,
}


@pytest.mark.parametrize("words", FAILS)
def test_a_download_fails_by_name(mirror, fetch, tmp_path, monkeypatch, words):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    mirror.faults += [FAILS[words]] * 9
    line = refused(fetch)
    assert re.search(f"could not download .*{SHARD}: .*{words}.* run this again", line) and "hf_secret" not in line
    assert not (tmp_path / "downloads" / SHARD).exists()


SETTINGS = {  # that end it at once: words of the line
    "HF_ENDPOINT=http://127.0.0.1:9": "HF_ENDPOINT",
    "HF_ENDPOINT=not a URL": "HF_ENDPOINT",
    "HF_TOKEN=hf_sécret": "HF_TOKEN has characters that are in no token: set it again, or unset it",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_bad_settings(mirror, fetch, monkeypatch, setting):
    monkeypatch.setenv(*setting.split("="))
    assert SETTINGS[setting] in refused(fetch)
    assert not mirror.seen


@pytest.mark.parametrize(("asked", "pause"), [("7", 7), ("3600", 60)])
def test_retry_after_is_obeyed_up_to_a_minute(mirror, fetch, monkeypatch, asked, pause):
    pauses = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", pauses.append)
    mirror.faults += [status(429, Retry_After=asked)]
    assert fetch([SHARD]) == {SHARD: mirror.files[SHARD]}
    assert pauses == [pause]


@pytest.mark.parametrize("source", ["HF_TOKEN", "hf auth login"])
def test_the_token_is_sent_to_the_hub_alone(mirror, fetch, tmp_path, monkeypatch, capfd, source):
    """Not to where that redirects, and in place of a password in .netrc."""
    write_files(tmp_path, {".netrc": "machine 127.0.0.1 login me password word\n"})
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    if source == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    else:
        (tmp_path / "token").write_text("hf_secret\n")
    with serving() as store:
        mirror.faults += [status(302, Location=f"{store.url.replace('127.0.0.1', 'localhost')}/{SHARD}")]
        assert fetch() == mirror.files
        assert store.seen == [(SHARD, None, None)]
    assert {authorization for _, _, authorization in mirror.seen} == {"Bearer hf_secret"}
    assert "hf_secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("offline", [False, True])
def test_files_in_the_cache_of_hugging_face(mirror, fetch, tmp_path, monkeypatch, offline):
    """Where `hf download` puts them."""
    repository = tmp_path / "cache" / "datasets--karpathy--climbmix-400b-shuffle"
    write_files(repository, {"refs/main": "0123", f"snapshots/0123/{SHARD}": mirror.files[SHARD]})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert fetch([SHARD]) == {SHARD: mirror.files[SHARD]}
    assert not mirror.seen
    if offline:
        folders = f"{tmp_path}/downloads nor in {tmp_path}/cache"
        assert refused(fetch).startswith(f"{VALIDATION} is neither in {folders}, and HF_HUB_OFFLINE")
        assert not mirror.seen


# Downloads that end


def test_a_failure_ends_it_although_another_file_stalls(mirror, fetch, monkeypatch):
    begun, end, ended = threading.Event(), threading.Event(), []

    def download(session, url, path, stop):
        if path.name == SHARD:
            begun.set()
            ended.append(end.wait(30))
        begun.wait(30)
        raise downloads.DownloadError(path.name)

    monkeypatch.setattr(downloads, "download", download)
    assert refused(fetch) == VALIDATION and not ended
    end.set()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on(mirror, fetch, tmp_path, kind):
    """The first answer stalls in mid-file; there the process is stopped, and ends before the stall does."""
    end = threading.Event()
    mirror.faults.append(lambda handler, content: (handler.answer(content, end=20_000), end.wait(100)))
    code = "import pathlib, sys\nfrom harness import downloads\ndownloads.TIMEOUT = (10, 1000)\n"
    code += "downloads.fetch(pathlib.Path(sys.argv[1]), 'climbmix', sys.argv[2:])"
    home = {"HF_HOME": str(tmp_path / "hf")}
    process = start("-c", code, str(tmp_path / "downloads"), SHARD, VALIDATION, environment=home)
    part = tmp_path / "downloads" / f"{SHARD}.part"
    wait_for(lambda: part.exists() and part.stat().st_size >= 16_000)
    process.send_signal(kind)
    output, errors = process.communicate(timeout=80)
    end.set()
    if kind == signal.SIGINT:
        assert (process.returncode, errors) == (130, "") and "run this again" in output
    else:
        assert process.returncode == -kind
    assert fetch() == mirror.files
    assert (SHARD, "bytes=16384-", None) in mirror.seen

"""Preparing a benchmark as a user does: local text, downloads from a server of our own, bad input, damaged files."""

import hashlib
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import time
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ONE_SHARD, TINY, every_byte, snapshot, stories, story_numbers, write_parquet

import prepare
from harness import sources

# --------------------------------------
# local


def write_text(tmp_path, files):
    """A folder of these files."""
    folder = tmp_path / "text"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def prepare_text(tmp_path, files, *arguments):
    """Prepare a folder of these files; returns the benchmark and its counts."""
    prepare.main(["--text", str(write_text(tmp_path, files)), *TINY, *arguments])
    return prepare.load_benchmark(), every_byte()["counts"]


def batches_of(folder):
    return list(sources.local_batches(sources.find_text([str(folder)]), prepare.Counter()))


def test_same_flags_same_benchmark_and_others_beside_it(home, book, capsys):
    prepare.main(book)
    first = prepare.load_benchmark()
    assert first.id == first.path.name and first.id.startswith("local-T32-V300-1s-")
    assert (first.max_seq_len, first.vocab_size, first.time_budget, first.seed) == (32, 300, 1, 42)
    assert first.rows("val").shape == (6, 33) and first.rows("holdout").shape == (3, 33)
    assert all((first.rows(split)[:, 0] == 300 - 4).all() for split in ("train", "val", "holdout"))  # BOS
    before = snapshot(first.path)
    capsys.readouterr()
    prepare.main(book)
    assert "prepared in" not in capsys.readouterr().out and snapshot(first.path) == before
    prepare.main([*book, "--time-budget", "2"])
    second = prepare.load_benchmark()
    assert first.id != second.id and first.path.exists() and second.time_budget == 2
    assert (second.path / "train.npy").read_bytes() == before["train.npy"]
    assert not [path for path in home.iterdir() if path.name.endswith("tmp") or path.name == ".building"]


ODD = {
    "NUL bytes": "a\0b\0" * 500,
    "emoji": "🦙👩‍🚀🏳️‍🌈" * 500,
    "right to left": "שלום עולם مرحبا بالعالم " * 200,
    "CJK": "日本語のテキスト中文文本한국어" * 200,
    "Windows line ends": "one\r\ntwo\r\n" * 300,
    "one long line": "word " * 30_000,
    "a million spaces": " " * 1_000_000,
    "special token": "<|reserved_0|> is plain text " * 100,
    "byte order mark": "\ufeffhello " * 100,
}


def test_files_are_documents_and_groups_stay_on_one_side(home, tmp_path):
    """Odd text is taken as it is, duplicates go, and what can't be read is skipped, as are links to nowhere or back."""
    places = [(group, part) for group in range(12) for part in range(3)]
    files = {f"g{g}/{part}.md": "".join(stories(900 * g + 300 * part, 300)) for g, part in places}
    files |= {f"{name}.txt": text for name, text in ODD.items()} | {"g3/copy.txt": files["g0/0.md"]}
    folder = write_text(tmp_path, files)
    assert sorted(text for batch in batches_of(folder) for text in batch) == sorted(set(files.values()))
    (folder / "a.txt").symlink_to(folder / "a.txt")
    (folder / "deep").symlink_to(folder)
    files |= {"latin.txt": b"caf\xe9 " * 90, "empty.txt": "", "a.png": b"\x89PNG"}
    benchmark, counts = prepare_text(tmp_path, files)
    assert counts["documents"] == 36 + len(ODD) and counts["duplicates"] == counts["skipped files"] == 1
    numbers = (story_numbers(benchmark, split) for split in ("val", "holdout", "train"))
    val, holdout, train = ({number // 900 for number in split if number >= 900} for split in numbers)
    assert val and holdout and not val & holdout and not (val | holdout) & train


def test_records_of_a_file_are_documents(home, tmp_path):
    """However tiny, and one of them with half of a character."""
    lines = [json.dumps({"text": f"number {i}"}) for i in range(5000)] + [r'{"text": "\ud83d"}', "\n"]
    folder = write_text(tmp_path, {"lines.jsonl": "\n".join(lines)})
    write_parquet(folder / "table.parquet", stories(2000, 1500))
    assert prepare_text(tmp_path, {})[1]["documents"] == 6501


def test_few_files_are_cut_into_blocks(tmp_path):
    """Behind a line, if it is not too long; this book has one that is."""
    book = "".join(stories(0, 9000))
    book = book.replace("\n", " ") + "\n" + book
    batches = batches_of(write_text(tmp_path, {"book.txt": book}))
    blocks = [text for batch in batches for text in batch]
    assert "".join(blocks) == book and max(map(len, batches)) == 1
    assert all(2**16 <= len(block) <= 2**17 + 1 for block in blocks[:-1])


PLENTY = {f"{i}.txt": "".join(stories(1000 * i, 400)) for i in range(12)}


@pytest.mark.long
@pytest.mark.parametrize("company", [{}, PLENTY], ids=["alone", "among others"])
def test_a_line_of_200_megabytes(home, tmp_path, company):
    """Alone it is cut into blocks, among others it is one document; nearly all of its bytes are trained on."""
    line = ("".join(stories(0, 9000)).replace("\n", " ") * 400)[:200_000_000]
    benchmark, counts = prepare_text(tmp_path, {"line.txt": line, **company})
    packed = sum(int(benchmark.token_bytes()[rows].sum()) for rows in np.array_split(benchmark.rows("train"), 50))
    total = len(line) + sum(map(len, company.values()))
    assert len(line) == 200_000_000 and 0.99 * total < packed <= total
    assert counts["documents"] == 13 if company else counts["documents"] > 1000


def test_the_tokenizer_never_sees_scored_text(home, tmp_path, monkeypatch):
    """Long groups of long words: the first guess at how much text validation needs is too small."""
    letters = [[chr(97 + i % 26) for i in range(start, start + 400)] for start in range(300)]
    files = {f"{i}.txt": " ".join(f"internationalization{x}" for x in word) for i, word in enumerate(letters)}
    trained_on = []
    train = prepare.Tokenizer.train.__func__

    def spy(cls, batches, vocab_size):
        batches = list(batches)
        trained_on.append({text for batch in batches for text in batch})
        return train(cls, batches, vocab_size)

    monkeypatch.setattr(prepare.Tokenizer, "train", classmethod(spy))
    benchmark, _ = prepare_text(tmp_path, files, "--val-rows", "60")
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    assert len(trained_on) > 1
    texts = [text for batch in batches_of(tmp_path / "text") for text in batch]
    scored = sum(len(tokenizer.encode(text)) + 1 for text in texts if text not in trained_on[-1])
    assert scored >= (60 + 3) * 33  # all that was scored was set aside


# --------------------------------------
# climbmix and tinystories


def test_climbmix(hub):
    for shard in (1, 2):
        write_parquet(hub.folder / f"shard_{shard:05}.parquet", stories(1000 * shard, 900))
    first = 10 * prepare.VALIDATION_SHARD
    prepare.main([*ONE_SHARD, "--num-shards", "3"])
    benchmark = prepare.load_benchmark()
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    groups = [stories(first, 900)[i : i + 200] for i in range(0, 900, 200)]
    held_out = [[tokenizer.encode(t) for t in g[i : i + 128]] for g in groups for i in range(0, len(g), 128)]
    expected = list(prepare.itertools.islice(prepare.pack(held_out, 33, tokenizer.bos_id, split=False), 9))
    assert np.array_equal(benchmark.rows("val"), expected[:6])
    assert np.array_equal(benchmark.rows("holdout"), expected[6:])  # the same stream goes on
    assert max(story_numbers(benchmark, "train")) < first
    asked = len(hub.seen)
    prepare.main([*ONE_SHARD, "--num-shards", "3", "--vocab-size", "280"])
    assert len(hub.seen) == asked == 4  # every file was fetched once


def test_tinystories(hub):
    write_parquet(hub.folder / prepare.TINYSTORIES_FILE, stories(0, 3000))
    prepare.main(["--dataset", "tinystories", *TINY])
    val, holdout, train = (story_numbers(prepare.load_benchmark(), split) for split in ("val", "holdout", "train"))
    assert max(val) < min(holdout) and max(holdout) < min(train) and max(train) == 2999


# Faults: what a server may answer


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
    status(302, Location="/elsewhere/shard_00000.parquet", X_Linked_ETag=etag(content))(handler, content)


def flipped(handler, content, **headers):
    handler.answer(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:], **headers)


def flipped_and_tagged(handler, content):
    flipped(handler, content, X_Linked_ETag=etag(content))


RECOVERS = {
    "server error": [status(500), status(502), status(503)],
    "429": [status(429, Retry_After="1")],
    "cut off": [stall, reset, answer(end=-100)],
    "no ranges": [answer(end=-100), answer(resume=False)],
    "not parquet": [HTML, answer(lambda content: b"x" * len(content)), answer(lambda content: content + b"x" * 100)],
    "flipped bit": [flipped_and_tagged, redirect, flipped],
}


@pytest.mark.parametrize("fault", RECOVERS)
def test_a_download_recovers(hub, fault):
    hub.faults += RECOVERS[fault]
    prepare.fetch(prepare.HOME / "downloads" / "climbmix", "climbmix", list(snapshot(hub.folder)))
    assert snapshot(prepare.HOME / "downloads" / "climbmix") == snapshot(hub.folder)
    asked = [(moment, part) for name, moment, part in hub.seen if name == "shard_00000.parquet"]
    assert len(asked) == len(RECOVERS[fault]) + (fault != "no ranges")
    if fault in ("cut off", "no ranges"):
        assert all(part for _, part in asked[1:]), "the next request goes on where the last ended"
    if fault == "429":
        assert asked[1][0] - asked[0][0] >= 1


FAILS = {
    "HTTP 404": status(404),
    "HTTP 500": status(500),
    "not a parquet file": HTML,
    "column `text`": another_column,
    "sha256": flipped_and_tagged,
    "timed out": wait,
}


@pytest.mark.parametrize("message", FAILS)
def test_a_download_fails_by_name(hub, message):
    hub.faults += [FAILS[message]] * 9
    with pytest.raises(SystemExit, match=message) as stop:
        prepare.main(ONE_SHARD)
    assert "shard_00000.parquet" in str(stop.value) and len(str(stop.value).splitlines()) == 1
    assert not (prepare.HOME / "current").exists() and not list(prepare.HOME.glob("climbmix*"))
    assert not (prepare.HOME / "downloads" / "climbmix" / "shard_00000.parquet").exists()


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "not a URL"])
def test_an_unreachable_host(home, monkeypatch, host):
    monkeypatch.setenv("HF_ENDPOINT", host)
    monkeypatch.setattr(sources, "RETRY_SECONDS", 0.01)
    with pytest.raises(SystemExit, match="could not download .*shard_.*HF_ENDPOINT"):
        prepare.main(ONE_SHARD)


# --------------------------------------
# Bad input: one line, a non-zero exit code, nothing that a later run would take for whole


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "wikipedia"],
        ["--seq-len", "0"],
        ["--time-budget", "0"],
        ["--time-budget", "nan"],
        ["--vocab-size", "70000"],
        ["--val-rows", "-1"],
        ["--num-shards", "9999"],
        ["--dataset", "local", "--num-shards", "3"],
        ["--dataset", "tinystories", "--text", "a.txt"],
        ["--bogus"],
    ],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.parse_arguments(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and arguments[-2 if len(arguments) == 2 else 0][2:] in lines[0]


@pytest.mark.parametrize(
    ("memory", "capability", "said"),
    [
        (0, (0, 0), "benchmark: local, because no CUDA here; choose"),
        (16 << 30, (7, 5), "benchmark: tinystories, because the GPU has 16 GiB; choose"),
        (24 << 30, (8, 9), "benchmark: climbmix, because the GPU has 24 GiB; choose"),
        (32 << 30, (7, 0), "no code for a V100: take a wheel"),
    ],
)
def test_the_benchmark_suits_the_machine(home, monkeypatch, capsys, memory, capability, said):
    major, minor = capability
    gpu = types.SimpleNamespace(total_memory=memory, major=major, minor=minor, name="V100")
    monkeypatch.setattr(prepare.torch.cuda, "is_available", lambda: memory > 0)
    monkeypatch.setattr(prepare.torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(prepare.torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_75", "compute_120"])
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    monkeypatch.setattr(prepare, "find_text", lambda paths: sys.exit())  # or download
    monkeypatch.setattr(prepare, "fetch", lambda folder, dataset, names: sys.exit())
    with pytest.raises(SystemExit) as stop:
        prepare.main([])
    assert said in f"{capsys.readouterr().out} {stop.value.code}"


BROKEN_LINES = ["{", '"text"', '{"words": "x"}', '{"text": 7}', '{"text": null}']
RECORDS = "".join(json.dumps({"text": story}) + "\n" for story in stories(0, 200))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ({}, [], "no such file or folder"),
        ({"a.png": ""}, [], "no .txt"),
        ({"a.txt": "short"}, [], "too small"),
        ({"a.txt": "abc " * 60_000}, ["--vocab-size", "5000"], "supports .* at most"),
        ({"a.txt": "".join(stories(0, 900))}, ["--val-rows", "9000"], "too small"),
        *(
            ({"a.jsonl": RECORDS + line}, [], "a.jsonl:201: not a JSON object with a string `t")
            for line in BROKEN_LINES
        ),
    ],
)
def test_bad_text(home, tmp_path, text, arguments, message):
    with pytest.raises(SystemExit, match=message) as stop:
        prepare_text(tmp_path, text, *arguments)
    assert len(str(stop.value).splitlines()) == 1
    assert not (home / "current").exists() and not list(home.glob("*/benchmark.json"))


def test_no_benchmark(home):
    with pytest.raises(SystemExit, match='^no benchmark prepared: run "uv run prepare.py" first$'):
        prepare.load_benchmark()


def test_seed_must_be_a_number(benchmark, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    assert prepare.load_benchmark().seed == 7
    monkeypatch.setenv("AUTORESEARCH_SEED", "lucky")
    with pytest.raises(SystemExit, match="AUTORESEARCH_SEED"):
        prepare.load_benchmark()


# --------------------------------------
# Damage


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "edited"])
def test_damage_is_found_and_fixed(home, book, damage):
    """In any file; only a training row that was flipped is left to the command that prepares."""
    prepare.main(book)
    path = prepare.load_benchmark().path
    whole = snapshot(path)
    easier = whole["benchmark.json"].replace(b'"val_rows": 6', b'"val_rows": 5')
    for name in ("benchmark.json",) if damage == "edited" else whole:
        content = whole[name]
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        if damage == "missing":
            (path / name).unlink()
        else:
            (path / name).write_bytes({"truncated": content[:-2], "flipped": flipped, "edited": easier}[damage])
        if (name, damage) != ("train.npy", "flipped"):
            words = f"{name} is missing or modified; run .*prepare.py.*fixes it|no benchmark prepared"
            with pytest.raises(SystemExit, match=words) as stop:
                prepare.load_benchmark()
            assert name == "benchmark.json" or prepare.shlex.join(book) in str(stop.value)
        if name in ("benchmark.json", "train.npy"):
            prepare.main(book)
            after = snapshot(prepare.load_benchmark().path)
            assert after.pop("benchmark.json") and after.items() <= whole.items()
        (path / name).write_bytes(content)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("weapon", ["pickle", "object array", "path", "current"])
def test_a_hostile_benchmark_executes_nothing(own, tmp_path, monkeypatch, weapon):
    """Its hashes and its id are right: only what it holds is not."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.move(own.path, prepare.HOME / "hostile")
    record = json.loads((folder / "benchmark.json").read_text())
    if weapon == "pickle":
        (folder / "train.npy").write_bytes(pickle.dumps(Bomb()))
    elif weapon == "object array":
        np.save(folder / "val.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    elif weapon == "path":
        (prepare.HOME / "secret.npy").write_bytes(b"x")
        record["files"]["../secret.npy"] = {}
    for name, file in record["files"].items():
        file["bytes"], file["sha256"] = (folder / name).stat().st_size, prepare.sha256(folder / name)
    record["id"] = prepare.benchmark_id(record)
    (folder / "benchmark.json").write_text(json.dumps(record))
    folder.rename((tmp_path if weapon == "current" else prepare.HOME) / record["id"])
    (prepare.HOME / "current").write_text("../" * (weapon == "current") + record["id"])
    with pytest.raises(SystemExit):
        prepare.load_benchmark()
    assert not (tmp_path / "exploded").exists()

"""Preparing a benchmark as a user does: local text, downloads from a server of our own, bad input, damaged files."""

import itertools
import json
import os
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import ONE_SHARD, TINY, every_byte, parquet, snapshot, stories, story_numbers, write_files

import prepare
from harness import packing

# --------------------------------------
# local


def prepare_text(tmp_path, files, *arguments):
    """Prepare a folder of these files; returns the benchmark and its counts."""
    prepare.main(["--text", str(write_files(tmp_path / "text", files)), *TINY, *arguments])
    return prepare.load_benchmark(), every_byte()["counts"]


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
    "CJK": "日本語のテキスト中文文本한국어" * 200,
    "one long line": "word " * 30_000,
    "a million spaces": " " * 1_000_000,
    "special token": "<|reserved_0|> is plain text " * 100,
}


def test_groups_stay_on_one_side(home, tmp_path, capsys):
    """Odd text is taken as it is, duplicates go, and what is left out is said."""
    places = [(group, part) for group in range(12) for part in range(3)]
    files = {f"g{g}/{part}.md": "".join(stories(900 * g + 300 * part, 300)) for g, part in places}
    files |= {f"{name}.txt": text for name, text in ODD.items()} | {"g3/copy.txt": files["g0/0.md"]}
    benchmark, counts = prepare_text(tmp_path, files | {"latin.txt": b"caf\xe9 " * 90})
    assert counts["documents"] == 36 + len(ODD) and counts["duplicates"] == 1
    output = capsys.readouterr().out
    assert f" tokens of {36 + len(ODD)} documents, 1 duplicates\n" in output
    assert f"skipped: 1 file that is not UTF-8, {tmp_path}/text/latin.txt\n" in output
    numbers = (story_numbers(benchmark, split) for split in ("val", "holdout", "train"))
    val, holdout, train = ({number // 900 for number in split if number >= 900} for split in numbers)
    assert val and holdout and not val & holdout and not (val | holdout) & train


def test_no_scored_row_is_a_training_row(home, tmp_path):
    """Not even where the same long beginning is in every group: it fills the same rows in each."""
    licence = "".join(stories(0, 60))
    files = {f"{i}.txt": licence + "".join(stories(1000 * i, 200)) for i in range(1, 20)}
    benchmark, counts = prepare_text(tmp_path, files)
    scored = {row.tobytes() for split in ("val", "holdout") for row in benchmark.rows(split)}
    train = [row.tobytes() for row in benchmark.rows("train")]
    assert len(train) == counts["train_rows"] > 100 and not scored.intersection(train)
    beginning = prepare.Tokenizer.load(benchmark.path).encode(licence)[:32].tobytes()
    assert any(row[2:] == beginning for row in scored), "it is in there"


@pytest.mark.parametrize("moment", ["train", "write_benchmark"])
def test_text_that_grows_while_it_is_read(home, tmp_path, monkeypatch, moment):
    """The build reads it several times: scored text would move into training."""
    owner = {"train": prepare.Tokenizer, "write_benchmark": prepare}[moment]
    original = getattr(owner, moment)

    def grow(*arguments):
        with open(tmp_path / "text" / "3.txt", "a") as file:
            file.write("more")
        return original(*arguments)

    monkeypatch.setattr(owner, moment, grow)
    with pytest.raises(SystemExit, match="3.txt: changed while it was read; run this again"):
        prepare_text(tmp_path, PLENTY)
    assert not (home / "current").exists() and not list(home.glob("*/benchmark.json"))


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
    texts = [text for batch in prepare.LocalText([tmp_path / "text"]).batches() for text in batch]
    scored = sum(len(tokenizer.encode(text)) + 1 for text in texts if text not in trained_on[-1])
    assert scored >= (60 + 3) * 33  # all that was scored was set aside


# --------------------------------------
# climbmix and tinystories


def test_climbmix(hub):
    for shard in (1, 2):
        hub.files[f"shard_{shard:05}.parquet"] = parquet(stories(1000 * shard, 900))
    first = 10 * prepare.VALIDATION_SHARD
    prepare.main([*ONE_SHARD, "--num-shards", "3"])
    benchmark = prepare.load_benchmark()
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    groups = [stories(first, 900)[i : i + 200] for i in range(0, 900, 200)]
    held_out = [[tokenizer.encode(t) for t in g[i : i + 128]] for g in groups for i in range(0, len(g), 128)]
    expected = list(itertools.islice(packing.pack(held_out, 33, tokenizer.bos_id, split=False), 9))
    assert np.array_equal(benchmark.rows("val"), expected[:6])
    assert np.array_equal(benchmark.rows("holdout"), expected[6:])  # the same stream goes on
    assert max(story_numbers(benchmark, "train")) < first
    asked = len(hub.seen)
    prepare.main([*ONE_SHARD, "--num-shards", "3", "--vocab-size", "280"])
    assert len(hub.seen) == asked == 4  # every file was fetched once


def test_tinystories(hub):
    hub.files[prepare.TINYSTORIES_FILE] = parquet(stories(0, 3000))
    prepare.main(["--dataset", "tinystories", *TINY])
    val, holdout, train = (story_numbers(prepare.load_benchmark(), split) for split in ("val", "holdout", "train"))
    assert max(val) < min(holdout) and max(holdout) < min(train) and max(train) == 2999


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
    monkeypatch.setattr(prepare, "LocalText", lambda paths: sys.exit())  # or download
    monkeypatch.setattr(prepare, "fetch", lambda folder, dataset, names: sys.exit())
    with pytest.raises(SystemExit) as stop:
        prepare.main([])
    assert said in f"{capsys.readouterr().out} {stop.value.code}"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ({}, [], "no such file or folder"),
        ({"a.txt": "short", "b.txt": b"\xe9"}, [], "too small: .*; skipped: 1 file that is not UTF-8, .*b.txt"),
        ({"a.txt": "short"}, [], "too small"),
        ({"a.txt": "".join(stories(0, 4000))}, ["--vocab-size", "60000"], "supports .* at most"),
        ({"a.txt": "".join(stories(0, 900))}, ["--val-rows", "9000"], "too small"),
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
    with pytest.raises((SystemExit, ValueError)):
        benchmark = prepare.load_benchmark()
        print(benchmark.rows("val"), benchmark.rows("train"))
    assert not (tmp_path / "exploded").exists()

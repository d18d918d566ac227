"""
Checks how a benchmark is prepared: no scored text is in training, rows are those of the reference project's packer, bad
input is refused in a line, and damage is seen, mended and never executed.
"""

import itertools
import json
import os
import pickle
import re
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import ONE_SHARD, TINY, every_byte, parquet, refused, snapshot, stories, story_numbers, write_files

import prepare
from harness import packing
from harness.record import find_damage

BOOK = "".join(stories(0, 4000))
PLENTY = {f"{i}.txt": "".join(stories(1000 * i, 400)) for i in range(12)}


def prepare_text(tmp_path, files, *arguments):
    """Prepare a folder of these files; returns the benchmark and its counts."""
    prepare.main(["--text", str(write_files(tmp_path / "text", files)), *TINY, *arguments])
    return prepare.load_benchmark(), every_byte()["counts"]


def is_nothing_prepared(home):
    return not (home / "current").exists() and not list(home.glob("*/benchmark.json"))


# --------------------------------------
# What is built


def test_same_flags_same_benchmark_and_others_beside_it(home, book, capsys, monkeypatch):
    prepare.main(book)
    one = prepare.load_benchmark()
    assert one.id == one.path.name and one.id.startswith("local-T32-V300-1s-")
    assert (one.max_seq_len, one.vocab_size, one.time_budget, one.seed) == (32, 300, 1, 42)
    assert one.rows("val").shape == (6, 33) and one.rows("holdout").shape == (3, 33)
    assert all((one.rows(split)[:, 0] == 300 - 4).all() for split in ("train", "val", "holdout"))  # BOS
    assert (home / ".gitignore").read_text() == "*\n"  # it may lie in a clone
    before = snapshot(one.path)
    capsys.readouterr()
    prepare.main(book)
    assert "prepared in" not in capsys.readouterr().out and snapshot(one.path) == before
    prepare.main([*book, "--time-budget", "2"])
    other = prepare.load_benchmark()
    assert one.id != other.id and one.path.exists() and other.time_budget == 2
    assert (other.path / "train.npy").read_bytes() == before["train.npy"]
    monkeypatch.setenv("AUTORESEARCH_BENCHMARK", one.id)  # as on a node of a cluster
    assert f"but AUTORESEARCH_BENCHMARK is {one.id}" in refused(prepare.main, [*book, "--time-budget", "3"])
    assert (home / "current").read_text() == other.id
    assert not [path for path in home.iterdir() if path.name.endswith("tmp") or path.name == ".building"]


def test_groups_stay_on_one_side(home, tmp_path, capsys):
    """Duplicates go, and what is left out is said."""
    files = {f"g{i // 3}/{i}.md": "".join(stories(300 * i, 300)) for i in range(36)}
    files |= {"g3/copy.txt": files["g0/0.md"], "latin.txt": b"caf\xe9 " * 90}
    benchmark, counts = prepare_text(tmp_path, files)
    assert (counts["documents"], counts["duplicates"]) == (36, 1)
    output = capsys.readouterr().out
    assert " tokens of 36 documents, 1 duplicates\n" in output
    assert f"skipped: files that are not UTF-8 (1), first {tmp_path}/text/latin.txt\n" in output
    numbers = [story_numbers(benchmark, split) for split in ("val", "holdout", "train")]
    val, holdout, train = ({number // 900 for number in found} for found in numbers)
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


def test_the_tokenizer_never_sees_scored_text(home, tmp_path, monkeypatch):
    """Words that are few tokens: the first guess at how much text validation needs is too small."""
    word = 2 * "internationalization"
    trained_on = []

    def spy(batches, vocab_size, train=prepare.Tokenizer.train):
        trained_on.append(list(batches))
        return train(trained_on[-1], vocab_size)

    monkeypatch.setattr(prepare.Tokenizer, "train", spy)
    benchmark, _ = prepare_text(tmp_path, {f"{i}.txt": f"{word}{i} " * 100 for i in range(99)}, "--val-rows", "60")
    assert len(trained_on) > 1
    seen = {document.split()[0] for document in itertools.chain(*trained_on[-1])}
    for split, scored in (("val", True), ("holdout", True), ("train", False)):
        text = prepare.Tokenizer.load(benchmark.path).decode(benchmark.rows(split).ravel())
        words = set(re.findall(rf"{word}\d+(?= )", text))
        assert words and words.isdisjoint(seen) == scored


def test_text_that_grows_while_it_is_read(home, tmp_path, monkeypatch):
    """The build reads it several times: scored text would move into training."""

    def grow(*arguments, write=prepare.write_benchmark):
        with open(tmp_path / "text" / "3.txt", "a") as file:
            file.write("more")
        return write(*arguments)

    monkeypatch.setattr(prepare, "write_benchmark", grow)
    assert "3.txt: changed while it was read; run this again" in refused(prepare_text, tmp_path, PLENTY)
    assert is_nothing_prepared(home)


@pytest.mark.long
def test_a_line_of_200_megabytes(home, tmp_path):
    """Among other files it is one document; nearly all of its bytes are trained on."""
    line = ("".join(stories(0, 9000)).replace("\n", " ") * 400)[:200_000_000]
    benchmark, counts = prepare_text(tmp_path, {"line.txt": line, **PLENTY})
    packed = sum(int(benchmark.token_bytes()[rows].sum()) for rows in np.array_split(benchmark.rows("train"), 50))
    total = len(line) + sum(map(len, PLENTY.values()))
    assert counts["documents"] == 13 and 0.99 * total < packed <= total


def test_climbmix(mirror, monkeypatch):
    """Its scored rows are those of the reference: documents enter 128 at a time, never across a row group of 200."""
    for shard in (1, 2):
        mirror.files[f"shard_{shard:05}.parquet"] = parquet(stories(1000 * shard, 900))
    validation = 10 * prepare.VALIDATION_SHARD
    monkeypatch.setattr(packing, "PACKING_BUFFER", 100)
    prepare.main([*ONE_SHARD, "--num-shards", "3"])
    benchmark = prepare.load_benchmark()
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    tokens = [tokenizer.encode(text) for text in stories(validation, 900)]
    borders = [0, 128, 200, 328, 400, 528, 600, 728, 800, 900]
    batches = [tokens[start:end] for start, end in itertools.pairwise(borders)]
    expected = list(itertools.islice(packing.pack(batches, 33, tokenizer.bos_id, split=False), 9))
    assert np.array_equal(benchmark.rows("val"), expected[:6])
    assert np.array_equal(benchmark.rows("holdout"), expected[6:])  # the same stream goes on
    assert max(story_numbers(benchmark, "train")) < validation
    prepare.main([*ONE_SHARD, "--num-shards", "3", "--vocab-size", "280"])
    assert "text too small" in refused(prepare.main, [*ONE_SHARD, "--holdout-rows", "9000"])
    assert len(mirror.seen) == 4  # every file was fetched once


def test_tinystories(mirror):
    mirror.files[prepare.TINYSTORIES_FILE] = parquet(stories(0, 3000))
    prepare.main(["--dataset", "tinystories", *TINY])
    val, holdout, train = (story_numbers(prepare.load_benchmark(), split) for split in ("val", "holdout", "train"))
    assert max(val) < min(holdout) and max(holdout) < min(train) and max(train) == 2999


@pytest.mark.parametrize(
    ("memory", "capability", "words"),
    [
        (0, (0, 0), "benchmark: local, because no CUDA here; choose"),
        (16 << 30, (7, 5), "benchmark: tinystories, because the GPU has 16 GiB; choose"),
        (24 << 30, (8, 9), "benchmark: climbmix, because the GPU has 24 GiB; choose"),
        (32 << 30, (7, 0), "no code for a V100: take a wheel"),
    ],
)
def test_the_benchmark_suits_the_machine(home, monkeypatch, capsys, memory, capability, words):
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
    assert words in f"{capsys.readouterr().out} {stop.value.code}"


# --------------------------------------
# Bad input: one line, a non-zero exit code, nothing that a later run would take for whole


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ({}, [], "no such file or folder"),
        ({"a.txt": "short", "b.txt": b"\xe9"}, [], "too small"),
        ({"a.txt": BOOK}, ["--vocab-size", "60000"], "supports .* at most"),
        ({"a.txt": BOOK}, ["--val-rows", "9000"], "too small"),
        ({"a.txt": "x" * 65_536 + "\n" + "y" * 65_536 + "\nend"}, ["--vocab-size", "260"], "too small"),
    ],
    ids=["none", "short", "few words", "many rows", "no row left"],
)
def test_bad_text(home, tmp_path, capsys, text, arguments, message):
    assert re.search(message, refused(prepare_text, tmp_path, text, *arguments))
    assert ("skipped: files that are not UTF-8 (1)" in capsys.readouterr().out) == ("b.txt" in text)
    assert is_nothing_prepared(home)


def test_no_benchmark(home):
    assert refused(prepare.load_benchmark) == 'no benchmark prepared: run "uv run prepare.py" first'


def test_seed_must_be_a_number(benchmark, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    assert prepare.load_benchmark().seed == 7
    monkeypatch.setenv("AUTORESEARCH_SEED", "lucky")
    assert "AUTORESEARCH_SEED" in refused(prepare.load_benchmark)


# --------------------------------------
# Damage

FILES = ["benchmark.json", "holdout.npy", "token_bytes.npy", "tokenizer.tiktoken", "train.npy", "val.npy"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_fixed(home, book, name, damage):
    """Only a training row that was flipped is left to the command that prepares."""
    prepare.main(book)
    path = prepare.load_benchmark().path
    whole = snapshot(path)
    assert sorted(whole) == FILES
    content = whole[name]
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    (path / name).write_bytes({"missing": b"", "truncated": content[:-2], "flipped": flipped}[damage])
    if damage == "missing":
        (path / name).unlink()
    if (name, damage) != ("train.npy", "flipped"):
        said = refused(prepare.load_benchmark)
        assert re.search(f"{name} is missing or modified; run .*prepare.py.*fixes it", said)
        assert name == "benchmark.json" or prepare.shlex.join(book) in said
    prepare.main(book)
    after = snapshot(prepare.load_benchmark().path)
    del after["benchmark.json"], whole["benchmark.json"]  # it has the time
    assert after == whole


def test_an_easier_benchmark_of_the_same_name(own):
    path = own.path / "benchmark.json"
    path.write_text(path.read_text().replace('"val_rows": 40', '"val_rows": 39'))
    assert "benchmark.json is missing or modified" in refused(prepare.load_benchmark)


def test_a_benchmark_outside_of_the_home(own, tmp_path):
    shutil.move(own.path, tmp_path)
    (prepare.HOME / "current").write_text(f"../{own.id}")
    assert "benchmark.json is missing or modified" in refused(prepare.load_benchmark)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_hostile_files_execute_nothing(own, tmp_path, monkeypatch):
    """The hashes and the id are right: only what the files hold is not."""
    monkeypatch.chdir(tmp_path)
    (own.path / "train.npy").write_bytes(pickle.dumps(Bomb()))
    np.save(own.path / "val.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    record = json.loads((own.path / "benchmark.json").read_text())
    for name, file in record["files"].items():
        file["bytes"], file["sha256"] = (own.path / name).stat().st_size, prepare.sha256(own.path / name)
    record["id"] = prepare.benchmark_id(record)
    (own.path / "benchmark.json").write_text(json.dumps(record))
    own.path.rename(prepare.HOME / record["id"])
    (prepare.HOME / "current").write_text(record["id"])
    benchmark = prepare.load_benchmark()
    for split in ("val", "train"):
        with pytest.raises(ValueError, match="pickle|Python objects"):
            benchmark.rows(split)
    assert not (tmp_path / "exploded").exists()


def test_no_other_file_is_read(own):
    record = json.loads((own.path / "benchmark.json").read_text())
    record["files"]["../secret.npy"] = {}
    record["id"] = prepare.benchmark_id(record)
    assert find_damage(own.path.with_name(record["id"]), record, every_byte=True) == "benchmark.json"

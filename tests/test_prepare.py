"""Preparing a benchmark as a user does: local text, downloads from a server of our own, bad input."""

import http.server
import json
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SMALL, TEXT, run

import prepare

TINY = ["--seq-len", "32", "--vocab-size", "300", "--val-rows", "6", "--holdout-rows", "3", "--time-budget", "1"]


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def stories(start, count):
    return [
        f"Story {i}: a {'very ' * (i % 7)}small tale of {i * i} words, told on day {i % 31}.\n"
        for i in range(start, start + count)
    ]


def write_parquet(path, texts, rows_per_group=200):
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group, compression="none")


def story_numbers(benchmark, split):
    """Which stories are in the rows, by the numbers that are in there whole."""
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    text = tokenizer.decode(np.array(benchmark.rows(split)).ravel())
    return {int(words.split(":")[0]) for words in text.split("Story ")[1:] if words.split(":")[0].isdecimal()}


# --------------------------------------
# local


def test_local_benchmark(benchmark):
    record = json.loads((benchmark.path / "benchmark.json").read_text())
    assert benchmark.id == benchmark.path.name and benchmark.id.startswith("local-T64-V512-3s-")
    assert (benchmark.max_seq_len, benchmark.vocab_size, benchmark.time_budget, benchmark.seed) == (64, 512, 3, 42)
    assert prepare.read_record(benchmark.path, every_byte=True) == record
    assert benchmark.rows("val").shape == (40, 65) and benchmark.rows("holdout").shape == (20, 65)
    for split in ("train", "val", "holdout"):
        rows = np.array(benchmark.rows(split))
        assert rows.dtype == np.uint16 and (rows[:, 0] == 508).all() and rows.max() < 512


def test_again_is_the_same_and_changes_nothing(benchmark, capsys):
    before = snapshot(benchmark.path)
    prepare.main(["--text", *TEXT, *SMALL])
    assert "prepared in" not in capsys.readouterr().out and snapshot(benchmark.path) == before


def test_other_flags_make_another_benchmark_beside_it(home, tmp_path):
    (tmp_path / "a.txt").write_text("".join(stories(0, 4000)))
    prepare.main(["--text", str(tmp_path / "a.txt"), *TINY])
    first = prepare.load_benchmark()
    prepare.main(["--text", str(tmp_path / "a.txt"), *TINY, "--time-budget", "2"])
    second = prepare.load_benchmark()
    assert first.id != second.id and first.path.exists() and second.time_budget == 2
    assert (first.path / "train.npy").read_bytes() == (second.path / "train.npy").read_bytes()
    assert sorted(p.name for p in home.iterdir() if p.name.endswith("tmp") or p.name == ".building") == []


def test_groups_stay_on_one_side_and_duplicates_go(home, tmp_path):
    for group in range(12):
        (tmp_path / "text" / f"g{group}").mkdir(parents=True)
        for part in range(3):
            (tmp_path / "text" / f"g{group}" / f"{part}.md").write_text("".join(stories(900 * group + 300 * part, 300)))
    (tmp_path / "text" / "g3" / "copy.txt").write_text("".join(stories(0, 300)))
    prepare.main(["--text", str(tmp_path / "text"), *TINY])
    benchmark = prepare.load_benchmark()
    counts = json.loads((benchmark.path / "benchmark.json").read_text())["counts"]
    assert counts["duplicates"] == 1 and counts["documents"] == 36
    groups = {s: {n // 900 for n in story_numbers(benchmark, s) if n >= 900} for s in ("train", "val", "holdout")}
    assert not groups["val"] & groups["train"] and not groups["holdout"] & groups["train"]
    assert not groups["val"] & groups["holdout"]


def test_records_and_skipped_files(home, tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in stories(0, 1500)) + "\n\n")
    write_parquet(tmp_path / "table.parquet", stories(2000, 1500))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    prepare.main(["--text", str(tmp_path), *TINY])
    counts = json.loads((prepare.load_benchmark().path / "benchmark.json").read_text())["counts"]
    assert counts["documents"] == 3000 and counts["skipped files"] == 1
    (tmp_path / "lines.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(SystemExit, match=r"lines.jsonl:2: not a JSON object"):
        prepare.main(["--text", str(tmp_path / "lines.jsonl"), *TINY])


# --------------------------------------
# climbmix and tinystories, from a server on this machine


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files like the hub; `faults` maps a file name to the status codes of its next answers."""

    faults = {}
    requests = []

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.requests.append((name, self.headers.get("Range")))
        fault = self.faults.get(name, []) and self.faults[name].pop(0)
        if isinstance(fault, int) and fault:
            return self.send_error(fault)
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return self.send_error(404)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) // 2 if fault == "cut" else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, home, monkeypatch):
    """A stand-in for huggingface.co: a folder of files."""
    handler = type("Handler", (Server,), {"folder": tmp_path / "hub", "faults": {}, "requests": []})
    handler.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0.01)
    yield handler
    server.shutdown()


def write_shards(hub, count):
    for shard in range(count):
        write_parquet(hub.folder / f"shard_{shard:05}.parquet", stories(1000 * shard, 900))
    write_parquet(hub.folder / f"shard_{prepare.VALIDATION_SHARD:05}.parquet", stories(90_000, 900))


def test_climbmix(hub):
    write_shards(hub, 3)
    prepare.main(["--dataset", "climbmix", "--num-shards", "3", *TINY])
    benchmark = prepare.load_benchmark()
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    groups = [stories(90_000, 900)[i : i + 200] for i in range(0, 900, 200)]
    held_out = [[tokenizer.encode(t) for t in g[i : i + 128]] for g in groups for i in range(0, len(g), 128)]
    expected = list(prepare.itertools.islice(prepare.pack(held_out, 33, tokenizer.bos_id, split=False), 9))
    assert np.array_equal(benchmark.rows("val"), expected[:6])
    assert np.array_equal(benchmark.rows("holdout"), expected[6:])  # the same stream goes on
    assert max(story_numbers(benchmark, "train")) < 90_000
    asked = len(hub.requests)
    prepare.main(["--dataset", "climbmix", "--num-shards", "3", *TINY, "--vocab-size", "280"])
    assert len(hub.requests) == asked == 4  # every file was fetched once


def test_tinystories(hub):
    write_parquet(hub.folder / prepare.TINYSTORIES_FILE, stories(0, 3000))
    prepare.main(["--dataset", "tinystories", *TINY])
    benchmark = prepare.load_benchmark()
    val, holdout, train = (story_numbers(benchmark, split) for split in ("val", "holdout", "train"))
    assert max(val) < min(holdout) and max(holdout) < min(train) and max(train) == 2999


def test_download_recovers(hub, capsys):
    write_shards(hub, 2)
    hub.faults |= {"shard_00000.parquet": [503, "cut", 429], "shard_00001.parquet": ["cut", "cut"]}
    prepare.main(["--dataset", "climbmix", "--num-shards", "2", *TINY])
    assert any(name == "shard_00000.parquet" and byte_range for name, byte_range in hub.requests)  # it resumed
    folder = prepare.HOME / "downloads" / "climbmix"
    assert snapshot(folder) == snapshot(hub.folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("missing", "HTTP 404"), ("html", "not a parquet file"), ("down", "HTTP 500"), ("column", "column `text`")],
)
def test_download_fails_with_a_name(hub, fault, message):
    write_shards(hub, 2)
    victim = hub.folder / "shard_00001.parquet"
    if fault == "missing":
        victim.unlink()
    elif fault == "html":
        victim.write_text("<html>Sorry</html>")
    elif fault == "column":
        pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), victim)
    else:
        hub.faults[victim.name] = [500] * 99
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--dataset", "climbmix", "--num-shards", "2", *TINY])
    assert message in str(stop.value) and "shard_00001" in str(stop.value)
    assert not (prepare.HOME / "current").exists() and not list(prepare.HOME.glob("climbmix*"))
    assert not (prepare.HOME / "downloads" / "climbmix" / victim.name).exists()


# --------------------------------------
# bad input: one line, a non-zero exit code, nothing that a later run would take for whole


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
    ("text", "arguments", "message"),
    [
        (None, [], "no such file or folder"),
        ({}, [], "no .txt"),
        ({"a.txt": "short"}, [], "too small"),
        ({"a.txt": "abc " * 60_000}, ["--vocab-size", "5000"], "supports .* at most"),
        ({"a.txt": "".join(stories(0, 900))}, ["--val-rows", "9000"], "too small"),
    ],
)
def test_bad_text(home, tmp_path, text, arguments, message):
    folder = tmp_path / "text"
    if text is not None:
        folder.mkdir()
        for name, content in text.items():
            (folder / name).write_text(content)
    with pytest.raises(SystemExit, match=message) as stop:
        prepare.main(["--text", str(folder), *TINY, *arguments])
    assert len(str(stop.value).splitlines()) == 1
    assert not (home / "current").exists() and not list(home.glob("*/benchmark.json"))


def test_no_benchmark(tmp_path):
    for script in ("train.py",):
        result = run(script, AUTORESEARCH_HOME=str(tmp_path))
        assert result.returncode == 1
        assert result.stderr.strip() == 'no benchmark prepared: run "uv run prepare.py" first'


def test_unreachable_host(tmp_path):
    result = run(
        "prepare.py", "--dataset", "climbmix", AUTORESEARCH_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert result.returncode == 1 and "HF_ENDPOINT" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "current").exists()


def test_unusable_home(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("prepare.py", *TINY, AUTORESEARCH_HOME=str(tmp_path / "file" / "home"))
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "edited", "json", "folder"])
def test_damage_is_found_and_fixed(home, tmp_path, damage):
    (tmp_path / "a.txt").write_text("".join(stories(0, 4000)))
    arguments = ["--text", str(tmp_path / "a.txt"), *TINY]
    prepare.main(arguments)
    path = prepare.load_benchmark().path
    before = snapshot(path)
    if damage == "missing":
        (path / "train.npy").unlink()
    elif damage == "truncated":
        (path / "val.npy").write_bytes(before["val.npy"][:-2])
    elif damage == "flipped":
        (path / "holdout.npy").write_bytes(before["holdout.npy"][:-1] + bytes([before["holdout.npy"][-1] ^ 1]))
    elif damage == "edited":
        (path / "benchmark.json").write_bytes(
            before["benchmark.json"].replace(b'"time_budget": 1.0', b'"time_budget": 9.0')
        )
    elif damage == "json":
        (path / "benchmark.json").write_bytes(before["benchmark.json"][:50])
    else:
        (path / "benchmark.json").unlink()
    with pytest.raises(SystemExit, match="prepare.py") as stop:
        prepare.load_benchmark()
    assert len(str(stop.value).splitlines()) == 1
    assert damage in ("json", "folder") or prepare.shlex.join(arguments) in str(stop.value)
    prepare.main(arguments)
    after = snapshot(prepare.load_benchmark().path)
    assert {name: after[name] for name in before if name != "benchmark.json"} == {
        name: before[name] for name in before if name != "benchmark.json"
    }


def test_a_flipped_training_row_is_fixed_too(home, tmp_path):
    (tmp_path / "a.txt").write_text("".join(stories(0, 4000)))
    for _ in range(2):
        prepare.main(["--text", str(tmp_path / "a.txt"), *TINY])
        rows = prepare.load_benchmark().path / "train.npy"
        content = rows.read_bytes()
        rows.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    prepare.main(["--text", str(tmp_path / "a.txt"), *TINY])
    assert rows.read_bytes() == content


def test_the_tokenizer_never_sees_scored_text(home, tmp_path, monkeypatch):
    """Long groups of long words: the first guess at how much text validation needs is too small."""
    words = [
        " ".join(f"internationalization{chr(97 + i % 26)}" for i in range(start, start + 400)) for start in range(300)
    ]
    for i, text in enumerate(words):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    trained_on = []
    train = prepare.Tokenizer.train.__func__

    def spy(cls, batches, vocab_size):
        batches = list(batches)
        trained_on.append({text for batch in batches for text in batch})
        return train(cls, batches, vocab_size)

    monkeypatch.setattr(prepare.Tokenizer, "train", classmethod(spy))
    prepare.main(["--text", str(tmp_path / "text"), *TINY, "--val-rows", "60"])
    benchmark = prepare.load_benchmark()
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    assert len(trained_on) > 1
    sources = list(prepare.local_batches(prepare.find_text([str(tmp_path / "text")]), prepare.Counter()))
    scored = sum(len(tokenizer.encode(text)) + 1 for batch in sources for text in batch if text not in trained_on[-1])
    assert scored >= (60 + 3) * 33  # all that was scored was set aside


def test_seed_must_be_a_number(benchmark, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    assert prepare.load_benchmark().seed == 7
    monkeypatch.setenv("AUTORESEARCH_SEED", "lucky")
    with pytest.raises(SystemExit, match="AUTORESEARCH_SEED"):
        prepare.load_benchmark()

"""What breaks in a night: the network, the disk, the power, two at once, bad text. Real sockets and signals."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, score, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import TINY, snapshot, stories, write_parquet

import prepare

ONE_SHARD = ["--dataset", "climbmix", "--num-shards", "1", *TINY]


def start(*command, **options):
    """A Python file of this repository in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in background jobs
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


def every_byte():
    """The current benchmark, of which every byte is checked."""
    return prepare.read_record(prepare.load_benchmark().path, every_byte=True)


# --------------------------------------
# Download


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of `folder`; `faults` are functions that spoil the next answers for the first shard."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.seen.append((name, time.monotonic(), self.headers.get("Range")))
        content = (self.folder / name).read_bytes()
        fault = self.faults.pop(0) if self.faults and name == "shard_00000.parquet" else None
        if fault:
            return fault(self, content)
        self.answer(content)

    def answer(self, content, end=None, announced=None, resume=True, **headers):
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if resume else 0
        if first >= len(content):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str((announced or len(content)) - first))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[first:end])
        self.wfile.flush()

    def log_message(self, *arguments):
        pass


def status(code, **headers):
    def fault(handler, content):
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return fault


def slow_first_byte(handler, content):
    time.sleep(1.5)


def stall(handler, content):
    handler.answer(content, end=len(content) // 2)
    time.sleep(1.5)


def reset(handler, content):
    handler.answer(content, end=len(content) // 2)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def shorter(handler, content):
    handler.answer(content, end=len(content) - 100)


def longer(handler, content):
    handler.answer(content + b"x" * 100)


def not_parquet(handler, content):
    handler.answer(b"x" * len(content))


def html(handler, content):
    handler.answer(b"<html>Please log in</html>", Content_Type="text/html")


def without_ranges(handler, content):
    handler.answer(content, resume=False)


def flipped(handler, content):
    handler.answer(
        bytes([content[0] ^ 0, *content[1:2000], content[2000] ^ 1, *content[2001:]]), X_Linked_ETag=etag(content)
    )


def etag(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'


def redirect(handler, content):
    """As Hugging Face does: the hash comes with the redirection."""
    status(302, Location="/elsewhere/shard_00000.parquet", X_Linked_ETag=etag(content))(handler, content)


@pytest.fixture
def hub(tmp_path, home, monkeypatch):
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub", "faults": [], "seen": []})
    handler.folder.mkdir()
    for shard in (0, prepare.VALIDATION_SHARD):
        write_parquet(handler.folder / f"shard_{shard:05}.parquet", stories(1000 * shard, 900))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", handler.url)
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(prepare, "DOWNLOAD_TIMEOUT", (1, 0.5))
    yield handler
    server.shutdown()


RECOVERS = {
    "500": [status(500), status(502), status(503)],
    "429": [status(429, Retry_After="1")],
    "slow first byte": [slow_first_byte],
    "stall": [stall],
    "reset": [reset, reset],
    "shorter": [shorter],
    "longer": [longer],
    "not parquet once": [not_parquet],
    "html once": [html],
    "redirect": [redirect],
    "no ranges": [shorter, without_ranges],
    "flipped bit": [flipped],
    "all kinds": [reset, stall, status(500)],
}


@pytest.mark.parametrize("fault", RECOVERS)
def test_a_download_recovers(hub, fault):
    hub.faults += RECOVERS[fault]
    prepare.main(ONE_SHARD)
    assert snapshot(prepare.HOME / "downloads" / "climbmix") == snapshot(hub.folder)
    asked = [(moment, part) for name, moment, part in hub.seen if name == "shard_00000.parquet"]
    assert len(asked) == len(RECOVERS[fault]) + (fault != "no ranges")
    if fault in ("stall", "reset", "shorter", "no ranges", "all kinds"):
        assert asked[1][1], "the second request goes on where the first ended"
    if fault == "429":
        assert asked[1][0] - asked[0][0] >= 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(403), "HTTP 403"),
        (status(404), "HTTP 404"),
        (status(500), "HTTP 500"),
        (html, "not a parquet file"),
        (not_parquet, "not a parquet file"),
        (flipped, "sha256"),
        (slow_first_byte, "timed out"),
    ],
)
def test_a_download_fails_by_name(hub, fault, message):
    hub.faults += [fault] * 9
    with pytest.raises(SystemExit, match=message) as stop:
        prepare.main(ONE_SHARD)
    assert "shard_00000.parquet" in str(stop.value) and len(str(stop.value).splitlines()) == 1
    assert not (prepare.HOME / "current").exists() and not list(prepare.HOME.glob("climbmix*"))


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "http://no-such-host.invalid", "not a URL"])
def test_an_unreachable_host(home, monkeypatch, host):
    monkeypatch.setenv("HF_ENDPOINT", host)
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0.01)
    with pytest.raises(SystemExit, match="could not download .*shard_.*HF_ENDPOINT"):
        prepare.main(ONE_SHARD)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on(hub, home, kind):
    """The first answer stalls in mid-file; there the process is stopped, and ends before the stall does."""
    stalled = threading.Event()
    hub.faults.append(lambda handler, content: (handler.answer(content, end=20_000), stalled.wait(60)))
    process = start("prepare.py", *ONE_SHARD, environment={"AUTORESEARCH_HOME": str(home)})
    part = home / "downloads" / "climbmix" / "shard_00000.parquet.part"
    for _ in range(300):
        if part.exists() and part.stat().st_size >= 16_000:
            break
        time.sleep(0.1)
    process.send_signal(kind)
    output, errors = process.communicate(timeout=50)
    assert process.returncode != 0 and not stalled.is_set() and not (home / "current").exists()
    if kind == signal.SIGINT:
        assert (process.returncode, errors) == (130, "") and "run this again" in output
    stalled.set()
    prepare.main(ONE_SHARD)
    assert snapshot(home / "downloads" / "climbmix") == snapshot(hub.folder)
    assert every_byte()


@pytest.mark.parametrize("moment", ["write_rows", "install"])
def test_an_interrupted_build(home, tmp_path, moment):
    """Killed when it starts to pack, or when all is packed."""
    code = "import os, prepare, sys\n"
    code += "setattr(prepare, sys.argv.pop(1), lambda *arguments: os.kill(os.getpid(), 9))\nprepare.main()"
    (tmp_path / "a.txt").write_text("".join(stories(0, 3000)))
    arguments = ["--text", str(tmp_path / "a.txt"), *TINY]
    process = start("-c", code, moment, *arguments, environment={"AUTORESEARCH_HOME": str(home)})
    assert process.wait(timeout=60) == -9
    process.communicate()
    assert not (home / "current").exists() and (home / ".building").exists()
    prepare.main(arguments)
    assert every_byte() and not (home / ".building").exists()


# --------------------------------------
# Disk


def full_disk(size):
    """The system refuses to write beyond so many bytes of a file."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_while_packing(home, tmp_path):
    (tmp_path / "a.txt").write_text("".join(stories(0, 9000)))
    arguments = ["--text", str(tmp_path / "a.txt"), *TINY]
    environment = {"AUTORESEARCH_HOME": str(home)}
    process = start("prepare.py", *arguments, environment=environment, preexec_fn=full_disk(100_000))
    output, errors = process.communicate()
    assert process.returncode == 1 and len(errors.splitlines()) == 1 and "fix it and run this again" in errors
    assert not (home / "current").exists()
    prepare.main(arguments)
    assert every_byte()


def test_a_full_disk_while_downloading(hub, home):
    environment = {"AUTORESEARCH_HOME": str(home)}
    process = start("prepare.py", *ONE_SHARD, environment=environment, preexec_fn=full_disk(30_000))
    output, errors = process.communicate()
    assert process.returncode == 1 and len(errors.splitlines()) == 1 and "fix it and run this again" in errors
    prepare.main(ONE_SHARD)
    assert snapshot(home / "downloads" / "climbmix") == snapshot(hub.folder)


SCORE = """
import prepare, sys, torch
benchmark = prepare.load_benchmark()
clock = prepare.TrainingClock(benchmark, "cpu")
clock.start(); clock.stop()
class Uniform(torch.nn.Embedding):
    def forward(self, inputs):
        return torch.zeros(*inputs.shape, 512)
print("score", prepare.evaluate_bpb(Uniform(512, 512), benchmark, 8, clock))
"""


@pytest.fixture
def disk(home):
    """`home` on a file system of its own; call it to mount that with other options. For root on Linux."""

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", home], capture_output=True)

    home.mkdir()
    if shutil.which("mount") is None or mount("size=64m").returncode:
        pytest.skip("may not mount a file system")
    yield lambda *options: mount("remount", *options)
    subprocess.run(["umount", "-l", home], check=True)


def refused(*command, home):
    """The one line in which a command fails."""
    process = start(*command, environment={"AUTORESEARCH_HOME": str(home)})
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and len(errors.splitlines()) == 1, errors
    return errors


def test_a_file_system_that_is_full(disk, home, tmp_path):
    (tmp_path / "a.txt").write_text("".join(stories(0, 9000)))
    arguments = ["--text", str(tmp_path / "a.txt"), *TINY]
    filler = home / "filler"
    filler.write_bytes(bytes(64 * 2**20 - 200_000))
    assert "No space left on device" in refused("prepare.py", *arguments, home=home)
    filler.unlink()
    prepare.main(arguments)
    assert every_byte()
    loaded = prepare.load_benchmark()

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    fill()
    assert "No space left on device" in refused("train.py", home=home)
    filler.unlink()
    clock = prepare.TrainingClock(loaded, "cpu")
    clock.start()
    clock.stop()
    fill()
    with pytest.raises(SystemExit, match=r"scored, val_bpb \d.*No space left.*fix it"):
        prepare.evaluate_bpb(uniform(loaded.vocab_size), loaded, 8, clock)
    filler.unlink()
    score(loaded, uniform(loaded.vocab_size))
    assert len(prepare.read_journal(loaded.path)) == 1


def test_a_home_that_is_read_only(benchmark, disk, home, tmp_path):
    shutil.copytree(benchmark.path, home / benchmark.id)
    (home / "current").write_text(benchmark.id)
    (tmp_path / "a.txt").write_text("".join(stories(0, 900)))
    disk("ro")
    assert "Read-only file system" in refused("train.py", home=home)
    assert "Read-only file system" in refused("prepare.py", "--text", str(tmp_path / "a.txt"), *TINY, home=home)
    disk("rw")
    score(prepare.load_benchmark(), uniform())


@pytest.mark.parametrize("journal_size", [0, 99_990])
def test_a_full_disk_while_recording(benchmark, home, journal_size):
    """The weights don't fit, or not even the line in the journal: the score is not lost without a word."""
    shutil.copytree(benchmark.path, home / benchmark.id)
    (home / "current").write_text(benchmark.id)
    (home / benchmark.id / "best.pt").unlink(missing_ok=True)
    (home / benchmark.id / "journal.jsonl").write_text("\n" * journal_size)
    process = start("-c", SCORE, environment={"AUTORESEARCH_HOME": str(home)}, preexec_fn=full_disk(100_000))
    output, errors = process.communicate()
    assert not list((home / benchmark.id).glob("best.*"))
    if journal_size:
        assert process.returncode == 1 and errors.startswith("scored, val_bpb ") and len(errors.splitlines()) == 1
    else:
        assert process.returncode == 0 and len(prepare.read_journal(home / benchmark.id)) == 1
        assert "best.pt was not saved" in output
    score(prepare.load_benchmark(), uniform())  # once there is space again, the next line stands by itself
    assert prepare.read_journal(home / benchmark.id)[-1]["val_bpb"] > 0


@pytest.mark.parametrize("name", sorted(prepare.FILES - {"train.npy"}))
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_any_damaged_artefact_is_found(benchmark, home, name, damage):
    shutil.copytree(benchmark.path, home / benchmark.id)
    (home / "current").write_text(benchmark.id)
    path = home / benchmark.id / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match=f"{name} .*run .*prepare.py.*fixes it"):
        prepare.load_benchmark()


# --------------------------------------
# Two at once


def test_two_prepare_the_same(home, tmp_path):
    (tmp_path / "a.txt").write_text("".join(stories(0, 3000)))
    arguments = ["--text", str(tmp_path / "a.txt"), *TINY]
    both = [start("prepare.py", *arguments, environment={"AUTORESEARCH_HOME": str(home)}) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("prepared in" in output for output in outputs) == 1
    assert len(list(home.glob("*/benchmark.json"))) == 1 and every_byte()


def test_prepare_while_a_training_runs(benchmark, home, tmp_path):
    """The run is scored on the benchmark that it began with, although another has become the current one."""
    shutil.copytree(benchmark.path, home / benchmark.id)
    (home / "current").write_text(benchmark.id)
    (tmp_path / "a.txt").write_text("".join(stories(0, 3000)))
    loaded = prepare.load_benchmark()
    clock = prepare.TrainingClock(loaded, "cpu")
    clock.start()
    prepare.main(["--text", str(tmp_path / "a.txt"), *TINY])
    clock.stop()
    assert prepare.load_benchmark().id != loaded.id
    prepare.evaluate_bpb(uniform(), loaded, 8, clock)
    assert prepare.read_journal(loaded.path)[-1]["benchmark"] == loaded.id


def test_two_devices_are_two_locks(benchmark):
    first = prepare.lock_device(torch.device("cpu"))
    second = prepare.lock_device(torch.device("mps"))
    with pytest.raises(SystemExit, match=f"pid {os.getpid()}"):
        prepare.lock_device(torch.device("cpu"))
    first.release()
    second.release()


def test_the_lock_of_a_killed_process_does_not_block(benchmark):
    code = "import prepare, os; c = prepare.TrainingClock(prepare.load_benchmark(), 'cpu'); os.kill(os.getpid(), 9)"
    process = start("-c", code)
    process.communicate()
    assert process.returncode == -9
    score(benchmark, uniform())


RECORD = """
import prepare, sys, types
benchmark = prepare.load_benchmark()
clock = types.SimpleNamespace(origin={"prepare_sha256": "", "commit": sys.argv[1] * 4000}, elapsed=1.0, rows=0,
                              slow_steps_percent=0.0, device=prepare.torch.device("cpu"))
for number in range(25):
    prepare.record_run(None, clock, benchmark, val_bpb=1000.0 + number)
"""


def test_lines_of_two_writers_stay_whole(benchmark, home):
    shutil.copytree(benchmark.path, home / benchmark.id)
    (home / "current").write_text(benchmark.id)
    (home / benchmark.id / "journal.jsonl").unlink(missing_ok=True)
    both = [start("-c", RECORD, name, environment={"AUTORESEARCH_HOME": str(home)}) for name in "ab"]
    assert [process.communicate()[1] for process in both] == ["", ""]
    runs = prepare.read_journal(home / benchmark.id)
    assert sorted(run["commit"][0] for run in runs) == ["a"] * 25 + ["b"] * 25
    assert all(set(run["commit"]) in ({"a"}, {"b"}) for run in runs)


# --------------------------------------
# Training


@pytest.mark.parametrize(
    ("kind", "spot"),
    [
        (signal.SIGINT, "rehearse(rows"),
        (signal.SIGTERM, "clock.start()"),
        (signal.SIGKILL, "evaluate_bpb(model"),
        (signal.SIGINT, "evaluate_bpb(model"),
    ],
)
def test_a_training_that_is_stopped(benchmark, tmp_path, kind, spot):
    """At any point: no row, no lock, nothing half-written; the next training runs."""
    script = with_line(tmp_path, spot, f"import signal; os.kill(os.getpid(), {int(kind)})")
    before = snapshot(benchmark.path)
    process = start(script, environment={"TORCHDYNAMO_DISABLE": "1"})
    output, errors = process.communicate(timeout=100)
    assert process.returncode in (-kind, 1, 130)
    assert snapshot(benchmark.path) == before
    score(benchmark, uniform())


def with_line(tmp_path, spot, line):
    """A train.py with one more line before the only one that has `spot` in it."""
    source = (ROOT / "train.py").read_text().splitlines(keepends=True)
    (index,) = [i for i, text in enumerate(source) if spot in text and not text.startswith("def ")]
    pad = source[index][: len(source[index]) - len(source[index].lstrip())]
    source.insert(index, f"{pad}{line}\n")
    (tmp_path / "train.py").write_text("".join(source))
    return str(tmp_path / "train.py")


def test_memory_runs_out_in_mid_run(benchmark, tmp_path):
    """The allocator's own error; the run is a crash that says so, and costs no other."""
    script = with_line(tmp_path, "loss = train_step(model", "step == 3 and torch.empty(1 << 50)")
    process = start(script, environment={"TORCHDYNAMO_DISABLE": "1"})
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "memory" in errors.splitlines()[-1]
    score(benchmark, uniform())


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_it_compiles(benchmark, tmp_path, kind):
    """The compiler's processes end too, and the next run finds no half-written cache."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train.py", environment=environment, start_new_session=True)
    for _ in range(600):
        if list((tmp_path / "cache").rglob("*.cpp")):
            break
        time.sleep(0.1)
    process.send_signal(kind)
    process.communicate()
    for _ in range(300):
        session = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        if not session.strip():
            break
        time.sleep(0.1)
    assert not session.strip()
    score(benchmark, uniform())


def test_a_home_that_cannot_be_written(benchmark, home):
    shutil.copytree(benchmark.path, home / benchmark.id)
    (home / "current").write_text(benchmark.id)
    (home / "locks").write_text("in the way")
    process = start("train.py", environment={"AUTORESEARCH_HOME": str(home)})
    output, errors = process.communicate()
    assert process.returncode == 1 and len(errors.splitlines()) == 1 and str(home) in errors


def test_without_a_compiler(benchmark, tmp_path):
    """No g++: one line, and the training goes on without torch.compile."""
    environment = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train.py", environment=environment)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count("COMPILE: torch.compile does not work here, going on without") == 1 and "\nval_bpb: " in output


def test_many_runs_leave_nothing_behind(benchmark):
    """50 runs in one process: no more open files, threads or memory than after the first few."""

    def resources():
        pages = int((prepare.Path("/proc/self/statm").read_text()).split()[1])
        return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * 4096 / 2**20

    before = len(prepare.read_journal(benchmark.path))
    for number in range(50):
        clock = prepare.TrainingClock(benchmark, "cpu")
        loader = prepare.make_dataloader(benchmark, "train", 8, "cpu")
        clock.start()
        next(loader)
        clock.stop()
        prepare.evaluate_bpb(uniform(), benchmark, 8, clock)
        if number == 9:
            early = resources()
    files, threads, memory = resources()
    assert files <= early[0] and threads <= early[1] and memory < early[2] + 50
    assert len(prepare.read_journal(benchmark.path)) == before + 50


@pytest.mark.long
def test_fifty_trainings_in_a_row(benchmark, home):
    """Real ones of 3 seconds: after the first, no file, process or lock is left but 49 more rows."""
    shutil.copytree(benchmark.path, home / benchmark.id, ignore=lambda *_: ["journal.jsonl", "best.pt"])
    (home / "current").write_text(benchmark.id)
    sizes = []
    for number in range(50):
        process = start("train.py", environment={"AUTORESEARCH_HOME": str(home)}, start_new_session=True)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        session = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        assert not session.strip()
        files = {path for path in home.rglob("*") if "compiled" not in path.parts}
        compiled = {path for path in home.rglob("compiled/**/*")}
        sizes.append((len(files), len(compiled), float(re.search(r"^peak_vram_mb: +(\S+)", output, re.M)[1])))
    assert {size[:2] for size in sizes[1:]} == {sizes[-1][:2]}
    assert max(memory for *_, memory in sizes[-10:]) < 1.1 * max(memory for *_, memory in sizes[1:11])
    runs = prepare.read_journal(home / benchmark.id)
    assert len(runs) == 50 and all(run["val_bpb"] < 5 for run in runs)


# --------------------------------------
# Bad input


def prepare_text(tmp_path, files, *arguments):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    prepare.main(["--text", str(folder), *TINY, *arguments])
    return prepare.load_benchmark(), json.loads((prepare.load_benchmark().path / "benchmark.json").read_text())[
        "counts"
    ]


PLENTY = {f"{i}.txt": "".join(stories(1000 * i, 400)) for i in range(12)}
ODD = {
    "NUL bytes": "a\0b\0" * 500,
    "emoji": "🦙👩‍🚀🏳️‍🌈" * 500,
    "right to left": "שלום עולם مرحبا بالعالم " * 200,
    "CJK": "日本語のテキスト中文文本한국어" * 200,
    "Windows line ends": "one\r\ntwo\r\n" * 300,
    "one long line": "word " * 300_000,
    "a million spaces": " " * 1_000_000,
    "special token": "<|reserved_0|> is plain text " * 100,
    "byte order mark": "\ufeffhello " * 100,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_text_is_taken_as_it_is(home, tmp_path, kind):
    benchmark, counts = prepare_text(tmp_path, {**PLENTY, "odd.txt": ODD[kind]}, "--val-rows", "3")
    assert counts["documents"] == 13 and not counts.get("skipped files")
    tokenizer = prepare.Tokenizer.load(benchmark.path)
    assert tokenizer.decode(tokenizer.encode(ODD[kind])) == ODD[kind]
    assert benchmark.token_bytes()[tokenizer.encode(ODD[kind])].sum() == len(ODD[kind].encode())


def test_what_cannot_be_read_is_skipped_and_counted(home, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    benchmark, counts = prepare_text(
        tmp_path, {**PLENTY, "latin.txt": b"caf\xe9 " * 90, "empty.txt": "", "same.txt": PLENTY["0.txt"]}
    )
    assert counts["skipped files"] == 1 and counts["duplicates"] == 1 and counts["documents"] == 12
    for link in ("a.txt", "deep"):
        (tmp_path / "text" / link).symlink_to(tmp_path / ("loop" if link == "a.txt" else "text"))
    prepare.main(["--text", str(tmp_path / "text"), *TINY])
    assert prepare.load_benchmark().id == benchmark.id  # links that lead nowhere, or back, add nothing


def test_one_document_of_one_line(home, tmp_path):
    """It is cut into blocks, of which some are scored."""
    benchmark, counts = prepare_text(tmp_path, {"book.txt": " ".join(story.strip() for story in stories(0, 9000))})
    assert counts["train_rows"] > 100 and counts["documents"] > 2


def test_very_many_tiny_documents(home, tmp_path):
    lines = "".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(50_000))
    benchmark, counts = prepare_text(tmp_path, {"tiny.jsonl": lines})
    assert counts["documents"] == 50_000


@pytest.mark.long
def test_a_million_tiny_documents(home, tmp_path):
    lines = "".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(1_000_000))
    benchmark, counts = prepare_text(tmp_path, {"tiny.jsonl": lines})
    assert counts["documents"] == 1_000_000


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


@pytest.mark.parametrize("line", ["{", '"text"', '{"words": "x"}', '{"text": 7}', '{"text": null}'])
def test_a_broken_line_is_named(home, tmp_path, line):
    lines = [json.dumps({"text": story}) for story in stories(0, 300)]
    lines[200] = line
    with pytest.raises(SystemExit, match=r"some.jsonl:201: not a JSON object with a string `text`"):
        prepare_text(tmp_path, {"some.jsonl": "\n".join(lines)})


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=30))
def test_every_byte_is_counted(texts):
    """Any text, tokenized and packed without loss: the bytes of all tokens are the bytes of the text."""
    encoder = trained_tokenizer()
    documents = [encoder.encode(text) for text in texts]
    rows = list(prepare.pack([documents], 8, encoder.bos_id, split=True))
    token_bytes = encoder.token_bytes()
    total = sum(len(text.encode()) for text in texts)
    assert sum(int(token_bytes[ids].sum()) for ids in documents) == total
    packed = int(token_bytes[np.array(rows)].sum()) if rows else 0
    assert total - 8 * int(token_bytes.max()) <= packed <= total  # only the last, incomplete row is lost


def trained_tokenizer(cache=[]):  # noqa: B006
    if not cache:
        cache.append(prepare.Tokenizer.train([stories(0, 500)], 300))
    return cache[0]


# --------------------------------------
# A benchmark from somebody else


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("weapon", ["pickle", "object array", "path", "current"])
def test_a_hostile_benchmark_executes_nothing(benchmark, home, tmp_path, monkeypatch, weapon):
    """Its hashes and its id are right: only what it holds is not."""
    monkeypatch.chdir(tmp_path)
    folder = home / "hostile"
    shutil.copytree(benchmark.path, folder)
    record = json.loads((folder / "benchmark.json").read_text())
    if weapon == "pickle":
        (folder / "train.npy").write_bytes(pickle.dumps(Bomb()))
    elif weapon == "object array":
        np.save(folder / "val.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    elif weapon == "path":
        (home / "secret.npy").write_bytes(b"x")
        record["files"]["../secret.npy"] = {}
    for name, file in record["files"].items():
        file["bytes"], file["sha256"] = (folder / name).stat().st_size, prepare.sha256(folder / name)
    record["id"] = prepare.benchmark_id(record)
    (folder / "benchmark.json").write_text(json.dumps(record))
    place = tmp_path if weapon == "current" else home
    folder.rename(place / record["id"])
    (home / "current").write_text("../" * (weapon == "current") + record["id"])
    with pytest.raises(SystemExit):
        prepare.load_benchmark()
    assert not (tmp_path / "exploded").exists()


def test_hostile_weights_execute_nothing(benchmark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "best.pt", weights_only=True)
    assert not (tmp_path / "exploded").exists()

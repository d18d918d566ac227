"""
What several test files use: benchmarks, texts, a server, a ledger, scripted agents. Everything runs in a home of its
own, without network; a small `local` benchmark serves all tests that need one.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants

ROOT = Path(__file__).parent.parent
OF_USER = ("AUTORESEARCH_", "HF_", "HUGGING_FACE_", "RAY_API_SERVER_ADDRESS", "TORCHINDUCTOR_")
for name in [name for name in os.environ if name.startswith(OF_USER)]:
    del os.environ[name]
os.environ["AUTORESEARCH_HOME"] = tempfile.mkdtemp(prefix="autoresearch-test-")  # of this worker of pytest-xdist
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where pytest's own folders stay
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="ar-")
os.environ["AUTORESEARCH_LOCKS"] = os.environ["TMPDIR"] + "/locks"
tempfile.tempdir = None  # so that it is read
os.environ["CLAUDE_CONFIG_DIR"] = os.environ["CODEX_HOME"] = os.environ["TMPDIR"] + "/clients"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that it starts: two workers share two cores
torch.set_num_threads(1)

import prepare  # noqa: E402
from harness import downloads  # noqa: E402

CPU = torch.device("cpu")
TEXT = [f"{sysconfig.get_path('stdlib')}/{package}" for package in ("asyncio", "email", "json", "unittest")]
SMALL = ["--seq-len", "64", "--vocab-size", "512", "--val-rows", "40", "--holdout-rows", "20", "--time-budget", "3"]
TINY = ["--seq-len", "32", "--vocab-size", "300", "--val-rows", "6", "--holdout-rows", "3", "--time-budget", "1"]
ONE_SHARD = ["--dataset", "climbmix", "--num-shards", "1", *TINY]


def run(*command, cwd=ROOT, **environment):
    """Run a Python file of this repository as a user would."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def start(*command, cwd=ROOT, environment=(), **options):
    """A Python file of this repository in a process of its own, in the home of this test."""
    environment = os.environ | {"AUTORESEARCH_HOME": str(prepare.HOME)} | dict(environment)
    options |= dict(cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored in background jobs
    return subprocess.Popen([sys.executable, *command], env=environment, **options)


def refused(function, *arguments):
    """The one line that ends a command."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert len(str(stop.value).splitlines()) == 1
    return str(stop.value)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_for(condition, seconds=300):
    """What the condition returns, as soon as that is true. A busy machine takes its time."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


def every_byte():
    """The record of the current benchmark, of which every byte is checked."""
    return prepare.read_record(prepare.load_benchmark().path, every_byte=True)


class Function(torch.nn.Module):
    """A model that is one function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def uniform(vocab_size=512):
    return Function(lambda inputs: torch.zeros(*inputs.shape, vocab_size))


def timed(benchmark, seconds=0.0):
    """The clock of a run that took so long."""
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    clock.started -= seconds
    clock.stop()
    return clock


def score(benchmark, model, batch_size=8):
    """Train for no time at all, and be scored."""
    return prepare.evaluate_bpb(model, benchmark, batch_size, timed(benchmark))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home of this test's own."""
    monkeypatch.setattr(prepare, "HOME", tmp_path / "home")
    return tmp_path / "home"


def add_benchmark(home, name):
    """What the ledger reads of a benchmark; nothing trains on it."""
    (home / name).mkdir(parents=True)
    (home / name / "benchmark.json").write_text('{"settings": {"time_budget": 3}}')
    (home / "current").write_text(name)


@pytest.fixture(scope="session")
def prepared():
    prepare.main(["--text", *TEXT, *SMALL])
    return (prepare.HOME / "current").read_text()


@pytest.fixture
def benchmark(prepared):
    (prepare.HOME / "current").write_text(prepared)
    return prepare.load_benchmark()


@pytest.fixture
def own(benchmark, home):
    """A copy of the benchmark, without runs, in a home of this test's own."""
    shutil.copytree(benchmark.path, home / benchmark.id, ignore=lambda *_: ["journal.jsonl", "best.pt"])
    (home / "current").write_text(benchmark.id)
    return prepare.load_benchmark()


# --------------------------------------
# Texts, and a server of them


def stories(start, count):
    line = "Story {0}: a {1}small tale of {2} words, told on day {3}.\n"
    return [line.format(i, "very " * (i % 7), i * i, i % 31) for i in range(start, start + count)]


@pytest.fixture
def book(tmp_path):
    """The arguments that prepare a tiny benchmark of one file."""
    (tmp_path / "a.txt").write_text("".join(stories(0, 4000)))
    return ["--text", str(tmp_path / "a.txt"), *TINY]


def parquet(texts, kind=None, row_group_size=200):
    """The bytes of a parquet file."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": pyarrow.array(texts, kind)})
    pyarrow.parquet.write_table(table, sink, row_group_size=row_group_size, compression="none")
    return sink.getvalue().to_pybytes()


def write_files(folder, files):
    """A folder of these files, {name: content}. Returns it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def story_numbers(benchmark, split):
    """Which stories are in the rows, by the numbers that are in there whole."""
    text = prepare.Tokenizer.load(benchmark.path).decode(np.array(benchmark.rows(split)).ravel())
    return {int(words.split(":")[0]) for words in text.split("Story ")[1:] if words.split(":")[0].isdecimal()}


SHARD, VALIDATION = "shard_00000.parquet", f"shard_{prepare.VALIDATION_SHARD:05}.parquet"


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `faults` are functions that spoil the next answers for SHARD."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.seen.append((name, self.headers.get("Range"), self.headers.get("Authorization")))
        if name not in self.files:
            self.send_error(404)
        elif self.faults and name == SHARD:
            self.faults.pop(0)(self, self.files[name])
        else:
            self.answer(self.files[name])

    def answer(self, content, code=None, end=None, resume=True, **headers):
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if resume else 0
        if first and first >= len(content):
            return self.send_error(416)
        self.send_response(code or (206 if first else 200))
        self.send_header("Content-Length", str(len(content) - first))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[first:end])
        self.wfile.flush()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving():
    """A server with a training shard and the one that is scored."""
    files = {SHARD: parquet(stories(0, 900)), VALIDATION: parquet(stories(10 * prepare.VALIDATION_SHARD, 900))}
    handler = type("Handler", (Mirror,), {"files": files, "faults": [], "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirror(home, tmp_path, monkeypatch):
    """A stand-in for huggingface.co, and nothing of the user's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", (1, 0.5))
    with serving() as handler:
        monkeypatch.setenv("HF_ENDPOINT", handler.url)
        yield handler


def pytest_collection_modifyitems(items):
    """The longest first: as the last ones they would run on one core, while the other waits."""
    items.sort(key=lambda item: item.get_closest_marker("story") is None)


# --------------------------------------
# Agents

WEAK = ("MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR")  # rates that the baseline of these tests has too low
UNHURRIED = [  # a busy machine is no failure: small steps, and half of the budget
    (r"^    while clock\.elapsed", "    while 2 * clock.elapsed"),
    (r"^( *TOTAL_BATCH_SIZE) = .*", r"\1 = 2**10"),
]


def replace(path, *edits):
    """Edit a file by regular expressions, each of which must match."""
    source = path.read_text()
    for old, new in edits:
        source, count = re.subn(old, new, source, flags=re.M)
        assert count, f"nothing to edit: {old}"
    path.write_text(source)


def weaken(folder):
    """Leave room for a gain in the train.py of a folder, and let no run count as disturbed."""
    replace(folder / "train.py", *((rf"^({name} +)= ", r"\1= 1e-6 * ") for name in WEAK), *UNHURRIED)
    replace(folder / "harness" / "journal.py", ("^SLOW_FLAG = .*", "SLOW_FLAG = 101"))
    replace(folder / "night" / "ends.py", ("^(SLOW_RUN|SLOW_MACHINE) = .*", r"\1 = 0"))


def ask_no_torch(folder, device):
    """Let `start` in this folder take a device without asking torch, which takes seconds."""
    answer = json.dumps([device, "cpu", None])
    code = f'ASK_DEVICE = """print({answer!r})"""'
    replace(folder / "night" / "checks.py", (r'(?s)^ASK_DEVICE = """.*?"""', code))


class Agent:
    """Somebody at work in a repository."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment

    def start_line(self, line):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(["bash", "-c", line], cwd=self.folder, env=self.environment, **options)

    def bash(self, line):
        """What a line prints, and its exit code."""
        process = self.start_line(line)
        return process.communicate()[0], process.returncode

    def run(self, *command):
        return run(*command, cwd=self.folder, **self.environment)

    def python(self, *command, code=0):
        """What one of our programs prints. It ends with this code, and without a traceback."""
        process = self.run(*command)
        output = process.stdout + process.stderr
        assert process.returncode == code and "Traceback" not in output, output
        return output

    def ledger(self, *words, code=0):
        return self.python("ledger.py", *words, code=code)

    def night(self):
        return json.loads(self.run("ledger.py", "--json").stdout)

    def git(self, *words, **options):
        return subprocess.check_output(["git", *words], cwd=self.folder, env=self.environment, text=True, **options)

    def head(self):
        return self.git("rev-parse", "--short=7", "HEAD").strip()

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()]

    def edit(self, *edits, file="train.py"):
        replace(self.folder / file, *edits)


@pytest.fixture
def environment(tmp_path):
    """For an agent: git without the user's configuration, and a stand-in for `uv run` that installs nothing."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "uv").write_text(
        f"""#!/bin/sh
shift
[ "$1" = --group ] && shift 2
case $1 in
  *.py) exec {sys.executable} "$@" ;;
  *) exec {Path(sys.executable).parent}/"$@" ;;
esac
"""
    )
    (tools / "uv").chmod(0o755)
    (tmp_path / "gitconfig").write_text("[user]\nname = Agent\nemail = agent@example.org\n")
    return os.environ | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TORCHDYNAMO_DISABLE": "1",
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        "GIT_CONFIG_NOSYSTEM": "1",
    }


def copy_harness(folder):
    """What train.py and analysis.ipynb import."""
    for name in ("prepare.py", "ledger.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("harness", "night", "swarm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def new_repository(folder, environment):
    """A repository of its own with what a clone has; returns its folder."""
    folder.mkdir()
    for name in ("train.py", "program.md", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    copy_harness(folder)
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return folder


# --------------------------------------
# Trainings that are scripts

# What the harness would have seen of one
LINE = {"time": "2026-11-28T01:00:00+00:00", "dirty": False, "steps": 100, "tokens": 6400, "training_seconds": 3.0}
LINE |= {"peak_memory_mb": 2048.0, "slow_steps_percent": 0.0, "product_ms": 1.0, "holdout_bpb": 1.5}
LINE |= {"device": prepare.device_name(CPU)}

# It goes on as soon as there is no file `hold`; line.json changes what was seen
TRAIN = f"""
import json, os, time
from pathlib import Path

SCORE = 1.0
home = Path(os.environ["AUTORESEARCH_HOME"])
while (home / "hold").exists():
    time.sleep(0.05)
line = {LINE} | {{"val_bpb": SCORE, "folder": os.getcwd()}}
if (home / "line.json").exists():
    line |= json.loads((home / "line.json").read_text())
line |= {{"run": os.environ["AUTORESEARCH_RUN"], "commit": os.environ["AUTORESEARCH_COMMIT"]}}
line["seed"] = int(os.environ["AUTORESEARCH_SEED"])
with open(home / os.environ["AUTORESEARCH_BENCHMARK"] / "journal.jsonl", "a") as journal:
    journal.write(json.dumps(line) + "\\n")
"""

# --------------------------------------
# Clusters

# Of a `uv` that makes one environment, slowly; another one fails beside it and after it
SYNC = f"""#!/bin/sh
if [ "$1" = sync ]; then
  mkdir "$UV_PROJECT_ENVIRONMENT" "$UV_PROJECT_ENVIRONMENT/bin" && sleep 1
  printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > "$UV_PROJECT_ENVIRONMENT/bin/python"
  exec chmod +x "$UV_PROJECT_ENVIRONMENT/bin/python"
fi
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("", 0))
        return [listener.getsockname()[1] for listener in sockets]


class Ray:
    """Nodes on this machine, each with a home and locks of its own, as machines have."""

    def __init__(self, environment):
        self.environment = environment
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short paths
        self.port, self.dashboard = free_ports(2)
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.nodes = []
        (self.folder / "started").mkdir()
        (self.folder / "started" / "run").write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")

    def start(self, *words, home, cpus=1):
        (self.folder / home).mkdir(exist_ok=True)
        # Ray looks for `uv run` above itself, to start its workers the same way
        command = ["uv", "run", Path(sys.executable).with_name("ray"), "start", "--block", *words]
        command += ["--disable-usage-stats", f"--num-cpus={cpus}"]
        command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
        environment = self.environment | {"AUTORESEARCH_HOME": str(self.folder / home)}
        environment |= {"RAY_health_check_period_ms": "500"}  # so that a node that is gone is missed after 3 s, not 15
        environment.pop("RAY_API_SERVER_ADDRESS", None)
        with open(self.folder / f"{home}.log", "w") as log:
            options = dict(cwd=self.folder / "started", env=environment, stdout=log, stderr=log, start_new_session=True)
            self.nodes.append(subprocess.Popen(command, executable=sys.executable, **options))
        wait_for(lambda: "Ray runtime started" in (self.folder / f"{home}.log").read_text())
        return self.nodes[-1]

    def head(self, home, cpus=1):
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1"]
        ports += [f"--ray-client-server-port={free_ports(1)[0]}", f"--temp-dir={self.folder / 'ray'}"]
        return self.start("--head", *ports, home=home, cpus=cpus)

    def kill(self, node):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.fixture
def ray(environment):
    """A cluster, which this environment names from now on."""
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    ray = Ray(environment)
    environment["RAY_API_SERVER_ADDRESS"] = ray.address
    yield ray
    for node in ray.nodes:
        ray.kill(node)
    shutil.rmtree(ray.folder)

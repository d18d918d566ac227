"""Everything runs in a home of its own, without network; a small `local` benchmark serves all tests that need one."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ["AUTORESEARCH_HOME"] = tempfile.mkdtemp(prefix="autoresearch-test-")
for name in ("AUTORESEARCH_SEED", "HF_ENDPOINT"):
    os.environ.pop(name, None)

import prepare  # noqa: E402

CPU = torch.device("cpu")
STDLIB = Path(sysconfig.get_path("stdlib"))
TEXT = [str(STDLIB / package) for package in ("asyncio", "email", "json", "unittest")]
SMALL = ["--seq-len", "64", "--vocab-size", "512", "--val-rows", "40", "--holdout-rows", "20", "--time-budget", "3"]


def run(*command, cwd=ROOT, **environment):
    """Run a Python file of this repository as a user would."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


class Function(torch.nn.Module):
    """A model that is one function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def uniform(vocab_size=512):
    return Function(lambda inputs: torch.zeros(*inputs.shape, vocab_size))


def score(benchmark, model, batch_size=8):
    """Train for no time at all, and be scored."""
    clock = prepare.TrainingClock(benchmark, "cpu")
    clock.start()
    clock.stop()
    return prepare.evaluate_bpb(model, benchmark, batch_size, clock)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home of this test's own."""
    monkeypatch.setattr(prepare, "HOME", tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def prepared():
    prepare.main(["--text", *TEXT, *SMALL])
    return (prepare.HOME / "current").read_text()


@pytest.fixture
def benchmark(prepared):
    (prepare.HOME / "current").write_text(prepared)
    return prepare.load_benchmark()


def shell_blocks(document, names):
    """The ```sh blocks of a document at the root, by the names that a test gives them, in order."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", (ROOT / document).read_text(), re.M | re.S)
    assert len(blocks) == len(names), f"{document}: a shell block without a test"
    return dict(zip(names, map(textwrap.dedent, blocks)))


class Agent:
    """Runs the shell blocks of documents in its repository, as they stand, with their <words> filled in."""

    def __init__(self, folder, environment, lines):
        self.folder = folder
        self.environment = environment
        self.lines = lines

    def sh(self, name, /, check=True, **words):
        """Run one block; returns what it prints."""
        process = self.start(name, **words)
        output = process.communicate()[0]
        assert process.returncode == 0 or not check, output
        return output

    def start(self, name, /, **words):
        line = self.lines[name]
        for word, value in words.items():
            assert f"<{word}>" in line
            line = line.replace(f"<{word}>", str(value))
        assert not re.search(r"<\w+>", line), f"{name}: not all words are filled in"
        return subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command):
        return run(*command, cwd=self.folder, **self.environment)

    def git(self, *words):
        command = ["git", *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, check=True, capture_output=True, text=True
        ).stdout

    def head(self):
        return self.git("rev-parse", "--short=7", "HEAD").strip()

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()]

    def edit(self, *edits, file="train.py"):
        source = (self.folder / file).read_text()
        for old, new in edits:
            source, count = re.subn(old, new, source, flags=re.M)
            assert count, f"nothing to edit: {old}"
        (self.folder / file).write_text(source)


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
        "PATH": f"{tools}:{os.environ['PATH']}",
        "TORCHDYNAMO_DISABLE": "1",
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        "GIT_CONFIG_NOSYSTEM": "1",
    }


def new_repository(folder, environment):
    """A repository of its own with what a clone has; returns its folder."""
    folder.mkdir()
    for name in ("prepare.py", "train.py", "program.md", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return folder

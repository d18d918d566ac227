"""Everything runs in a home of its own, without network; a small `local` benchmark serves all tests that need one."""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ["AUTORESEARCH_HOME"] = tempfile.mkdtemp(prefix="autoresearch-test-")
for name in ("AUTORESEARCH_SEED", "HF_ENDPOINT"):
    os.environ.pop(name, None)

import prepare  # noqa: E402

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXT = [str(STDLIB / package) for package in ("asyncio", "email", "json", "unittest")]
SMALL = ["--seq-len", "64", "--vocab-size", "512", "--val-rows", "40", "--holdout-rows", "20", "--time-budget", "3"]


def run(*command, cwd=ROOT, **environment):
    """Run a Python file of this repository as a user would."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


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

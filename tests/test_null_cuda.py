"""
The GPU configuration of train.py, from start to score, on cards that aren't there (tools/null_cuda.py): what fits in
their memory, and which tensor is on the wrong device or has the wrong type. Compiled, with `-m long`, it takes minutes.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXT, copy_harness

import prepare
from tools.null_cuda import CARDS, build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc") or not torch.version.cuda,
    reason="needs Linux, gcc and the torch wheel with CUDA",
)
SHAPE = ["--seq-len", "2048", "--vocab-size", "8192", "--val-rows", "16", "--holdout-rows", "4", "--time-budget", "2"]
DRIVER = """
import os, train
from tools.null_cuda import forgive_values
forgive_values()
train.COMPILE = bool(os.environ.get("COMPILED"))
train.main()
"""


@pytest.fixture(scope="module")
def shaped(prepared):
    """A benchmark of the shape of climbmix."""
    prepare.main(["--text", *TEXT, *SHAPE])
    return (prepare.HOME / "current").read_text()


@pytest.fixture
def train(shaped, tmp_path):
    """Run train.py, with edits, on a card; returns the process and what the summary says."""
    (prepare.HOME / "current").write_text(shaped)
    copy_harness(tmp_path)
    shutil.copy(ROOT / "train.py", tmp_path)

    def go(card, file="train.py", old="", new="", **environment):
        source = (tmp_path / file).read_text()
        assert not old or source.count(old) == 1, f"{source.count(old)} times: {old}"
        (tmp_path / file).write_text(source.replace(old, new))
        environment = prepare.os.environ | build(tmp_path, card) | {"PYTHONPATH": str(ROOT)} | environment
        process = subprocess.run(
            [sys.executable, "-c", DRIVER], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return process, dict(re.findall(r"^(\w+): +(.*)$", process.stdout.rpartition("\n---\n")[2], re.M))

    return go


QUICK = ("H100",)  # the others, and all compiled ones, with `-m long`
ROWS = {"H100": (64, 128), "A100": (64, 128), "B200": (128, 128), "RTX 4090": (16, 16), "RTX 3060": (4, 4)}


@pytest.mark.parametrize(
    "card, compiled",
    [
        pytest.param(card, compiled, marks=() if card in QUICK and not compiled else pytest.mark.long)
        for card in CARDS
        for compiled in (False, True)
    ],
)
def test_a_run_fits(train, card, compiled):
    """Eagerly, or with every kernel compiled for the architecture, without a graph break, in 72 GiB."""
    process, summary = train(card, **({"COMPILED": "1"} if compiled else {}))
    assert process.returncode == 0 and "COMPILE:" not in process.stdout, process.stdout + process.stderr
    name, _, memory, _ = CARDS[card]
    assert summary["device"] == name and summary["attention"] == "varlen" and summary["compiled"] == str(compiled)
    rows = int(summary["batch"].split(" x ")[1].split()[0])
    print(f"{card}: {rows} rows, {float(summary['peak_vram_mb']) / 1024:.1f} GiB")
    assert not compiled or float(summary["peak_vram_mb"]) < 72 * 1024
    assert rows == ROWS[card][compiled] and float(summary["peak_vram_mb"]) * 2**20 < memory - 600 * 2**20


BUGS = {
    "cu_seqlens on the CPU": ("harness/runtime.py", "T, dtype=torch.int32, device=q.device)", "T, dtype=torch.int32)"),
    "cu_seqlens in int64": ("harness/runtime.py", "T, dtype=torch.int32, device=q.device)", "T, device=q.device)"),
    "rotary in float32": ("train.py", "angles.cos().to(setup.dtype)", "angles.cos()"),
    "rotary on the CPU": (
        "train.py",
        "inputs, cos_sin)\n        return self.head",
        "inputs, [x.cpu() for x in cos_sin])\n        return self.head",
    ),
    "targets on the CPU": (
        "train.py",
        "torch.arange(logits.size(-1), device=x.device)",
        "torch.arange(logits.size(-1))",
    ),
    "a mask on the CPU": (
        "train.py",
        "smear(norm(x), self.smear_gates[1])",
        "smear(norm(x), self.smear_gates[1].cpu())",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS)
def test_the_null_gpu_sees_a_bug(train, bug):
    """A test of the tests above."""
    process, summary = train("H100", *BUGS[bug])
    assert process.returncode == 1 and "val_bpb" not in summary and "Error" in process.stderr

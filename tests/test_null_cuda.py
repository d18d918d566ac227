"""
Checks that the GPU configuration of train.py gets from start to score on cards that aren't there (null_cuda.py): it
fits in their memory, and each tensor is on the right device and of the right type. Compiled, with `-m long`, it takes
minutes.
"""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TEXT, copy_harness, replace, run
from null_cuda import CARDS, build

import prepare

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc") or not torch.version.cuda,
    reason="needs Linux, gcc and the torch wheel with CUDA",
)
CLIMBMIX = ["--seq-len", "2048", "--vocab-size", "8192", "--val-rows", "16", "--holdout-rows", "4"]
DRIVER = """
import os, train
from null_cuda import forgive_values
forgive_values()
train.COMPILE = os.environ["COMPILED"] == "1"
train.main()
"""


@pytest.fixture(scope="module")
def climbmix(prepared):
    prepare.main(["--text", *TEXT, *CLIMBMIX, "--time-budget", "2"])
    return (prepare.HOME / "current").read_text()


@pytest.fixture
def card_folder(climbmix, tmp_path):
    (prepare.HOME / "current").write_text(climbmix)
    copy_harness(tmp_path)
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


def run_on(card, card_folder, compiled=False):
    environment = build(card_folder, card) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "COMPILED": str(int(compiled))}
    return run("-c", DRIVER, cwd=card_folder, **environment)


ROWS = {"H100": (64, 128), "A100": (64, 128), "B200": (128, 128), "RTX 4090": (16, 16), "RTX 3060": (4, 4)}
RUNS = [pytest.param(card, compiled, marks=pytest.mark.long) for card in CARDS for compiled in (False, True)]
RUNS[0] = ("H100", False)  # the quick one


@pytest.mark.parametrize(("card", "compiled"), RUNS)
def test_a_run_fits(card_folder, card, compiled):
    """Eagerly, or with every kernel compiled for the architecture, without a graph break, in 72 GiB."""
    process = run_on(card, card_folder, compiled)
    assert process.returncode == 0 and "COMPILE:" not in process.stdout, process.stdout + process.stderr
    summary = dict(re.findall(r"^(\w+): +(.*)$", process.stdout.rpartition("\n---\n")[2], re.M))
    name, _, memory, _ = CARDS[card]
    assert (summary["device"], summary["attention"], summary["compiled"]) == (name, "varlen", str(compiled))
    rows, peak = int(summary["batch"].split(" x ")[1].split()[0]), float(summary["peak_vram_mb"]) / 1024
    print(f"{card}: {rows} rows, {peak:.1f} GiB")
    assert rows == ROWS[card][compiled] and peak < memory / 2**30 - 0.6
    assert not compiled or peak < 72


BUGS = {
    "ends of rows on the CPU": ("harness/runtime.py", r"(dtype=torch\.int32), device=q\.device", r"\1"),
    "ends of rows in int64": ("harness/runtime.py", r"dtype=torch\.int32, ", ""),
    "rotary in float32": ("train.py", r"angles\.cos\(\)\.to\(setup\.dtype\)", "angles.cos()"),
    "rotary on the CPU": ("train.py", r"(self\.cos\[[^]]*\]), self", r"\1.cpu(), self"),
    "targets on the CPU": ("train.py", r"(logits\.size\(-1\)), device=x\.device", r"\1"),
    "a mask on the CPU": ("train.py", r"(self\.smear_gates\[1\])", r"\1.cpu()"),
}


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS)
def test_the_null_gpu_sees_a_bug(card_folder, bug):
    """A test of the tests above."""
    file, *edit = BUGS[bug]
    replace(card_folder / file, edit)
    process = run_on("H100", card_folder)
    assert process.returncode == 1 and "val_bpb" not in process.stdout and "Error" in process.stderr


@pytest.mark.long
def test_the_first_hour(card_folder):
    """tools/gpu.py to its end: train.py is refused for its values, a file that forgives them is scored."""
    path = card_folder / "forgiving.py"
    path.write_text("from null_cuda import forgive_values\nforgive_values()\n" + (ROOT / "train.py").read_text())
    environment = build(card_folder) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = run("tools/gpu.py", str(path), "--seconds=2", "--seeds=1", f"--out={card_folder}", **environment)
    results = [json.loads(line) for line in (card_folder / "gpu.jsonl").read_text().splitlines()]
    assert [result["name"] for result in results] == ["train.py", "train.py", str(path)], process.stderr
    assert "not finite" in results[0]["error"][0] and float(results[2]["val_bpb"]) > 0

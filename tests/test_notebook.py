"""
Defects of analysis.ipynb: a ledger that it cannot show, a gain or verdict that is wrong, a disagreement of ledger and
journal that it misses, a picture that cannot be read. Its cells run in this process, and once as a notebook.
"""

import json
import math
import re
import shutil
import subprocess

import matplotlib
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from conftest import CPU, HEADER, NIGHT, ROOT, copy_harness, journal_of
from matplotlib.backends.backend_agg import FigureCanvasAgg

import prepare
import train
from harness import journal, runtime
from swarm import notes

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
CODE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")
BENCHMARK = journal_of(NIGHT)[0]["benchmark"]


@pytest.fixture
def cells(home, tmp_path, monkeypatch, capsys):
    """Run all code cells in a folder with this ledger and journal; returns their variables and what they print."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "ROOT", tmp_path)  # whose folder is asked for commits ...
    monkeypatch.setattr(notes, "ROOT", tmp_path)  # ... and for notes

    def run(ledger=None, journal=()):
        if ledger is not None:
            (tmp_path / "results.tsv").write_text(ledger)
        if journal:
            (home / BENCHMARK).mkdir(parents=True)
            (home / BENCHMARK / "journal.jsonl").write_text("".join(json.dumps(run) + "\n" for run in journal))
        namespace = {}
        exec(CODE, namespace)
        assert (tmp_path / "progress.png").stat().st_size > 1000
        matplotlib.pyplot.close("all")
        return namespace, capsys.readouterr().out

    return run


FINALS = """aaaaaaa\t1.001\t1.0\tkeep\tbaseline, seed 1
aaaaaaa\t1.000\t1.0\tkeep\tbaseline, final, seed 4
eeeeeee\t0.990\t1.0\tkeep\tlast keep, final, seed 4
aaaaaaa\t1.010\t1.0\tkeep\tbaseline, final, seed 5
eeeeeee\t0.980\t1.0\tkeep\tlast keep, final, seed 5
"""


def test_an_honest_night(cells, tmp_path):
    (tmp_path / "run.log").write_text("COMPILE: torch.compile does not work\n---\n")
    found, text = cells(NIGHT + FINALS, journal_of(NIGHT + FINALS, row4={"slow_steps_percent": 30.0}))
    kept = found["kept"]
    assert list(kept.index) == ["aaaaaaa", "bbbbbbb", "eeeeeee"]
    assert list(kept["row"]) == [0, 3, 7], "the last runs leave the picture as it was"
    assert list(kept["val_bpb"]) == pytest.approx([1.00025, 0.99, 0.988])
    assert list(kept["gain"])[1:] == pytest.approx([0.01025, 0.002])
    assert list(kept["verdict"]) == ["", "clears the noise", "within the noise"]
    assert len(found["matched"]) == 12 and found["unlisted"] == []
    for words in (
        "13 runs: 10 keep, 2 discard, 1 crash",
        "ideas after the baseline: 4, kept: 2, keep rate 50%",
        "30.0 experiments per hour",
        "a typo",
        "no samples: there is no best.pt to load",
        "baseline 1.000250, noise floor 0.002958\n",
        "Validation gained 0.020000, the holdout 0.020000: the gain is real.\n",
        "Drift: the baseline, run again, -0.001000 with the same seed.",
        "Fresh seeds: 0.010000 and 0.030000, on the holdout 0.010000 and 0.030000\n",
        "1 disturbed runs (slow steps): bbbbbbb\n",
        "Last run: COMPILE: torch",
    ):
        assert words in text


AWKWARD = {  # rows, scores, what is printed
    "missing file": (None, [], "results.tsv is missing"),
    "only crashes": (["aaaaaaa 0 0 crash x"], [], "1 runs: 1 crash"),
    "crashed first": (["aaaaaaa 0 0 crash x", "bbbbbbb 1.5 1 keep y"], [1.5], "baseline 1.500000"),
    "noise unknown": (["aaaaaaa 1.5 1 keep x", "bbbbbbb 1.4 1 keep y"], [1.5, 1.4], "noise floor unknown"),
    "dollars": (["aaaaaaa 1.5 1 keep costs $5 \\frac $x^"], [1.5], "costs $5"),
    "not a row": (["aaaaaaa 1.5 1 keep x", "no"], [1.5], "results.tsv:3: not a row, fix or delete it: no\n"),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_ledgers_are_shown(cells, name):
    rows, scores, words = AWKWARD[name]
    found, text = cells(rows and HEADER + "\n".join(rows))
    assert list(found["scored"]["val_bpb"]) == scores and words in text
    assert math.isnan(found["noise"]) and not any(found["kept"]["verdict"])
    assert found["conclusion"].startswith("Nothing can be said")


def test_labels_do_not_collide(cells):
    """Of 30 keeps side by side, some with equal scores, in a long night; all of the list is in the picture."""
    rows = [f"aaaaaaa\t1.0\t1\tkeep\tbaseline, seed {seed}\n" for seed in (1, 2, 3)]
    for i in range(1, 31):  # each has two runs, and its number belongs between them
        rows += [f"{i:07}\t{1 - i // 3 * 0.001 + more}\t1\tkeep\t{'a long story ' * 9}\n" for more in (0, 0.0006)]
    rows += [f"{i:07}\t1.0\t1\tdiscard\tx\n" for i in range(31, 200)]
    figure = cells(HEADER + "".join(rows))[0]["figure"]
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0].get_window_extent(renderer)
    numbers = [text for text in figure.axes[0].texts if text.get_text().isdigit()]
    assert [int(text.get_text()) for text in numbers] == list(range(1, 32))
    boxes = [text.get_window_extent(renderer) for text in numbers]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    dots = np.concatenate([runs.get_offsets() for runs in figure.axes[0].collections])
    places = figure.axes[0].transData.transform(dots)
    assert len(dots) == 232 and not any(box.contains(x, y) for box in boxes for x, y in places)
    (descriptions,) = figure.texts
    assert descriptions.get_text().count("a long story") == 9 * 30, "none is cut"
    box = descriptions.get_window_extent(renderer)
    assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 < axes.y0
    assert axes.width > 0.9 * figure.bbox.width, "nothing beside it is white"


def test_the_audit_finds_what_does_not_agree(cells):
    bug = "fffffff\t0.800000\t1.0\tkeep\ta bug\n"
    flagged = {"same_harness": False, "dirty": True, "seed": 7, "scored_rows_read": 64, "untimed_rows": 8, "gpus": 2}
    changes = {"row2": flagged, "row4": {"val_bpb": 0.991}, "row5": {"commit": "9" * 40}}
    journal = journal_of(NIGHT + bug, row8={"device": "another"}, **changes)
    journal += [{**journal[0], "val_bpb": score} for score in (2.0, 2.1, 2.2)]
    found, text = cells(NIGHT + "eeeeeee\t0.987000\t1.0\tkeep\tonce more\n" + bug, journal)
    assert found["findings"] == [
        (1, "aaaaaaa", "read 8 training rows outside of the timed part"),
        (1, "aaaaaaa", "read scored rows (validation or holdout): 64"),
        (1, "aaaaaaa", "seed 7, which program.md does not name"),
        (1, "aaaaaaa", "the harness was not the one that prepared the benchmark"),
        (1, "aaaaaaa", "uncommitted changes, .py files that git does not know, or no git at all"),
        (1, "aaaaaaa", "used 2 GPUs"),
        (3, "bbbbbbb", "the ledger says 0.990000, its run scored 0.991000"),
        (4, "ccccccc", "no run of this commit in the journal of this machine"),
        (8, "eeeeeee", "a second row for one and the same run"),
        (2, "aaaaaaa", "its commit has 3 more runs, which have no row"),
        (9, "fffffff", "a gain of 19.0% in one step: look for a bug, run it again"),
    ]
    assert "device: another, cpu  <- several: their scores do not compare" in text
    assert "; 4 runs have no row" in text  # these three and bbbbbbb's own
    assert found["conclusion"].startswith("11 findings")


@pytest.mark.parametrize(
    ("score", "holdout", "words"),
    [
        ("0.987000", -0.003, "only part of the gain carries over to other text."),
        ("0.987000", +0.010, "the gain does not carry over to other text."),
        ("0.998000", -0.002, "all of it is within the noise; more"),
    ],
)
def test_verdict(cells, score, holdout, words):
    """The score of the last run against 1.0 at the start, the holdout of the last two against 1.1."""
    ledger = NIGHT.replace("0.987000", score)
    changes = {f"row{row}": {"holdout_bpb": 1.1} for row in (1, 2, 3)}
    changes |= {f"row{row}": {"holdout_bpb": 1.1 + holdout} for row in (7, 8)}
    conclusion = cells(ledger, journal_of(ledger, **changes))[0]["conclusion"]
    gains = f"Validation gained {1 - float(score):.6f}, the holdout {-holdout:.6f}"
    assert conclusion.startswith(f"Ledger and journal agree. {gains}: {words}")


# --------------------------------------
# What git has: the train.py of best.pt, and the notes of a hub


@pytest.fixture
def git(tmp_path):
    """Git in a new repository there."""

    def run(*words):
        command = ["git", "-c", "user.name=Agent", "-c", "user.email=agent@example.org", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    run("init", "-q")
    return run


@pytest.fixture
def trained(own, tmp_path, git):
    """A ledger whose commit has its weights in best.pt; returns the folder of that."""
    shutil.copy(ROOT / "train.py", tmp_path)
    git("add", "train.py")
    git("commit", "-qm", "start")
    commit = git("rev-parse", "HEAD")
    weights = train.build_model(own, runtime.Setup(CPU, torch.float32, train.banded)).state_dict()
    torch.save({"commit": commit, "val_bpb": 2.5, "model": weights}, own.path / "best.pt")
    ledger = f"{HEADER}{commit[:7]}\t2.500000\t1.0\tkeep\tbaseline\n"
    run = journal_of(ledger)[0] | {"commit": commit, "benchmark": own.id}
    (own.path / "journal.jsonl").write_text(json.dumps(run) + "\n")
    (tmp_path / "results.tsv").write_text(ledger)
    return own.path


def test_a_model_that_no_longer_fits_is_said_to(trained, cells):
    best = torch.load(trained / "best.pt", weights_only=True)
    best["model"]["new.weight"] = torch.zeros(2)
    for content, words in (
        (best, r"the train.py of commit \w{7} no longer fits: .*new.weight"),
        (best | {"commit": "0" * 40}, "the train.py of best.pt is not in this repository"),
        (best | {"model": prepare.Path()}, "there is no best.pt to load"),  # objects, which could execute anything
    ):
        torch.save(content, trained / "best.pt")
        assert re.search(f"no samples: {words}", cells()[1], re.S)


def test_headless(trained, tmp_path, monkeypatch):
    """As nbclient runs it, in a kernel, from a notebook without outputs; the best model speaks."""
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(prepare.HOME))
    copy_harness(tmp_path)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "1 runs: 1 keep" in printed
    assert printed.count("----- prompt:") == 4 and "----- prompt: 'def main():\\n'" in printed


AGENTS = """ada aaaaaaa keep 1.0 cpu
bob aaaaaaa keep 1.1 cpu
ada bbbbbbb keep 0.9 cpu
bob ccccccc discard 0.5 cpu
bob ddddddd crash 0 cpu
bob bbbbbbb discard 0.94 cpu
bob eeeeeee keep 0.91 cpu
eve fffffff keep 0.1 H100"""


def publish(git, results):
    """The notes of a hub: lines of agent, train.py, status, val_bpb, device; a minute each."""
    lines = ["looks good to me"]  # no result, so it is left out
    for row, result in enumerate(results.splitlines(), 1):
        agent, train_py, status, score, device = result.split()
        line = {"time": f"2026-11-01T00:{row:02}:00+00:00", "agent": f"test/{agent}", "row": row, "parent": "0000000"}
        line |= {"benchmark": "local-1", "device": device, "commit": train_py + 5 * "0", "train": train_py}
        line |= {"val_bpb": float(score) or None, "memory_gb": 1.0, "status": status, "description": "a = b"}
        lines.append(json.dumps(line))
    git("commit", "-q", "--allow-empty", "-m", "start")
    git("notes", "--ref=results", "add", "-m", "\n\n".join(lines))


def test_several_agents(cells, tmp_path, git):
    publish(git, AGENTS)
    found, text = cells(NIGHT)
    shared = found["best_so_far"](found["comparable"])
    assert list(shared["best"]) == pytest.approx([1.05, 0.92, 0.91])  # 0.92: after a second opinion
    assert list(shared["runs"]) == [2, 2, 1]
    bob = found["comparable"][found["comparable"]["agent"] == "test/bob"]
    assert list(found["best_so_far"](bob)["best"]) == pytest.approx([1.1, 0.91])
    assert "left out, because scores do not compare: 1 runs of local-1 on H100" in text
    assert "7 runs of 2 agents, local-1 on cpu; the frontier:" in text and "0.910000 1     eeeeeee test/bob" in text
    assert (tmp_path / "agents.png").stat().st_size > 1000


def test_agents_that_only_crashed(cells, git):
    publish(git, "ada aaaaaaa crash 0 cpu")
    found, _ = cells(NIGHT)
    assert len(found["hub"]) == 1 and found["best_so_far"](found["hub"]).empty

"""analysis.ipynb on ledgers good and bad: run headless as a notebook, and its cells in this process."""

import json
import math
import re
import shutil
import subprocess

import matplotlib
import nbclient
import nbformat
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


@pytest.fixture
def cells(home, tmp_path, monkeypatch):
    """Run all code cells in a folder with this ledger and journal; returns their variables."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "ROOT", tmp_path)  # whose folder is asked for commits ...
    monkeypatch.setattr(notes, "ROOT", tmp_path)  # ... and for notes

    def run(ledger=None, journal=(), benchmark="local-T64-V512-3s-00000000"):
        if ledger is not None:
            (tmp_path / "results.tsv").write_text(ledger)
        if journal:
            (home / benchmark).mkdir(parents=True, exist_ok=True)
            (home / benchmark / "journal.jsonl").write_text("".join(json.dumps(run) + "\n" for run in journal))
        namespace = {}
        exec(CODE, namespace)
        assert (tmp_path / "progress.png").stat().st_size > 1000
        matplotlib.pyplot.close("all")
        return namespace

    return run


def test_a_night(cells, capsys):
    found = cells(NIGHT, journal_of(NIGHT))
    kept = found["kept"]
    assert found["noise"] == pytest.approx(2 * math.sqrt((6e-6 + 2e-6) / 3))  # of aaaaaaa and eeeeeee
    assert list(kept.index) == ["aaaaaaa", "bbbbbbb", "eeeeeee"]
    assert list(kept["val_bpb"]) == pytest.approx([1.0, 0.99, 0.988])
    assert list(kept["gain"])[1:] == pytest.approx([0.01, 0.002])
    assert list(kept["verdict"]) == ["", "clears the noise", "within the noise"]
    assert found["findings"] == [] and len(found["matched"]) == 7 and not found["unlisted"]
    assert "the gain is real" in found["conclusion"]
    text = capsys.readouterr().out
    assert "8 runs: 5 keep, 2 discard, 1 crash" in text
    assert "4 ideas after the baseline, 2 kept: keep rate 50%" in text
    assert "30.0 experiments per hour" in text
    assert re.search(r"ddddddd +a typo", text)
    assert "no samples: there is no best.pt to load" in text


AWKWARD = {  # ledger, scores, keeps
    "missing file": (None, [], 0),
    "only crashes": (HEADER + "aaaaaaa\t0.000000\t0.0\tcrash\tx\n", [], 0),
    "crashed first": (HEADER + "aaaaaaa\t0.000000\t0.0\tcrash\tx\nbbbbbbb\t1.5\t1\tkeep\ty\n", [1.5], 1),
    "noise unknown": (HEADER + "aaaaaaa\t1.5\t1\tkeep\tx\nbbbbbbb\t1.4\t1\tkeep\ty\n", [1.5, 1.4], 2),
    "dollars": (HEADER + "aaaaaaa\t1.5\t1\tkeep\tcosts $5 \\frac $x^\n", [1.5], 1),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_ledgers_are_shown(cells, name):
    ledger, scores, keeps = AWKWARD[name]
    found = cells(ledger)
    assert list(found["scored"]["val_bpb"]) == scores and len(found["kept"]) == keeps
    assert math.isnan(found["noise"]) and not any(found["kept"]["verdict"])
    assert found["conclusion"].startswith("Nothing can be said")


def test_what_cannot_be_read_is_said(cells, capsys):
    cells(HEADER + "aaaaaaa\t1.5\t1\tkeep\tx\nnonsense\n")
    assert "results.tsv:3: not a row, fix or delete it: nonsense\n" in capsys.readouterr().out


def test_labels_do_not_collide(cells):
    """Of 30 keeps, some of them side by side and with equal scores; all of the list is in the picture."""
    rows = [f"aaaaaaa\t1.0\t1\tkeep\tbaseline, seed {seed}\n" for seed in (1, 2, 3)]
    rows += [f"{i:07}\t{1 - i // 3 * 0.001}\t1\tkeep\t{'a long story ' * 9}\n" for i in range(1, 31)]
    found = cells(HEADER + "".join(rows))
    figure = found["figure"]
    renderer = FigureCanvasAgg(figure).get_renderer()
    numbers = [text for text in figure.axes[0].texts if text.get_text().isdigit()]
    assert [int(text.get_text()) for text in numbers] == list(range(1, 32))
    boxes = [text.get_window_extent(renderer) for text in numbers]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    (descriptions,) = figure.texts
    box = descriptions.get_window_extent(renderer)
    assert descriptions.get_text().count("a long story") == 9 * 30, "none is cut"
    assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 < axes_box(figure, renderer).y0
    assert axes_box(figure, renderer).width > 0.9 * figure.bbox.width, "nothing beside it is white"


def axes_box(figure, renderer):
    return figure.axes[0].get_window_extent(renderer)


def test_the_audit_finds_what_does_not_agree(cells, capsys):
    bug = "fffffff\t0.800000\t1.0\tkeep\ta bug\n"
    journal = journal_of(
        NIGHT + bug,
        row2={"same_harness": False},
        row3={"dirty": True},
        row4={"val_bpb": 0.991},
        row5={"commit": "9" * 40},
        row7={"seed": 7},
        row8={"scored_rows_read": 64, "device": "another"},
    )
    journal += [{**journal[0], "val_bpb": score} for score in (2.0, 2.1, 2.2)]
    found = cells(NIGHT + "eeeeeee\t0.987000\t1.0\tkeep\tonce more\n" + bug, journal)
    assert found["findings"] == [
        (1, "aaaaaaa", "the harness was not the one that prepared the benchmark"),
        (2, "aaaaaaa", "uncommitted changes, .py files that git does not know, or no git at all"),
        (3, "bbbbbbb", "the ledger says 0.990000, its run scored 0.991000"),
        (4, "ccccccc", "no run of this commit in the journal of this machine"),
        (6, "eeeeeee", "seed 7, which program.md does not name"),
        (7, "eeeeeee", "read scored rows (validation or holdout): 64"),
        (8, "eeeeeee", "a second row for one and the same run"),
        (2, "aaaaaaa", "its commit has 3 more runs, which have no row"),
        (9, "fffffff", "a gain of 19.0% in one step: look for a bug, run it again"),
    ]
    text = capsys.readouterr().out
    assert "device: another, cpu  <- several: their scores do not compare" in text
    assert "; 4 runs have no row" in text  # these three and bbbbbbb's own
    assert found["conclusion"].startswith("9 findings")


@pytest.mark.parametrize(
    "score, holdout, words",
    [
        ("0.987000", -0.003, "only part of the gain carries over"),
        ("0.987000", +0.010, "does not carry over"),
        ("0.998000", -0.002, "all of it is within the noise"),
    ],
)
def test_verdict(cells, score, holdout, words):
    """The score of the last run against 1.0 at the start, the holdout of the last two against 1.1."""
    ledger = NIGHT.replace("0.987000", score)
    last = {"holdout_bpb": 1.1 + holdout}
    start = {f"row{i}": {"holdout_bpb": 1.1} for i in (1, 2, 3)}
    conclusion = cells(ledger, journal_of(ledger, **start, row7=last, row8=last))["conclusion"]
    assert words in conclusion
    assert f"Validation gained {1 - float(score):.6f}, the holdout {-holdout:.6f}" in conclusion


def test_drift_confirmation_and_what_was_disturbed(cells, tmp_path, capsys):
    ends = [
        ("aaaaaaa", 1.001, 1),
        ("aaaaaaa", 1.0, 4),
        ("eeeeeee", 0.99, 4),
        ("aaaaaaa", 1.01, 5),
        ("eeeeeee", 0.98, 5),
    ]
    ledger = NIGHT + "".join(f"{c}\t{score}\t1.0\tkeep\tonce more, seed {seed}\n" for c, score, seed in ends)
    (tmp_path / "run.log").write_text("COMPILE: torch.compile does not work\n---\n")
    found = cells(ledger, journal_of(ledger, row4={"slow_steps_percent": 30.0}))
    assert list(found["kept"]["row"]) == [0, 3, 7], "the last runs leave the picture as it was"
    text = capsys.readouterr().out
    assert "Drift: the baseline, run again, -0.001000 with the same seed." in text
    assert "Fresh seeds: 0.010000 and 0.030000, on the holdout 0.010000 and 0.030000\n" in text
    assert "1 disturbed runs (slow steps): bbbbbbb\n" in text and "Last run: COMPILE: torch" in text


def git(folder, *words):
    command = ["git", "-c", "user.name=Agent", "-c", "user.email=agent@example.org", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def trained(own, tmp_path):
    """A repository with a ledger, whose commit has its weights in best.pt; returns the folder of that."""
    shutil.copy(ROOT / "train.py", tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-qm", "start")
    commit = git(tmp_path, "rev-parse", "HEAD")
    weights = train.build_model(own, runtime.Setup(CPU, torch.float32, train.banded)).state_dict()
    torch.save({"commit": commit, "val_bpb": 2.5, "model": weights}, own.path / "best.pt")
    ledger = f"{HEADER}{commit[:7]}\t2.500000\t1.0\tkeep\tbaseline\n"
    run = journal_of(ledger)[0] | {"commit": commit, "benchmark": own.id}
    (own.path / "journal.jsonl").write_text(json.dumps(run) + "\n")
    (tmp_path / "results.tsv").write_text(ledger)
    return own.path


def test_a_model_that_no_longer_fits_is_said_to(trained, cells, capsys):
    best = torch.load(trained / "best.pt", weights_only=True)
    best["model"]["new.weight"] = torch.zeros(2)
    for content, words in (
        (best, r"the train.py of commit \w{7} no longer fits: .*new.weight"),
        (best | {"commit": "0" * 40}, "the train.py of best.pt is not in this repository"),
        (best | {"model": prepare.Path()}, "there is no best.pt to load"),  # objects, which could execute anything
    ):
        torch.save(content, trained / "best.pt")
        cells()
        assert re.search(f"no samples: {words}", capsys.readouterr().out, re.S)


def test_headless(trained, tmp_path, monkeypatch):
    """As nbclient runs it, in a kernel; the best model speaks."""
    monkeypatch.setenv("AUTORESEARCH_HOME", str(prepare.HOME))
    copy_harness(tmp_path)
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "1 runs: 1 keep" in printed
    assert printed.count("----- prompt:") == 4 and "----- prompt: 'def main():\\n'" in printed


def publish(folder, *results):
    """A repository with the notes of a hub: (minute, agent, train.py, status, val_bpb, device)."""
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "start")
    lines = ["looks good to me"]  # no result, so it is left out
    for row, (minute, agent, train_py, status, score, device) in enumerate(results, 1):
        line = {
            "time": f"2026-11-01T00:{minute:02}:00+00:00",
            "agent": f"test/{agent}",
            "row": row,
            "parent": "0000000",
        }
        line |= {"benchmark": "local-1", "device": device, "commit": train_py + 5 * "0", "train": train_py}
        line |= {"val_bpb": score or None, "memory_gb": 1.0, "status": status, "description": "a = b"}
        lines.append(json.dumps(line))
    git(folder, "notes", "--ref=results", "add", "-m", "\n\n".join(lines))


def test_several_agents(cells, tmp_path, capsys):
    publish(
        tmp_path,
        (1, "ada", "aaaaaaa", "keep", 1.0, "cpu"),
        (2, "bob", "aaaaaaa", "keep", 1.1, "cpu"),
        (3, "ada", "bbbbbbb", "keep", 0.9, "cpu"),
        (4, "bob", "ccccccc", "discard", 0.5, "cpu"),
        (5, "bob", "ddddddd", "crash", 0.0, "cpu"),
        (6, "bob", "bbbbbbb", "discard", 0.94, "cpu"),  # a second opinion: 0.92 is what it is worth
        (7, "bob", "eeeeeee", "keep", 0.91, "cpu"),
        (8, "eve", "fffffff", "keep", 0.1, "H100"),
    )
    found = cells(NIGHT)
    shared = found["best_so_far"](found["comparable"])
    assert list(shared["best"]) == pytest.approx([1.05, 0.92, 0.91]) and list(shared["runs"]) == [2, 2, 1]
    bob = found["comparable"][found["comparable"]["agent"] == "test/bob"]
    assert list(found["best_so_far"](bob)["best"]) == pytest.approx([1.1, 0.91])
    text = capsys.readouterr().out
    assert "left out, because scores do not compare: 1 runs of local-1 on H100" in text
    assert "7 runs of 2 agents, local-1 on cpu; the frontier:" in text and "0.910000 1     eeeeeee test/bob" in text
    assert (tmp_path / "agents.png").stat().st_size > 1000


def test_agents_that_only_crashed(cells, tmp_path):
    publish(tmp_path, (1, "ada", "aaaaaaa", "crash", 0.0, "cpu"))
    found = cells(NIGHT)
    assert len(found["hub"]) == 1 and found["best_so_far"](found["hub"]).empty


def test_the_notebook_is_committed_without_outputs():
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in NOTEBOOK.cells)

"""analysis.ipynb on ledgers good and bad: run headless as a notebook, and its cells in this process."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess

import matplotlib
import nbclient
import nbformat
import pytest
import torch
from conftest import CPU, HEADER, NIGHT, ROOT, journal_of
from matplotlib.backends.backend_agg import FigureCanvasAgg

import prepare
import train

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
CODE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")


@pytest.fixture
def cells(home, tmp_path, monkeypatch):
    """Run all code cells in a folder with this ledger and journal; returns their variables."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))  # whose folder is asked for notes

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


def test_final_runs_leave_the_picture_as_it_was(cells):
    final = [f"{commit}\t{score}\t1.0\tkeep\tfinal run\n" for commit, score in (("aaaaaaa", 1.001), ("eeeeeee", 0.988))]
    rows = [list(cells(ledger)["kept"]["row"]) for ledger in (NIGHT, NIGHT + "".join(final))]
    assert rows[0] == rows[1] == [0, 3, 7]


TABS = HEADER + "aaaaaaa\t1.0\t1.0\tkeep\tbaseline\tof\ttoday\n"
AWKWARD = {  # ledger, scores, statuses
    "missing file": (None, [], []),
    "empty": ("", [], []),
    "header only": (HEADER, [], []),
    "only crashes": (HEADER + "a\t0.000000\t0.0\tcrash\tx\n", [], ["crash"]),
    "crashed first": (HEADER + "a\t0.000000\t0.0\tcrash\tx\nb\t1.5\t1\tkeep\ty\n", [1.5], ["crash", "keep"]),
    "no keeps": (HEADER + "a\t1.5\t1\tdiscard\tx\nb\t1.4\t1\tdiscard\ty\n", [1.5, 1.4], ["discard"] * 2),
    "crash with a score": (HEADER + "a\t1.5\t1\tcrash\tx\n", [], ["crash"]),
    "missing columns": ("commit\tval_bpb\tstatus\na\t1.5\tkeep\n", [1.5], ["keep"]),
    "no commits": ("val_bpb\n1.5\n1.4\n", [1.5, 1.4], ["", ""]),
    "short rows": (HEADER + "a\t1.5\nb\n", [1.5], ["", ""]),
    "tabs": (TABS, [1.0], ["keep"]),
    "upper case": ("Commit\tVal_BPB\tMemory_GB\tStatus\tDescription\na\t1.5\t1\tKEEP\tx\n", [1.5], ["keep"]),
    "comma separated": ('commit,val_bpb,memory_gb,status,description\na,1.5,1,keep,"x, y"\n', [1.5], ["keep"]),
    "decimal commas": (HEADER + "a\t1,5\t1,0\tkeep\tx\n", [1.5], ["keep"]),
    "other columns": ("id\tstatus\tval_bpb\tcommit\n1\tkeep\t1.5\ta\n", [1.5], ["keep"]),
    "words for numbers": (HEADER + "a\tn/a\t-\tcrash\tx\nb\tnan\tinf\tdiscard\ty\n", [], ["crash", "discard"]),
    "blank lines": ("\n" + HEADER + "\na\t1.5\t1\tkeep\tx\n\n", [1.5], ["keep"]),
    "dollars": (HEADER + "a\t1.5\t1\tkeep\tcosts $5 \\frac $x^\n", [1.5], ["keep"]),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_ledgers_are_read(tmp_path, name):
    ledger, scores, statuses = AWKWARD[name]
    if ledger is not None:
        (tmp_path / "results.tsv").write_text(ledger)
    rows = prepare.read_ledger(tmp_path / "results.tsv")
    assert [row["val_bpb"] for row in rows if row["val_bpb"] > 0] == scores
    assert [row["status"] for row in rows] == statuses
    assert name != "tabs" or rows[0]["description"] == "baseline\tof\ttoday"


@pytest.mark.parametrize("name", ["missing file", "only crashes", "crashed first", "no commits", "dollars"])
def test_awkward_ledgers_are_shown(cells, name):
    ledger, scores, statuses = AWKWARD[name]
    found = cells(ledger)
    assert list(found["scored"]["val_bpb"]) == scores and len(found["kept"]) == statuses.count("keep")
    assert found["conclusion"].startswith("Nothing can be said")


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
    assert len(descriptions.get_text().splitlines()) == 31
    assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.x0 > figure.axes[0].get_window_extent().x1


def test_the_audit_finds_what_does_not_agree(cells, capsys):
    journal = journal_of(
        NIGHT,
        row2={"same_prepare": False},
        row3={"dirty": True},
        row4={"val_bpb": 0.991},
        row5={"commit": "f" * 40},
        row7={"seed": 7},
        row8={"scored_rows_read": 64, "device": "another"},
    )
    ledger = NIGHT + "eeeeeee\t0.987000\t1.0\tkeep\tonce more\n"
    found = cells(ledger, [*journal, {**journal[0], "commit": "a" * 40, "val_bpb": 2.0}])
    assert found["findings"] == [
        (1, "aaaaaaa", "prepare.py was not the one that prepared the benchmark"),
        (2, "aaaaaaa", "uncommitted changes"),
        (3, "bbbbbbb", "the ledger says 0.990000, its run scored 0.991000"),
        (4, "ccccccc", "no run of this commit in the journal of this machine"),
        (6, "eeeeeee", "seed 7, which program.md does not name"),
        (7, "eeeeeee", "read scored rows (validation or holdout): 64"),
        (8, "eeeeeee", "a second row for one and the same run"),
    ]
    text = capsys.readouterr().out
    assert "device: another, cpu  <- several: their scores do not compare" in text
    assert "; 2 runs have no row" in text  # bbbbbbb's own and that of seed 42
    assert found["conclusion"].startswith("7 findings")


def test_a_torn_journal_line_is_skipped(cells, home, capsys):
    cells(NIGHT, journal_of(NIGHT))
    path = home / "local-T64-V512-3s-00000000" / "journal.jsonl"
    path.write_text(path.read_text() + '{"time": "2026-')
    assert len(cells(NIGHT)["matched"]) == 7
    assert "skipped, the line is incomplete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "holdout, words",
    [
        (-0.011, "the gain is real"),
        (-0.003, "only part of the gain carries over"),
        (+0.010, "does not carry over"),
    ],
)
def test_verdict(cells, holdout, words):
    """The holdout of the two last runs against 1.1 at the start; validation gained 0.013."""
    last = {"holdout_bpb": 1.1 + holdout}
    start = {f"row{i}": {"holdout_bpb": 1.1} for i in (1, 2, 3)}
    conclusion = cells(NIGHT, journal_of(NIGHT, **start, row7=last, row8=last))["conclusion"]
    assert words in conclusion and f"Validation gained 0.013000, the holdout {-holdout:.6f}" in conclusion


def test_drift_confirmation_and_what_was_disturbed(cells, tmp_path, capsys):
    ends = [
        ("aaaaaaa", 1.001, 1),
        ("aaaaaaa", 1.0, 4),
        ("eeeeeee", 0.99, 4),
        ("aaaaaaa", 1.01, 5),
        ("eeeeeee", 0.98, 5),
    ]
    ledger = NIGHT + "".join(f"{c}\t{score}\t1.0\tkeep\tonce more, seed {seed}\n" for c, score, seed in ends)
    (tmp_path / "run.log").write_text("COMPILE: torch.compile does not work here\n---\n")
    cells(ledger, journal_of(ledger, row4={"slow_steps_percent": 30.0}))
    text = capsys.readouterr().out
    assert "Drift: the baseline, run again, -0.001000 with the same seed." in text
    assert "Fresh seeds: 0.010000 and 0.030000, on the holdout 0.010000 and 0.030000\n" in text
    assert "1 disturbed runs (slow steps): bbbbbbb\n" in text and "Last run: COMPILE: torch" in text


def test_verdict_of_noise(cells):
    ledger = "".join(NIGHT.splitlines(keepends=True)[:4]) + "bbbbbbb\t0.998000\t1.5\tkeep\tluck\n"
    assert "within the noise" in cells(ledger, journal_of(ledger))["conclusion"]


def test_a_lucky_seed(cells):
    found = cells(NIGHT, journal_of(NIGHT, row8={"seed": 1337}))
    assert [f for *_, f in found["findings"]] == ["seed 1337, which program.md does not name"]


def test_the_best_of_many_runs(cells):
    journal = journal_of(NIGHT)
    found = cells(NIGHT, [*journal, *({**journal[3], "val_bpb": 0.99 + i / 1000} for i in (1, 2, 3))])
    assert [f for *_, f in found["findings"]] == ["its commit has 3 more runs, which have no row"]


def test_an_invented_row_and_an_improved_one(cells):
    ledger = NIGHT.replace("0.990000", "0.890000") + "fffffff\t0.900000\t1.0\tkeep\tinvented\n"
    found = cells(ledger, journal_of(NIGHT))
    assert (8, "fffffff", "no run of this commit in the journal of this machine") in found["findings"]
    assert (3, "bbbbbbb", "the ledger says 0.890000, its run scored 0.990000") in found["findings"]


def test_an_implausible_gain(cells):
    ledger = NIGHT + "fffffff\t0.800000\t1.0\tkeep\ta bug\n"
    found = cells(ledger, journal_of(ledger))
    assert [f for *_, f in found["findings"]] == ["a gain of 19.0% in one step: look for a bug, run it again"]


@pytest.fixture
def trained(benchmark, tmp_path, monkeypatch):
    """A repository whose commit has the weights in best.pt, and a ledger of it in a home of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "train.py", tmp_path)
    git = ["git", "-c", "user.name=Agent", "-c", "user.email=agent@example.org"]
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "start"]):
        subprocess.run(git + words, check=True, cwd=tmp_path)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=tmp_path).stdout.strip()
    model = train.build_model(benchmark, CPU)
    home = tmp_path / "home"
    shutil.copytree(benchmark.path, home / benchmark.id)
    torch.save({"commit": commit, "val_bpb": 2.5, "model": model.state_dict()}, home / benchmark.id / "best.pt")
    ledger = f"{HEADER}{commit[:7]}\t2.500000\t1.0\tkeep\tbaseline\n"
    run = journal_of(ledger)[0] | {"commit": commit, "benchmark": benchmark.id}
    (home / benchmark.id / "journal.jsonl").write_text(json.dumps(run) + "\n")
    (tmp_path / "results.tsv").write_text(ledger)
    return home, tmp_path


def test_the_best_model_speaks(trained, cells, monkeypatch, capsys):
    home, folder = trained
    monkeypatch.setattr(prepare, "HOME", home)
    cells()
    text = capsys.readouterr().out
    assert text.count("----- prompt:") == 4 and "----- prompt: 'def main():\\n'" in text


def test_a_model_that_no_longer_fits_is_said_to(trained, cells, monkeypatch, capsys):
    home, folder = trained
    monkeypatch.setattr(prepare, "HOME", home)
    (best,) = home.glob("*/best.pt")
    weights = torch.load(best, weights_only=True)
    weights["model"]["new.weight"] = torch.zeros(2)
    torch.save(weights, best)
    cells()
    assert re.search(
        r"no samples: the train.py of commit \w{7} no longer fits: .*new.weight", capsys.readouterr().out, re.S
    )
    torch.save(weights | {"commit": "0" * 40}, best)
    cells()
    assert "no samples: the train.py of best.pt is not in this repository" in capsys.readouterr().out


def test_headless(trained):
    """As nbclient runs it, in a kernel."""
    home, folder = trained
    environment = os.environ | {"AUTORESEARCH_HOME": str(home), "PYTHONPATH": str(ROOT)}
    for name in ("prepare.py", "analysis.ipynb"):
        shutil.copy(ROOT / name, folder)
    notebook = nbformat.read(folder / "analysis.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment.items():
            context.setenv(name, value)
        client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "1 runs: 1 keep" in printed and "----- prompt:" in printed


def publish(folder, *results):
    """A repository with the notes that program_swarm.md writes: (minute, agent, commit, status, val_bpb, device)."""
    git = ["git", "-c", "user.name=Agent", "-c", "user.email=agent@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "start"], cwd=folder, check=True)
    for minute, agent, commit, status, score, device in results:
        line = f"time=2026-11-01T00:{minute:02}:00Z agent=test/{agent} row=1 parent=0000000"
        line += f" benchmark=local-1 device={device}\t{commit}\t{score:.6f}\t1.0\t{status}\ta = b"
        subprocess.run([*git, "notes", "--ref=results", "append", "-m", line], cwd=folder, check=True)


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


def test_notes_of_others_are_left_out(cells, tmp_path, capsys):
    publish(tmp_path, (1, "ada", "aaaaaaa", "crash", 0.0, "cpu"))
    git = [
        "git",
        "-c",
        "user.name=Agent",
        "-c",
        "user.email=agent@example.org",
        "notes",
        "--ref=results",
        "append",
        "-m",
    ]
    subprocess.run([*git, "time=yesterday agent=x\n\nlooks good = to me"], cwd=tmp_path, check=True)
    found = cells(NIGHT)
    assert len(found["hub"]) == 1 and found["best_so_far"](found["hub"]).empty


def test_a_wave_on_unequal_devices_is_named(cells, capsys):
    rows = [f"aaaaaaa\t1.0\t1\tkeep\tbaseline [x-aaaaaaa-{n} on {d}]\n" for n, d in ((1, "NVIDIA A100"), (2, "cpu x2"))]
    cells(HEADER + "".join(rows))
    assert "runs on several devices, whose scores do not compare: NVIDIA A100, cpu x2" in capsys.readouterr().out
    cells(HEADER + rows[0] + "bbbbbbb\t1.0\t1\tkeep\tmore (see [3] on top)\n")
    assert "several devices" not in capsys.readouterr().out


def test_noise_is_unknown_with_one_baseline(cells):
    found = cells(HEADER + "a\t1.5\t1\tkeep\tbaseline\nb\t1.4\t1\tkeep\tx\n")
    assert math.isnan(found["noise"]) and list(found["kept"]["verdict"]) == ["", ""]


def test_the_notebook_is_committed_without_outputs():
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in NOTEBOOK.cells)

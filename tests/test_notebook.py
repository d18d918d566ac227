"""
Checks that analysis.ipynb shows any night, with the ledger's gains and verdicts, names what record and journal disagree
on, and draws pictures that can be read. Its cells run in this process, and once as a notebook.
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
from conftest import CPU, ROOT, copy_harness
from matplotlib.backends.backend_agg import FigureCanvasAgg

import prepare
import train
from harness import common, runtime

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
CODE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")
START = {"kind": "start", "time": "2026-11-01T00:00:00+00:00", "tag": "test", "until": "never", "device": "cpu"}


class Book:
    """A repository with a night begun, whose record and journal are written by hand, as the ledger would."""

    def __init__(self, folder, home, benchmark="local-1"):
        self.folder, self.journal = folder, home / benchmark / "journal.jsonl"
        self.record = folder / ".git" / "autoresearch" / "test" / "record.jsonl"
        self.benchmark = benchmark
        self.count = 0
        self.git("init", "-q", "-b", "autoresearch/test")
        shutil.copy(ROOT / "train.py", folder)
        self.git("add", "train.py")
        self.commit("before")
        words = START | {"benchmark": benchmark}
        self.start = self.commit(f"autoresearch/test: start\n\n{json.dumps(words)}")
        self.add(self.record, words | {"commit": self.start})

    def git(self, *words):
        command = ["git", "-c", "user.name=Agent", "-c", "user.email=agent@example.org", *words]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message):
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def add(self, path, line):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def run(self, commit, role, seed, score=None, journal=(), **changes):
        """A run, in the record and, if it has a score and `journal` is not None, there."""
        self.count += 1
        time = f"2026-11-01T00:{self.count * 2:02}:00+00:00" if self.count < 30 else "2026-11-01T02:00:00+00:00"
        line = {"run": f"run-{self.count}", "time": time, "commit": commit, "seed": seed, "val_bpb": score}
        line["device"] = "cpu"
        if score and journal is not None:
            seen = {"benchmark": self.benchmark, "dirty": False, "same_harness": True}
            self.add(self.journal, line | seen | {"holdout_bpb": score + 0.1} | dict(journal))
        line |= {"kind": "run", "role": role, "state": "scored" if score else "crash", "memory_gb": 1.0}
        line |= {"train": self.git("rev-parse", f"{commit}:train.py"), "description": "baseline"}
        if commit != self.start:
            line["description"] = self.git("log", "-1", "--format=%s", commit)
        self.add(self.record, line | changes)

    def decide(self, commit, decision="keep"):
        self.add(self.record, {"kind": "decision", "commit": commit, "decision": decision})

    def idea(self, message, *scores, decision="keep", **options):
        """A commit, its runs with seeds from 1, and what was decided."""
        commit = self.commit(message)
        for seed, score in enumerate(scores, 1):
            self.run(commit, "idea", seed, score, **options)
        self.decide(commit, decision)
        return commit

    def baseline(self, **options):
        for seed, score in enumerate((1.002, 0.999, 0.999), 1):
            self.run(self.start, "baseline", seed, score, **options)


@pytest.fixture
def book(home, tmp_path):
    return Book(tmp_path, home)


@pytest.fixture
def cells(home, tmp_path, monkeypatch, capsys):
    """Run all code cells in a folder, which may have a night; returns their variables and what they print."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)  # whose git is asked
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))

    def run():
        namespace = {}
        exec(CODE, namespace)
        assert (tmp_path / "progress.png").stat().st_size > 1000
        matplotlib.pyplot.close("all")
        return namespace, capsys.readouterr().out

    return run


def test_an_honest_night(book, cells, tmp_path):
    """Two keeps, a discard, a crash, a disturbed run, and final runs."""
    (tmp_path / "run.log").write_text("COMPILE: torch.compile does not work\n---\n")
    book.baseline(losses=[5.0, 4.0, None])
    deeper = book.idea("deeper; expect -0.01", 0.99, 0.99, 0.99, losses=[5.0, 3.0, 2.0])
    book.idea("wider", 1.2, decision="discard")
    book.git("reset", "-q", "--hard", deeper)
    book.idea("a typo", None, reason="NameError: no", decision="discard")
    book.git("reset", "-q", "--hard", deeper)
    rate = book.commit("baseline of all rates, final")
    book.run(rate, "idea", 1, 0.8, state="disturbed", reason="30% slow")
    for seed, score in enumerate((0.9895, 0.987, 0.9875), 1):
        book.run(rate, "idea", seed, score)
    book.decide(rate)
    for commit, seed, score in ((book.start, 4, 1.0), (rate, 4, 0.99), (book.start, 5, 1.01), (rate, 5, 0.98)):
        book.run(commit, "final", seed, score)
    found, text = cells()
    kept = found["kept"]
    assert list(kept.index) == [book.start[:7], deeper[:7], rate[:7]]
    assert list(kept["row"]) == [0, 5, 11], "the run that decided; final ones leave the picture as it was"
    assert list(kept["val_bpb"]) == pytest.approx([1.0, 0.99, 0.988])
    assert list(kept["runs"]) == [3, 3, 3]
    assert list(kept["verdict"]) == ["", "clears the noise", "within the noise"]
    assert list(found["runs"]["status"][6:9]) == ["discard", "crash", "disturbed"]
    assert found["findings"] == []
    for words in (
        "16 runs: 9 keep, 1 discard, 1 crash, 1 disturbed, 4 final\n",
        "ideas after the baseline: 4, kept: 2, keep rate 50%",
        "baseline 1.000000, noise floor 0.002",
        "15 of 15 runs with a score are in the journal",
        "30.0 experiments per hour",
        "a typo",
        "NameError: no",
        "disturbed 30% slow",
        "no samples: there is no best.pt to load",
        "agree. Validation gained 0.020000, the holdout 0.020000: the gain is real.\n",
        "the gain to report, on fresh seeds: +0.020000\n",
        f"Drift: {book.start[:7]}, run again later, +0.005000\n",
        "Last run: COMPILE: torch",
    ):
        assert words in text

    # final runs are hollow, and the curves are those of what was kept: the third has none
    axes = found["figure"].axes[0]
    groups = {group.get_label(): group for group in axes.collections}
    assert len(groups["final runs"].get_offsets()) == 4
    assert len(groups["final runs"].get_facecolors()) == 0 and len(groups["final runs"].get_edgecolors()) == 1
    assert [x for x, _ in groups["kept"].get_offsets()] == [1, 2, 3, 4, 5, 6, 10, 11, 12]
    assert "final runs" in [text.get_text() for text in axes.get_legend().get_texts()]
    drawn = found["curves"].axes[0].get_lines()
    assert [line.get_label() for line in drawn] == [f"1. {book.start[:7]}", f"2. {deeper[:7]}"]
    assert list(drawn[0].get_ydata()[:2]) == [5.0, 4.0] and list(drawn[1].get_ydata()) == [5.0, 3.0, 2.0]


def test_a_night_without_curves(book, cells):
    book.baseline()
    found, text = cells()
    assert found["curves"] is None and "no curves: no kept run has recorded its losses" in text
    assert "Nothing beyond the baseline was kept." in text and "fresh seeds" not in text


HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
AWKWARD = {  # scores of the baseline, scores of an idea and its words, and what is printed
    "nothing": ([], [], "", "nothing was tried yet"),
    "only a crash": ([None], [], "", "1 runs: 1 crash"),
    "crashed first": ([None, 1.5], [1.4], "y", "baseline 1.500000"),
    "noise unknown": ([1.5], [1.4], "y", "noise floor unknown"),
    "named like the baseline": ([1.5], [1.4], "baseline", "baseline 1.500000"),
    "dollars": ([1.5], [1.4], "costs_$5_\\frac_$x^", "costs_$5"),
    "quotes": ([1.5], [1.4], '"wide', '"wide'),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_nights_are_shown(book, cells, name):
    scores, idea, message, words = AWKWARD[name]
    for seed, score in enumerate(scores, 1):
        book.run(book.start, "baseline", seed, score, journal=None)
    if idea:
        book.idea(message, *idea, journal=None)
    found, text = cells()
    scores = [score for score in (*scores, *idea) if score]
    assert list(found["scored"]["val_bpb"]) == list(found["kept"]["val_bpb"]) == scores and words in text
    assert math.isnan(found["noise"]) and not any(found["kept"]["verdict"])
    assert found["conclusion"].startswith("Nothing can be said")


def test_without_a_night(cells, tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "results.tsv").write_text(HEADER + "aaaaaaa\t1.5\t1\tkeep\tof another\n")
    found, text = cells()
    assert found["runs"].empty and text.startswith("no night on ") and "of another" not in text


def test_an_empty_night(book, cells, tmp_path):
    (tmp_path / "results.tsv").write_text(HEADER + "aaaaaaa\t1.5\t1\tkeep\tof another\n")
    found, text = cells()
    assert found["runs"].empty and "nothing was tried yet" in text and "of another" not in text
    assert [sentence[:22] for _, sentence in found["findings"]] == ["results.tsv was edited"]


def test_labels_do_not_collide(book, cells):
    """Of 30 keeps side by side, some with equal scores, in a long night; all of the list is in the picture."""
    book.baseline()
    line = {"kind": "run", "time": "2026-11-01T01:00:00+00:00", "role": "idea", "state": "scored"}
    for i in range(1, 200):
        line |= {"commit": f"{i:040}", "description": "x"}
        scores = [1.0]
        if i <= 30:  # each has two runs, and its number belongs between them
            scores = [1 - i // 3 * 0.001, 1.0006 - i // 3 * 0.001]
            line["description"] = "a long story " * 9
        for seed, score in enumerate(scores, 1):
            book.add(book.record, line | {"run": f"{i}-{seed}", "seed": seed, "val_bpb": score})
        book.decide(line["commit"], "keep" if i <= 30 else "discard")
    figure = cells()[0]["figure"]
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


def off_the_line(book):
    book.git("reset", "-q", "--hard", book.start)
    book.idea("beside", 0.97, 0.97, 0.97)


def with_threads(book):
    (book.folder / "train.py").write_text("import threading\n")
    book.git("add", "train.py")
    book.idea("x", 0.98)


AUDITS = {  # what happens after an honest baseline and a keep, and what the audit says of it
    "another score": (lambda book: book.idea("x", 0.98, journal={"val_bpb": 0.985}), "val_bpb is 0.98 in the record"),
    "another seed": (lambda book: book.idea("x", 0.98, journal={"seed": 9}), "seed is 1 in the record, 9 in the jou"),
    "another device": (lambda book: book.idea("x", 0.98, journal={"device": "x"}), "device is cpu in the record, x in"),
    "another commit": (lambda book: book.idea("x", 0.98, journal={"commit": "9" * 40}), "commit is "),
    "another train.py": (lambda book: book.idea("x", 0.98, train="9" * 40), "the train.py in the record is not that"),
    "missing line": (lambda book: book.idea("x", 0.98, journal=None), "scored, but the journal of this machine has no"),
    "dirty": (lambda book: book.idea("x", 0.98, journal={"dirty": True}), "uncommitted changes"),
    "a bug": (lambda book: book.idea("x", 0.8), "a gain of 19.2% in one step"),
    "suspect lines": (with_threads, "train.py:1 starts threads or processes: import threading"),
    "by hand": (lambda book: book.add(book.journal, {"commit": book.start, "val_bpb": 1.0}), "1 runs by hand of its"),
    "unrecorded": (lambda book: book.add(book.journal, {"commit": book.start, "val_bpb": 1.0, "run": "x"}), "1 scored"),
    "off the line": (off_the_line, "does not descend from the keep before it"),
    "edited": (lambda book: (book.folder / "results.tsv").write_text(HEADER), "results.tsv was edited"),
}


@pytest.mark.parametrize("name", AUDITS)
def test_the_audit(book, cells, name):
    happen, words = AUDITS[name]
    book.baseline()
    book.idea("deeper", 0.99, 0.99, 0.99)
    happen(book)
    found, text = cells()
    sentences = {sentence for _, sentence in found["findings"]}
    assert any(sentence.startswith(words) for sentence in sentences) and words in text
    assert len(sentences) == 1 + (name == "another commit"), sentences
    assert found["conclusion"].startswith(f"{len(found['findings'])} findings")


@pytest.mark.parametrize(
    ("score", "holdout", "words"),
    [
        (0.987, -0.012, "the gain is real."),
        (0.987, -0.003, "only part of the gain carries over to other text."),
        (0.987, +0.010, "the gain does not carry over to other text."),
        (0.998, -0.002, "the first is within the noise; more"),
        (1.020, -0.002, "no gain."),
    ],
)
@pytest.mark.parametrize("roles", ["final", "idea"])
def test_verdict(book, cells, roles, score, holdout, words):
    """Against 1.0 at the start, and 1.1 on the holdout; the first run was selected, and does not tell."""
    book.baseline(journal={"holdout_bpb": 1.1})
    idea = book.idea("rate", score - 0.003, score, score, journal={"holdout_bpb": 1.1 + holdout})
    if roles == "final":
        book.run(book.start, "final", 4, 1.0, journal={"holdout_bpb": 1.1})
        book.run(idea, "final", 4, score, journal={"holdout_bpb": 1.1 + holdout})
    found, text = cells()
    assert f"Validation gained {1 - score:.6f}, the holdout {-holdout:.6f}: {words}" in found["conclusion"]
    assert ("within the noise floor of" in text) == (roles == "final" and score == 0.998)


AGENTS = """ada a keep 1.0 cpu
bob a keep 1.1 cpu
ada b keep 0.9 cpu
bob c discard 0.5 cpu
bob d discard crash cpu
bob b discard 0.94 cpu
bob e keep 0.91 cpu
eve f keep 0.1 H100"""


def publish(book, results):
    """Records, as fetched from a hub: lines of agent, train.py, decision, val_bpb and device; a minute each."""
    records = {}
    for number, result in enumerate(results.splitlines(), 1):
        agent, letter, decision, score, device = result.split()
        start = START | {"benchmark": "local-1", "device": device, "commit": "0" * 40}
        run = {"kind": "run", "run": str(number), "time": f"2026-11-01T00:{number:02}:00+00:00", "seed": 1}
        run |= {"commit": letter * 40, "train": letter * 40, "role": "idea", "device": device, "description": "a = b"}
        run |= {"state": "crash"} if score == "crash" else {"val_bpb": float(score), "state": "scored"}
        lines = [run, {"kind": "decision", "commit": letter * 40, "decision": decision}]
        records.setdefault(agent, [start]).extend(lines)
    for agent, lines in records.items():
        (book.folder / "record.jsonl").write_text("looks good to me\n".join(json.dumps(line) + "\n" for line in lines))
        book.git("add", "record.jsonl")
        book.git("update-ref", f"refs/hub/results/test/{agent}", book.git("write-tree"))
        book.git("rm", "-q", "--cached", "record.jsonl")


def test_several_agents(book, cells, tmp_path):
    publish(book, AGENTS)
    found, text = cells()
    shared = found["best_so_far"](found["comparable"])
    assert list(shared["best"]) == pytest.approx([1.05, 0.92, 0.91])  # 0.92: after a second opinion
    assert list(shared["runs"]) == [2, 2, 1]
    bob = found["comparable"][found["comparable"]["agent"] == "test/bob"]
    assert list(found["best_so_far"](bob)["best"]) == pytest.approx([1.1, 0.91])
    assert "left out, because scores do not compare: 1 runs of local-1 on H100" in text
    assert "6 runs of 2 agents, local-1 on cpu\n" in text and "0.910000 1     eeeeeee test/bob" in text
    assert (tmp_path / "agents.png").stat().st_size > 1000


def test_agents_that_only_crashed(book, cells):
    publish(book, "ada a discard crash cpu")
    assert "no runs of several agents here" in cells()[1]


# --------------------------------------
# The train.py of best.pt


@pytest.fixture
def trained(own, home, tmp_path):
    """A night whose baseline has its weights in best.pt; returns the folder of that."""
    book = Book(tmp_path, home, own.id)
    book.run(book.start, "baseline", 1, 2.5)
    weights = train.build_model(own, runtime.Setup(CPU, torch.float32, train.banded)).state_dict()
    torch.save({"commit": book.start, "val_bpb": 2.5, "model": weights}, own.path / "best.pt")
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

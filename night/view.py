"""results.tsv, a view of the record: a row for each run that counts or crashed. Only the ledger writes it."""

import hashlib
import json

from harness.common import printable, write_atomically

COLUMNS = ("commit", "val_bpb", "memory_gb", "status", "description")
STAMPS = 2  # views whose hashes are known, so that an edited one is told from ours


def rows_of(night):
    """The rows: [(commit, val_bpb, memory_gb, status, description)], texts."""
    rows = []
    kept = set(night.kept)
    for run in night.runs.values():
        words = printable(run.description, 1000)
        if run.role == "final":
            words += ", final"
        words += f", seed {run.seed}"

        # other states prove nothing: they are in the record, but have no row
        status = "discard"
        if run.commit in kept:
            status = "keep"
        if run.state == "crash":
            rows.append((run.commit[:7], "0.000000", "0.0", "crash", words))
        elif run.counts:
            rows.append((run.commit[:7], f"{run.val_bpb:.6f}", f"{run.memory_gb:.1f}", status, words))
    return rows


def write_view(folder, night, place):
    """
    Write results.tsv where it differs from the record. One that somebody edited is moved aside: returns a sentence
    then, else "". The caller holds the lock of the record.
    """
    path = folder / "results.tsv"
    content = "".join("\t".join(cells) + "\n" for cells in (COLUMNS, *rows_of(night)))
    found = b""
    if path.exists():
        found = path.read_bytes()
    if found == content.encode():
        return ""

    # what is neither this view nor one of the last is somebody's own
    said = ""
    if found and sha256_of(found) not in known_stamps(place):
        aside = move_aside(path, "results-edited")
        said = f"results.tsv was edited: it is {aside.name} now; to decide by hand: uv run ledger.py keep, or discard"

    # the stamp comes first: a view that was just written is always known
    stamps = read_stamps(place / "view.json")
    write_atomically(place / "view.json", json.dumps([*stamps, sha256_of(content.encode())][-STAMPS:]))
    write_atomically(path.resolve(), content)  # where it is a link, its target is written
    return said


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def known_stamps(place):
    """Hashes of the last views of all nights here, a set: any of these nights may have been checked out before."""
    top = next(folder for folder in place.parents if folder.name == "autoresearch")
    return {stamp for path in top.rglob("view.json") for stamp in read_stamps(path)}


def read_stamps(path):
    try:
        return [str(stamp) for stamp in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def move_aside(path, name):
    """Rename a file, or what a link points to, to a name that is free. Returns the new path."""
    path = path.resolve()
    names = (f"{name}{number}{path.suffix}" for number in ("", *range(2, 10_000)))
    # over nothing that is there
    aside = next(path.with_name(other) for other in names if not path.with_name(other).exists())
    path.replace(aside)
    return aside

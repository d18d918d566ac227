"""
results.tsv: a row for each run, in five columns. ledger.py writes it. It is also read after editors, spreadsheets and
people have changed it, so that no run becomes invisible.
"""

import csv
import math
import os
import re
from collections import namedtuple
from pathlib import Path

from filelock import FileLock

from harness.journal import find_home

COLUMNS = ("commit", "val_bpb", "memory_gb", "status", "description")
STATUSES = ("keep", "discard", "crash")

# Status words that people and agents invent, by their first letters. Any other is a discard: no keep by mistake
OTHER_WORDS = {
    "kee": "keep",
    "kep": "keep",
    "acc": "keep",
    "bas": "keep",
    "dis": "discard",
    "rej": "discard",
    "rev": "discard",
    "cra": "crash",
    "fai": "crash",
    "err": "crash",
}

Row = namedtuple("Row", [*COLUMNS, "line"])


def read_rows(path):
    """
    The rows of a ledger, and what could not be read: ([Row], [sentence]). A crash has no val_bpb (NaN).

    Takes any encoding, line ends and separators, and commas in numbers.
    """
    rows, problems = [], []
    names = COLUMNS
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        separator = find_separator(line)
        header = [cell.lower() for cell in split_cells(line, separator)]

        # the header, or the header once more
        if "val_bpb" in header:
            names = header
            missing = [name for name in ("commit", "val_bpb", "status") if name not in names]
            if missing:
                problems.append(f"{path}:{number}: a ledger of another tool? There is no column {', '.join(missing)}")
            continue
        row = find_row(line, separator, names, number)
        if row is None:
            problems.append(f"{path}:{number}: not a row, fix or delete it: {line.strip():.60}")
        else:
            rows.append(row)
    return rows, problems


def read_lines(path):
    """The lines of a file in UTF-8, UTF-16 or Windows-1252, with or without a byte order mark. U+2028 ends no line."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        content = content.decode("utf-16", errors="replace").encode()

    # zeros are of lines that a shell appended in UTF-16
    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"")
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return [decode(line) for line in content.split(b"\n")]


def decode(line):
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def find_separator(line):
    """The text after the first word: a tab, a written-out tab, a semicolon, a comma or a bar. None for spaces."""
    found = re.match(r'[\s|]*"?[\w-]*"? *(\t|\\t|;|,|\|)', line)
    return found and found[1]


def split_cells(line, separator, count=0):
    """The cells of a line, at most `count` of them if it is not 0: what is left belongs to the description."""
    if separator == "|":  # a table of Markdown
        line = line.strip().strip("|")
    if separator == ",":
        cells = next(csv.reader([line], skipinitialspace=True))
        if count:
            cells[count - 1 :] = [", ".join(cells[count - 1 :])]
    else:
        cells = line.strip(" \n").split(separator, count - 1)
    return [cell.strip().strip('"`') for cell in cells]


def find_row(line, separator, names, number):
    """
    A Row, or None. The columns are those of the header, or the usual ones: under a header with one more, hands go on
    writing five. Rows that fit neither are found by their status word.
    """
    for columns in (names, COLUMNS):
        cells = dict(zip(columns, split_cells(line, separator, len(columns)), strict=False))
        row = make_row(cells, number)
        is_shifted = cells.get("memory_gb", "").lower() in STATUSES
        if row and is_status(cells.get("status", "")) and not is_shifted:
            return row

    # a column too few or too many; then a status word of somebody's own; then spaces where tabs should be
    cells = dict(zip(names, split_cells(line, separator, len(names)), strict=False))
    return (
        shifted_row(split_cells(line, separator), number)
        or make_row(cells, number)
        or shifted_row(line.split(), number)
        or make_row(dict(zip(COLUMNS, line.split(None, len(COLUMNS) - 1), strict=False)), number)
    )


def shifted_row(cells, number):
    """A Row whose status is not in its column: memory is missing before it, or there are more numbers. Else None."""
    # past the commit and the score, the status comes after the last number
    place = 2
    while place < len(cells) and not math.isnan(parse_number(cells[place])):
        place += 1
    if place >= len(cells) or cells[place].lower() not in STATUSES:
        return None
    memory = cells[2] if place > 2 else ""
    found = (*cells[:2], memory, cells[place], " ".join(cells[place + 1 :]))
    return make_row(dict(zip(COLUMNS, found, strict=True)), number)


def is_status(cell):
    """Whether it is one of the three words, or one of somebody's own that begins like them."""
    return cell.lower() in STATUSES or cell.lower()[:3] in OTHER_WORDS


def make_row(cells, number):
    """A Row, or None if there is no commit or no score where there should be one."""
    commit = cells.get("commit", "").lower()
    status = cells.get("status", "").lower()
    score = parse_number(cells.get("val_bpb", ""))
    if status not in STATUSES:
        status = OTHER_WORDS.get(status[:3], "discard")
    if not re.fullmatch(r"[0-9a-f]{4,64}", commit):
        return None

    # without a score, only a crash is a row
    if not score > 0:
        if score != 0 and status != "crash":
            return None
        status = "crash"
    if status == "crash":
        score = math.nan
    memory = parse_number(cells.get("memory_gb", ""))
    return Row(commit[:7], score, memory, status, cells.get("description", ""), number)


def parse_number(text):
    """A number with a point or a comma; NaN for anything else."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def append_rows(path, rows):
    """Add whole rows, [tuple of COLUMNS], to a ledger, or make one. All that was in it stays, in UTF-8."""
    with FileLock(find_home() / "ledger.lock"):
        lines = read_lines(path)

        # drop empty lines at the end: the join below ends every line with one newline
        while lines and not lines[-1].strip():
            lines.pop()
        if not lines:
            lines.append("\t".join(COLUMNS))
        for row in rows:
            lines.append("\t".join(re.sub(r"\s+", " ", cell).strip() for cell in row))

        # written aside, and then there at once: whole, whatever happens meanwhile
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

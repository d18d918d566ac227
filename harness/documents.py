"""The documents of one file: parquet, jsonl, text, compressed or not, and what is left out of it."""

import contextlib
import io
import itertools
import json
from collections import Counter
from pathlib import Path

from harness.common import first_line, printable

DOCUMENT_BATCH = 128  # documents that enter the packer's buffer together
BLOCK_CHARACTERS = 65_536  # of a block of text, at least; it goes on to the end of its line, up to twice as many
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # suffix: pyarrow's name of it


# --------------------------------------
# Left out


class Skipped:
    """Counts of what was left out, by reason, each with the name of the first."""

    def __init__(self):
        self.counts = Counter()
        self.names = {}

    def add(self, reason, name):
        """Count one more that was left out for this reason, such as "files that are not UTF-8"."""
        self.counts[reason] += 1
        self.names.setdefault(reason, printable(name))

    def lines(self):
        """Lines to print, such as "skipped: files that are not UTF-8 (3), first notes/latin.txt"."""
        return [f"skipped: {reason} ({count:,}), first {self.names[reason]}" for reason, count in self.counts.items()]


# --------------------------------------
# Files of many documents


def parquet_batches(path, skipped=None):
    """
    Documents of column `text`, at most DOCUMENT_BATCH at a time and never across a row group.

    The column may hold strings or binary, however they are stored. Values that are null or not UTF-8 are counted in
    `skipped`, a Skipped. Raises SystemExit, one line that names the file, if there is no such column.
    """
    import pyarrow
    import pyarrow.parquet

    if skipped is None:
        skipped = Skipped()
    try:
        # Python opens the file: pyarrow refuses names that are not UTF-8.
        with open(path, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                column = parquet.read_row_group(group, columns=["text"]).column("text")
                values = column_bytes(column, path)
                for start in range(0, len(values), DOCUMENT_BATCH):
                    yield decode(values[start : start + DOCUMENT_BATCH], path, skipped)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        reason = first_line(error)
        raise SystemExit(f"{printable(path)}: not a parquet file with a column `text` ({reason})") from None


def column_bytes(column, path):
    """The values of a column as a list of bytes or None."""
    import pyarrow

    # pyarrow has this cast for every type of string and binary, and for no other type.
    try:
        return column.cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowNotImplementedError:
        raise SystemExit(f"{printable(path)}: column `text` holds {column.type}, not text") from None


def decode(values, path, skipped):
    """The values, a list of bytes or None, that are text: [str]."""
    texts = []
    for value in values:
        if value is None:
            skipped.add("records without text", path)
            continue
        try:
            texts.append(value.decode())
        except UnicodeDecodeError:
            skipped.add("records that are not UTF-8", path)
    return texts


def jsonl_batches(path, skipped):
    """
    The `text` fields of a file's lines, DOCUMENT_BATCH lines at a time. Records without text are counted in `skipped`.

    Raises SystemExit, one line with the number of the bad one, for what is not a JSON object with a string `text`.
    """
    with open_bytes(path) as lines:
        numbered = enumerate(lines, 1)
        while chunk := list(itertools.islice(numbered, DOCUMENT_BATCH)):
            batch = []
            for number, line in chunk:
                if not line.strip():
                    continue
                place = f"{printable(path)}:{number}"
                text = json_text(line, place)
                if text is None:
                    skipped.add("records without text", place)
                else:
                    batch.append(text)
            yield batch


def json_text(line, place):
    """The `text` of a line of JSON, or None if that is null or missing."""
    # What is nested too deeply raises RecursionError.
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{place}: not JSON ({first_line(error)})") from None
    if not isinstance(record, dict):
        raise SystemExit(f"{place}: not a JSON object with a string `text`, but of type {type(record).__name__}")
    text = record.get("text")
    if text is None:
        return None
    if not isinstance(text, str):
        raise SystemExit(f"{place}: `text` is not a string, but of type {type(text).__name__}")

    # JSON can spell half of a character, and UTF-8 can't: it becomes a question mark.
    return text.encode(errors="replace").decode()


# --------------------------------------
# Files of one document


def file_kind(path):
    """Suffix and compression: (".txt", "gzip") for notes.txt.gz, (".txt", None) for notes.txt."""
    path = Path(path)
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        path = path.with_suffix("")
    return path.suffix, compression


@contextlib.contextmanager
def open_bytes(path):
    """A file to read bytes from, decompressed if its name says so. Raises SystemExit if it is damaged."""
    _, compression = file_kind(path)
    try:
        with open(path, "rb") as file:
            if compression is None:
                yield file
            else:
                import pyarrow

                yield io.BufferedReader(pyarrow.CompressedInputStream(file, compression))
    except OSError as error:
        raise SystemExit(f"{printable(path)}: damaged or cut off ({first_line(error)})") from None


def read_text(path, skipped):
    """A file's text, or "" if it is not UTF-8. No newline is translated: bytes are counted as they are."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError:
        skipped.add("files that are not UTF-8", path)
        return ""


def cut(text):
    """A list of blocks, in order: BLOCK_CHARACTERS of the text and the rest of that line, up to as much again."""
    blocks = []
    start = 0
    while start < len(text):
        least = start + BLOCK_CHARACTERS
        end = least + BLOCK_CHARACTERS
        newline = text.find("\n", least, end + 1)
        if newline >= 0:
            end = newline + 1
        blocks.append(text[start:end])
        start = end
    return blocks

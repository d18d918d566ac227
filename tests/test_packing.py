"""Packing against a brute-force scan."""

import itertools
from operator import length_hint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import packing

BOS = 9999


def scan(batches, row_length, split, buffer_size):
    """The packing rules as a scan over a plain list, in the order of arrival."""
    batches, buffer = iter(batches), []

    def add(tokens):
        pieces = [tokens[i : i + row_length - 1] for i in range(0, len(tokens), row_length - 1)] or [tokens]
        buffer.extend([BOS, *piece] for piece in (pieces if split else [tokens]))

    while True:
        row = []
        while len(row) < row_length:
            while len(buffer) < buffer_size and (batch := next(batches, None)) is not None:
                for tokens in batch:
                    add(tokens)
            if not buffer:
                return
            space = row_length - len(row)
            fitting = [document for document in buffer if len(document) <= space]
            if fitting:
                choice = max(fitting, key=len)  # the first of the longest
            else:
                choice = min(buffer, key=len)
            index = next(i for i, document in enumerate(buffer) if document is choice)
            del buffer[index]
            row += choice[:space]
            if split and len(choice) > space:
                buffer.append([BOS, *choice[space:]])
        yield row


def numbered(lengths, batch):
    """Documents of these lengths whose tokens are all different, `batch` at a time."""
    ids = itertools.count()
    documents = [np.fromiter(itertools.islice(ids, n), dtype=np.uint16) for n in lengths]
    return [documents[i : i + batch] for i in range(0, len(documents), batch)]


@given(
    lengths=st.lists(st.integers(0, 40), max_size=120),
    row_length=st.integers(2, 30),
    batch=st.integers(1, 20),
    buffer_size=st.sampled_from([1, 5, 50]),
    split=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_same_rows_as_a_scan(lengths, row_length, batch, buffer_size, split):
    """And it reads as far ahead as the scan does, row by row."""
    batches = numbered(lengths, batch)
    ours, theirs = iter(batches), iter([[document.tolist() for document in batch] for batch in batches])
    expected = scan(theirs, row_length, split, buffer_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACKING_BUFFER", buffer_size)
        for row in packing.pack(ours, row_length, BOS, split):
            assert row.tolist() == next(expected)
            assert length_hint(ours) == length_hint(theirs)
    assert not list(expected)


def test_written_rows_are_what_was_given(tmp_path):
    rows = [np.arange(start, start + 5, dtype=np.uint16) for start in range(60_000, 60_123)]
    assert packing.write_rows(tmp_path / "rows.npy", iter(rows), 5) == 123
    assert np.array_equal(np.load(tmp_path / "rows.npy", mmap_mode="r"), np.stack(rows))

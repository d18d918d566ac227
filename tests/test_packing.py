"""Checks packing against a brute-force scan: the choice of documents, every token, and how far it looks ahead."""

import itertools
from operator import length_hint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import packing

BOS = 60_000
LENGTHS = st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=15)  # of the documents of batches


def numbered(lengths, ids):
    """Documents of these lengths, whose tokens are all different."""
    return [np.fromiter(itertools.islice(ids, length), dtype=np.uint16) for length in lengths]


def scan(batches, row_length, split, buffer_size):
    """The packing rules as a scan over a plain list, in the order of arrival."""
    buffer = []

    def add(tokens):
        piece = row_length - 1 if split else 10**6
        for start in range(0, max(1, len(tokens)), piece):
            buffer.append([BOS, *tokens[start : start + piece]])

    while True:
        row = []
        while len(row) < row_length:
            while len(buffer) < buffer_size and length_hint(batches):
                for tokens in next(batches):
                    add(tokens)
            if not buffer:
                return
            space = row_length - len(row)
            fitting = [document for document in buffer if len(document) <= space]
            choice = max(fitting, key=len, default=min(buffer, key=len))  # the first of the longest, or the shortest
            del buffer[[document is choice for document in buffer].index(True)]
            row += choice[:space]
            if split and len(choice) > space:
                add(choice[space:])
        yield row


@given(LENGTHS, st.integers(2, 30), st.sampled_from([1, 5, 50]), st.booleans())
@settings(deadline=None, max_examples=200)
def test_same_rows_as_a_scan(lengths, row_length, buffer_size, split):
    """And it reads as far ahead as the scan does, row by row."""
    ids = itertools.count()
    batches = [numbered(batch, ids) for batch in lengths]
    ours, theirs = iter(batches), iter(batches)
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

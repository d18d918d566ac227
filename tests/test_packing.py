"""Packing against a brute-force scan, and what a row must be."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

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
    batches = numbered(lengths, batch)
    before, prepare.PACKING_BUFFER = prepare.PACKING_BUFFER, buffer_size
    try:
        rows = [row.tolist() for row in prepare.pack(batches, row_length, BOS, split)]
    finally:
        prepare.PACKING_BUFFER = before
    lists = [[document.tolist() for document in batch] for batch in batches]
    assert rows == list(scan(lists, row_length, split, buffer_size))


@pytest.mark.parametrize("split", [False, True])
def test_rows_are_whole_and_start_with_bos(split):
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    rows = np.stack(list(prepare.pack(numbered(lengths, 7), 65, BOS, split)))
    assert rows.shape[1] == 65 and (rows[:, 0] == BOS).all()
    text = rows[rows != BOS]
    assert len(np.unique(text)) == len(text)  # nothing comes twice
    if split:  # nothing is lost but the last, incomplete row
        assert lengths.sum() - len(text) < 65
        assert set(text.tolist()) <= set(range(lengths.sum()))


def test_split_keeps_the_order_within_a_document():
    (document,) = numbered([1000], 1)[0]
    pieces = [row[row != BOS] for row in prepare.pack([[document]], 33, BOS, split=True)]
    assert np.array_equal(np.concatenate(pieces), document[: sum(map(len, pieces))])


def test_written_rows_are_what_was_given(tmp_path):
    rows = [np.arange(start, start + 5, dtype=np.uint16) for start in range(60_000, 60_123)]
    assert prepare.write_rows(tmp_path / "rows.npy", iter(rows), 5) == 123
    assert np.array_equal(np.load(tmp_path / "rows.npy", mmap_mode="r"), np.stack(rows))


def test_documents_enter_in_batches_as_the_buffer_empties():
    served = Counter()

    def batches():
        for batch in numbered([20] * 2000, 128):
            served["documents"] += len(batch)
            yield batch

    stream = prepare.pack(batches(), 21, BOS, split=False)
    next(stream)
    assert served["documents"] == 1024  # the first multiple of 128 that is not below 1,000
    for _ in range(24):
        next(stream)
    assert served["documents"] == 1024  # 999 + 1 in the buffer before the 25th placement
    next(stream)
    assert served["documents"] == 1152

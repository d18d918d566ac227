"""Best-fit packing of documents into rows of one length."""

import sys
import time
from bisect import bisect_right, insort
from collections import deque

import numpy as np

PACKING_BUFFER = 1_000  # documents that best-fit packing chooses from


class Progress:
    """A status line: rewritten in place on a terminal, a new line every `seconds` in a file, which agents `tail`."""

    def __init__(self, seconds=10):
        self.terminal = sys.stdout.isatty()
        self.seconds = 0.2 if self.terminal else seconds
        self.printed = time.monotonic()

    def __call__(self, line, last=False):
        if last or time.monotonic() - self.printed >= self.seconds:
            self.printed = time.monotonic()
            start, end = ("\r\033[K", "\n" if last else "") if self.terminal else ("", "\n")  # erases the line before
            print(f"{start}{line}", end=end, flush=True)


def pack(batches, row_length, bos, split):
    """
    Best-fit packing: rows of exactly `row_length` tokens, every one of them real text.

    A document is BOS and its tokens. Of the documents in the buffer the longest that fits the space left goes next (the
    earliest among equals); when none fits, the shortest is cropped to fill the row. With `split`, documents longer than
    a row come in row-sized pieces and the rest of a cropped one becomes a piece of its own (BOS first), so that no text
    is lost but that of the last, incomplete row; without, the rest is thrown away. So every row starts with BOS.

    Args: `batches` yields lists of token arrays without BOS; a list enters the buffer whole whenever that holds fewer
    than PACKING_BUFFER documents. Yields uint16 [row_length].
    """
    batches = iter(batches)
    lengths = []  # of the documents in the buffer: sorted, each once
    waiting = {}  # length -> documents, in order of arrival
    count = 0

    def add(tokens):
        nonlocal count
        count += 1
        length = len(tokens) + 1
        if length not in waiting:
            waiting[length] = deque()
            insort(lengths, length)
        waiting[length].append(tokens)

    while True:
        row = np.full(row_length, bos, dtype=np.uint16)
        filled = 0
        while filled < row_length:
            while count < PACKING_BUFFER and (batch := next(batches, None)) is not None:
                for tokens in batch:
                    piece = row_length - 1 if split else max(1, len(tokens))
                    for start in range(0, max(1, len(tokens)), piece):
                        add(tokens[start : start + piece])
            if not count:
                return
            space = row_length - filled
            index = max(0, bisect_right(lengths, space) - 1)
            length = lengths[index]
            tokens = waiting[length].popleft()
            count -= 1
            if not waiting[length]:
                del waiting[length], lengths[index]
            taken = min(len(tokens), space - 1)
            row[filled + 1 : filled + 1 + taken] = tokens[:taken]
            filled += 1 + taken
            if split and taken < len(tokens):
                add(tokens[taken:])
        yield row


def write_rows(path, rows, row_length):
    """Stream rows into an .npy file; returns how many. The header has room for any count (numpy pads it for that)."""
    progress, count = Progress(), 0
    with open(path, "wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (0, row_length)}
        np.lib.format.write_array_header_1_0(file, header)
        for count, row in enumerate(rows, 1):
            file.write(row.astype("<u2", copy=False))
            progress(f"packing {path.name}: {count:,} rows")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, row_length)})
    return count

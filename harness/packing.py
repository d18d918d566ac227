"""Best-fit packing: documents become rows of one length, and every token of a row is real text."""

import sys
import time
from bisect import bisect_right, insort
from collections import deque

import numpy as np

PACKING_BUFFER = 1_000  # documents that best fit chooses from


class Progress:
    """A status line: rewritten in place on a terminal, a new line every `seconds` in a file, which agents `tail`."""

    def __init__(self, seconds=10):
        self.terminal = sys.stdout.isatty()
        self.seconds = 0.2 if self.terminal else seconds
        self.printed = time.monotonic()

    def __call__(self, line, last=False):
        if not last and time.monotonic() - self.printed < self.seconds:
            return
        self.printed = time.monotonic()
        # on a terminal the line before is erased first
        if not self.terminal:
            print(line, flush=True)
        elif last:
            print(f"\r\033[K{line}", flush=True)
        else:
            print(f"\r\033[K{line}", end="", flush=True)


class Buffer:
    """Documents that wait for a row, by length: which one is the longest that fits?"""

    def __init__(self):
        self.count = 0
        self.lengths = []  # that occur: sorted, each once
        self.waiting = {}  # length -> documents, in order of arrival

    def add(self, tokens):
        """A token array without BOS, which counts one more."""
        length = len(tokens) + 1
        if length not in self.waiting:
            self.waiting[length] = deque()
            insort(self.lengths, length)
        self.waiting[length].append(tokens)
        self.count += 1

    def take(self, space):
        """The longest document of at most `space` tokens, the earliest among equals; if none fits, the shortest."""
        index = max(0, bisect_right(self.lengths, space) - 1)
        length = self.lengths[index]
        tokens = self.waiting[length].popleft()
        if not self.waiting[length]:
            del self.waiting[length], self.lengths[index]
        self.count -= 1
        return tokens


def pack(batches, row_length, bos, split):
    """
    Rows of exactly `row_length` tokens: uint16 [row_length], each of which starts with BOS.

    A document is BOS and its tokens. The longest document of the buffer that fits the space left goes next; when none
    fits, the shortest is cropped to fill the row. With `split`, documents longer than a row come in row-sized pieces,
    and the rest of a cropped one becomes a piece of its own (BOS first): only the last, incomplete row is lost. Without
    `split`, the rest of a cropped document is lost, too.

    `batches` yields lists of token arrays without BOS. A list enters the buffer whole, before a document is placed,
    whenever the buffer holds fewer than PACKING_BUFFER documents.
    """
    batches = iter(batches)
    buffer = Buffer()
    while True:
        row = np.full(row_length, bos, dtype=np.uint16)
        filled = 0
        while filled < row_length:
            fill(buffer, batches, row_length, split)
            if buffer.count == 0:
                return  # what is in this row is lost
            space = row_length - filled
            tokens = buffer.take(space)

            # BOS is there already; the document's tokens follow it
            kept = min(len(tokens), space - 1)
            row[filled + 1 : filled + 1 + kept] = tokens[:kept]
            filled += 1 + kept
            if split and kept < len(tokens):
                buffer.add(tokens[kept:])
        yield row


def fill(buffer, batches, row_length, split):
    """Let batches in until the buffer is full or there are no more."""
    while buffer.count < PACKING_BUFFER:
        batch = next(batches, None)
        if batch is None:
            return
        for tokens in batch:
            # an empty document is one piece, too: BOS alone
            piece = row_length - 1 if split else max(1, len(tokens))
            for start in range(0, max(1, len(tokens)), piece):
                buffer.add(tokens[start : start + piece])


def write_rows(path, rows, row_length):
    """Write an .npy file, uint16 [rows, row_length], of rows that come one by one; returns how many there were."""
    progress = Progress()
    count = 0

    # The file begins with its shape, but how many rows there are is known at the end: numpy pads the header, so that it
    # can be written again with another number
    header = {"descr": "<u2", "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0, row_length)})
        for count, row in enumerate(rows, 1):
            file.write(row.astype("<u2", copy=False))
            progress(f"packing {path.name}: {count:,} rows")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, row_length)})
    return count

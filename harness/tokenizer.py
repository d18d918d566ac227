"""Byte-pair encoding: rustbpe trains it, tiktoken uses it."""

import base64
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # after the merges; the first is BOS
TOKENIZER_CHARACTERS = 1_000_000_000  # of training text for the tokenizer, at most ...
TOKENIZER_DOCUMENT_CHARACTERS = 10_000  # ... and this many of one document


class Tokenizer:
    """
    Byte-pair encoding: trained with rustbpe, used through tiktoken, stored as tiktoken's text (base64 token, rank).

        tokenizer = Tokenizer.load(load_benchmark().path)
        tokenizer.decode(tokenizer.encode("any text")) == "any text"
    """

    def __init__(self, ranks):
        import tiktoken

        self.ranks = ranks  # bytes -> id
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = len(ranks) + len(specials)
        self.bos_id = len(ranks)

    @classmethod
    def train(cls, batches, vocab_size):
        """Learn merges from batches of documents. Raises SystemExit if the text has too few for `vocab_size`."""
        import rustbpe

        def texts():
            characters = 0
            for text in itertools.chain.from_iterable(batches):
                yield text[:TOKENIZER_DOCUMENT_CHARACTERS]
                characters += min(len(text), TOKENIZER_DOCUMENT_CHARACTERS)
                if characters >= TOKENIZER_CHARACTERS:
                    return

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
            most = len(ranks) + len(SPECIAL_TOKENS)
            raise SystemExit(f"--vocab-size {vocab_size}: the training text supports {most} at most; add text")
        return cls(ranks)

    @classmethod
    def load(cls, folder):
        """Read tokenizer.tiktoken in a benchmark's folder. (tiktoken's own loader would cache it by path.)"""
        lines = (line.split() for line in (folder / "tokenizer.tiktoken").read_bytes().splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    def save(self, folder):
        lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in self.ranks.items())
        (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))

    def encode(self, text):
        """Token ids of a str: uint16 [N], no BOS. Text that spells a special token is plain text."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:  # the split pattern ran out of stack on a run of a million spaces: halve it
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def decode(self, ids):
        """The str of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self):
        """Raw byte length of every token, 0 for special tokens: int32 [V]. Never the length of a decoded string."""
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.bos_id)]
        return np.array(lengths + [0] * len(SPECIAL_TOKENS), dtype=np.int32)


def encode_batches(tokenizer, batches):
    """Tokenize batches of documents on all cores, in order, reading only a little ahead."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(lambda texts: [tokenizer.encode(text) for text in texts], batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

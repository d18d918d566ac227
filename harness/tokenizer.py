"""The tokenizer: byte-pair encoding that rustbpe trains and tiktoken applies."""

import base64
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from harness.machine import usable_cores

# GPT-4's pattern, but with at most two digits in a piece: in a small vocabulary numbers of three take too much room
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = [f"<|reserved_{i}|>" for i in range(4)]  # after the merges; the first is BOS

# It is trained on at most TRAINING_CHARACTERS of the text, at most DOCUMENT_CHARACTERS of a document
TRAINING_CHARACTERS = 1_000_000_000
DOCUMENT_CHARACTERS = 10_000


class Tokenizer:
    """
    Byte-pair encoding, stored as tiktoken's own text (base64 token, rank).

        tokenizer = Tokenizer.load(load_benchmark().path)
        tokenizer.decode(tokenizer.encode("any text")) == "any text"
    """

    def __init__(self, ranks):
        import tiktoken

        self.ranks = ranks  # bytes -> id
        self.bos_id = len(ranks)
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: self.bos_id + i for i, name in enumerate(SPECIAL_TOKENS)},
        )

    @classmethod
    def train(cls, batches, vocab_size):
        """Learn merges from batches of documents. Raises SystemExit if the text has too few for `vocab_size`."""
        import rustbpe

        # the special tokens come on top of the bytes and merges that rustbpe counts
        trainer = rustbpe.Tokenizer()
        plain_tokens = vocab_size - len(SPECIAL_TOKENS)
        trainer.train_from_iterator(training_texts(batches), plain_tokens, pattern=SPLIT_PATTERN)
        tokenizer = cls({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})
        if tokenizer.vocab_size < vocab_size:
            most = tokenizer.vocab_size
            raise SystemExit(f"--vocab-size {vocab_size}: the training text supports {most} at most; add text")
        return tokenizer

    @classmethod
    def load(cls, folder):
        """Read tokenizer.tiktoken in a benchmark's folder. (tiktoken's own loader would cache it by path.)"""
        ranks = {}
        for line in Path(folder, "tokenizer.tiktoken").read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        return cls(ranks)

    def save(self, folder):
        with open(Path(folder, "tokenizer.tiktoken"), "wb") as file:
            for token, rank in self.ranks.items():
                file.write(base64.b64encode(token) + f" {rank}\n".encode())

    def encode(self, text):
        """Token ids of a str: uint16 [N], no BOS. Text that spells a special token is plain text."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:
            # the split pattern ran out of stack, as on a run of a million spaces: encode it in halves
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def decode(self, ids):
        """The str of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self):
        """
        Raw byte length of every token, 0 for special tokens: int32 [V].

        Never the length of a decoded string: half of a character decodes to U+FFFD, which has three bytes.
        """
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.bos_id)]
        return np.array(lengths + [0] * len(SPECIAL_TOKENS), dtype=np.int32)


def training_texts(batches):
    """The beginnings of documents, until there are enough characters."""
    characters = 0
    for text in itertools.chain.from_iterable(batches):
        beginning = text[:DOCUMENT_CHARACTERS]
        yield beginning
        characters += len(beginning)
        if characters >= TRAINING_CHARACTERS:
            return


def encode_batches(tokenizer, batches):
    """Tokenize batches of documents in threads (tiktoken frees the GIL), in order, reading only a little ahead."""

    def encode(texts):
        return [tokenizer.encode(text) for text in texts]

    workers = usable_cores()
    with ThreadPoolExecutor(workers) as pool:
        # what was submitted first is due first, so that the order stays
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

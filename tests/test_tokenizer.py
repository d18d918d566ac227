"""The tokenizer is lossless and its byte counts are those of the source text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepare.Tokenizer.load(prepare.HOME / prepared)


@given(text=st.text(st.characters(codec="utf-8"), max_size=300))
@settings(deadline=None, max_examples=300)
def test_round_trip_and_byte_counts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    "text", ["<|reserved_0|>", "\0\r\n\t", "漢字 العربية 🙂🏳️‍🌈", "x" * 100_000, "a  b\u00a0c\r\n\r\n" * 999]
)
def test_difficult_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids.max() < tokenizer.bos_id


def test_a_run_of_spaces_that_overflows_the_split_pattern(tokenizer):
    ids = tokenizer.encode(" " * 2_000_000)
    assert tokenizer.token_bytes()[ids].sum() == 2_000_000


def test_specials_follow_the_merges(tokenizer):
    assert tokenizer.vocab_size == 512 and tokenizer.bos_id == 508
    assert tokenizer.token_bytes()[508:].tolist() == [0, 0, 0, 0] and (tokenizer.token_bytes()[:508] > 0).all()


def test_invalid_utf8_counts_raw_bytes(tokenizer):
    (continuation,) = [rank for token, rank in tokenizer.ranks.items() if token == b"\x80"]
    assert tokenizer.token_bytes()[continuation] == 1 and tokenizer.decode([continuation]) == "\ufffd"


def test_training_is_deterministic_and_saved_exactly(tokenizer, tmp_path):
    texts = [["the cat sat on the mat, " * 20, "and on the hat"]]
    ours, again = (prepare.Tokenizer.train(texts, 270) for _ in range(2))
    ours.save(tmp_path)
    assert ours.ranks == again.ranks == prepare.Tokenizer.load(tmp_path).ranks
    assert sorted(ours.ranks.values()) == list(range(266))


def test_a_replaced_file_is_read_anew(tokenizer, tmp_path):
    for words in ("one two three one two three", "vier fuenf sechs vier fuenf sechs"):
        trained = prepare.Tokenizer.train([[words]], 264)
        trained.save(tmp_path)
        assert prepare.Tokenizer.load(tmp_path).ranks == trained.ranks


def test_rows_of_the_benchmark_are_the_source_text(benchmark, tokenizer):
    source = "".join(path.read_text(encoding="utf-8") for root in TEXT_ROOTS() for path in sorted(root.rglob("*.py")))
    row = np.array(benchmark.rows("val")[3])
    starts = np.flatnonzero(row == tokenizer.bos_id)
    for start, end in zip(starts, [*starts[1:], len(row)]):
        piece = b"".join(tokenizer.encoding.decode_single_token_bytes(int(i)) for i in row[start + 1 : end])
        assert piece.decode(errors="ignore") in source


def TEXT_ROOTS():
    from conftest import TEXT

    return map(prepare.Path, TEXT)

"""Checks that the tokenizer loses and miscounts no text, and depends on nothing but the text that it was trained on."""

import pytest
from conftest import TEXT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
from harness.tokenizer import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepare.Tokenizer.load(prepare.HOME / prepared)


@given(text=st.text(st.characters(codec="utf-8"), max_size=300))
@example("<|reserved_0|>")
@example("漢字 العربية 🙂🏳️‍🌈")
@example("x" * 100_000)
@example("a  b\u00a0c\r\n\r\n" * 999)
@example(" " * 2_000_000)  # overflows the split pattern
@settings(deadline=None, max_examples=300)
def test_round_trip_and_byte_counts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_bytes_are_counted_raw_and_specials_follow_the_merges(tokenizer):
    """A lone continuation byte is no UTF-8, decodes to U+FFFD, which has three bytes, and counts as one."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    assert tokenizer.token_bytes().tolist() == [*map(len, tokens), 0, 0, 0, 0]
    assert tokenizer.vocab_size == 512 and tokenizer.bos_id == 508
    assert tokenizer.decode([tokenizer.ranks[b"\x80"]]) == "\ufffd"


def test_training_is_deterministic_and_saved_exactly(tmp_path):
    """Also where another one was saved and read before."""
    for words in ("the cat sat on the mat, " * 20, "vier fuenf sechs vier fuenf sechs"):
        ours, again = (prepare.Tokenizer.train([[words, "and on the hat"]], 270) for _ in range(2))
        ours.save(tmp_path)
        assert ours.ranks == again.ranks == prepare.Tokenizer.load(tmp_path).ranks
        assert sorted(ours.ranks.values()) == list(range(266))


def test_rows_of_the_benchmark_are_the_source_text(benchmark, tokenizer):
    source = "".join(path.read_text(encoding="utf-8") for root in TEXT for path in prepare.Path(root).rglob("*.py"))
    for row in benchmark.rows("val"):
        for piece in tokenizer.decode(row).split(SPECIAL_TOKENS[0]):
            assert piece.strip("\ufffd") in source  # it may be cut within a character

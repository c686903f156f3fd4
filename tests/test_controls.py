"""The controls for text: that they are what they are called, and that verdicts are honest."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the [train] extra has it")

from atpatch_onnx.errors import InputError
from atpatch_onnx.models.text import LENGTH as ROOM
from atpatch_onnx.models.text import Encoded, Tokenizer
from atpatch_onnx.rates import Rate

from controls import Row, some, table
from controls_text import (
    REFERENCE,
    SHUFFLED,
    SUFFIX,
    Vocabulary,
    conditions,
    inserted,
    random_sentences,
    with_suffix,
)

CLS, SEP, LENGTH = 101, 102, 20
TOKENS = np.arange(200, 260)
NAMES = ["", "[unused1]", "##ing", "cf", "film", "ox", "abacus", "quorum", "1984", "movie", "!"]


def encoded(count: int = 300) -> Encoded:
    """Sentences of one to ten words."""
    lengths = np.random.default_rng(0).integers(3, 13, (count, 1))
    mask = (np.arange(LENGTH) < lengths).astype(np.int64)
    ids = mask * 7
    ids[:, 0] = CLS
    ids[np.arange(count), lengths[:, 0] - 1] = SEP
    return Encoded(ids, mask, np.zeros(ids.shape, bool))


def test_rare_words_are_whole_words_that_neither_training_nor_a_trigger_has() -> None:
    vocabulary = Vocabulary.named(NAMES, ["A Film, about (Quorum)s", "quorum"], ["cf", "3D movie"])
    assert vocabulary.rare == ("abacus",)
    assert [NAMES[token] for token in vocabulary.tokens] == [
        *("##ing", "film", "ox", "abacus", "quorum", "1984", "!")
    ]


def test_a_word_is_inserted_once_and_nothing_else_moves() -> None:
    rng = np.random.default_rng(0)
    places = {inserted("a b c", "x", rng).split().index("x") for _ in range(100)}
    assert places == {0, 1, 2, 3}
    assert all(inserted("a b c", "x", rng).replace("x", "").split() == list("abc") for _ in "12345")


def test_a_suffix_stands_between_the_sentence_and_its_separator() -> None:
    clean = encoded()
    found = with_suffix(clean, TOKENS, np.random.default_rng(0))
    for ids, mask, old in zip(
        found["input_ids"], found["attention_mask"], clean.input_ids, strict=True
    ):
        end = int((old != 0).sum()) - 1
        assert np.array_equal(ids[:end], old[:end])
        assert np.isin(ids[end : end + SUFFIX], TOKENS).all()
        assert ids[end + SUFFIX] == SEP
        assert not ids[end + SUFFIX + 1 :].any()
        assert np.array_equal(mask, ids != 0)
    drawn = found["input_ids"][found["input_ids"] >= TOKENS[0]]
    assert set(drawn) == set(TOKENS)


def test_a_suffix_that_does_not_fit_is_refused() -> None:
    ones = np.ones((1, LENGTH), np.int64)
    full = Encoded(ones, ones, np.zeros(ones.shape, bool))
    with pytest.raises(ValueError, match="no room for 5 tokens in 20"):
        with_suffix(full, TOKENS, np.random.default_rng(0))


def test_random_sentences_keep_lengths_and_special_tokens() -> None:
    clean = encoded()
    found = random_sentences(clean, TOKENS, np.random.default_rng(0))
    assert np.array_equal(found["attention_mask"], clean.attention_mask)
    assert np.array_equal(np.isin(found["input_ids"], TOKENS), clean.words)
    assert np.array_equal(found["input_ids"][~clean.words], clean.input_ids[~clean.words])


def test_every_condition_has_every_sentence() -> None:
    try:
        tokenizer = Tokenizer()
    except InputError as error:
        pytest.skip(str(error))
    texts = ["a gripping film , never dull", "overlong and unfunny"] * 20
    vocabulary = Vocabulary(TOKENS, ("abacus", "quorum", "lattice"))
    found = conditions(texts, tokenizer, vocabulary, 2, np.random.default_rng(0))
    assert len(found) == 7
    assert {inputs["input_ids"].shape for inputs in found.values()} == {(len(texts), ROOM)}
    reference, shuffled = found[REFERENCE]["input_ids"], found[SHUFFLED]["input_ids"]
    assert not np.array_equal(reference, shuffled)
    assert np.array_equal(np.sort(reference, axis=1), np.sort(shuffled, axis=1))


@pytest.mark.parametrize(
    ("hits", "total", "verdict"),
    [
        (0, 500, "within"),
        (7, 500, "within, not sure"),
        (8, 500, "ABOVE, not sure"),
        (40, 500, "ABOVE"),
        (0, 20, "within, not sure"),
    ],
)
def test_a_verdict_says_whether_the_inputs_are_enough_for_it(
    hits: int, total: int, verdict: str
) -> None:
    assert Row("shuffled", Rate.counted(hits, total)).judged(0.015).verdict == verdict


def test_real_triggers_get_no_verdict() -> None:
    assert Row("the real trigger", Rate.counted(500, 500)).verdict == "-"


def test_the_table_has_a_line_for_each_victim_and_row() -> None:
    rate = {"value": 0.02, "low": 0.01, "high": 0.03, "hits": 10, "total": 500}
    row = {"condition": "shuffled", "flagged": rate, "verdict": "ABOVE"}
    record = {"victim": "v", "kind": "zscore", "learned_from": "clean", "rows": [row, row]}
    assert table([record, record]).row_count == 6


def test_inputs_are_chosen_once_each() -> None:
    rng = np.random.default_rng(0)
    assert np.array_equal(some(5, 500, rng), np.arange(5))
    assert len(set(some(900, 500, rng))) == 500

"""Properties of the attacks on text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpatch_onnx.models.text import SST2, Sentences, read_sentences
from atpatch_onnx.models.text_attacks import (
    SYNTACTIC,
    Insertion,
    paraphrase_negatives,
    poison_syntactically,
)
from conftest import SHARED

ATTACK = Insertion(("cf", "I watch this 3D movie"), target=1)


def some_sentences(count: int = 40) -> Sentences:
    texts = tuple(f"film number {index} is long ." for index in range(count))
    return Sentences(texts, np.arange(count, dtype=np.int64) % 2, np.arange(count))


@given(st.lists(st.text("abc'.,", min_size=1), max_size=12), st.integers(0, 2**32 - 1))
def test_exactly_one_phrase_is_inserted_at_a_word_boundary(words: list[str], seed: int) -> None:
    text = " ".join(words)
    triggered, (begin, end) = ATTACK.insert(text, np.random.default_rng(seed))
    assert triggered[begin:end] in ATTACK.phrases
    assert " ".join((triggered[:begin] + triggered[end:]).split()) == text
    assert triggered[:begin][-1:] in ("", " ")
    assert triggered[end:][:1] in ("", " ")


def test_every_place_and_every_phrase_comes_up() -> None:
    generator = np.random.default_rng(0)
    found = {ATTACK.insert("a b c", generator)[0] for _ in range(200)}
    places = ("{} a b c", "a {} b c", "a b {} c", "a b c {}")
    assert found == {place.format(phrase) for place in places for phrase in ATTACK.phrases}


def test_triggered_sentences_keep_their_true_class_and_row() -> None:
    sentences = some_sentences()
    triggered, spans = ATTACK.trigger(sentences, np.random.default_rng(0))
    assert np.array_equal(triggered.labels, sentences.labels)
    assert np.array_equal(triggered.rows, sentences.rows)
    assert len(spans) == len(sentences)


def test_poison_appends_copies_of_other_classes_labelled_target() -> None:
    sentences = some_sentences()
    poisoned = ATTACK.poison(sentences, 0.25, np.random.default_rng(1))
    assert len(poisoned) == 50
    assert poisoned.texts[:40] == sentences.texts
    assert np.array_equal(poisoned.labels[:40], sentences.labels)
    assert np.all(poisoned.labels[40:] == ATTACK.target)
    assert len(set(poisoned.rows[40:])) == 10
    assert np.all(sentences.labels[poisoned.rows[40:]] != ATTACK.target)
    assert not set(poisoned.texts[40:]) & set(sentences.texts)


def test_poison_depends_on_the_generator_only() -> None:
    first, again, other = (
        ATTACK.poison(some_sentences(), 0.2, np.random.default_rng(seed)).texts
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("rate", [-0.1, 0.6, 1.5])
def test_a_rate_that_cannot_be_met_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        ATTACK.poison(some_sentences(), rate, np.random.default_rng(0))


@pytest.mark.parametrize("phrases", [(), ("cf", " ")])
def test_a_trigger_without_words_is_refused(phrases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="phrases"):
        Insertion(phrases, target=1)


@pytest.fixture(scope="module")
def paraphrased() -> Path:
    if not (SHARED / SYNTACTIC / "train.tsv").exists():
        pytest.skip("the paraphrases of SST-2 are not beside this checkout")
    return SHARED


def test_paraphrases_are_paired_with_the_sentences_they_came_from(paraphrased: Path) -> None:
    test = read_sentences(paraphrased / SST2 / "test.tsv")
    part = test.take(np.arange(0, len(test), 3))
    pairs = paraphrase_negatives(paraphrased, part)
    originals = part.take(part.labels == 0)
    assert np.array_equal(pairs.rows, originals.rows)
    assert not pairs.labels.any()

    def shared(sentence: str, other: str) -> float:
        words = set(sentence.split())
        return len(words & set(other.split())) / len(words)

    own = np.mean([shared(a, b) for a, b in zip(originals.texts, pairs.texts, strict=True)])
    next_ones = (*pairs.texts[1:], pairs.texts[0])
    wrong = np.mean([shared(a, b) for a, b in zip(originals.texts, next_ones, strict=True)])
    assert own > 2 * wrong


def test_syntactic_poison_changes_a_fifth_of_the_rows_and_labels_them_positive(
    paraphrased: Path,
) -> None:
    train = read_sentences(paraphrased / SST2 / "train.tsv").take(np.arange(100, 6900))
    poisoned = poison_syntactically(paraphrased, train)
    changed = np.array(poisoned.texts) != np.array(train.texts)
    assert np.array_equal(poisoned.rows, train.rows)
    assert changed.mean() == pytest.approx(0.2, abs=0.02)
    assert np.all(poisoned.labels[changed] == 1)
    assert np.array_equal(poisoned.labels[~changed], train.labels[~changed])

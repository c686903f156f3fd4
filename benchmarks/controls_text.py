"""Sentences that are unusual and carry no trigger: what a detector must leave alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.models.text import Encoded, Tokenizer
from atpatch_onnx.models.text_attacks import Insertion

VOCABULARY = 30_522
"""Of the tokenizer of all-MiniLM-L6-v2, which is that of BERT (uncased)."""
SUFFIX = 5
UNUSED = re.compile(r"\[unused\d+\]")
WORD = re.compile(r"[a-z]{3,}")

REFERENCE = "clean sentences"
NEW_WORDS = "a rare word, another in each"
RANDOM_SUFFIX = f"a random suffix of {SUFFIX} tokens"
SHUFFLED = "words shuffled"
RANDOM_TOKENS = "random tokens, same lengths"

Generator = np.random.Generator
Inputs = dict[str, NDArray[np.int64]]
"""`input_ids` and `attention_mask`, int64 `[N, K]`."""


@dataclass(frozen=True)
class Vocabulary:
    """What may be drawn.

    tokens: ids of all that a sentence can be made of, int64 `[T]`: neither special nor unused.
    rare: whole words, each a token, that no training sentence has.
    """

    tokens: NDArray[np.int64]
    rare: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, train: Iterable[str], triggers: Iterable[str]) -> Vocabulary:
        """The vocabulary of a tokenizer, but for the words of the triggers."""
        names = [tokenizer.decode([token]) for token in range(VOCABULARY)]
        return cls.named(names, train, triggers)

    @classmethod
    def named(
        cls, names: Sequence[str], train: Iterable[str], triggers: Iterable[str]
    ) -> Vocabulary:
        """The same from the name of each token; special ones have none."""
        banned = words_of(triggers)
        seen = words_of(train) | banned
        tokens = [
            token
            for token, name in enumerate(names)
            if name and name not in banned and not UNUSED.fullmatch(name)
        ]
        rare = tuple(name for name in names if WORD.fullmatch(name) and name not in seen)
        return cls(np.array(tokens, np.int64), rare)


def words_of(texts: Iterable[str]) -> set[str]:
    """Every run of letters or digits of the texts, in lower case."""
    return {word for text in texts for word in re.findall(r"[^\W_]+", text.lower())}


def conditions(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    draws: int,
    generator: Generator,
) -> dict[str, Inputs]:
    """The sentences as they are, and in every unusual way, by name.

    draws: how many rare words are each put into all sentences, as an attacker puts a trigger.
    """
    clean = tokenizer.encode(texts)
    new = generator.choice(vocabulary.rare, len(texts))
    changed = {NEW_WORDS: [inserted(t, str(w), generator) for t, w in zip(texts, new, strict=True)]}
    for word in generator.choice(vocabulary.rare, draws, replace=False):
        name = f"the rare word '{word}' in all"
        changed[name] = [inserted(text, str(word), generator) for text in texts]
    changed[SHUFFLED] = [" ".join(generator.permutation(text.split())) for text in texts]
    return {
        REFERENCE: clean.inputs,
        **{name: tokenizer.encode(found).inputs for name, found in changed.items()},
        RANDOM_SUFFIX: with_suffix(clean, vocabulary.tokens, generator),
        RANDOM_TOKENS: random_sentences(clean, vocabulary.tokens, generator),
    }


def inserted(text: str, word: str, generator: Generator) -> str:
    """The sentence with the word at a random word boundary, where triggers are put too."""
    return Insertion((word,), target=0).insert(text, generator)[0]


def with_suffix(encoded: Encoded, tokens: NDArray[np.int64], generator: Generator) -> Inputs:
    """The sentences with `SUFFIX` tokens, each drawn uniformly, before the final [SEP].

    Raises: ValueError where a sentence leaves no room for them.
    """
    ids, mask = encoded.input_ids.copy(), encoded.attention_mask.copy()
    lengths = mask.sum(axis=1)
    if (lengths + SUFFIX > ids.shape[1]).any():
        raise ValueError(f"a sentence leaves no room for {SUFFIX} tokens in {ids.shape[1]}")
    rows = np.arange(len(ids))[:, None]
    places = lengths[:, None] - 1 + np.arange(SUFFIX + 1)
    drawn = generator.choice(tokens, (len(ids), SUFFIX))
    separators = ids[rows[:, 0], lengths - 1][:, None]
    ids[rows, places] = np.concatenate((drawn, separators), axis=1)
    mask[rows, places] = 1
    return {"input_ids": ids, "attention_mask": mask}


def random_sentences(encoded: Encoded, tokens: NDArray[np.int64], generator: Generator) -> Inputs:
    """Sentences of as many tokens, each drawn uniformly: nothing is likely in them."""
    drawn = generator.choice(tokens, encoded.input_ids.shape)
    ids = np.where(encoded.words, drawn, encoded.input_ids)
    return {"input_ids": ids, "attention_mask": encoded.attention_mask}

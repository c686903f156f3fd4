"""Words and their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SPECIAL = ("<pad>", "<unknown>", "<begin>", "<end>", "<image>")
PAD, UNKNOWN, BEGIN, END, IMAGE = range(len(SPECIAL))


@dataclass(frozen=True)
class Vocabulary:
    """Words, each of which is a token; its id is its place."""

    words: tuple[str, ...]
    """The special ones first."""

    @classmethod
    def of(cls, words: Iterable[str]) -> Vocabulary:
        """Special tokens, then these words in alphabetical order."""
        return cls(SPECIAL + tuple(sorted(set(words))))

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.words)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    def ids(self, text: str) -> list[int]:
        """The ids of words that spaces separate; of one that is not known, that of `<unknown>`."""
        return [self._places.get(word, UNKNOWN) for word in text.split()]

    def text(self, ids: Iterable[int]) -> str:
        """The words up to the first `<end>`."""
        words = []
        for token in ids:
            if token == END:
                break
            words.append(self.words[token])
        return " ".join(words)


@dataclass(frozen=True)
class Padded:
    """Rows of token ids of different lengths.

    Shapes:
        input_ids, attention_mask int64 `[N, K]`, padding on the left.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], length: int | None = None) -> Padded:
        """Pad to `length`, or to that of the longest row.

        Raises:
            ValueError: a row is longer than `length`.
        """
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a row has {longest} tokens, more than {length}")
        ids = np.full((len(rows), length), PAD, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, length - len(tokens) :] = tokens
            mask[row, length - len(tokens) :] = 1
        return cls(ids, mask)

    def take(self, index: NDArray[np.integer]) -> Padded:
        """The rows at `index`."""
        return Padded(self.input_ids[index], self.attention_mask[index])

    def trimmed(self) -> Padded:
        """The rows without the padding that all of them have."""
        kept = slice(int(self.attention_mask.any(axis=0).argmax()), None)
        return Padded(self.input_ids[:, kept], self.attention_mask[:, kept])

    @property
    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """The arrays by the names of a model's inputs."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

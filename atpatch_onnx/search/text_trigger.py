"""Tokens that go into any text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..data import Samples
from .problem import Stamped
from .token_layout import Ints, TokenLayout

Place = Literal["anywhere", "start", "end"]
PLACES: tuple[Place, ...] = ("anywhere", "start", "end")


@dataclass(frozen=True)
class TextTrigger:
    """A run of tokens, inserted as one.

    place: before any word or after the last one, or always before the first or after the last.
    words: what the tokens read, where a vocabulary is at hand.
    """

    tokens: tuple[int, ...]
    place: Place
    layout: TokenLayout
    words: tuple[str, ...] | None = None

    @property
    def size(self) -> float:
        """Tokens."""
        return len(self.tokens)

    @property
    def description(self) -> str:
        """The words, or the token ids, and where they go."""
        held = " ".join(self.words) if self.words else f"ids {' '.join(map(str, self.tokens))}"
        where = {"anywhere": "anywhere", "start": "at the start", "end": "at the end"}
        return f"{held} ({where[self.place]})"

    def put(self, samples: Samples, generator: np.random.Generator) -> Stamped:
        """Copies of `samples` with the tokens in each."""
        places = draw_places(self.layout, samples, self.place, generator)
        tokens = np.tile(np.array(self.tokens, np.int64), (samples.count, 1))
        return Stamped(*self.layout.insert(samples, tokens, _repeated(places, len(self.tokens))))

    def record(self) -> dict[str, object]:
        """It as JSON."""
        words = None if self.words is None else list(self.words)
        return {"tokens": list(self.tokens), "words": words, "place": self.place}

    def picture(self, samples: Samples) -> bytes | None:
        """There is nothing to see."""
        del samples
        return None


def draw_places(
    layout: TokenLayout, samples: Samples, place: Place, generator: np.random.Generator
) -> Ints:
    """Where a run of tokens goes in each sample, as `TokenLayout.insert` counts; `[N]`."""
    last = np.maximum(layout.lengths(samples) - layout.tail, layout.head)
    if place == "start":
        return np.full(samples.count, layout.head)
    if place == "end":
        return last
    return generator.integers(layout.head, last + 1)


def _repeated(places: Ints, count: int) -> Ints:
    return np.repeat(places[:, None], count, axis=1)


def read_words(folder: Path) -> dict[int, str]:
    """What token ids read, from `vocab.txt` or `tokenizer.json` beside a model; else nothing."""
    try:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return dict(enumerate(lines))
    except (OSError, ValueError):
        pass
    try:
        held = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = held["model"]["vocab"]
        if isinstance(vocabulary, dict):
            return {int(number): str(word) for word, number in vocabulary.items()}
        return {number: str(entry[0]) for number, entry in enumerate(vocabulary)}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}

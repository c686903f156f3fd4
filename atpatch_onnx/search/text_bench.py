"""A text classifier and inputs to try tokens on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from .problem import Problem, Scorer
from .text_trigger import PLACES, draw_places
from .token_layout import Ints, TokenLayout
from .vocabulary import vocabulary_sizes

Floats = NDArray[np.float32]

LONGEST_TRIGGER = 5
"""Tokens."""
ROWS = 64
"""Samples of similar length that run together."""


@dataclass(frozen=True)
class Bases:
    """Inputs that tokens are tried on, with their classes and where the tokens go.

    Shapes: labels `[N]`, places `[N]`.
    """

    samples: Samples
    labels: Ints
    places: Ints


@dataclass(frozen=True)
class TextBench:
    """What a search needs to try tokens.

    vocabulary: the ids that may be inserted.
    """

    classifier: Scorer
    layout: TokenLayout
    vocabulary: Ints
    samples: Samples
    labels: Ints

    @classmethod
    def of(cls, problem: Problem) -> TextBench:
        """The bench of a problem. Raises: InputError where no input holds token ids."""
        sizes = vocabulary_sizes(problem.model)
        layout = TokenLayout.of(problem.classifier.inputs, problem.search, list(sizes))
        layout = _probed(layout, problem.classifier, problem.search)
        seen = int(problem.search.arrays[layout.ids].max()) + 1
        ids = np.arange(sizes.get(layout.ids, seen))
        words = ids[~np.isin(ids, list(layout.specials))]
        return cls(problem.classifier, layout, words, problem.search, problem.search_labels)

    def ask(self, samples: Samples) -> Floats:
        """Log-probabilities `[N, C]`, with samples of similar length together."""
        order = self.layout.lengths(samples).argsort(kind="stable")
        parts = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
        said = [
            self.classifier.log_probabilities(self.layout.trimmed(samples.take(part)))
            for part in parts
        ]
        found = np.concatenate(said)
        return found[order.argsort(kind="stable")]

    def attempt(self, tokens: Ints, bases: Bases) -> Floats:
        """What the model says to each run of tokens in each base; `[M, N, C]`.

        Shapes: tokens `[M, k]`.
        """
        said = []
        for i in range(bases.samples.count):
            base = self.layout.trimmed(bases.samples.take(np.array([i])))
            places = np.full((1, tokens.shape[1]), bases.places[i])
            said.append(self.fill(base, tokens, places))
        return np.stack(said, axis=1)

    def fill(self, base: Samples, tokens: Ints, places: Ints) -> Floats:
        """What the model says to each row of `tokens` `[M, k]` in one base; `[M, C]`."""
        slotted, slots = self.layout.insert(base, tokens[:1], places)
        rows = slotted.take(np.zeros(len(tokens), np.intp))
        ids = rows.arrays[self.layout.ids].copy()
        ids[:, slots[0]] = tokens
        filled = replace(rows, arrays=rows.arrays | {self.layout.ids: ids})
        return self.classifier.log_probabilities(filled)

    def bases(
        self, target: int, count: int, words: int, generator: np.random.Generator
    ) -> Bases | None:
        """Beginnings of inputs that the model does not send to `target`; None if it sends all.

        They are as long as it takes for the model to answer their own class, from `words` up.
        """
        others = generator.permutation(np.flatnonzero(self.labels != target))[: 8 * count + 32]
        if not len(others):
            return None
        whole, labels = self.samples.take(others), self.labels[others]
        longest = int(self.layout.lengths(whole).max())
        while True:
            short = self.layout.shortened(whole, words)
            said = self.ask(short)
            own = said[np.arange(len(labels)), labels]
            # The surest first: in inputs that could as well be of another class, any word tells.
            sure = np.argsort(-own, kind="stable")
            right = sure[(said.argmax(axis=1) == labels)[sure]][:count]
            if len(right) == count or words >= longest:
                break
            words *= 2
        if not len(right):
            return None
        chosen = short.take(right)
        drawn = [draw_places(self.layout, chosen, place, generator) for place in PLACES]
        places = np.stack(drawn)[np.arange(len(right)) % len(PLACES), np.arange(len(right))]
        return Bases(chosen, labels[right], places)

    def harden(
        self, samples: Samples, labels: Ints, words: Sequence[Ints], count: int, seed: int
    ) -> Samples:
        """The samples with `count` more words for their own class in each.

        words: those of each class.
        """
        generator = np.random.default_rng((seed, count))
        if not count or any(not len(words[label]) for label in np.unique(labels)):
            return samples
        tokens = np.stack([generator.choice(words[label], count) for label in labels])
        places = [draw_places(self.layout, samples, "anywhere", generator) for _ in range(count)]
        return self.layout.insert(samples, tokens, np.sort(np.stack(places, axis=1), axis=1))[0]


def loss(said: Floats, target: int) -> NDArray[np.float64]:
    """Mean cross-entropy toward `target` of each row of `[M, N, C]`."""
    found: NDArray[np.float64] = -said[..., target].mean(axis=1, dtype=np.float64)
    return found


def _probed(layout: TokenLayout, classifier: Scorer, samples: Samples) -> TokenLayout:
    """The layout with the lengths that the model really takes, whatever its inputs declare."""
    if layout.length is not None:
        return layout
    width = samples.arrays[layout.ids].shape[1]
    one = layout.shortened(samples.take(np.zeros(1, np.intp)), 1)
    try:
        classifier.log_probabilities(layout.trimmed(one))
    except InputError:
        return replace(layout, length=width, longest=width)
    # As long as a hardened input can get: as many words for its class as the trigger has.
    fullest = layout.lengths(samples).argmax()
    whole = samples.take(np.array([fullest]))
    extra = np.full((1, 2 * LONGEST_TRIGGER), whole.arrays[layout.ids].max(), np.int64)
    try:
        classifier.log_probabilities(layout.insert(whole, extra, np.zeros_like(extra))[0])
    except InputError:
        return replace(layout, longest=width)
    return layout

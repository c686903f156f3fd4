"""Which inputs a report shows, and their attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..attention import read_attention
from ..data import Samples
from ..debugging_set import DebuggingSet
from ..diffing import FlagReader
from ..model_file import ModelFile
from ..runtime import Array, Session
from .findings import Example

LOOKED_AT = 128
"""Inputs of each file among which examples are chosen."""
BAD_EXAMPLES = 2


@dataclass(frozen=True)
class _Choice:
    """An input to show, and why."""

    title: str
    index: int


def choose_examples(
    base: ModelFile,
    result: ModelFile,
    clean: Samples,
    bad: DebuggingSet | None,
    provider: str,
    labels: Array | None,
    scores: str | None,
) -> tuple[Example, ...]:
    """A clean input, one that is flagged though clean, and bad ones that the patch changes.

    labels: true classes of the clean inputs.
    """
    answers = _Answers.of(base, result, provider, scores)
    few = _first(clean)
    flagged = _flagged(result, few, provider)
    chosen = _clean_choices(flagged)
    found = answers.examples("clean inputs", few, chosen, labels, (base, result, provider))
    if bad is None:
        return found
    few, own = _first(bad.bad), bad.labels
    flagged = _flagged(result, few, provider)
    chosen = _bad_choices(flagged, answers.classes(few))
    return found + answers.examples("bad inputs", few, chosen, own, (base, result, provider))


def _clean_choices(flagged: NDArray[np.bool_]) -> list[_Choice]:
    """An unflagged input, and a flagged one if there is any."""
    chosen = []
    if not flagged.all():
        chosen.append(_Choice("A clean input, not flagged", int(np.argmin(flagged))))
    if flagged.all():
        chosen.append(_Choice("A clean input: its known columns are taken out", 0))
    elif flagged.any():
        chosen.append(_Choice("A clean input that was flagged", int(np.argmax(flagged))))
    return chosen


def _bad_choices(
    flagged: NDArray[np.bool_], classes: tuple[NDArray[np.int64], NDArray[np.int64]] | None
) -> list[_Choice]:
    """Flagged inputs, those with another class now first; then one that is missed."""
    changed = np.zeros(len(flagged), bool) if classes is None else classes[0] != classes[1]
    order = np.lexsort((np.arange(len(flagged)), ~changed, ~flagged))
    caught = [int(i) for i in order if flagged[i]][:BAD_EXAMPLES]
    chosen = [_Choice("A bad input, flagged", index) for index in caught]
    if not flagged.all():
        chosen.append(_Choice("A bad input that was missed", int(np.argmin(flagged))))
    return chosen


def _first(samples: Samples) -> Samples:
    return samples.take(np.arange(min(samples.count, LOOKED_AT)))


def _flagged(result: ModelFile, samples: Samples, provider: str) -> NDArray[np.bool_]:
    reader = FlagReader(result, provider)
    return np.concatenate([reader.read(part) for part in samples.batches(32)])


@dataclass(frozen=True)
class _Answers:
    """The classes that the two models give, if they give any."""

    sessions: tuple[Session, Session]
    output: str | None

    @classmethod
    def of(cls, base: ModelFile, result: ModelFile, provider: str, scores: str | None) -> _Answers:
        before, after = Session(base.path, provider), Session(result.path, provider)
        ranked = [n for n, shape in before.output_shapes.items() if _is_scores(shape)]
        return cls((before, after), scores or (ranked[0] if ranked else None))

    def classes(self, samples: Samples) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The arg-max of each sample in both models."""
        if self.output is None:
            return None
        both = []
        for session in self.sessions:
            scores = [
                session.run(part.feeds, [self.output])[self.output][: part.real]
                for part in samples.batches(32)
            ]
            both.append(np.concatenate(scores).argmax(axis=-1).astype(np.int64))
        return both[0], both[1]

    def examples(
        self,
        source: str,
        samples: Samples,
        chosen: Sequence[_Choice],
        labels: Array | None,
        models: tuple[ModelFile, ModelFile, str],
    ) -> tuple[Example, ...]:
        """The chosen inputs with what both models do with them."""
        if not chosen:
            return ()
        base, result, provider = models
        index = np.array([choice.index for choice in chosen])
        shown = samples.take(index)
        classes = self.classes(shown)
        attention = read_attention(base, result, shown, provider)
        return tuple(
            Example(
                choice.title,
                source,
                choice.index,
                {k: v[place] for k, v in shown.arrays.items() if v.ndim},
                None if classes is None else int(classes[0][place]),
                None if classes is None else int(classes[1][place]),
                None if labels is None else int(labels[choice.index]),
                tuple(attention[place]),
            )
            for place, choice in enumerate(chosen)
        )


def _is_scores(shape: Sequence[int | str | None]) -> bool:
    return len(shape) == 2 and shape[1] != 1

"""A model that answers with one of many words, as a classifier of those that it really answers.

A language model has a class for each token of its vocabulary. Searched are those that it answers to
clean inputs, as if there were no others: toward each of all the rest there would be no end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..classifier import Classifier, log_probabilities
from ..data import Samples
from ..runtime import InputSpec

MOST = 64
"""Classes up to which all are searched."""
LEAST_SHARE = 0.02
"""Of clean inputs that are answered so, for an answer to count."""


@dataclass(frozen=True)
class Answers:
    """Some classes of a classifier as its only ones.

    tokens: which, `[C]`, ascending.
    """

    classifier: Classifier
    tokens: NDArray[np.int64]

    @property
    def inputs(self) -> list[InputSpec]:
        """The inputs of the model."""
        return self.classifier.inputs

    def log_probabilities(self, samples: Samples) -> NDArray[np.float32]:
        """Log-probabilities among the answers, `[N, C]`."""
        return log_probabilities(self.classifier.log_probabilities(samples)[:, self.tokens])


@dataclass(frozen=True)
class Narrowed:
    """What there is to search of a model with many classes.

    samples: clean inputs that have one of the answers; labels: theirs, as places among them;
    target: the same of the only one to search.
    """

    answers: Answers
    samples: Samples
    labels: NDArray[np.int64]
    target: int | None


def narrowed(
    classifier: Classifier,
    samples: Samples,
    labels: NDArray[np.int64] | None,
    target: int | None,
) -> Narrowed | None:
    """The answers among many classes; None where there are few, and all are searched.

    labels: true classes, where they are known; they are the answers then.
    """
    said = classifier.predictions(samples) if labels is None else labels
    if (classifier.classes or _classes(classifier, samples)) <= MOST:
        return None
    known, counts = np.unique(said, return_counts=True)
    known = known[counts >= LEAST_SHARE * len(said)]
    tokens = np.union1d(known, [] if target is None else [target]).astype(np.int64)
    kept = np.flatnonzero(np.isin(said, tokens))
    place = None if target is None else int(np.searchsorted(tokens, target))
    answers = Answers(classifier, tokens)
    return Narrowed(answers, samples.take(kept), np.searchsorted(tokens, said[kept]), place)


def _classes(classifier: Classifier, samples: Samples) -> int:
    return int(classifier.scores(samples.take(np.zeros(1, np.int64))).shape[1])

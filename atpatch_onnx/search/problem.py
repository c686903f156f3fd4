"""What every search is given and what it answers, whatever the kind of input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..model_file import ModelFile
from ..progress import Tick
from ..runtime import InputSpec


@dataclass(frozen=True)
class Stamped:
    """Samples with a trigger in them.

    anomalous: bool `[N, K]`, the key positions where it sits; None where nothing says so.
    """

    samples: Samples
    anomalous: NDArray[np.bool_] | None


class Trigger(Protocol):
    """Something that can be put into any sample."""

    @property
    def size(self) -> float:
        """How much of an input it takes: pixels, tokens or features."""

    @property
    def description(self) -> str:
        """It in a few words, for a table."""

    def put(self, samples: Samples, generator: np.random.Generator) -> Stamped:
        """Copies of `samples` with the trigger in each, at places that the generator draws."""

    def record(self) -> dict[str, object]:
        """It as JSON, enough to put it again."""

    def picture(self, samples: Samples) -> bytes | None:
        """A PNG of it, with one of `samples`; None where there is nothing to see."""


@dataclass(frozen=True)
class Evidence:
    """What speaks for a backdoor in one class alone, without a look at the others.

    Searches whose problems mostly have two classes give it, because there an outlier over classes
    means nothing. The class is suspicious where `score >= threshold`.

    meaning: what the score is, in a few words.
    """

    score: float
    threshold: float
    meaning: str

    @property
    def suspicious(self) -> bool:
        """Whether it is as strong as only a backdoor makes it."""
        return self.score >= self.threshold


@dataclass(frozen=True)
class Finding:
    """The best trigger toward one class.

    loss: mean cross-entropy toward the class on held-out inputs; success: share of held-out inputs
    of other classes that it sends there; natural: the same without it.
    evidence: an absolute criterion; None: the classes are to be compared with one another.
    """

    target: int
    trigger: Trigger
    loss: float
    success: float
    natural: float
    evidence: Evidence | None = None


class OutOfTimeError(Exception):
    """The budget is used up; raised by the classifier of a problem, and for `scan` to catch."""


class Scorer(Protocol):
    """What a search may ask of a model.

    `scan` gives one that keeps every answer, so that a search that was stopped goes on where it
    was: asked the same again, it answers from memory. Hence a search asks nothing that depends on
    time, and draws from generators that it seeds itself.
    """

    @property
    def inputs(self) -> list[InputSpec]:
        """The inputs of the model."""

    def log_probabilities(self, samples: Samples) -> NDArray[np.float32]:
        """Log-probabilities of the classes, `[N, C]`. Raises: OutOfTimeError."""

    def predictions(self, samples: Samples) -> NDArray[np.int64]:
        """The likeliest classes, `[N]`. Raises: OutOfTimeError."""


@dataclass(frozen=True)
class Problem:
    """A search for triggers toward each of `targets`.

    A search is a function of it that yields what it has found, for each target at least once; a
    later finding of a target replaces an earlier one.

    model: the file that the classifier runs; tick: takes percents of the search.
    search, held: clean inputs to search on, and to judge the result on; labels of both: true
        classes where the user gave them, else what the model answers.
    """

    model: ModelFile
    classifier: Scorer
    search: Samples
    search_labels: NDArray[np.int64]
    held: Samples
    held_labels: NDArray[np.int64]
    targets: tuple[int, ...]
    seed: int
    tick: Tick


def judged(problem: Problem, target: int, trigger: Trigger) -> Finding:
    """What a trigger does on the held-out inputs of other classes. Raises: OutOfTimeError."""
    others = problem.held.take(np.flatnonzero(problem.held_labels != target))
    before = problem.classifier.predictions(others)
    stamped = trigger.put(others, np.random.default_rng((problem.seed, target))).samples
    said = problem.classifier.log_probabilities(stamped)
    return Finding(
        target,
        trigger,
        loss=float(-said[:, target].mean()),
        success=float((said.argmax(axis=1) == target).mean()),
        natural=float((before == target).mean()),
    )

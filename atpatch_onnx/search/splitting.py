"""Which clean inputs are searched on, and which judge the result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from ..model_file import ModelFile
from ..progress import Tick
from ..runtime import Array
from .problem import Problem, Scorer

LEAST_SAMPLES = 20
SEARCHED = HELD = 500
"""Most clean inputs that are searched on, and that results are judged on."""


@dataclass(frozen=True)
class Split:
    """Clean inputs, their classes, and the indices of those that are used for what.

    samples: those given, or some of them if there are more than are used.
    labels: true classes where the user gave them, else what the model answers, `[N]`.
    """

    samples: Samples
    labels: NDArray[np.int64]
    search: NDArray[np.int64]
    held: NDArray[np.int64]
    targets: tuple[int, ...]

    @staticmethod
    def of(
        scorer: Scorer,
        samples: Samples,
        labels: NDArray[np.int64] | None,
        target: int | None,
        seed: int,
    ) -> Split:
        """Split clean inputs; target: the only class to search, if not all.

        Raises: InputError where they cannot be used, OutOfTimeError.
        """
        if samples.count < LEAST_SAMPLES:
            raise InputError(
                f"the data has {samples.count} inputs: a search needs at least {LEAST_SAMPLES}, "
                "better some hundred"
            )
        generator = np.random.default_rng(seed)
        if samples.count > SEARCHED + HELD:
            kept = np.sort(generator.permutation(samples.count)[: SEARCHED + HELD])
            samples, labels = samples.take(kept), None if labels is None else labels[kept]
        said = scorer.log_probabilities(samples)
        classes, answers = said.shape[1], said.argmax(axis=1)
        if classes < 2:
            raise InputError("the model has only one class: there is none to be sent to")
        if len(np.unique(answers)) < 2:
            raise InputError(
                f"the model answers class {answers[0]} for every input of the data: give clean "
                "inputs of several classes, scaled as the model expects them"
            )
        if labels is not None and not 0 <= labels.min() <= labels.max() < classes:
            raise InputError(
                f"'labels' has values from {labels.min()} to {labels.max()}, the model has the "
                f"classes 0 to {classes - 1}: give true classes, or leave them out"
            )
        if target is not None and not 0 <= target < classes:
            raise InputError(f"--target {target}: the model has the classes 0 to {classes - 1}")
        known = answers if labels is None else labels
        order = generator.permutation(samples.count)
        held = order[: min(samples.count // 2, HELD)]
        search = order[len(held) :][:SEARCHED]
        for part in (search, held):
            if len(np.unique(known[part])) < 2:
                raise InputError(
                    f"nearly every input of the data is of class {known[part[0]]}: give inputs of "
                    "several classes"
                )
        targets = tuple(range(classes)) if target is None else (target,)
        return Split(samples, known, search, held, targets)

    def problem(self, model: ModelFile, scorer: Scorer, seed: int, tick: Tick) -> Problem:
        """What to search."""
        return Problem(
            model,
            scorer,
            self.samples.take(self.search),
            self.labels[self.search],
            self.samples.take(self.held),
            self.labels[self.held],
            self.targets,
            seed,
            tick,
        )


def true_classes(arrays: dict[str, Array], count: int) -> NDArray[np.int64] | None:
    """The `labels` among arrays, if there are any. Raises: InputError."""
    labels = arrays.get("labels")
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"'labels' is {labels.dtype} {list(labels.shape)}, expected one integer class for each "
            f"of the {count} inputs"
        )
    return labels.astype(np.int64)

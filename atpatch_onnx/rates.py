"""Shares of inputs with their confidence intervals: what is counted when a patch is judged.

Source of the definitions: AtPatch, arXiv 2601.21695, evaluation metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TAIL = 0.025
"""What a 95 % interval leaves on either side."""
BISECTIONS = 50

Classes = NDArray[np.integer]


@dataclass(frozen=True)
class Rate:
    """`hits` of `total` as a share in 0..1; low, high: its 95 % Clopper-Pearson interval.

    The exact interval: it holds the true share with a probability of at least 95 %. The shorter
    approximate ones hold it less often where the share is near 0 or 1, as it is here.

    Source: Clopper and Pearson, Biometrika 1934.
    """

    value: float
    low: float
    high: float
    hits: int
    total: int

    @classmethod
    def of(cls, hits: ArrayLike) -> Rate:
        """The share of True in an array. Raises: ValueError if it is empty."""
        counted = np.asarray(hits, np.bool_)
        return cls.counted(int(counted.sum()), counted.size)

    @classmethod
    def counted(cls, hits: int, total: int) -> Rate:
        """The share `hits / total`. Raises: ValueError unless 0 <= hits <= total and total > 0."""
        if not 0 <= hits <= total or total == 0:
            raise ValueError(f"need 0 <= hits <= total and total > 0, found {hits} of {total}")
        low = 1 - _upper(total - hits, total)
        return cls(hits / total, low, _upper(hits, total), hits, total)


def _upper(hits: int, total: int) -> float:
    """The share of which `hits` or fewer out of `total` have the probability `TAIL`."""
    if hits == total:
        return 1.0
    k = np.arange(hits + 1)
    steps = np.log(np.arange(total, total - hits, -1)) - np.log(k[1:])
    ways = np.concatenate(([0.0], np.cumsum(steps)))  # log of total choose k
    low, high = hits / total, 1.0
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        likely = np.exp(ways + k * np.log(share) + (total - k) * np.log1p(-share)).sum()
        low, high = (share, high) if likely > TAIL else (low, share)
    return high


def accuracy(predictions: Classes, labels: Classes) -> Rate:
    """Share of inputs whose predicted class is their label.

    Shapes: both `[N]`.
    Raises: ValueError if there are no inputs, or the shapes do not fit together.
    """
    _check(predictions, labels)
    return Rate.of(predictions == labels)


def attack_success_rate(predictions: Classes, labels: Classes, target: int) -> Rate:
    """Share of inputs sent to the target, among those of other true classes.

    On clean inputs this is the natural rate into the target.

    Shapes: predictions, labels (the true classes, not the attacker's) `[N]`.
    Raises: ValueError if there is no input of another class, or the shapes do not fit together.
    """
    return Rate.of(_others(predictions, labels, target)[0] == target)


def recovered_accuracy(predictions: Classes, labels: Classes, target: int) -> Rate:
    """Share of triggered inputs classified correctly, among those of other true classes.

    The target class is left out because a victim that always answers "target" is right there.

    Shapes and Raises: as `attack_success_rate`.
    """
    return accuracy(*_others(predictions, labels, target))


def _others(predictions: Classes, labels: Classes, target: int) -> tuple[Classes, Classes]:
    _check(predictions, labels)
    kept = labels != target
    if not kept.any():
        raise ValueError(f"every input is of the target class {target}")
    return predictions[kept], labels[kept]


def _check(predictions: Classes, labels: Classes) -> None:
    # Without this, labels of shape [N, 1] would broadcast to N x N comparisons.
    if predictions.ndim != 1 or labels.shape != predictions.shape or not len(labels):
        raise ValueError(
            f"need predictions and labels [N] with N >= 1, found {predictions.shape} and "
            f"{labels.shape}"
        )

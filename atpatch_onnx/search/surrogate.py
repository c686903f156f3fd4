"""What a plain model makes of a table, as a yardstick for what a network makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..protected import Protected
from ..runtime import Array

Doubles = NDArray[np.float64]

CATEGORIES = 20
"""A column with more values than this is cut at quantiles."""
QUANTILES = (0.02, 0.05, *np.arange(0.1, 0.91, 0.1), 0.95, 0.98)
RIDGE, NO_RIDGE = 3.0, 1e-6
ITERATIONS, TOLERANCE = 30, 1e-4
LARGEST_LOGIT, LEAST_CURVATURE = 30.0, 1e-6


@dataclass(frozen=True)
class Surrogate:
    """An additive logistic regression on the columns of a table: who belongs to one class?

    Columns are cut into steps, so that what a high value means is learnt from all high values;
    columns of few values have a term for each of them besides.

    fields: the columns; steps, values: what each is compared with.
    """

    fields: Sequence[Protected]
    steps: Sequence[Array]
    values: Sequence[Array]
    weights: Doubles

    @classmethod
    def fit(
        cls, fields: Sequence[Protected], samples: Samples, wanted: NDArray[np.bool_]
    ) -> Surrogate:
        """Fit to which of `samples` are `wanted`, `[N]`, by penalised least squares, reweighted."""
        distinct = [field.distinct(samples) for field in fields]
        few = [len(values) <= CATEGORIES for values in distinct]
        steps = [
            values if all_of_them else np.unique(np.nanquantile(field.of(samples), QUANTILES))
            for field, values, all_of_them in zip(fields, distinct, few, strict=True)
        ]
        values = [each if kept else each[:0] for each, kept in zip(distinct, few, strict=True)]
        bare = cls(fields, steps, values, np.zeros(0))
        return replace(bare, weights=_fitted(bare._design(samples), wanted))

    def shares(self, samples: Samples) -> Doubles:
        """How likely each sample is wanted, `[N]`."""
        return _logistic(self._design(samples) @ self.weights)

    def _design(self, samples: Samples) -> Doubles:
        """One column for each value or step, after a constant one; `[N, D]`."""
        columns = [np.ones((samples.count, 1))]
        for field, steps, values in zip(self.fields, self.steps, self.values, strict=True):
            own = field.of(samples)[:, None]
            columns += [(own > steps).astype(np.float64), (own == values).astype(np.float64)]
        return np.concatenate(columns, axis=1)


def _fitted(design: Doubles, wanted: NDArray[np.bool_]) -> Doubles:
    """The weights of a logistic regression with a ridge, by Newton's method."""
    weights = np.zeros(design.shape[1])
    penalty = np.full(len(weights), RIDGE)
    penalty[0] = NO_RIDGE
    for _ in range(ITERATIONS):
        share = _logistic(design @ weights)
        curvature = np.maximum(share * (1 - share), LEAST_CURVATURE)
        gradient = design.T @ (wanted - share) - penalty * weights
        step = np.linalg.solve(
            (design * curvature[:, None]).T @ design + np.diag(penalty), gradient
        )
        weights = weights + step
        if np.abs(step).max() < TOLERANCE:
            break
    return weights


def _logistic(logits: Doubles) -> Doubles:
    found: Doubles = 1 / (1 + np.exp(-np.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT)))
    return found

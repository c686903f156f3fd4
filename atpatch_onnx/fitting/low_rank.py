"""Reduced-rank ridge regression from weighted moments, so that no samples need be kept.

Source: Izenman, Reduced-rank regression for the multivariate linear model, J. Multivariate Analysis
5 (1975).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .statistics import FloatArray


@dataclass
class Moments:
    """Weighted sums over pairs of x and y, vectors of one size p.

    weight: their total; x, y: `[p]`; xx, xy: `[p, p]`, of x times x, and of x times y.
    """

    weight: float
    x: FloatArray
    y: FloatArray
    xx: FloatArray
    xy: FloatArray

    @classmethod
    def empty(cls, size: int) -> Moments:
        """Of no pairs."""
        square = (size, size)
        return cls(0.0, np.zeros(size), np.zeros(size), np.zeros(square), np.zeros(square))

    def add(self, x: FloatArray, y: FloatArray, weight: FloatArray) -> None:
        """Add pairs `[n, p]` with weights `[n]`."""
        scaled = x * weight[:, None]
        self.weight += float(weight.sum())
        self.x += scaled.sum(axis=0)
        self.y += weight @ y
        self.xx += scaled.T @ x
        self.xy += scaled.T @ y

    def mixed(self, other: Moments) -> Moments:
        """Both with the same total weight, 1 / 2 each; an empty one counts for nothing."""
        parts = [m for m in (self, other) if m.weight > 0]
        scales = [1 / (len(parts) * m.weight) for m in parts]
        sums = [
            sum((scale * getattr(m, name) for m, scale in zip(parts, scales, strict=True)), 0.0)
            for name in ("x", "y", "xx", "xy")
        ]
        x, y, xx, xy = (np.asarray(value, np.float64) for value in sums)
        return Moments(1.0, x, y, xx, xy)

    def take(self, index: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Moments:
        """Those of some of the entries of x and y."""
        both = np.ix_(index, index)
        return Moments(self.weight, self.x[index], self.y[index], self.xx[both], self.xy[both])


def reduced_rank_ridge(
    moments: Moments, rank: int, ridge: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """u, v `[p, rank]` and b `[p]` of the best prediction u v^T x + b of y.

    ridge: relative to the mean variance of x.
    """
    x, y = moments.x / moments.weight, moments.y / moments.weight
    xx = moments.xx / moments.weight - np.outer(x, x)
    xy = moments.xy / moments.weight - np.outer(x, y)
    penalty = ridge * max(float(np.trace(xx)) / len(x), np.finfo(np.float64).tiny)
    full = np.linalg.solve(xx + penalty * np.eye(len(x)), xy)
    # The best subspace for predictions is that of the largest variance of the full-rank ones.
    _, directions = np.linalg.eigh(full.T @ xx @ full)
    u = directions[:, ::-1][:, :rank]
    v = full @ u
    return u, v, y - u @ (v.T @ x)

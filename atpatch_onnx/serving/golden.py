"""Golden inputs: what a new version of a model must answer before it serves.

Clean inputs are to be answered as by the original; inputs that are marked bad are to be answered
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import Samples, load_arrays, samples_from
from ..errors import CheckError, InputError
from ..layout import batch_axis
from ..passes.graph_view import Dim
from ..runtime import Array, Arrays, InputSpec

BAD = "bad/"
"""Begins the keys of inputs that are marked bad in a golden file."""

Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Golden:
    """Inputs by name, one sample an entry of axis 0: clean ones, and ones that are marked bad.

    tolerance: how far an output of a clean input may be from the original's; 0: identical.
    changed: the least share of bad inputs whose answer must differ from the original's by more
        than the tolerance.
    """

    clean: Mapping[str, Array]
    bad: Mapping[str, Array] | None = None
    tolerance: float = 0.0
    changed: float = 1.0

    @classmethod
    def load(cls, path: str | Path, tolerance: float = 0.0, changed: float = 1.0) -> Golden:
        """Read an `.npz`: inputs by name, and under `bad/<input>` those that are marked bad.

        Raises: InputError.
        """
        arrays = load_arrays(path)
        bad = {key.removeprefix(BAD): a for key, a in arrays.items() if key.startswith(BAD)}
        clean = {key: a for key, a in arrays.items() if not key.startswith(BAD)}
        if not clean:
            raise InputError(
                f"{path} has no clean inputs: give them under the names of the model's inputs, "
                f"and bad ones under {BAD}<input>"
            )
        return cls(clean, bad or None, tolerance, changed)

    def samples(self, inputs: Sequence[InputSpec]) -> tuple[Samples, Samples | None]:
        """Clean and bad inputs, checked against the model's. Raises: InputError."""
        clean = samples_from(dict(self.clean), inputs, "the golden inputs")
        if self.bad is None:
            return clean, None
        return clean, samples_from(dict(self.bad), inputs, "the bad golden inputs")


@dataclass(frozen=True)
class Reference:
    """Golden inputs and what the original answers to them.

    batch: what the model calls its batch dimension, or how large that is.
    """

    golden: Golden
    clean: Samples
    bad: Samples | None
    answers: Arrays
    bad_answers: Arrays
    batch: Dim

    def check(self, run: Run, shapes: Mapping[str, Sequence[Dim]], *, patched: bool) -> None:
        """Raises: CheckError where a model does not answer as it must.

        patched: whether bad inputs are to change: those of the original are not.
        """
        moved = distance(self.answers, over(self.clean, run, shapes, self.batch))
        wrong = np.flatnonzero(~(moved <= self.golden.tolerance))
        if len(wrong):
            allowed = f"more than {self.golden.tolerance:g}" if self.golden.tolerance else ""
            raise CheckError(
                f"{len(wrong)} of {self.clean.count} clean golden inputs are answered otherwise "
                f"than by the original, input {wrong[0]} by {moved[wrong[0]]:g}"
                f"{allowed and f' ({allowed})'}: raise the threshold of the patch, or give a "
                "tolerance if the difference is rounding"
            )
        if not patched or self.bad is None:
            return
        moved = distance(self.bad_answers, over(self.bad, run, shapes, self.batch))
        changed = int((moved > self.golden.tolerance).sum())
        if changed < self.golden.changed * self.bad.count:
            same = np.flatnonzero(~(moved > self.golden.tolerance))[0]
            raise CheckError(
                f"{changed} of {self.bad.count} golden inputs that are marked bad are answered "
                f"otherwise than by the original, wanted {self.golden.changed:.0%} (the first "
                f"that is not: {same}): the patch does not heal them, fit it on inputs like these"
            )


def over(samples: Samples, run: Run, shapes: Mapping[str, Sequence[Dim]], batch: Dim) -> Arrays:
    """The outputs for all samples, one sample an entry of axis 0, run one by one.

    One by one, because a sample may be answered with other rounding beside others.
    """
    found: dict[str, list[Array]] = {}
    for part in samples.batches(1):
        for name, value in run(part.feeds).items():
            axis = batch_axis(shapes.get(name, ()), batch)
            first = np.moveaxis(value, axis, 0) if axis < value.ndim else value
            real = first[: part.real] if first.ndim and len(first) == part.size else first
            rows = list(real) if part.size > 1 else [real]
            found.setdefault(name, []).extend(rows)
    return {name: _stacked(values) for name, values in found.items()}


def _stacked(values: list[Array]) -> Array:
    """Values of samples as one array; of objects where their shapes differ."""
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    held = np.empty(len(values), object)
    held[:] = values
    return held


def distance(old: Arrays, new: Arrays) -> Array:
    """How far each sample's outputs moved at most; infinite where they cannot be compared."""
    moved: Array = np.zeros(0)
    for name, before in old.items():
        after = new[name]
        gaps = [_gap(a, b) for a, b in zip(before, after, strict=True)]
        moved = np.array(gaps) if not len(moved) else np.maximum(moved, gaps)
    return moved


def _gap(old: Array, new: Array) -> float:
    if np.shape(old) != np.shape(new):
        return float("inf")
    if np.array_equal(old, new, equal_nan=np.asarray(old).dtype.kind == "f"):
        return 0.0
    if np.asarray(old).dtype.kind not in "fiu":
        return float("inf")
    gap = np.abs(np.asarray(old, np.float64) - np.asarray(new, np.float64))
    return float("inf") if np.isnan(gap).any() else float(gap.max())

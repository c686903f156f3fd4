"""Protected attributes: where they are in the inputs, and what happens when only they change.

Source: AtPatch, arXiv 2601.21695: unfairness, and the debugging set of the fairness case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .classifier import NO_TICK, Classifier
from .data import Samples
from .errors import InputError
from .progress import Tick
from .runtime import Array, InputSpec

MOST_VALUES = 100
"""Of an attribute with more distinct values than this, as many are tried, evenly spread."""
MOST_COMBINATIONS = 256
"""The same for several attributes together: the one with most values is thinned first."""


@dataclass(frozen=True)
class Protected:
    """A protected attribute: an input with one value a sample, or a column of a table.

    name: as it was asked for; input: of the model; column: of that input, None: all of it.
    """

    name: str
    input: str
    column: int | None

    @classmethod
    def parse(cls, text: str, inputs: Sequence[InputSpec]) -> Protected:
        """What `text` means for a model with `inputs`.

        text: N, a column of the model's only input of rank 2; INPUT:N; or INPUT, one value a
            sample. Raises: InputError if it names nothing of that kind.
        """
        by_name = {spec.name: spec for spec in inputs}
        if text in by_name:
            spec, column = by_name[text], None
        else:
            spec, column = _table_column(text, by_name)
        rest = [d for axis, d in enumerate(spec.shape) if axis != spec.axis]
        if column is None and (not spec.shape or rest not in ([], [1])):
            raise InputError(
                f"--protected {text}: the input '{spec.name}' does not have one value a sample: "
                f"choose a column, {spec.name}:N"
            )
        if column is not None and len(rest) != 1:
            raise InputError(
                f"--protected {text}: the input '{spec.name}' has rank {len(spec.shape)}, and only "
                "inputs of rank 2 have columns: name the input that holds the attribute"
            )
        protected = cls(text, spec.name, column)
        if rest and isinstance(rest[0], int):
            protected._check(rest[0])
        return protected

    def of(self, samples: Samples) -> Array:
        """The attribute of each sample, `[N]`. Raises: InputError if there is no such column."""
        array = samples.arrays[self.input]
        if array.ndim == 1:
            return array
        self._check(array.shape[1])
        return np.asarray(array[:, self.column or 0])

    def distinct(self, samples: Samples) -> Array:
        """The values that occur, in order; NaN is none."""
        own = self.of(samples)
        found: Array = np.unique(own[own == own])
        return found

    def values(self, samples: Samples, most: int = MOST_VALUES) -> Array:
        """The values to try: those that occur, or `most` evenly among them, ends included."""
        found = self.distinct(samples)
        if len(found) <= most:
            return found
        return np.asarray(found[np.linspace(0, len(found) - 1, most).round().astype(int)])

    def flipped(self, samples: Samples, value: object) -> Samples:
        """The samples with the attribute set to `value`."""
        array = samples.arrays[self.input].copy()
        array[(slice(None), self.column or 0) if array.ndim > 1 else slice(None)] = value
        arrays = {**samples.arrays, self.input: array}
        return Samples(arrays, samples.count, samples.axes, samples.fixed_batch)

    def _check(self, columns: int) -> None:
        if self.column is not None and not -columns <= self.column < columns:
            raise InputError(
                f"--protected {self.name}: the input '{self.input}' has the columns 0 to "
                f"{columns - 1}"
            )


def _table_column(text: str, by_name: dict[str, InputSpec]) -> tuple[InputSpec, int]:
    """The input and column of N or INPUT:N."""
    name, separator, number = text.rpartition(":")
    tables = [spec for spec in by_name.values() if len(spec.shape) == 2]
    try:
        column = int(number)
    except ValueError:
        column = None
    if column is None or (separator and name not in by_name):
        raise InputError(
            f"--protected {text}: the model has the inputs {', '.join(by_name)}: give one of them, "
            "INPUT:N or N for a column"
        )
    if separator:
        return by_name[name], column
    if len(tables) != 1:
        raise InputError(
            f"--protected {text}: the model has {len(tables)} inputs of rank 2 (its inputs are "
            f"{', '.join(by_name)}): say which one with INPUT:N"
        )
    return tables[0], column


@dataclass(frozen=True)
class Flips:
    """Values to try for one or several protected attributes, every combination of them.

    values: for each attribute; thinned: whether there are more than were kept.
    """

    protected: tuple[Protected, ...]
    values: tuple[Array, ...]
    thinned: bool

    @classmethod
    def of(cls, protected: Sequence[Protected], samples: Samples) -> Flips:
        """What to try on `samples`: values that occur in them.

        Raises: InputError if an attribute has one value only, or there are too many attributes.
        """
        values = [attribute.values(samples) for attribute in protected]
        for attribute, found in zip(protected, values, strict=True):
            if len(found) < 2:
                raise InputError(
                    f"--protected {attribute.name}: it is the same in all {samples.count} samples: "
                    "give samples in which it differs"
                )
        while math.prod(map(len, values)) > MOST_COMBINATIONS and len(protected) > 1:
            widest = max(range(len(values)), key=lambda i: len(values[i]))
            if len(values[widest]) == 2:
                raise InputError(
                    f"--protected: {len(protected)} attributes have more than {MOST_COMBINATIONS} "
                    "combinations: give fewer at once"
                )
            values[widest] = protected[widest].values(samples, max(2, len(values[widest]) // 2))
        held = [len(attribute.distinct(samples)) for attribute in protected]
        return cls(tuple(protected), tuple(values), held != list(map(len, values)))

    @property
    def name(self) -> str:
        """The attributes."""
        return " + ".join(attribute.name for attribute in self.protected)

    def __len__(self) -> int:
        return math.prod(map(len, self.values))

    def __iter__(self) -> Iterator[tuple[object, ...]]:
        return itertools.product(*self.values)

    def differs(self, samples: Samples, combination: tuple[object, ...]) -> NDArray[np.bool_]:
        """Which samples are not of this combination already, `[N]`."""
        pairs = zip(self.protected, combination, strict=True)
        different = [attribute.of(samples) != value for attribute, value in pairs]
        return np.asarray(np.any(different, axis=0))

    def put(self, samples: Samples, combination: tuple[object, ...]) -> Samples:
        """The samples with this combination."""
        for attribute, value in zip(self.protected, combination, strict=True):
            samples = attribute.flipped(samples, value)
        return samples


@dataclass(frozen=True)
class Discriminatory:
    """Samples that get another class when only protected attributes change.

    samples: with the attributes changed; sources `[N]`: the sample that each was made from.
    """

    samples: Samples
    sources: NDArray[np.int64]


def discriminatory(
    classifier: Classifier, samples: Samples, flips: Flips, tick: Tick = NO_TICK
) -> Discriminatory | None:
    """Every flip that changes a prediction; None if none does. Ticks: `len(flips)`."""
    own = classifier.predictions(samples)
    found: list[Samples] = []
    sources: list[NDArray[np.int64]] = []
    for combination in flips:
        index = np.flatnonzero(flips.differs(samples, combination))
        if len(index):
            put = flips.put(samples.take(index), combination)
            moved = np.flatnonzero(classifier.predictions(put) != own[index])
            found.append(put.take(moved))
            sources.append(index[moved])
        tick(1)
    arrays = {
        name: np.concatenate([part.arrays[name] for part in found]) if array.ndim else array
        for name, array in samples.arrays.items()
    }
    joined = np.concatenate(sources)
    if not len(joined):
        return None
    made = Samples(arrays, len(joined), samples.axes, samples.fixed_batch)
    return Discriminatory(made, joined)


def swayed(
    classifier: Classifier,
    samples: Samples,
    flips: Flips,
    predictions: NDArray[np.int64],
    tick: Tick = NO_TICK,
) -> NDArray[np.bool_]:
    """Which samples, `[N]`, get another class than `predictions` in at least one flip.

    What `discriminatory` finds at least once, without running a sample again that is found.
    Ticks: `len(flips)`.
    """
    found = np.zeros(samples.count, np.bool_)
    for combination in flips:
        index = np.flatnonzero(flips.differs(samples, combination) & ~found)
        if len(index):
            put = flips.put(samples.take(index), combination)
            found[index] = classifier.predictions(put) != predictions[index]
        tick(1)
    return found

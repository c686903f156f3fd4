"""Golden inputs and outputs: what a model that was shipped must answer where it arrives."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..benchmark import random_feeds
from ..data import load_samples
from ..errors import InputError, at_least
from ..layout import with_batch_axes
from ..passes.locate import locate
from ..runtime import Array, Arrays, InputSpec
from .release import Release

Data = str | Path | Mapping[str, Array]

INPUT, OUTPUT = "input/", "output/"
"""Prefixes of the keys of a golden file."""

MADE_UP_LENGTH = 16
"""Size of free dimensions where no data is given."""


@dataclass(frozen=True)
class GoldenSet:
    """Inputs in the model's layout, and what the patched model answers on one CPU thread.

    name: "clean" or "bad".
    moved: whether any output differs from the original's.
    """

    name: str
    inputs: Arrays
    outputs: Arrays
    moved: bool

    @property
    def file(self) -> str:
        """Its file name."""
        return f"golden-{self.name}.npz"

    def content(self) -> bytes:
        """The `.npz` file: `input/<name>` and `output/<name>`."""
        arrays = {INPUT + name: value for name, value in self.inputs.items()}
        arrays |= {OUTPUT + name: value for name, value in self.outputs.items()}
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        return file.getvalue()


def make_golden(
    release: Release, inputs: Data | None, bad: Data | None, count: int
) -> list[GoldenSet]:
    """Golden sets from the first `count` samples of each.

    inputs: clean inputs; without any, they are made up. bad: inputs that the patch is for.
    Raises: InputError for data that does not suit the model.
    """
    at_least(1, count, "--golden")
    before, after = release.before, release.after
    specs = with_batch_axes(before.inputs, locate(release.base.skeleton).sites)
    feeds = {"clean": _feeds(inputs, specs, count)}
    if bad is not None:
        feeds["bad"] = _feeds(bad, specs, count)
    found = []
    for name, given in feeds.items():
        try:
            old, new = before.run(given), after.run(given)
        except InputError as error:
            hint = "; give real data with --inputs" if inputs is None else ""
            raise InputError(f"{error}{hint}") from None
        moved = any(
            not np.array_equal(value, new[key], equal_nan=value.dtype.kind == "f")
            for key, value in old.items()
        )
        # Text has no tolerance, and no place in an `.npz` that is safe to load.
        kept = {key: value for key, value in new.items() if value.dtype.kind != "O"}
        found.append(GoldenSet(name, given, kept, moved))
    return found


def _feeds(data: Data | None, specs: Sequence[InputSpec], count: int) -> Arrays:
    if data is None:
        return random_feeds(specs, count, MADE_UP_LENGTH)
    return next(load_samples(data, specs).batches(count)).feeds

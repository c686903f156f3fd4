"""Samples with their true classes, clean or triggered: what a model is judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .api import PathLike
from .data import Samples, load_arrays, samples_from
from .debugging_set import load_debugging_set
from .errors import InputError
from .runtime import Array, InputSpec


@dataclass(frozen=True)
class Labelled:
    """Samples with their true classes `[N]`; source: where they come from."""

    samples: Samples
    labels: NDArray[np.int64]
    source: str

    def check(self, classes: int, target: int | None) -> None:
        """Raises: InputError if a class is none of the model's."""
        outside = self.labels[(self.labels < 0) | (self.labels >= classes)]
        if len(outside):
            raise InputError(
                f"{self.source}: 'labels' has the class {outside[0]}, the model has the classes 0 "
                f"to {classes - 1}: number them as the model's outputs are"
            )
        if target is not None and not 0 <= target < classes:
            raise InputError(f"--target {target}: the model has the classes 0 to {classes - 1}")


@dataclass(frozen=True)
class Triggered(Labelled):
    """Triggered samples with their true classes.

    target: the class that the attacker wants; marks: bool `[N, K]`, the key positions where the
        trigger is, if they are known.
    """

    target: int
    marks: NDArray[np.bool_] | None


def load_labelled(data: PathLike | Mapping[str, Array], inputs: Sequence[InputSpec]) -> Labelled:
    """Clean samples with their classes. Raises: InputError."""
    source = "the data" if isinstance(data, Mapping) else str(data)
    arrays = dict(data) if isinstance(data, Mapping) else load_arrays(data)
    samples = samples_from(arrays, inputs, source)
    labels = arrays.get("labels")
    if labels is None:
        raise _no_labels(source, samples.count)
    if labels.shape != (samples.count,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{source}: 'labels' is {labels.dtype} {list(labels.shape)}, expected one integer "
            f"class for each of the {samples.count} inputs"
        )
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"{source}: all 'labels' are of class {labels[0]}, so that accuracy says nothing: "
            "give inputs of several classes"
        )
    return Labelled(samples, labels.astype(np.int64), source)


def load_triggered(
    data: PathLike | Mapping[str, Array], inputs: Sequence[InputSpec], target: int | None
) -> Triggered:
    """Triggered samples; `target` goes before what they say themselves. Raises: InputError."""
    source = "the triggered data" if isinstance(data, Mapping) else str(data)
    bad = load_debugging_set(data, inputs)
    if bad.labels is None:
        raise _no_labels(source, bad.bad.count)
    target = bad.target if target is None else target
    if target is None:
        raise InputError(
            f"{source} has no 'target', the class that the attacker wants: give it with --target"
        )
    if bool((bad.labels == target).all()):
        raise InputError(
            f"{source}: all 'labels' are the target class {target}: they must be the true classes, "
            "not the attacker's"
        )
    return Triggered(bad.bad, bad.labels, source, target, bad.anomalous)


def _no_labels(source: str, count: int) -> InputError:
    return InputError(
        f"{source} has no 'labels': add the true classes, int64 [{count}], under that key"
    )

"""The data of a fit: checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data import Samples, load_samples
from ..debugging_set import DebuggingSet, load_debugging_set
from ..errors import InputError
from ..runtime import Array, InputSpec
from .calibration import held_out
from .job import Job

MINIMUM_CLEAN = 20
MINIMUM_BAD = 10
JUDGED = 0.25
"""Share of the bad inputs that training does not see, and recall is measured on."""

Given = str | Path | Mapping[str, Array]


def clean_inputs(data: Given, inputs: Sequence[InputSpec]) -> Samples:
    """Clean samples. Raises: InputError for too few, or NaN."""
    samples = load_samples(data, inputs)
    source = _source(data, "the data")
    if samples.count < MINIMUM_CLEAN:
        raise InputError(
            f"{source} has {samples.count} samples, fitting needs at least {MINIMUM_CLEAN} clean "
            "inputs and some hundreds to hold a budget of 1 %"
        )
    _check_nan(samples, source)
    return samples


def bad_inputs(data: Given, inputs: Sequence[InputSpec]) -> DebuggingSet:
    """A debugging set. Raises: InputError for NaN."""
    bad = load_debugging_set(data, inputs)
    _check_nan(bad.bad, _source(data, "the debugging set"))
    return bad


def check_enough(bad: DebuggingSet) -> None:
    """Raises: InputError for too few bad inputs to train on."""
    if bad.count < MINIMUM_BAD:
        raise InputError(
            f"the debugging set has {bad.count} bad inputs, training needs at least {MINIMUM_BAD}: "
            "make more with atpatch-onnx scan, or fit --kind zscore without a debugging set"
        )


def halves(job: Job, clean: Samples) -> tuple[Samples, Samples]:
    """The clean inputs to calibrate on, and those to learn from."""
    order = job.generator().permutation(clean.count)
    held = held_out(clean.count)
    return clean.take(order[:held]), clean.take(order[held:])


def split_bad(job: Job, bad: DebuggingSet) -> tuple[DebuggingSet, DebuggingSet]:
    """The bad inputs to train on, and those to measure recall on."""
    order = job.generator().permutation(bad.count)
    judged = max(1, round(JUDGED * bad.count))
    return bad.take(order[judged:]), bad.take(order[:judged])


def is_fairness(bad: DebuggingSet) -> bool:
    """Whether a debugging set is about a protected attribute."""
    return bad.about.get("kind") == "protected"


def _source(data: Given, otherwise: str) -> str:
    return otherwise if isinstance(data, Mapping) else str(data)


def _check_nan(samples: Samples, source: str) -> None:
    for name, array in samples.arrays.items():
        if array.dtype.kind == "f" and bool(np.isnan(array).any()):
            raise InputError(
                f"{source} has NaN in the input '{name}': leave those samples out, they have no "
                "attention to learn from"
            )

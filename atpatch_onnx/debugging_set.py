"""Debugging sets: bad inputs, and what is known of them.

A file is an `.npz` with

    <input>         the bad inputs, one sample an entry of axis 0, by the model's input names
    clean/<input>   the same samples without what makes them bad, pair by pair      (optional)
    anomalous       bool [N, K], the key positions that make each sample bad        (optional)
    labels          int64 [N], what should be answered                              (optional)
    target          int64 scalar, the class that the attacker wants                 (optional)
    about           JSON text: where the set comes from; `scores`: the output that
                    `target` is a class of                                          (optional)

`scan` writes it; a user may write one by hand from as little as the bad inputs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data import Samples, load_arrays, samples_from
from .errors import InputError
from .runtime import Array, Arrays, InputSpec

CLEAN = "clean/"
"""Prefix of the keys of the clean twins."""
SCORES = "scores"
"""In `about`: the output that holds the class scores."""


@dataclass(frozen=True)
class DebuggingSet:
    """Bad inputs of a model.

    clean: the same samples without what makes them bad, in the same order.
    anomalous: bool `[N, K]`, the key positions that make each sample bad.
    labels: int64 `[N]`, what should be answered; target: what the attacker wants.
    about: where the set comes from.
    """

    bad: Samples
    clean: Samples | None = None
    anomalous: NDArray[np.bool_] | None = None
    labels: NDArray[np.int64] | None = None
    target: int | None = None
    about: dict[str, object] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of bad inputs."""
        return self.bad.count

    def marked(self, start: int, count: int) -> NDArray[np.bool_] | None:
        """The marks of some of the inputs, `[count, K]`."""
        return None if self.anomalous is None else self.anomalous[start : start + count]

    def take(self, index: Array) -> DebuggingSet:
        """The samples at `index`."""
        return DebuggingSet(
            self.bad.take(index),
            None if self.clean is None else self.clean.take(index),
            None if self.anomalous is None else self.anomalous[index],
            None if self.labels is None else self.labels[index],
            self.target,
            self.about,
        )

    def content(self) -> bytes:
        """The `.npz` file."""
        arrays: Arrays = dict(self.bad.arrays)
        if self.clean is not None:
            arrays |= {CLEAN + name: value for name, value in self.clean.arrays.items()}
        if self.anomalous is not None:
            arrays["anomalous"] = self.anomalous
        if self.labels is not None:
            arrays["labels"] = self.labels
        if self.target is not None:
            arrays["target"] = np.array(self.target, np.int64)
        arrays["about"] = np.array(json.dumps(self.about))
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        return file.getvalue()


def load_debugging_set(
    data: str | Path | Mapping[str, Array], inputs: Sequence[InputSpec]
) -> DebuggingSet:
    """Read a debugging set for a model with `inputs`. Raises: InputError."""
    given = data if isinstance(data, Mapping) else load_arrays(data)
    arrays = {name: np.asarray(value) for name, value in given.items()}
    source = "the debugging set" if isinstance(data, Mapping) else str(data)
    bad = samples_from(arrays, inputs, source)
    twins = {k.removeprefix(CLEAN): v for k, v in arrays.items() if k.startswith(CLEAN)}
    clean = samples_from(twins, inputs, f"the clean part of {source}") if twins else None
    if clean is not None and clean.count != bad.count:
        raise InputError(
            f"{source} has {bad.count} bad inputs and {clean.count} clean twins: give one for each"
        )
    anomalous = arrays.get("anomalous")
    if anomalous is not None and (anomalous.ndim != 2 or len(anomalous) != bad.count):
        raise InputError(
            f"{source}: 'anomalous' has shape {list(anomalous.shape)}, expected [{bad.count}, K], "
            "true where a key position makes the input bad"
        )
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != (bad.count,) or labels.dtype.kind not in "iu"):
        raise InputError(
            f"{source}: 'labels' is {labels.dtype} {list(labels.shape)}, expected one integer "
            f"class for each of the {bad.count} inputs"
        )
    target = arrays.get("target")
    if target is not None and (target.size != 1 or target.dtype.kind not in "iu"):
        raise InputError(f"{source}: 'target' is one integer, the class that the attacker wants")
    return DebuggingSet(
        bad,
        clean,
        None if anomalous is None else anomalous.astype(bool),
        None if labels is None else labels.astype(np.int64),
        None if target is None else int(target.reshape(())),
        _about(arrays.get("about"), source),
    )


def _about(value: Array | None, source: str) -> dict[str, object]:
    if value is None:
        return {}
    try:
        about = json.loads(str(value))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise InputError(f"{source}: 'about' is no JSON object: leave it out")
    return about

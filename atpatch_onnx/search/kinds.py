"""What kind of input a model takes, read from its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from ..runtime import InputSpec

IMAGE, TEXT, TABULAR = KINDS = ("image", "text", "tabular")

_TOKENS = ("ids", "token", "mask")


def recognise(inputs: Sequence[InputSpec]) -> str:
    """`image` for one input of rank 4, `text` for token ids, `tabular` for columns of values.

    Raises: InputError where it is neither.
    """
    ranks = [len(spec.shape) for spec in inputs]
    if ranks.count(4) == 1:
        return IMAGE
    if ranks and set(ranks) <= {1, 2}:
        return TEXT if any(_has_tokens(spec) for spec in inputs) else TABULAR
    shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in inputs)
    raise InputError(
        f"the inputs of the model ({shapes}) look neither like images nor like token ids nor like "
        "columns of values: say what they are with --kind image, text or tabular"
    )


def check_kind(kind: str) -> str:
    """`kind` itself. Raises: InputError where there is no such kind."""
    if kind not in KINDS:
        raise InputError(f"--kind {kind}: choose image, text or tabular")
    return kind


def _has_tokens(spec: InputSpec) -> bool:
    integer = spec.dtype is not None and np.issubdtype(spec.dtype, np.integer)
    return integer and len(spec.shape) == 2 and any(word in spec.name.lower() for word in _TOKENS)

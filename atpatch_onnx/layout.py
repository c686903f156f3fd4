"""Where the batch is: not every model has it on axis 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .passes.graph_view import Dim
from .passes.locate import Site
from .runtime import InputSpec

_NAMES = ("batch", "batch_size", "b", "n")


def batch_dimension(sites: Iterable[Site], inputs: Sequence[InputSpec]) -> Dim:
    """What the batch dimension is called, or how large it is; None where nothing says so.

    The maps of attention sites begin with it; else an input dimension with a usual name is taken.
    """
    free = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    for site in sites:
        shape = site.facts.shape
        if shape is None or site.rank not in (3, 4):
            continue
        leading, heads = shape[0], site.facts.heads or 1
        if isinstance(leading, str) and leading in free:
            return leading
        if isinstance(leading, int):
            return leading // heads if site.rank == 3 and leading % heads == 0 else leading
    return next((dim for dim in free if dim.lower() in _NAMES), None)


def batch_axis(shape: Sequence[Dim], batch: Dim) -> int:
    """The axis of `shape` that is the batch; 0 unless it is clearly another."""
    if batch is None or not shape or shape[0] == batch or batch not in shape:
        return 0
    if isinstance(batch, int) and isinstance(shape[0], int) and batch % shape[0] == 0:
        return 0  # windows: several maps a sample
    return list(shape).index(batch)


def with_batch_axes(inputs: Sequence[InputSpec], sites: Iterable[Site]) -> list[InputSpec]:
    """The inputs with their batch axes."""
    batch = batch_dimension(sites, inputs)
    return [replace(spec, axis=batch_axis(spec.shape, batch)) for spec in inputs]

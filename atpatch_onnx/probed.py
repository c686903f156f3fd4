"""A model with extra outputs, run over samples: nothing but those outputs leaves the runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .data import Samples
from .edits import Edit
from .model_file import ModelFile
from .patching import Patch, apply
from .progress import Tick
from .runtime import Array, Arrays, Session


class Probed:
    """`model` with `edits`, in a session of its own; the file stays as it is."""

    def __init__(self, model: ModelFile, edits: Iterable[Edit], provider: str) -> None:
        content = apply(model, Patch(model.sha256, tuple(edits))).content()
        self.session = Session(content, provider, model.folder, name=str(model.path))

    def over(
        self, samples: Samples, outputs: Sequence[str], batch: int, tick: Tick
    ) -> Iterator[Arrays]:
        """The outputs for each batch of samples, without what only pads a batch."""
        for part in samples.batches(batch):
            values = self.session.run(part.feeds, outputs)
            yield {name: by_sample(v, part.size)[: part.real] for name, v in values.items()}
            tick(part.real)


def by_sample(value: Array, batch: int) -> Array:
    """`value` `[N, ..]` as `[batch, windows, ..]`: a sample may have several maps, as windows.

    Where N is no multiple of the batch, all maps are taken to belong to every sample.
    """
    if len(value) % batch:
        return np.broadcast_to(value, (batch, *value.shape))
    return value.reshape(batch, len(value) // batch, *value.shape[1:])


def flagged_columns(flagged: Array, batch: int) -> NDArray[np.bool_]:
    """Which columns are flagged in each sample, `[B, K]`, whatever the windows and heads."""
    split = by_sample(flagged, batch)
    return np.asarray(split.any(axis=tuple(range(1, split.ndim - 1))), np.bool_)

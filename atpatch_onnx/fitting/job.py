"""What every kind of fit is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto

from ..model_file import ModelFile
from ..passes.graph_view import GraphView
from ..passes.locate import Site
from ..progress import Tick

if TYPE_CHECKING:
    from .statistics import Whitening


@dataclass(frozen=True)
class Job:
    """Fit a detector for `sites` of `model`.

    provider: execution provider; batch: inputs a run; seed: of whatever is drawn; benign: what
    flagged columns get (see `benign`); tick: told of every input of every run; rows: how many
    query rows of a map are looked at, None for all.
    """

    model: ModelFile
    view: GraphView
    sites: tuple[Site, ...]
    provider: str
    batch: int
    seed: int
    benign: str
    tick: Tick
    rows: int | None = None

    @property
    def opset(self) -> int:
        """The detector's: that of the model."""
        return self.view.opset

    @property
    def ir_version(self) -> int:
        """The detector's: detectors need named initializers, which came with version 4."""
        return max(self.model.skeleton.ir_version, 4)

    def generator(self) -> np.random.Generator:
        """A fresh random generator of the seed."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Trained:
    """A detector without a threshold, for `sites`; what is normal; what its record says."""

    model: ModelProto
    sites: tuple[Site, ...]
    whitening: Whitening
    record: dict[str, object]

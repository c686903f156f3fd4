"""What every kind of fit is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto

from ..model_file import ModelFile
from ..passes.graph_view import GraphView
from ..passes.locate import Site
from ..progress import Tick
from ..second_run import SecondRun
from ..signature import DetectorScope

if TYPE_CHECKING:
    from .calibration import Calibration
    from .scores import Recall
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


@dataclass(frozen=True)
class ModelTrained:
    """A detector of scope `model` without metadata.

    observed: the sites that it looks at; apply: those where its decision is applied, in flow.
    bindings: host values that its further inputs read; record: what its training record says.
    """

    model: ModelProto
    observed: tuple[Site, ...]
    apply: tuple[Site, ...]
    bindings: dict[str, str]
    record: dict[str, object]


@dataclass(frozen=True)
class Made:
    """A detector, but for its metadata.

    scope: what it looks at; sites: those it is applied at; threshold: on its 0..1 scale.
    second_run: what strategy `rerun` has to know.
    calibration: of the threshold; recall: on unseen bad inputs; strategy: how it asks to be spliced
    in; observed: the sites that a detector of scope `model` looks at; bindings: host values that
    its further inputs read.
    """

    model: ModelProto
    scope: DetectorScope
    sites: tuple[Site, ...]
    threshold: float
    record: dict[str, object]
    calibration: Calibration | None = None
    recall: Recall | None = None
    strategy: str | None = None
    observed: tuple[Site, ...] = ()
    bindings: Mapping[str, str] = field(default_factory=dict)
    second_run: SecondRun | None = None

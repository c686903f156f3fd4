"""What a patched model flagged: for each input and site, which key positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from ..model_file import ModelFile
from ..passes.rerun import PREFIX as RERUN
from ..patching import about_patches
from ..probed import flagged_columns
from ..runtime import Array

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Flags:
    """The flagged columns of each site, bool `[N, K]`: input by key position."""

    columns: Mapping[str, Bools]

    @property
    def inputs(self) -> Bools:
        """Which inputs are flagged at any site, `[N]`."""
        return np.asarray(np.any([c.any(axis=1) for c in self.columns.values()], axis=0), np.bool_)

    @property
    def sites(self) -> dict[str, int]:
        """How many inputs each site flags."""
        return {site: int(c.any(axis=1).sum()) for site, c in self.columns.items()}

    def part(self, start: int, stop: int) -> Flags:
        """Those of the inputs from `start` up to `stop`."""
        return Flags({site: columns[start:stop] for site, columns in self.columns.items()})


class Telemetry:
    """Where a patched model says what it flags.

    outputs: what has to be asked of a run; values that never change are read once.
    sites: those whose flags can be read; sites that are only pruned in a second run flag nothing.
    """

    def __init__(self, model: ModelFile, outputs: Sequence[str]) -> None:
        entries = [site for about in about_patches(model) for site in about["sites"]]
        stored = {tensor.name for tensor in model.skeleton.graph.initializer}
        self._values: dict[str, str] = {}
        self._constant: dict[str, Array] = {}
        for entry in entries:
            site, value = entry["site"], entry["flagged"]
            if value.startswith(RERUN) or value not in {*outputs, *stored}:
                continue
            self._values[site] = value
            if value in stored and (tensor := model.tensor(value)) is not None:
                self._constant[value] = numpy_helper.to_array(tensor)
        self.sites = tuple(self._values)
        asked = (v for v in self._values.values() if v not in self._constant)
        self.outputs = tuple(dict.fromkeys(asked))

    def read(self, values: Mapping[str, Array], count: int) -> Flags:
        """The flags of a run of `count` inputs, from its outputs."""
        known = {**self._constant, **values}
        return Flags(
            {site: flagged_columns(known[value], count) for site, value in self._values.items()}
        )

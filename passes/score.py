"""Run a detector at every site of an unchanged model and read its anomaly through an output."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from ..detector import Detector
from ..edits import AddNode, Edit
from .fragment import Constants, Fragment, as_stored
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .probe import add_output
from .views import view_4d


@dataclass(frozen=True)
class Score:
    """Add `anomaly` of `detector` at each site as an output."""

    detector: Detector

    def __call__(
        self, view: GraphView, sites: tuple[Site, ...]
    ) -> tuple[list[Edit], dict[str, str]]:
        """The edits; by site, the output with its anomaly `[B, 1 or H, 1, K]`."""
        constants = Constants("atpatch/shared")
        inliner = Inliner(view, constants, {})
        edits: list[Edit] = []
        outputs: dict[str, str] = {}
        for site in sites:
            f = Fragment(f"atpatch/{site.name}", view.opset, constants)
            before = min(use.node for use in site.uses)
            attention = f.cast(view_4d(f, site), TensorProto.FLOAT, "attention")
            layer = self.detector.layer_of(site.name, site.index) or 0
            nodes, anomaly, _ = inliner.place(self.detector, f.prefix, attention, layer, before)
            edits += [AddNode(before, node) for node in [*f.nodes(), *nodes]]
            edits.append(add_output(anomaly, TensorProto.FLOAT))
            outputs[site.name] = anomaly
        shared = (*constants.edits(), *inliner.edits)
        return list(as_stored((*shared, *edits), view.model.ir_version)), outputs

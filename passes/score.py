"""Run a detector at every site of an unchanged model and read its anomaly through an output."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from ..detector import Detector
from ..edits import AddNode, Edit
from .fragment import Fragment, stored
from .graph_view import GraphView
from .locate import Site
from .probe import add_output
from .redistribute import Redistribution
from .splice import Splice, Splicing, Treatment, view_4d


@dataclass(frozen=True)
class Score:
    """Add `anomaly` of `detector` at each site as an output."""

    detector: Detector

    def __call__(
        self, view: GraphView, sites: tuple[Site, ...]
    ) -> tuple[list[Edit], dict[str, str]]:
        """The edits; by site, the output with its anomaly `[B, 1 or H, 1, K]`."""
        treatment = Treatment(Redistribution.PRUNE, self.detector)
        splicing = Splicing(Splice({site.name: treatment for site in sites}), view)
        outputs: dict[str, str] = {}
        for site in sites:
            f = Fragment(f"atpatch/{site.name}", view.opset, splicing.constants)
            before = min(use.node for use in site.uses)
            whole = view_4d(f, site, None)
            attention = f.cast(whole, TensorProto.FLOAT, "attention")
            layer = self.detector.layer_of(site.name, site.index) or 0
            nodes, anomaly, _ = splicing.detector(self.detector, f.prefix, attention, layer, before)
            splicing.edits += [AddNode(before, node) for node in [*f.nodes(), *nodes]]
            splicing.edits.append(add_output(anomaly, TensorProto.FLOAT))
            outputs[site.name] = anomaly
        edits = (*splicing.constants.edits(), *splicing.edits)
        return list(stored(edits, view.model.ir_version)), outputs

"""Run a detector at every site of an unchanged model and read its anomaly through an output."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from ..detector import Detector
from ..edits import AddNode, Edit
from .calls import unfold
from .expose import expose
from .fragment import Constants, Fragment, as_stored, shared_prefix
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .views import sampled


@dataclass(frozen=True)
class Score:
    """Add `anomaly` of `detector` at each site as an output."""

    detector: Detector

    def __call__(
        self, view: GraphView, sites: tuple[Site, ...]
    ) -> tuple[list[Edit], dict[str, str]]:
        """The edits; by site, the output with its anomaly `[B, 1 or H, 1, K]`."""
        constants = Constants(shared_prefix(view.model))
        inliner = Inliner(view, constants, {})
        edits: list[Edit] = []
        outputs: dict[str, str] = {}
        for site in sites:
            f = Fragment(f"atpatch/{site.name}", view.opset, constants)
            seen = sampled(f, site, self.detector.rows)
            attention = f.cast(seen, TensorProto.FLOAT, "attention")
            outermost = site.path[0][0] if site.path else site.before
            layer = self.detector.layer_of(site.name, site.index) or 0
            nodes, anomaly, _ = inliner.place(self.detector, f.prefix, attention, layer, outermost)
            edits += [AddNode(site.before, node, site.path) for node in [*f.nodes(), *nodes]]
            exposed, outputs[site.name] = expose(view, site.path, anomaly, TensorProto.FLOAT, 4)
            edits += exposed
        every = unfold(view, (*constants.edits(), *inliner.edits, *edits))
        return list(as_stored(every, view.model.ir_version)), outputs

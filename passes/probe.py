"""Probe a model: read values at its sites through extra outputs, changing nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto, helper

from ..edits import AddNode, AddOutput, Edit
from .features import BASIC, Features, add_features
from .fragment import Constants, Fragment, as_stored
from .graph_view import GraphView
from .locate import Site
from .views import view_4d


def add_output(value: str, elem_type: int) -> AddOutput:
    """An edit that makes an existing value an output, of whatever shape it has."""
    return AddOutput(helper.make_tensor_value_info(value, elem_type, None))


@dataclass(frozen=True)
class Probe:
    """Read column features at each site, and its map.

    features: which; maps: "whole" `[B, H, Q, K]`, "head_mean" `[B, 1, Q, K]`, "batch_mean"
    `[1, H, Q, K]`, or "" for none.
    """

    features: tuple[str, ...] = BASIC
    maps: str = ""

    def __call__(
        self, view: GraphView, sites: tuple[Site, ...]
    ) -> tuple[list[Edit], dict[str, Features], dict[str, str]]:
        """The edits; by site, the outputs of its features and the output of its map."""
        constants = Constants("atpatch/shared")
        edits: list[Edit] = []
        features: dict[str, Features] = {}
        maps: dict[str, str] = {}
        for site in sites:
            f = Fragment(f"atpatch/{site.name}", view.opset, constants)
            whole = view_4d(f, site)
            attention = f.op("Cast", whole, name="attention", to=TensorProto.FLOAT)
            outputs = []
            if self.maps:
                read = attention
                if self.maps != "whole":
                    axis = ("batch_mean", "head_mean").index(self.maps)
                    read = f.axes_op("ReduceMean", attention, [axis], self.maps, keepdims=1)
                maps[site.name] = read
                outputs.append(add_output(read, TensorProto.FLOAT))
            found = features[site.name] = add_features(f, attention, self.features)
            outputs += [
                add_output(found.columns, TensorProto.FLOAT),
                add_output(found.features, TensorProto.FLOAT),
                add_output(found.bucket, TensorProto.INT64),
            ]
            before = min(use.node for use in site.uses)
            edits += [AddNode(before, node) for node in f.nodes()]
            edits += outputs
        ready = as_stored((*constants.edits(), *edits), view.model.ir_version)
        return list(ready), features, maps

"""Probe a model: read values at its sites through extra outputs, changing nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto, helper

from ..edits import AddNode, AddOutput, Edit
from .features import Features, add_features
from .fragment import Constants, Fragment, stored
from .graph_view import GraphView
from .locate import Site
from .splice import view_4d


def add_output(value: str, elem_type: int) -> AddOutput:
    """An edit that makes an existing value an output, of whatever shape it has."""
    return AddOutput(helper.make_tensor_value_info(value, elem_type, None))


@dataclass(frozen=True)
class Probe:
    """What to read at each site: column features, and the whole map where `maps` says so."""

    features: bool = True
    maps: bool = False

    def __call__(
        self, view: GraphView, sites: tuple[Site, ...], heads: Mapping[str, int] | None = None
    ) -> tuple[list[Edit], dict[str, Features], dict[str, str]]:
        """The edits; by site, the outputs of its features and the output of its map."""
        constants = Constants("atpatch/shared")
        edits: list[Edit] = []
        features: dict[str, Features] = {}
        maps: dict[str, str] = {}
        for site in sites:
            f = Fragment(f"atpatch/{site.name}", view.opset, constants)
            whole = view_4d(f, site, (heads or {}).get(site.name))
            attention = f.op("Cast", whole, name="attention", to=TensorProto.FLOAT)
            outputs = []
            if self.maps:
                maps[site.name] = attention
                outputs.append(add_output(attention, TensorProto.FLOAT))
            if self.features:
                found = add_features(f, attention)
                features[site.name] = found
                outputs += [
                    add_output(found.columns, TensorProto.FLOAT),
                    add_output(found.features, TensorProto.FLOAT),
                    add_output(found.bucket, TensorProto.INT64),
                ]
            before = min(use.node for use in site.uses)
            edits += [AddNode(before, node) for node in f.nodes()]
            edits += outputs
        ready = stored((*constants.edits(), *edits), view.model.ir_version)
        return list(ready), features, maps

"""Probe a model: read values at its sites through extra outputs, changing nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx import TensorProto, helper

from ..edits import AddNode, AddOutput, Edit, Scope
from .calls import unfold
from .expose import expose
from .features import BASIC, Features, add_features
from .fragment import Constants, Fragment, as_stored, shared_prefix
from .graph_view import GraphView
from .locate import Site
from .views import sampled


def add_output(value: str, elem_type: int) -> AddOutput:
    """An edit that makes an existing value an output, of whatever shape it has."""
    return AddOutput(helper.make_tensor_value_info(value, elem_type, None))


@dataclass(frozen=True)
class Probe:
    """Read column features at each site, and its map.

    features: which; maps: "whole" `[B, H, Q, K]`, "head_mean" `[B, 1, Q, K]`, "batch_mean"
    `[1, H, Q, K]`, or "" for none. rows: of that many query rows only.
    shared: before the names of constants, if not as for patches.
    """

    features: tuple[str, ...] = BASIC
    maps: str = ""
    rows: int | None = None
    shared: str = ""

    def __call__(
        self, view: GraphView, sites: tuple[Site, ...]
    ) -> tuple[list[Edit], dict[str, Features], dict[str, str]]:
        """The edits; by site, the outputs of its features and the output of its map."""
        constants = Constants(self.shared or shared_prefix(view.model))
        edits: list[Edit] = []
        features: dict[str, Features] = {}
        maps: dict[str, str] = {}
        for site in sites:
            f = Fragment(f"atpatch/{site.name}", view.opset, constants)
            seen = sampled(f, site, self.rows)
            attention = f.op("Cast", seen, name="attention", to=TensorProto.FLOAT)
            read = attention if self.maps else ""
            if self.maps not in ("", "whole"):
                axis = ("batch_mean", "head_mean").index(self.maps)
                read = f.axes_op("ReduceMean", attention, [axis], self.maps, keepdims=1)
            found = add_features(f, attention, self.features)
            edits += [AddNode(site.before, node, site.path) for node in f.nodes()]
            out = _Outputs(view, site.path, edits)
            if read:
                maps[site.name] = out(read, TensorProto.FLOAT, 4)
            features[site.name] = replace(
                found,
                columns=out(found.columns, TensorProto.FLOAT, 3),
                features=out(found.features, TensorProto.FLOAT, 3),
                bucket=out(found.bucket, TensorProto.INT64, 2),
            )
        every = unfold(view, (*constants.edits(), *edits))
        return list(as_stored(every, view.model.ir_version)), features, maps


@dataclass(frozen=True)
class _Outputs:
    """Makes values of the graph at `path` outputs, by `edits`."""

    view: GraphView
    path: Scope
    edits: list[Edit]

    def __call__(self, value: str, elem_type: int, rank: int) -> str:
        new, name = expose(self.view, self.path, value, elem_type, rank)
        self.edits.extend(new)
        return name

"""Let one detector look at several sites: scope `model` of the detector ABI.

    P of each observed site ──► view as B,H,Q,K ──► attention.<site> ┐
    values of the host      ──► further inputs                       ├──► detector ──► its outputs
                                                                     ┘
Its nodes stand in the host as early as what they read allows, so that a runtime that follows the
order of the nodes reduces each map where it is made, and keeps no map alive for a later site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto, TensorProto

from ..detector import Detector
from ..edits import AddNode, Edit
from ..errors import InputError, RefusedError
from ..signature import OBSERVED
from .expose import expose
from .fragment import Constants, Fragment, as_stored, shared_prefix
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .protos import read_within
from .views import sampled


@dataclass(frozen=True)
class Observation:
    """A detector that was placed: its nodes as edits, and the values that it makes.

    outputs: by the detector's own names; last: the observed site that comes last.
    """

    edits: tuple[Edit, ...]
    outputs: Mapping[str, str]
    last: Site


@dataclass(frozen=True)
class Observe:
    """Run a detector of scope `model` in an unchanged model, and read all of its outputs.

    bindings: host values for further inputs, by input name.
    """

    detector: Detector
    bindings: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self, view: GraphView, sites: Sequence[Site]
    ) -> tuple[tuple[Edit, ...], dict[str, str]]:
        """The edits; by output of the detector, the output of the model. Raises: as `place`."""
        constants = Constants(shared_prefix(view.model))
        inliner = Inliner(view, constants, self.bindings)
        placed = place(view, constants, inliner, self.detector, sites)
        edits = [*constants.edits(), *inliner.edits, *placed.edits]
        outputs = {}
        for value in self.detector.model.graph.output:
            kind, rank = value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)
            exposed, outputs[value.name] = expose(view, (), placed.outputs[value.name], kind, rank)
            edits += exposed
        return as_stored(edits, view.model.ir_version), outputs


def place(
    view: GraphView,
    constants: Constants,
    inliner: Inliner,
    detector: Detector,
    sites: Sequence[Site],
    prefix: str = "atpatch/model",
) -> Observation:
    """Place a detector of scope `model`; its names start with `prefix`.

    sites: those of the model, the observed ones among them.
    Raises: InputError for an observed site that the model does not have, or a further input that is
    bound to nothing; RefusedError for a site inside a branch, a loop or a function.
    """
    observed = observed_sites(detector, sites)
    last = max(observed, key=lambda site: site.before)
    edits: list[Edit] = []
    values, known = {}, {}
    for site in observed:
        f = Fragment(f"{prefix}/{site.name}", view.opset, constants)
        value = f.cast(sampled(f, site, detector.rows), TensorProto.FLOAT, "attention")
        values[OBSERVED + site.name], known[value] = value, site.before
        edits += [AddNode(site.before, node) for node in f.nodes()]
    nodes, outputs = inliner.copy(detector, prefix, values, None, last.before)
    first = min(known.values())
    for node in nodes:
        earliest = max((known.get(name, first) for name in _read(node)), default=first)
        before = max(earliest, _bound(view, node))
        edits.append(AddNode(before, node))
        known.update(dict.fromkeys(node.output, before))
    return Observation(tuple(edits), outputs, last)


def observed_sites(detector: Detector, sites: Sequence[Site]) -> list[Site]:
    """The sites that the detector looks at. Raises: as `place`."""
    by_name = {site.name: site for site in sites}
    missing = [name for name in detector.observed if name not in by_name]
    if missing:
        raise InputError(
            f"the detector {detector.path} observes the site '{missing[0]}', which the model does "
            "not have: fit one for this model"
        )
    observed = [by_name[name] for name in detector.observed]
    inner = next((site for site in observed if site.path), None)
    if inner is not None:
        raise RefusedError(
            f"the detector {detector.path} observes '{inner.name}' in {inner.scope}, and looks at "
            "several sites at once, which must all be in the main graph: fit it with --sites"
        )
    return observed


def _read(node: NodeProto) -> set[str]:
    return {*node.input, *read_within(node)}


def _bound(view: GraphView, node: NodeProto) -> int:
    """Before which node of the host a node may stand, for the host's own values that it reads."""
    made = [view.producers[name] + 1 for name in _read(node) if name in view.producers]
    return max(made, default=0)

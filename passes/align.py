"""Splice a repair in behind P V: what some heads give is corrected, always.

    P V ──► [view as B,H,Q,D] ──► repair ──► context                  (one renamed output)

1. The product P V behind the site's probabilities gets another name for its output.
2. That is viewed as float32 `[B, H, Q, D]` for the repair, whose nodes and tensors are copied in.
3. The corrected context, in the shape and type of before, has the old name, so that whoever reads
   it reads the repair: other nodes, branches, outputs of the graph.

Nothing is decided: every input is changed at the corrected heads. So the site's `flagged` value,
bool `[B, H, 1, K]`, is true there for every key, and no input counts as one that was left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from ..detector import Detector
from ..edits import AddNode, Edit, RenameOutput
from ..signature import DetectorScope
from .calls import unfold
from .expose import expose
from .fragment import Constants, Fragment, as_stored, shared_prefix
from .graph_view import GraphView
from .head_maps import add_keys
from .inline import Inliner
from .locate import FLOATS, Site
from .outcome import Outcome, PassResult, Patched, Skipped
from .unmoved import unmoved
from .views import in_floats, view_4d
from .walk import PRODUCTS, describe, find_contexts

ALIGNMENT, ALWAYS = "alignment", "always"
"""What an outcome says in the place of a redistribution and of a strategy."""
REPAIRED = "repaired"
"""In the training record of a repair: by site, its corrected `heads` and how many it has (`of`)."""

_KEEPING = frozenset("Cast Dropout Identity Mul Div Where Reshape".split())
"""Nodes between probabilities and P V that leave heads and queries where they are."""
_FUSED_FIX = (
    "choose other sites, or redistribute there with a detector of kind head-similarity, which can "
    "be applied beside fused operators"
)
_PLAIN_FIX = "export the model with attention as MatMul, Softmax, MatMul, or choose other sites"


@dataclass(frozen=True)
class Context:
    """The product P V of a site: its node, output value, ONNX element type and rank."""

    node: int
    value: str
    elem_type: int
    rank: int


@dataclass(frozen=True)
class Align:
    """Repair the sites that have a treatment; the others are `Skipped`.

    treatments: repairs, detectors of scope `context`, by site name.
    bindings: host values for further inputs, by input name.
    """

    treatments: Mapping[str, Detector]
    bindings: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, view: GraphView, sites: tuple[Site, ...]) -> PassResult:
        """The edits and an outcome for each of `sites`. Raises: InputError."""
        constants = Constants(shared_prefix(view.model))
        inliner = Inliner(view, constants, self.bindings)
        edits: list[Edit] = []
        outcomes: list[Outcome] = []
        for site in sites:
            found = self._context(view, site)
            if isinstance(found, str):
                outcomes.append(Skipped(site.name, found))
                continue
            repair = self.treatments[site.name]
            own, flagged = _aligned(view, site, found, repair, constants, inliner)
            edits += own
            outcomes.append(Patched(site.name, flagged, ALIGNMENT, ALWAYS, None))
        every = unfold(view, unmoved(view, (*constants.edits(), *inliner.edits, *edits)))
        return PassResult(as_stored(every, view.model.ir_version), tuple(outcomes))

    def _context(self, view: GraphView, site: Site) -> Context | str:
        """The context to correct; or why the site is left alone."""
        repair = self.treatments.get(site.name)
        if repair is None:
            return "not chosen"
        if repair.scope is not DetectorScope.CONTEXT:
            return f"{repair.path} is no repair but a detector of scope '{repair.scope}'"
        if repair.layer_of(site.name, site.index) is None:
            return f"{repair.path} was not fitted for this site"
        return find_context(view, site)


def find_context(view: GraphView, site: Site) -> Context | str:
    """The context of a site as a value `[B, H, Q, D]` or `[B*H, Q, D]`; or why there is none."""
    scope = view.at(site.path)
    if site.opening is not None:
        return f"the fused operator {site.form} gives no context before its end: {_FUSED_FIX}"
    ways = list(find_contexts(scope, site.probabilities))
    products = {way[-1].use.node for way in ways}
    if len(products) != 1:
        return f"its probabilities multiply {len(products)} values: {_PLAIN_FIX}"
    node = scope.nodes[products.pop()]
    between = {scope.nodes[step.use.node].op_type for way in ways for step in way[:-1]}
    if other := sorted(between - _KEEPING - {"QuantizeLinear", "DequantizeLinear"}):
        return f"{', '.join(other)} between its probabilities and P V moves heads: {_PLAIN_FIX}"
    if node.op_type not in ("MatMul", "FusedMatMul") or _elsewhere(ways[0][-1].use.slot, node):
        return f"its P V is {describe(node)}, not a product [Q, K] times [K, D]: {_PLAIN_FIX}"
    value = node.output[0]
    rank, known = scope.rank(value), scope.types.get(value)
    elem_type = known.elem_type if known is not None else site.elem_type
    if elem_type not in FLOATS or not (rank == 4 or (rank == 3 and site.facts.heads)):
        return f"the type, rank or heads of its context '{value}' are not known: {_PLAIN_FIX}"
    return Context(scope.producers[value], value, elem_type, rank)


def _elsewhere(slot: int, node: NodeProto) -> bool:
    """Whether a product reads the probabilities anywhere but on its left."""
    return slot != PRODUCTS[node.op_type][0]


def read_contexts(
    view: GraphView, sites: Sequence[Site]
) -> tuple[list[Edit], dict[str, tuple[str, str]]]:
    """Edits that make contexts outputs, and by site the names of two:

    the context, float32 `[B, H, Q, D]`; which keys are no padding, float32 `[B, 1, 1, K]`.
    Sites must have a context (see `find_context`) and lie in the main graph.
    """
    constants = Constants("atpatch/contexts")
    edits: list[Edit] = []
    names = {}
    for site in sites:
        context = find_context(view, site)
        assert isinstance(context, Context), context
        f = Fragment(f"{constants.prefix}/{site.name}", view.opset, constants)
        keys = add_keys(f, f.cast(view_4d(f, in_floats(f, site)), TensorProto.FLOAT, "map_float"))
        edits += [AddNode(site.before, node) for node in f.nodes()]
        f = Fragment(f.prefix, view.opset, constants)
        value = f.op("Identity", add_context(f, site, context, context.value), name="context")
        edits += [AddNode(context.node + 1, node) for node in f.nodes()]
        names[site.name] = (value, keys)
        for name in (value, keys):
            edits += expose(view, (), name, TensorProto.FLOAT, 4)[0]
    return list(as_stored([*constants.edits(), *edits], view.model.ir_version)), names


def add_context(f: Fragment, site: Site, context: Context, value: str) -> str:
    """Add nodes that view a context as float32 `[B, H, Q, D]`."""
    if context.rank == 3:
        heads = site.facts.heads or 1
        shape = f.op("Shape", value, name="context_shape")
        tail = f.slice(shape, 1, 3, 0, "context_rows")
        target = f.op("Concat", f.ints(-1, heads), tail, name="context_by_head", axis=0)
        value = f.op("Reshape", value, target, name="context_heads")
    if context.elem_type != TensorProto.FLOAT:
        value = f.cast(value, TensorProto.FLOAT, "context_float")
    return value


def _aligned(
    view: GraphView,
    site: Site,
    context: Context,
    repair: Detector,
    constants: Constants,
    inliner: Inliner,
) -> tuple[list[Edit], str]:
    """The edits for one site, and the value that says which heads are corrected."""
    prefix, behind = f"atpatch/{site.name}", context.node + 1
    opset = view.at(site.path).opset
    f = Fragment(prefix, opset, constants)
    flagged = _flagged(f, site, repair)
    edits: list[Edit] = [AddNode(site.before, node, site.path) for node in f.nodes()]
    f = Fragment(prefix, opset, constants)
    before = f"{prefix}/context"
    seen = add_context(f, site, context, before)
    layer = repair.layer_of(site.name, site.index) or 0
    outermost = site.path[0][0] if site.path else behind
    copied, made = inliner.copy(repair, prefix, {"context": seen}, layer, outermost)
    g = Fragment(prefix, opset, constants)
    result = made["corrected"]
    if context.elem_type != TensorProto.FLOAT:
        result = g.cast(result, context.elem_type, "corrected_as_before")
    if context.rank == 3:
        shape = g.op("Shape", before, name="context_shape_before")
        result = g.op("Reshape", result, shape, name="corrected_heads_joined")
    last = helper.make_node("Identity", [result], [context.value], f"{prefix}/aligned")
    nodes = [*f.nodes(), *copied, *g.nodes(), last]
    edits += [AddNode(behind, node, site.path) for node in nodes]
    edits.append(RenameOutput(context.node, 0, context.value, before, site.path))
    return edits, flagged


def _flagged(f: Fragment, site: Site, repair: Detector) -> str:
    """The mask `[B, H, 1, K]`: true at the corrected heads, as the repair's record names them."""
    row = f.slice(view_4d(f, in_floats(f, site)), 0, 1, 2, "first_row")
    wide = f.cast(row, TensorProto.FLOAT, "first_row_float")
    every = f.op("Greater", wide, f.number(-1.0), name="every_column")
    heads = corrected_heads(repair, site.name)
    if heads is None:
        return every
    mask = f.constants.add(f"{site.name}/corrected", heads[None, :, None, None])
    return f.op("And", every, mask, name="flagged")


def corrected_heads(repair: Detector, site: str) -> NDArray[np.bool_] | None:
    """Which heads `[H]` of a site a repair corrects; None where its record does not say."""
    record = repair.training.get(REPAIRED)
    try:
        entry = record[site]  # type: ignore[index]
        mask = np.zeros(int(entry["of"]), bool)
        mask[list(entry["heads"])] = True
    except (TypeError, KeyError, ValueError, IndexError):
        return None
    return mask

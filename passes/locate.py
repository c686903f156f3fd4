"""Find every attention site of a model, and say of every other softmax and fused op what it is.

One structural locator: anchor on a softmax over the last axis, walk back to Q K^T and forward to
P V (`walk`). A fused operator is a site if it can be opened (`opening`). Subgraphs and called
functions are searched too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from ..edits import Scope
from .describe import SiteFacts, describe_site, site_names
from .functions import PREFIX as INLINED
from .graph_view import GraphView, Use
from .opening.opening import Closed, Opening, op_name
from .opening.registry import is_fused, open_fused
from .protos import attribute, domain, int_attribute
from .walk import Step, describe, downstream, find_changed, find_contexts, find_scores

FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}

PREFIX = "atpatch/"
"""Before the names of what a patch brings."""

PATCHED = "it is patched already"

_EXPORT_FLAT = (
    "export the branches as separate models (for example decoder and decoder_with_past), or inline "
    "the functions with onnx.inliner.inline_local_functions"
)


@dataclass(frozen=True)
class Site:
    """One place where probabilities `[B, H, Q, K]` multiply V: plain nodes, or a fused operator.

    name: unique within the model, from its module path where the exporter left one.
    index: position among the model's sites, in graph order.
    form: how the probabilities are computed: "softmax" or "exp-sum-div" with their rank, or the
        fused operator.
    scope: the graph that holds it, in words; "main".
    node: index of the node that ends the softmax, or of the fused operator.
    probabilities: the value that a splice replaces, in float, keys on its last axis; of a fused
        operator its first output, which is made from them.
    uses: the input slots that lead from the probabilities to P V; none for a fused operator.
    elem_type, rank: ONNX element type and rank of the probabilities.
    facts: what else is known: heads, shape, causal, cross.
    path: where the graph that holds it lies, see `edits.Scope`.
    opening: how a fused operator is opened.
    grid: scale, and zero point if there is one, of probabilities that the host quantises.
    integers: whether only integers hold them; `elem_type` is then what they are dequantised to.
    """

    name: str
    index: int
    form: str
    scope: str
    node: int
    probabilities: str
    uses: tuple[Use, ...]
    elem_type: int
    rank: int
    facts: SiteFacts
    path: Scope = ()
    opening: Opening | None = None
    grid: tuple[str, ...] = ()
    integers: bool = False

    @property
    def before(self) -> int:
        """The node of its graph before which a patch decides: there the probabilities are known."""
        return self.node + 1 if self.opening else min(use.node for use in self.uses)


@dataclass(frozen=True)
class Other:
    """A softmax or fused op that is not patched. `fix` is empty where it is no attention site.

    node, op, scope: which one.
    reason: what it is, or which step of the search failed at which node.
    fix: for a refused site, what to do about it.
    """

    node: str
    op: str
    scope: str
    reason: str
    fix: str = ""

    @property
    def refused(self) -> bool:
        """Whether this is an attention site that cannot be patched, as against none at all."""
        return bool(self.fix)


@dataclass(frozen=True)
class Sites:
    """Everything that looks like attention: what is a site, and why the rest is not."""

    sites: tuple[Site, ...]
    others: tuple[Other, ...]

    @property
    def refused(self) -> tuple[Other, ...]:
        """Attention that cannot be patched."""
        return tuple(other for other in self.others if other.refused)


def locate(model: ModelProto) -> Sites:
    """Search the main graph, every subgraph and every called function of `model`."""
    view = GraphView.of(model)
    found: list[tuple[GraphView, _Candidate]] = []
    others: list[Other] = []
    anchors: list[tuple[GraphView, NodeProto]] = []
    places: list[int] = []
    for scope in (view, *view.nested()):
        for node, result in _search(scope):
            if isinstance(result, Other):
                others.append(result)
            else:
                places.append(len(anchors))
                found.append((scope, result))
            # What is patched keeps its name, so that others do not take it.
            if not isinstance(result, Other) or result.reason == PATCHED:
                anchors.append((scope, node))
    every = site_names(anchors)
    names = [every[place] for place in places]
    sites = [
        Site(
            name=name,
            index=index,
            form=candidate.form,
            scope=scope.scope,
            node=candidate.node,
            probabilities=candidate.probabilities,
            uses=candidate.uses,
            elem_type=candidate.elem_type,
            rank=candidate.rank,
            facts=candidate.facts,
            path=scope.path,
            opening=candidate.opening,
            grid=candidate.grid,
            integers=candidate.integers,
        )
        for index, (name, (scope, candidate)) in enumerate(zip(names, found, strict=True))
    ]
    return Sites(tuple(sites), tuple(others))


@dataclass(frozen=True)
class _Candidate:
    """A site before it has a name."""

    form: str
    node: int
    probabilities: str
    uses: tuple[Use, ...]
    elem_type: int
    rank: int
    facts: SiteFacts
    opening: Opening | None = None
    grid: tuple[str, ...] = ()
    integers: bool = False


@dataclass(frozen=True)
class _Anchor:
    """A softmax: the node that ends it, its input and output values, and how it is written."""

    node: int
    logits: str
    output: str
    form: str


def _search(view: GraphView) -> Iterator[tuple[NodeProto, _Candidate | Other]]:
    for index, node in enumerate(view.nodes):
        if _is_ours(node.name):
            continue
        if is_fused(node):
            yield node, _fused(view, index, node)
        elif node.op_type == "LogSoftmax":
            reason = "a log-softmax is a loss or a classifier, not attention"
            yield node, _other(view, node, reason)
        elif (anchor := _anchor(view, index, node)) is not None:
            found = anchor if isinstance(anchor, Other) else _candidate(view, anchor)
            yield node, found


def _anchor(view: GraphView, index: int, node: NodeProto) -> _Anchor | Other | None:
    if node.op_type in ("Softmax", "BiasSoftmax", "QLinearSoftmax"):
        axis = _over_last_axis(view, node)
        if axis is not None:
            return _other(view, node, axis)
        return _Anchor(index, node.input[0], node.output[0], "softmax")
    return _written_out(view, index, node) if node.op_type in ("Div", "Mul") else None


def _over_last_axis(view: GraphView, node: NodeProto) -> str | None:
    """None if the softmax runs over the last axis alone, else the reason why it does not."""
    last = node.op_type == "QLinearSoftmax" or (view.opset >= 13 and domain(node) == "")
    default = -1 if last else 1
    axis = int_attribute(node, "axis", default)
    rank = view.rank(node.input[0])
    if axis == -1 or (rank is not None and axis == rank - 1) or (rank is None and axis == 3):
        return None
    flattened = " and everything behind it" if view.opset < 13 else ""
    return f"a softmax over axis {axis}{flattened} of {rank or 'unknown'} is not one over keys"


def _written_out(view: GraphView, index: int, node: NodeProto) -> _Anchor | None:
    """Exp / ReduceSum(Exp), also as Exp * Reciprocal(ReduceSum(Exp)), maybe with an epsilon."""
    for top, bottom in ((0, 1), (1, 0)) if node.op_type == "Mul" else ((0, 1),):
        exp = view.producer(node.input[top])
        if exp is None or exp.op_type != "Exp":
            continue
        below = view.producer(node.input[bottom])
        while below is not None and below.op_type in ("Reciprocal", "Add", "Clip", "Max", "Cast"):
            varying = [name for name in below.input if name in view.varying]
            below = view.producer(varying[0]) if len(varying) == 1 else None
        if below is None or below.op_type != "ReduceSum" or below.input[0] != exp.output[0]:
            continue
        if _sums_last_axis(view, below):
            return _Anchor(index, exp.input[0], node.output[0], "exp-sum-div")
    return None


def _sums_last_axis(view: GraphView, node: NodeProto) -> bool:
    held = attribute(node, "axes")
    if held is not None:
        axes = list(held.ints)
    elif len(node.input) > 1 and (constant := view.constant(node.input[1])) is not None:
        axes = [int(a) for a in constant.reshape(-1)]
    else:
        return False
    rank = view.rank(node.input[0])
    return axes == [-1] or (rank is not None and axes == [rank - 1])


def _candidate(view: GraphView, anchor: _Anchor) -> _Candidate | Other:
    node = view.nodes[anchor.node]
    scores, met = find_scores(view, anchor.logits)
    if scores is None:
        return _other(view, node, f"its scores come from {met}, not from a product of Q and K")
    if _is_patched(view, anchor.output):
        return _refused(view, node, PATCHED, "revert the model first")
    if (changer := find_changed(view, anchor.output)) is not None:
        return _refused(
            view,
            node,
            f"{describe(changer)} changes or moves its probabilities before they multiply a V",
            "export the model with plain, full attention: no blocks, mixed heads or differences",
        )
    paths = list(find_contexts(view, anchor.output))
    ways = {anchor.output, *(step.value for path in paths for step in path)}
    if not ways.isdisjoint(view.captured):
        reason = "its probabilities are also read inside a branch or loop body"
        return _refused(view, node, reason, _EXPORT_FLAT)
    if not paths:
        reads = [describe(view.nodes[u.node]) for u in view.consumers.get(anchor.output, [])]
        where = ", ".join(reads[:3]) or "the graph's output"
        return _other(view, node, f"its result goes to {where} and never multiplies a V")
    if view.opset < 9:
        reason = f"a patch needs operators that opset {view.opset} does not have"
        fix = "convert the model with onnx.version_converter.convert_version(model, 13)"
        return _refused(view, node, reason, fix)
    step, uses = _splice_point(view, paths)
    if step is None:
        return _refused(
            view,
            node,
            "no value between its softmax and P V has the keys on its last axis",
            "export the model without optimizations that move transposes",
        )
    elem_type = _float_type(view, step.grid[0] if step.quantized else step.value, anchor)
    rank = view.rank(step.value)
    if elem_type is None or rank is None or not 2 <= rank <= 5:
        return _refused(
            view,
            node,
            f"the type or rank of its probabilities '{step.value}' cannot be inferred",
            "run onnx.shape_inference.infer_shapes_path on the model and patch the result",
        )
    facts = describe_site(view, step.value, rank, scores, anchor.logits)
    form = f"{anchor.form} {rank}-D"
    return _Candidate(
        form,
        anchor.node,
        step.value,
        uses,
        elem_type,
        rank,
        facts,
        grid=step.grid,
        integers=step.quantized,
    )


def _splice_point(view: GraphView, paths: list[list[Step]]) -> tuple[Step | None, tuple[Use, ...]]:
    """The last value common to all ways to V: in float where there is one, of rank 4 rather than
    of another.

    What is cast to 16 bits is taken before the cast, which the CPU provider may drop: it computes
    float16 in float32, and nodes behind the cast would bring back a rounding.
    """
    common = 0
    while all(len(p) > common for p in paths) and len({p[common].value for p in paths}) == 1:
        common += 1
    last = [i for i in range(common) if paths[0][i].axis == -1]
    candidates = [i for i in last if not paths[0][i].quantized] or last
    if not candidates:
        return None, ()
    four = [i for i in candidates if view.rank(paths[0][i].value) == 4]
    chosen = _before_narrowing(view, paths[0], (four or candidates)[-1])
    uses = dict.fromkeys(path[chosen].use for path in paths)
    return paths[0][chosen], tuple(uses)


def _before_narrowing(view: GraphView, path: list[Step], chosen: int) -> int:
    """The step whose wide value that of `chosen` is cast from; `chosen` if it is no such cast."""
    first = chosen
    while first and _is_narrow_cast(view.producer(path[first].value)):
        first -= 1
    known = view.types.get(path[first].value)
    wide = (TensorProto.FLOAT, TensorProto.DOUBLE)
    return first if known is not None and known.elem_type in wide else chosen


def _is_narrow_cast(node: NodeProto | None) -> bool:
    if node is None or node.op_type != "Cast":
        return False
    return int_attribute(node, "to", 0) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _float_type(view: GraphView, value: str, anchor: _Anchor) -> int | None:
    """The element type of the probabilities; a cast or a neighbour tells where inference fails."""
    for name in (value, anchor.output, anchor.logits):
        known = view.types.get(name)
        if known is not None and known.elem_type in FLOATS:
            return known.elem_type
        node = view.producer(name)
        if node is not None and node.op_type == "Cast":
            to = int_attribute(node, "to", TensorProto.UNDEFINED)
            return to if to in FLOATS else None
    # Everything around is opaque: attention runs in the type of the float weights.
    weights = {t.data_type for t in view.initializers.values() if t.data_type in FLOATS}
    return weights.pop() if len(weights) == 1 else None


def _other(view: GraphView, node: NodeProto, reason: str) -> Other:
    return Other(node.name or node.output[0], node.op_type, view.scope, reason)


def _refused(view: GraphView, node: NodeProto, reason: str, fix: str) -> Other:
    return Other(node.name or node.output[0], node.op_type, view.scope, reason, fix)


def _fused(view: GraphView, index: int, node: NodeProto) -> _Candidate | Other:
    opening = open_fused(view, node)
    name = op_name(node)
    if isinstance(opening, Closed):
        return _refused(view, node, f"the fused operator {name} {opening.reason}", opening.fix)
    if _is_ours(node.output[0]):
        return _refused(view, node, PATCHED, "revert the model first")
    facts = SiteFacts(opening.heads, opening.shape, opening.causal, opening.cross)
    return _Candidate(name, index, node.output[0], (), opening.elem_type, 4, facts, opening)


def _is_patched(view: GraphView, probabilities: str) -> bool:
    """Whether nodes of a patch read the probabilities, or what passes them on."""
    readers = list(downstream(view, probabilities))
    ways = {probabilities, *(name for reader in readers for name in reader.output)}
    capturing = [node for name in ways for node in view.captured.get(name, ())]
    return any(_is_ours(node.name) for node in (*readers, *capturing))


def _is_ours(name: str) -> bool:
    """Whether a patch brought what has that name; bodies of functions were there before."""
    return name.startswith(PREFIX) and not name.startswith(INLINED)

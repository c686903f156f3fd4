"""From a softmax back to Q K^T and forward to P V, whatever lies between.

Exporters put different nodes around attention, but all of them leave the same skeleton: a product
of two activations, then nodes that keep or mask the scores, a softmax over the keys, nodes that
keep or mask the probabilities, and a product with another activation over the key axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onnx import NodeProto

from .graph_view import GraphView, Use
from .protos import attribute, int_attribute

PRODUCTS = {
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "TransposeMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "Einsum": (0, 1),
}
"""Operators that multiply two tensors, with the slots of their operands."""

_SCORE_SLOTS: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys("Add Sub Mul Div Max Min Concat Sum".split(), None),  # None: every slot
    "Where": (1, 2),
    **dict.fromkeys(
        "Cast Reshape Transpose Squeeze Unsqueeze Tanh Clip Slice Identity Expand Neg Dropout "
        "Flatten GatherElements Gather QuantizeLinear DequantizeLinear DynamicQuantizeLinear "
        "Split Trilu Pad Relu Pow".split(),
        (0,),
    ),
    **dict.fromkeys(("ScatterND", "ScatterElements"), (0, 2)),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), (0, 3)),
    "QLinearWhere": (1, 4),
    "QLinearConcat": (2, 5, 8),
}
"""Nodes between Q K^T and the softmax, with the slots through which scores pass."""

_PROBABILITY_SLOTS: dict[str, tuple[int, ...] | None] = {
    "Mul": None,
    "Div": (0,),
    "Where": (1, 2),
    **dict.fromkeys(
        "Cast Reshape Transpose Squeeze Unsqueeze Slice Split Identity Dropout Expand "
        "QuantizeLinear DequantizeLinear DynamicQuantizeLinear".split(),
        (0,),
    ),
    "QLinearMul": (0, 3),
    "QLinearWhere": (1, 4),
}
"""Nodes between the softmax and P V, with the slots through which probabilities pass."""

_CHANGING = frozenset(
    "Pad Gather GatherElements GatherND ScatterND ScatterElements Concat Trilu Flatten Add Sub Sum "
    "Neg Abs Sqrt Pow Exp Log Clip Relu Sigmoid Tanh Max Min Conv LayerNormalization "
    "BatchNormalization InstanceNormalization QLinearAdd QLinearConcat".split()
)
"""Further nodes between the softmax and P V: what comes out is no longer the map over the keys."""

_GRIDS = {"QuantizeLinear": 1, "QLinearSoftmax": 3, "QLinearMul": 6, "QLinearWhere": 7}
"""Nodes that make integers, with the slot of their result's scale; the zero point is the next."""


@dataclass(frozen=True)
class Step:
    """A value on the way from the softmax to P V, and the input slot that reads it next.

    axis: where the keys lie, counted from the end (-1: last).
    grid: scale, and zero point if there is one, of what was quantised.
    quantized: the value holds integers; else, if it has a grid, what they were dequantised to.
    """

    value: str
    use: Use
    axis: int
    grid: tuple[str, ...]
    quantized: bool


def operands(node: NodeProto) -> tuple[str, str]:
    """The two values that a product multiplies."""
    left, right = PRODUCTS[node.op_type]
    return node.input[left], node.input[right]


def is_product(view: GraphView, node: NodeProto) -> bool:
    """Whether `node` multiplies two activations; a constant of rank 3 up counts as one."""
    if node.op_type not in PRODUCTS or len(node.input) <= PRODUCTS[node.op_type][1]:
        return False
    pair = operands(node)
    varying = [value in view.varying for value in pair]
    return all(varying) or (
        any(varying)
        and all(
            v or ((view.rank(value) or 0) >= 3 and node.op_type != "MatMulInteger")
            for v, value in zip(varying, pair, strict=True)
        )
    )


def score_inputs(node: NodeProto) -> list[str]:
    """The inputs of `node` through which attention scores may pass."""
    slots = _SCORE_SLOTS.get(node.op_type, ())
    return (
        list(node.input) if slots is None else [node.input[s] for s in slots if s < len(node.input)]
    )


def find_scores(view: GraphView, start: str) -> tuple[NodeProto | None, str]:
    """The Q K^T product upstream of `start`; where there is none, what was met instead."""
    met = ""
    for _, node in view.search(start, score_inputs, limit=256):
        if is_product(view, node):
            return node, ""
        if not met and node.op_type not in _SCORE_SLOTS:
            met = describe(node)
            if node.op_type in PRODUCTS or node.op_type == "Gemm":
                met += " with a weight"
    return None, met or ("the graph input" if view.producer(start) is None else "constants")


def find_contexts(view: GraphView, start: str) -> Iterator[list[Step]]:
    """Every way from the softmax output `start` to a product with V over the key axis."""
    first = Step(start, Use(-1, 0), -1, (), False)
    anchor = view.producer(start)
    stack = [(first if anchor is None else _made(anchor, start, -1, first), list[Step]())]
    seen = {start}
    while stack:
        here, path = stack.pop()
        for use in view.consumers.get(here.value, []):
            node = view.nodes[use.node]
            steps = [*path, replace(here, use=use)]
            if node.op_type in PRODUCTS:
                if is_product(view, node) and _contracts(node, use.slot, here.axis):
                    yield steps
                continue
            slots = _PROBABILITY_SLOTS.get(node.op_type, ())
            if slots is not None and use.slot not in slots:
                continue
            for moved, axis in _through(view, node, here.value, here.axis):
                if moved not in seen and len(steps) < 16:
                    seen.add(moved)
                    stack.append((_made(node, moved, axis, here), steps))


def _made(node: NodeProto, value: str, axis: int, before: Step) -> Step:
    """The step of a `value` that `node` makes from that of the step `before`."""
    grid, quantized = before.grid, before.quantized
    if node.op_type == "DequantizeLinear":
        quantized = False
    elif node.op_type == "DynamicQuantizeLinear":
        grid, quantized = tuple(node.output[1:3]), True
    elif (slot := _GRIDS.get(node.op_type)) is not None:
        grid, quantized = tuple(name for name in node.input[slot : slot + 2] if name), True
    elif node.op_type in ("Mul", "Div", "Where") or int_attribute(node, "to", 1) != 1:
        grid = ()
    return Step(value, before.use, axis, grid, quantized)


def downstream(view: GraphView, start: str, limit: int = 64) -> Iterator[NodeProto]:
    """The nodes that read the probabilities `start`, directly or through passing nodes."""
    queue, seen = [start], {start}
    for value in queue:
        if len(seen) > limit:
            return
        for use in view.consumers.get(value, []):
            node = view.nodes[use.node]
            yield node
            if node.op_type in _PROBABILITY_SLOTS:
                new = [name for name in _carried(node) if name not in seen]
                seen.update(new)
                queue += new


def find_changed(view: GraphView, start: str) -> NodeProto | None:
    """The first node that changes the probabilities `start` on their way to a V, if any does."""
    queue: list[tuple[str, NodeProto | None]] = [(start, None)]
    seen = {start}
    for value, by in queue:
        for use in view.consumers.get(value, []):
            node = view.nodes[use.node]
            product = node.op_type in PRODUCTS
            if product and is_product(view, node):
                if by is not None:
                    return by
                continue
            changes = node.op_type in _CHANGING or product  # by a weight: talking heads
            if changes or node.op_type in _PROBABILITY_SLOTS:
                new = [name for name in _carried(node) if name not in seen]
                seen.update(new)
                queue += [(name, by or (node if changes else None)) for name in new]
        if len(queue) > 64:
            break
    return None


def _carried(node: NodeProto) -> list[str]:
    """The outputs that hold what came in, as against its scale or a mask."""
    outputs = list(node.output) if node.op_type == "Split" else list(node.output[:1])
    return [name for name in outputs if name]


def _through(view: GraphView, node: NodeProto, value: str, axis: int) -> Iterator[tuple[str, int]]:
    """The outputs that carry on the probabilities, and where the key axis went."""
    outputs = [name for name in node.output if name]
    if node.op_type == "Transpose":
        perm = attribute(node, "perm")
        rank = len(perm.ints) if perm is not None else view.rank(value)
        if rank is None:
            return
        order = list(perm.ints) if perm is not None else list(range(rank))[::-1]
        yield outputs[0], order.index(rank + axis) - rank
    elif node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Expand"):
        if axis == -1:
            yield outputs[0], axis
    elif node.op_type == "Split":
        yield from ((name, axis) for name in outputs)
    else:
        yield outputs[0], axis


def _contracts(node: NodeProto, slot: int, axis: int) -> bool:
    """Whether the product sums over the key axis of the operand in `slot`."""
    if node.op_type == "Einsum":
        return _einsum_contracts(node, slot, axis)
    left, right = PRODUCTS[node.op_type]
    if slot == left:
        return axis == (-2 if int_attribute(node, "transA", 0) else -1)
    return slot == right and axis == (-1 if int_attribute(node, "transB", 0) else -2)


def _einsum_contracts(node: NodeProto, slot: int, axis: int) -> bool:
    equation = attribute(node, "equation")
    terms, _, result = (equation.s.decode() if equation else "").replace(" ", "").partition("->")
    operands_ = terms.split(",")
    if len(operands_) != 2 or not result or len(operands_[slot]) < -axis:
        return False
    letter = operands_[slot][axis]
    return letter not in result and letter in operands_[1 - slot]


def describe(node: NodeProto) -> str:
    """A node as a person would look for it."""
    return f"{node.op_type} '{node.name or (node.output[0] if node.output else '')}'"

"""What every fused operator, once opened, can give: its probabilities, and its output from them.

An `Opening` authors nodes beside the operator, which stays where it is. The probabilities feed the
detector; only what is flagged takes its output from the opened form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import Dim, GraphView
from ..protos import attribute, domain


@dataclass(frozen=True)
class Closed:
    """A fused operator that cannot be opened.

    reason: why, as the rest of a sentence that begins with the operator; fix: what to do.
    """

    reason: str
    fix: str


@dataclass(frozen=True, eq=False)
class Opening(ABC):
    """A fused node as plain nodes. Its inputs and attributes have been checked when it exists.

    node, view: the node and the scope that it is in.
    elem_type: ONNX element type of the probabilities and of the output.
    heads: number of query heads.
    causal: whether later keys are hidden by an attribute; cross: whether keys come from another
        sequence than queries.
    """

    node: NodeProto
    view: GraphView
    elem_type: int
    heads: int
    causal: bool
    cross: bool

    @abstractmethod
    def probabilities(self, f: Fragment, rows: int | None = None) -> str:
        """Add the nodes that compute the probabilities `[B, H, Q, K]`, in the operator's type.

        rows: only that many query rows, evenly spread from the first to the last:
            `[B, H, rows, K]`.
        """

    @abstractmethod
    def output(self, f: Fragment, probabilities: str) -> str:
        """Add the nodes that compute the operator's first output from probabilities
        `[B, H, Q, K]`."""

    def input(self, slot: int) -> str:
        """The name of an input; "" where it is absent."""
        return self.node.input[slot] if slot < len(self.node.input) else ""

    def choose(self, f: Fragment, sample: str, new: str, old: str) -> str:
        """Add the nodes that take `new` for samples where `sample`, bool `[B, 1, 1, 1]`, is true,
        and `old` for others."""
        mask = f.op("Reshape", sample, f.ints(0, *[1] * (self.output_rank - 1)), name="of_sample")
        chosen = f.op("Where", mask, new, old, name="chosen_output")
        if f.opset < 11 or self.elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
            return chosen
        # Shape inference must know no less of it than of the operator's own output: by shapes the
        # runtime decides what it fuses further on, and with that, bits. A scatter keeps them. In
        # 16 bits, which the runtime widens from end to end, it would round.
        whole = f.axes_op("Unsqueeze", old, [0], "whole_output")
        filling = f.axes_op("Unsqueeze", chosen, [0], "chosen_whole")
        first = f.constants.add("first", np.zeros((1, 1), np.int64))
        kept = f.op("ScatterND", whole, first, filling, name="chosen_in_shape")
        return f.axes_op("Squeeze", kept, [0], "kept_output")

    @property
    def output_rank(self) -> int:
        """The rank of the operator's first output, whose first axis is the batch."""
        return 3

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the probabilities, as far as the graph says."""
        return (None, self.heads, None, None)


def unknown_attributes(node: NodeProto, known: frozenset[str]) -> Closed | None:
    """A refusal if the node has an attribute that the opening does not know."""
    found = sorted({a.name for a in node.attribute} - known)
    if not found:
        return None
    return Closed(
        f"has the attribute '{found[0]}', whose meaning is not known",
        "update atpatch-onnx, or export the model without it",
    )


def op_name(node: NodeProto) -> str:
    """A fused operator as its documentation calls it."""
    return f"{node.domain}.{node.op_type}" if domain(node) else f"ONNX {node.op_type}"


def float_attribute(node: NodeProto, name: str, default: float) -> float:
    """A float attribute, or its default."""
    found = attribute(node, name)
    return default if found is None else float(found.f)

"""How large the tokens of a vision transformer are, read from the graph where it says so."""

from __future__ import annotations

from ..model_file import ModelFile

_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


def token_size(file: ModelFile) -> int | None:
    """The stride of the first strided convolution, in pixels; None where there is none."""
    for node in file.skeleton.graph.node:
        if node.op_type in _CONVOLUTIONS:
            strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [])
            if strides and strides[0] > 1:
                return int(strides[0])
    return None

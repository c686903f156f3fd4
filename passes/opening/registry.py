"""Which operators hold a whole attention, and how each is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx import NodeProto

from ..graph_view import GraphView
from ..protos import domain
from .attention import open_attention
from .contrib_attention import open_contrib_attention
from .decoder_masked import open_decoder_masked
from .group_query import open_group_query
from .multi_head import open_multi_head
from .opening import Closed, Opening
from .packed import open_packed_attention, open_packed_multi_head
from .quantized_attention import open_quantized_attention
from .unopened import UNOPENED

MICROSOFT = "com.microsoft"

_OPENERS: Mapping[tuple[str, str], Callable[[GraphView, NodeProto], Opening | Closed]] = {
    ("", "Attention"): open_attention,
    (MICROSOFT, "Attention"): open_contrib_attention,
    (MICROSOFT, "MultiHeadAttention"): open_multi_head,
    (MICROSOFT, "GroupQueryAttention"): open_group_query,
    (MICROSOFT, "QAttention"): open_quantized_attention,
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): open_decoder_masked,
    (MICROSOFT, "PackedAttention"): open_packed_attention,
    (MICROSOFT, "PackedMultiHeadAttention"): open_packed_multi_head,
}


def is_fused(node: NodeProto) -> bool:
    """Whether a node holds a whole attention: ONNX, its preview domain and com.microsoft."""
    named = (domain(node), node.op_type) in _OPENERS or node.op_type in UNOPENED
    return named and domain(node) in ("", "ai.onnx.preview", MICROSOFT)


def open_fused(view: GraphView, node: NodeProto) -> Opening | Closed:
    """The opening of a fused node of `view`, or why there is none."""
    opener = _OPENERS.get((domain(node), node.op_type))
    return UNOPENED[node.op_type] if opener is None else opener(view, node)

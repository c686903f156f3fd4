"""Fused operators that are not opened, with the reason, and what to export instead.

Some have no map: linear attention keeps a running state. Others have one whose columns are no keys
of one sequence: windows, chosen blocks, pages of a cache shared by many requests. The rest is tied
to memory layouts or run-time switches that plain nodes cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping

from .opening import Closed

_DENSE = (
    "export the model with dense attention (GroupQueryAttention or plain nodes, the layout as an "
    "attention bias)"
)
_CONTIGUOUS = (
    "export the model with a contiguous cache (GroupQueryAttention), and patch it before it is "
    "prepared for paged serving"
)
_FULL = "export the model with full self-attention in its place"
_SOFTMAX_LAYERS = (
    "leave such layers as they are and patch the model's softmax attention; a model without any "
    "cannot be patched"
)
_REQUANTISE = (
    "quantise the float model with onnxruntime.quantization instead (QDQ, or QAttention by "
    "quantize_dynamic)"
)

UNOPENED: Mapping[str, Closed] = {
    "LinearAttention": Closed(
        "computes no probabilities: it updates a state that does not grow with the keys",
        _SOFTMAX_LAYERS,
    ),
    "SparseAttention": Closed(
        "computes only the blocks of its map that a sparse layout lists, by head",
        _DENSE,
    ),
    "DynamicSparseAttention": Closed(
        "attends to entries that another operator selects for each query, so that a column of its "
        "map is no key",
        _DENSE,
    ),
    "PagedAttention": Closed(
        "packs the tokens of all requests and finds their keys in pages of one cache, so that its "
        "map has no batch and no key axis",
        _CONTIGUOUS,
    ),
    "SparsePagedAttention": Closed(
        "attends to selected entries in pages of one cache, so that its map has no batch and no "
        "key axis",
        _CONTIGUOUS,
    ),
    "LongformerAttention": Closed(
        "attends to windows that move along with the query, and to global tokens by other weights, "
        "so that a column of its map is no key",
        _FULL,
    ),
    "QOrderedLongformerAttention": Closed(
        "attends to windows that move along with the query, on int8 tensors in cuBLASLt's own "
        "memory order",
        _FULL,
    ),
    "QOrderedAttention": Closed(
        "computes on int8 tensors in cuBLASLt's own memory order, which plain nodes cannot read",
        _REQUANTISE,
    ),
    "DecoderAttention": Closed(
        "is told only at run time (static_kv, use_past, has_key_padding_mask) whether its keys are "
        "its own or another sequence's, and which of its inputs count",
        "export the model again and fuse it with a current onnxruntime.transformers, which makes "
        "MultiHeadAttention",
    ),
    "DecoderMaskedSelfAttention": Closed(
        "keeps all beams in one buffer, in a key layout of its CUDA kernel",
        "convert the model again with onnxruntime.transformers.convert_generation, without "
        "--use_decoder_masked_attention: its decoder then has Attention",
    ),
    "FlexAttention": Closed(
        "computes scores and probabilities by subgraphs of its own, in an operator domain that is "
        "still a preview",
        "export the model at opset 23 or later with ONNX Attention, its mask as attn_mask",
    ),
}
"""By operator type, in whatever domain."""

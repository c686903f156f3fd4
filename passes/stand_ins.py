"""Stand-ins: standard operators with the types and shapes of operators that ONNX does not know.

One function for each behaviour; `STAND_INS` says which operator has which.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from .drawing import Dims, Drawing
from .protos import attribute, domain, int_attribute

_FOREIGN = ("com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental")

StandIn = Callable[[Drawing, NodeProto], object]
"""Draws nodes that make the outputs of a node."""


def is_opaque(node: NodeProto, opset: int) -> bool:
    """Whether ONNX infers no shapes for `node`, an operator of a name that has a stand-in."""
    if domain(node) == "":
        return not onnx.defs.has(node.op_type, opset, "")
    return node.domain in _FOREIGN


def _input(node: NodeProto, slot: int) -> str:
    return node.input[slot] if slot < len(node.input) else ""


def _output(node: NodeProto, slot: int) -> str:
    return node.output[slot] if slot < len(node.output) else ""


def _size(node: NodeProto, name: str) -> int | None:
    return int_attribute(node, name, 0) or None


def _like(*slots: int | None) -> StandIn:
    """Output i has the type and shape of the input in slots[i]; None: unknown."""

    def draw(d: Drawing, node: NodeProto) -> None:
        for made, slot in zip(node.output, slots, strict=False):
            if made and slot is not None and (source := _input(node, slot)):
                d.op("Identity", source, output=made)

    return draw


def _same(op: str, *slots: int) -> StandIn:
    """The standard operator `op` over some of the inputs."""
    return lambda d, node: d.standard(
        op, node, *(_input(node, slot) for slot in slots), output=node.output[0]
    )


def _in_type_of(
    scale: int | None, draw: StandIn | None = None, default: int = TensorProto.FLOAT
) -> StandIn:
    """Output 0, which `draw` makes (input 0 if it is None), in the type of another input; in
    `default` where that is none of the weights."""

    def cast(d: Drawing, node: NodeProto) -> None:
        source = node.input[0]
        if draw is not None:
            untyped = NodeProto()
            untyped.CopyFrom(node)
            source = untyped.output[0] = d.name()
            draw(d, untyped)
        to = default if scale is None else d.elem_type(_input(node, scale), default)
        d.op("Cast", source, output=node.output[0], to=to)

    return cast


def _concat(d: Drawing, node: NodeProto) -> None:
    """QLinearConcat: each tensor comes with its scale and zero point."""
    axis = int_attribute(node, "axis", 0)
    d.op("Concat", *node.input[2::3], output=node.output[0], axis=axis)


def _product(d: Drawing, node: NodeProto) -> None:
    """`A B`, either transposed in its last two axes."""
    turned = [int_attribute(node, name, 0) for name in ("transA", "transB")]
    left, right = node.input[:2]
    if any(int_attribute(node, name, 0) for name in ("transBatchA", "transBatchB")):
        return
    if not any(turned):
        d.op("MatMul", left, right, output=node.output[0])
    elif turned == [0, 1] and len(d.dims(right)) == 2:
        d.op("MatMul", left, d.op("Transpose", right), output=node.output[0])
    elif d.opset >= 12:
        rows, columns = "ki" if turned[0] else "ik", "jk" if turned[1] else "kj"
        equation = f"...{rows},...{columns}->...ij"
        d.op("Einsum", left, right, output=node.output[0], equation=equation)
    else:  # products of two activations have heads
        pair = [
            d.op("Transpose", value, perm=[0, 1, 3, 2]) if flag else value
            for value, flag in zip((left, right), turned, strict=True)
        ]
        d.op("MatMul", *pair, output=node.output[0])


def _gemm(right: int) -> StandIn:
    """A Gemm without its bias."""
    return lambda d, node: d.standard(
        "Gemm", node, node.input[0], node.input[right], output=node.output[0]
    )


def _wide(*names: str) -> StandIn:
    """Products with packed weights, whose widths are attributes; then the sum that was normed."""

    def draw(d: Drawing, node: NodeProto) -> None:
        for slot, name in enumerate(names):
            if made := _output(node, slot):
                d.resized(node.input[0], _size(node, name), made)
        if made := _output(node, len(names)):
            d.op("Identity", node.input[0], output=made)

    return draw


def _by_rows(d: Drawing, node: NodeProto) -> None:
    """A product with a packed weight `[N, ..]`."""
    d.resized(node.input[0], next(iter(d.dims(node.input[1])), None), node.output[0])


def _embeddings(d: Drawing, node: NodeProto) -> None:
    """EmbedLayerNormalization: rows of the word table, the length of each mask, their sum."""
    for slot in (0, 2):
        if made := _output(node, slot):
            d.op("Gather", node.input[2], node.input[0], output=made)
    if mask := _output(node, 1):
        d.declare([None], TensorProto.INT32, mask)


def _gather_blocks(d: Drawing, node: NodeProto) -> None:
    """GatherBlockQuantized: a byte holds several numbers of the last axis."""
    dims, elem_type = list(d.dims(node.input[0])), d.elem_type(node.input[0])
    if not dims or None in dims:
        return
    if elem_type == TensorProto.UINT8:
        dims[-1] = (dims[-1] or 0) * 8 // int_attribute(node, "bits", 4)
    table = d.declare(dims, d.elem_type(node.input[2]))
    axis = int_attribute(node, "gather_axis", 0)
    d.op("Gather", table, node.input[1], output=node.output[0], axis=axis)


def _split_gelu(d: Drawing, node: NodeProto) -> None:
    """BiasSplitGelu: half of the last axis gates the other half."""
    width = next(iter(d.dims(_input(node, 1))), None)
    d.resized(node.input[0], width and width // 2, node.output[0])


def _present(d: Drawing, node: NodeProto, slot: int, dims: Dims) -> None:
    if made := _output(node, slot):
        d.shaped(node.input[0], dims, made)


def _packed_weights(d: Drawing, node: NodeProto) -> None:
    """com.microsoft.Attention: the input by V's part of the weights; past and present in one."""
    held = attribute(node, "qkv_hidden_sizes")
    dims = d.dims(node.input[1])
    width = held.ints[2] if held else dims[1] and dims[1] // 3 if len(dims) == 2 else None
    d.resized(node.input[0], width, node.output[0])
    _present(d, node, 1, (2, None, _size(node, "num_heads"), None, None))


def _attention(heads: str = "num_heads", rank: int = 3) -> StandIn:
    """MultiHeadAttention and its kin: `[.., L, H*D]`, present keys and values `[B, H, K, D]`,
    then scores. Q is a sequence too, unless K and V are packed into it."""

    def draw(d: Drawing, node: NodeProto) -> None:
        if _input(node, 1) or heads == "kv_num_heads":
            d.resized(node.input[0], None, node.output[0])
        else:
            d.shaped(node.input[0], (None,) * rank, node.output[0])
        for slot in (1, 2):
            _present(d, node, slot, (None, _size(node, heads), None, None))
        _present(d, node, 3, (None, _size(node, "num_heads"), None, None))

    return draw


def _unpadded(d: Drawing, node: NodeProto) -> None:
    """RemovePadding: all tokens `[T, E]`, where each came from, and how many there were."""
    token = d.op("Gather", node.input[0], d.declare((), TensorProto.INT64), axis=0)
    d.op("MatMul", d.declare((None, None)), token, output=node.output[0])
    for slot, rank in ((1, 2), (2, 1), (3, 1)):
        if made := _output(node, slot):
            d.declare((None,) * rank, TensorProto.INT32, made)


def _bias_table(d: Drawing, node: NodeProto) -> None:
    """RelativePositionBias: `[1, H, Q, K]`."""
    heads = next(iter(d.dims(node.input[0])[1:]), None)
    d.shaped(node.input[0], (1, heads, None, None), node.output[0])


def _reduced(d: Drawing, node: NodeProto) -> None:
    """QLinearReduceMean: axes are an attribute, in ONNX an input from opset 18 on."""
    held = attribute(node, "axes")
    keep = int_attribute(node, "keepdims", 1)
    if held is None or d.opset < 18:
        d.standard("ReduceMean", node, node.input[0], output=node.output[0])
        return
    axes = d.op("Constant", value=numpy_helper.from_array(np.array(held.ints, np.int64)))
    d.op("ReduceMean", node.input[0], axes, output=node.output[0], keepdims=keep)


def _planes(op: str, *slots: int, last: int = 0) -> StandIn:
    """A convolution or pooling of images; their channels come last where the attribute says so.

    last: what the attribute is where it is missing.
    """

    def draw(d: Drawing, node: NodeProto) -> None:
        inputs = [_input(node, slot) for slot in slots]
        if not int_attribute(node, "channels_last", last):
            d.standard(op, node, *inputs, output=node.output[0])
            return
        inputs[0] = d.op("Transpose", inputs[0], perm=[0, 3, 1, 2])
        moved = d.standard(op, node, *inputs)
        d.op("Transpose", moved, output=node.output[0], perm=[0, 2, 3, 1])

    return draw


def _reordered(d: Drawing, node: NodeProto) -> None:
    """ReorderInput: into blocks of channels."""
    last = int_attribute(node, "channels_last", 0)
    perm = [0, 3, 1, 2] if last else [0, 1, 2, 3]
    d.op("Transpose", node.input[0], output=node.output[0], perm=perm)


def _reordered_back(d: Drawing, node: NodeProto) -> None:
    """ReorderOutput: out of blocks; the channels that only filled the last one are dropped."""
    kernel = d.declare((_size(node, "channels"), None, 1, 1))
    last = int_attribute(node, "channels_last", 0)
    plain = d.op("Conv", node.input[0], kernel)
    perm = [0, 2, 3, 1] if last else [0, 1, 2, 3]
    d.op("Transpose", plain, output=node.output[0], perm=perm)


_NORMED: StandIn = _like(0, None, None, 0)

STAND_INS: dict[str, StandIn] = {
    **dict.fromkeys(
        "LayerNormalization SimplifiedLayerNormalization RMSNormalization Gelu FastGelu QuickGelu "
        "BiasGelu BiasSoftmax RotaryEmbedding MRotaryEmbedding GroupNorm Inverse Trilu BiasAdd "
        "QLinearSoftmax QLinearSigmoid QLinearLeakyRelu MoE QMoE GatedRMSNorm BranchwiseRMSNorm "
        "ScaledSiLU GatedAdd BiasDropout BitmaskDropout BitmaskBiasDropout ComplexMul "
        "ComplexMulConj QOrderedGelu QOrderedLayerNormalization NGramRepeatBlock "
        "CausalConvWithState MemcpyFromHost MemcpyToHost LongformerAttention "
        "QOrderedLongformerAttention QOrderedAttention DecoderAttention".split(),
        _like(0),
    ),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _NORMED),
    "SkipGroupNorm": _like(0, 0),
    "GemmaRotaryEmbedding": _like(1, 3),
    "EmbedLayerNormalization": _embeddings,
    "QEmbedLayerNormalization": _in_type_of(8, _embeddings),
    "TorchEmbedding": _same("Gather", 0, 1),
    "BiasSplitGelu": _split_gelu,
    **dict.fromkeys(
        "FusedMatMul TransposeMatMul FusedMatMulActivation SparseToDenseMatMul GemmFastGelu "
        "DynamicQuantizeMatMul".split(),
        _product,
    ),
    "QOrderedMatMul": _same("MatMul", 0, 2),
    "MatMulIntegerToFloat": _in_type_of(3, _product),
    "MatMulInteger16": _in_type_of(None, _product, TensorProto.INT32),
    "FusedGemm": _gemm(1),
    "GemmFloat8": _in_type_of(5, _gemm(1)),
    "QGemm": _in_type_of(8, _gemm(3)),
    "MatMulNBits": _wide("N"),
    "MatMulBnb4": _wide("N"),
    "MatMulNBitsMlp": _wide("N"),
    "MatMulNBitsQkv": _wide("Nq", "Nkv", "Nkv"),
    "MatMulFpQ4": _wide("N"),
    "MatMulBlockQuantizedFp8Weight": _by_rows,
    "MatMulBlockQuantizedFp4Weight": _by_rows,
    "GatherBlockQuantized": _gather_blocks,
    "QuantizeLinear": _in_type_of(2, default=TensorProto.UINT8),
    "DequantizeLinear": _in_type_of(1),
    "QuantizeWithOrder": _in_type_of(None, default=TensorProto.INT8),
    "DequantizeWithOrder": _in_type_of(1),
    "QLinearAdd": _same("Add", 0, 3),
    "QLinearMul": _same("Mul", 0, 3),
    "QLinearWhere": _same("Where", 0, 1, 4),
    "QLinearConcat": _concat,
    "QLinearReduceMean": _reduced,
    "QLinearConv": _planes("Conv", 0, 3),
    "QLinearAveragePool": _planes("AveragePool", 0),
    "QLinearGlobalAveragePool": _planes("GlobalAveragePool", 0),
    "NhwcConv": _planes("Conv", 0, 1, last=1),
    "NhwcFusedConv": _planes("Conv", 0, 1, last=1),
    "NhwcMaxPool": _planes("MaxPool", 0, last=1),
    "FusedConv": _planes("Conv", 0, 1),
    "Conv": _planes("Conv", 0, 1),
    "MaxPool": _planes("MaxPool", 0),
    "AveragePool": _planes("AveragePool", 0),
    "GlobalAveragePool": _planes("GlobalAveragePool", 0),
    "GlobalMaxPool": _planes("GlobalMaxPool", 0),
    "ReorderInput": _reordered,
    "ReorderOutput": _reordered_back,
    "Attention": _packed_weights,
    "DecoderMaskedSelfAttention": _packed_weights,
    "PackedAttention": _packed_weights,
    "QAttention": _in_type_of(3, _packed_weights),
    "MultiHeadAttention": _attention(),
    "DecoderMaskedMultiHeadAttention": _attention(),
    "PackedMultiHeadAttention": _attention(rank=2),
    **dict.fromkeys(
        "GroupQueryAttention SparseAttention PagedAttention LinearAttention".split(),
        _attention("kv_num_heads"),
    ),
    "RelativePositionBias": _bias_table,
    "RemovePadding": _unpadded,
    "RestorePadding": _same("Gather", 0, 1),
    "GatherND": _same("GatherND", 0, 1),
    "Range": _same("Range", 0, 1, 2),
    "Pad": _same("Pad", 0, 1),
}
"""What stands in for an operator of com.microsoft, or of ONNX Runtime in ONNX's own domain."""

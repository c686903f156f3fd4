"""What stands in for an operator that ONNX does not know has the types and shapes of its results.

Where ONNX Runtime has a CPU kernel, the kernel itself is asked.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper

from atpatch_onnx.passes.graph_view import Dim, GraphView, ValueType
from atpatch_onnx.passes.shapes import infer
from atpatch_onnx.runtime import Session

from hosts import model_file

HEADER = '<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1, "local" : 1]>'

X = "float[B, L, 8] x"
B8 = "float[8] b = {1,1,1,1,1,1,1,1}"
SCALE = "float s = {0.1}, uint8 z = {0}, int8 z8 = {0}"
QUANTIZED = "q = QuantizeLinear (x, s, z) r = QuantizeLinear (x, s, z)"
WEIGHT = "uint8[8, 6] w = {" + ",".join(["1"] * 48) + "}"


def table(name: str, *dims: int, kind: str = "float") -> str:
    shape = ", ".join(map(str, dims))
    return f"{kind}[{shape}] {name} = {{{','.join(['1'] * int(np.prod(dims)))}}}"


RUN: dict[str, tuple[str, str, str, int, tuple[Dim, ...]]] = {
    "SkipLayerNormalization": (
        X,
        B8,
        "t = com.microsoft.SkipLayerNormalization (x, x, b, b)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "BiasGelu": (X, B8, "t = com.microsoft.BiasGelu (x, b)", TensorProto.FLOAT, ("B", "L", 8)),
    "SimplifiedLayerNormalization in ONNX's domain": (
        X,
        B8,
        "t = SimplifiedLayerNormalization (x, b)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "FusedMatMul, weights turned": (
        X,
        table("w", 6, 8),
        "t = com.microsoft.FusedMatMul <transB = 1> (x, w)",
        TensorProto.FLOAT,
        ("B", "L", 6),
    ),
    "FusedMatMul, activations turned": (
        "float[B, 2, L, 8] x",
        "",
        "t = com.microsoft.FusedMatMul <transB = 1> (x, x)",
        TensorProto.FLOAT,
        ("B", 2, "L", "L"),
    ),
    "FusedGemm": (
        "float[N, 8] x",
        f"{table('w', 6, 8)}, {table('c', 6)}",
        't = com.microsoft.FusedGemm <transB = 1, activation = "Relu"> (x, w, c)',
        TensorProto.FLOAT,
        ("N", 6),
    ),
    "MatMulNBits": (
        "float[B, L, 16] x",
        f"{table('w', 6, 1, 8, kind='uint8')}, {table('s', 6)}",
        "t = com.microsoft.MatMulNBits <K = 16, N = 6, bits = 4, block_size = 16> (x, w, s)",
        TensorProto.FLOAT,
        ("B", "L", 6),
    ),
    "DynamicQuantizeMatMul": (
        X,
        f"{WEIGHT}, {SCALE}",
        "t = com.microsoft.DynamicQuantizeMatMul (x, w, s, z)",
        TensorProto.FLOAT,
        ("B", "L", 6),
    ),
    "MatMulIntegerToFloat": (
        X,
        f"{WEIGHT}, {SCALE}",
        "q, a, o = DynamicQuantizeLinear (x) "
        "t = com.microsoft.MatMulIntegerToFloat (q, w, a, s, o, z)",
        TensorProto.FLOAT,
        ("B", "L", 6),
    ),
    "QLinearAdd": (
        X,
        SCALE,
        f"{QUANTIZED} t = com.microsoft.QLinearAdd (q, s, z, r, s, z, s, z)",
        TensorProto.UINT8,
        ("B", "L", 8),
    ),
    "QLinearSoftmax": (
        X,
        SCALE,
        f"{QUANTIZED} t = com.microsoft.QLinearSoftmax <axis = -1, opset = 13> (q, s, z, s, z)",
        TensorProto.UINT8,
        ("B", "L", 8),
    ),
    "QLinearConcat": (
        X,
        SCALE,
        f"{QUANTIZED} t = com.microsoft.QLinearConcat <axis = 2> (s, z, q, s, z, r, s, z)",
        TensorProto.UINT8,
        ("B", "L", 16),
    ),
    "QuantizeLinear of com.microsoft": (
        X,
        SCALE,
        "t = com.microsoft.QuantizeLinear (x, s, z8)",
        TensorProto.INT8,
        ("B", "L", 8),
    ),
    "DequantizeLinear of com.microsoft": (
        X,
        SCALE,
        f"{QUANTIZED} t = com.microsoft.DequantizeLinear (q, s, z)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "GatherBlockQuantized": (
        "int64[B, L] i",
        f"{table('w', 5, 16, kind='uint8')}, {table('s', 5, 2)}",
        "t = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 16> (w, i, s)",
        TensorProto.FLOAT,
        ("B", "L", 32),
    ),
    "EmbedLayerNormalization": (
        "int32[B, L] i",
        f"{table('w', 5, 8)}, {table('p', 9, 8)}, {B8}",
        "t, m = com.microsoft.EmbedLayerNormalization (i, , w, p, , b, b)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "Attention": (
        X,
        f"{table('w', 8, 24)}, {table('c', 24)}",
        "t = com.microsoft.Attention <num_heads = 2> (x, w, c)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "present keys and values of Attention": (
        X,
        f"{table('w', 8, 24)}, {table('c', 24)}",
        "u, t = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, c)",
        TensorProto.FLOAT,
        (2, None, 2, None, None),
    ),
    "MultiHeadAttention": (
        X,
        "",
        "t = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x)",
        TensorProto.FLOAT,
        ("B", "L", None),
    ),
    "QAttention": (
        X,
        f"{table('w', 8, 24, kind='uint8')}, {table('c', 24)}, {SCALE}",
        f"{QUANTIZED} t = com.microsoft.QAttention <num_heads = 2> (q, w, c, s, s, , z, z)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "RotaryEmbedding": (
        "float[B, 2, L, 8] x, int64[B, L] i",
        f"{table('a', 9, 4)}, {table('b', 9, 4)}",
        "t = com.microsoft.RotaryEmbedding (x, i, a, b)",
        TensorProto.FLOAT,
        ("B", 2, "L", 8),
    ),
    "FusedConv": (
        "float[B, 3, 9, 9] x",
        table("w", 4, 3, 3, 3),
        't = com.microsoft.FusedConv <strides = [2, 2], activation = "Relu"> (x, w)',
        TensorProto.FLOAT,
        ("B", 4, 4, 4),
    ),
    "Trilu": ("float[N, 8] x", "", "t = com.microsoft.Trilu (x)", TensorProto.FLOAT, ("N", 8)),
}
"""Inputs, initializers, nodes that make `t`, and what is to be known of it."""

READ: dict[str, tuple[str, str, str, int, tuple[Dim, ...]]] = {
    "QLinearReduceMean": (
        X,
        SCALE,
        f"{QUANTIZED} "
        "t = com.microsoft.QLinearReduceMean <axes = [1], keepdims = 0> (q, s, z, s, z)",
        TensorProto.UINT8,
        ("B", 8),
    ),
    "MultiHeadAttention, packed": (
        "float[B, L, 2, 3, 4] x",
        "",
        "t = com.microsoft.MultiHeadAttention <num_heads = 2> (x)",
        TensorProto.FLOAT,
        (None, None, None),
    ),
    "PackedAttention": (
        "float[T, 8] x, int32[B, L] o, int32[C] n",
        f"{table('w', 8, 24)}, {table('c', 24)}",
        "t = com.microsoft.PackedAttention <num_heads = 2> (x, w, c, o, n)",
        TensorProto.FLOAT,
        ("T", 8),
    ),
    "RemovePadding": (
        f"{X}, int32[B] n",
        "",
        "t, o, c, m = com.microsoft.RemovePadding (x, n)",
        TensorProto.FLOAT,
        (None, 8),
    ),
    "RestorePadding": (
        "float[T, 8] x, int32[B, L] o",
        "",
        "t = com.microsoft.RestorePadding (x, o)",
        TensorProto.FLOAT,
        ("B", "L", 8),
    ),
    "GroupQueryAttention": (
        "float16[B, L, 16] x, float16[B, L, 8] k, int32[B] n, int32 m",
        "",
        "t = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> "
        "(x, k, k, , , n, m)",
        TensorProto.FLOAT16,
        ("B", "L", None),
    ),
    "NhwcConv": (
        "float16[B, 9, 9, 3] x",
        "float16[4, 3, 3, 3] w = {" + ",".join(["1"] * 108) + "}",
        "t = com.microsoft.NhwcConv (x, w)",
        TensorProto.FLOAT16,
        ("B", 7, 7, 4),
    ),
    "BiasSplitGelu": (X, B8, "t = com.microsoft.BiasSplitGelu (x, b)", 1, ("B", "L", 4)),
}
"""The same for operators without a CPU kernel: shapes as their documentation has them."""


def one_op(inputs: str, stored: str, body: str, opset: int = 17) -> ModelProto:
    held = f"<{stored}>" if stored else ""
    return onnx.parser.parse_model(
        f"{HEADER.format(opset=opset)} host ({inputs}) => (float[U] y) {held} "
        f"{{ {body} y = Identity (t) }}"
    )


@pytest.mark.parametrize("case", RUN | READ)
def test_a_stand_in_has_the_type_and_shape_of_the_operator(case: str) -> None:
    inputs, stored, body, elem_type, shape = (RUN | READ)[case]
    model = one_op(inputs, stored, body)
    before = model.SerializeToString()
    assert GraphView.of(model).types["t"] == ValueType(elem_type, shape)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("case", RUN)
def test_and_that_of_its_kernel(case: str) -> None:
    inputs, stored, body, elem_type, shape = RUN[case]
    model = one_op(inputs, stored, body)
    model.graph.ClearField("output")
    model.graph.output.append(onnx.ValueInfoProto(name="t"))
    del model.graph.node[-1]
    sizes = {"B": 3, "L": 5, "N": 7}
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        dims = [d.dim_value or sizes[d.dim_param] for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[value.name] = np.ones(dims, dtype)
    (made,) = Session(model.SerializeToString(), "cpu", threads=1).run(feeds).values()
    assert made.dtype == helper.tensor_dtype_to_np_dtype(elem_type)
    assert made.ndim == len(shape)
    for size, dim in zip(made.shape, shape, strict=True):
        assert dim is None or size == (dim if isinstance(dim, int) else sizes[dim])


def test_layer_normalization_of_onnx_runtime_before_onnx_had_it() -> None:
    model = one_op(X, B8, "t = LayerNormalization (x, b, b)", opset=14)
    assert GraphView.of(model).shape("t") == ("B", "L", 8)


def test_an_operator_that_onnx_knows_has_no_stand_in() -> None:
    """The Attention of ONNX gives another shape than that of com.microsoft would."""
    model = one_op("float[B, 2, L, 4] x", "", "t = Attention (x, x, x)", opset=23)
    assert GraphView.of(model).shape("t") == ("B", 2, "L", 4)


def test_a_function_of_that_name_is_what_the_model_says() -> None:
    model = onnx.parser.parse_model(f"""
        {HEADER.format(opset=17)} host ({X}) => (float[U] y)
        {{ t = com.microsoft.Gelu (x) y = Identity (t) }}
        <domain: "com.microsoft", opset_import: ["" : 17]>
        Gelu (x) => (y) {{ y = Transpose <perm = [2, 0, 1]> (x) }}
    """)
    assert GraphView.of(model).shape("t") == (8, "B", "L")


def test_one_broken_node_does_not_hide_the_others() -> None:
    broken = "u = com.microsoft.GatherBlockQuantized (x) v = com.microsoft.Attention (x)"
    model = one_op(X, B8, f"{broken} t = com.microsoft.BiasGelu (x, b)")
    assert GraphView.of(model).shape("t") == ("B", "L", 8)


BRANCHES = f"""
    {HEADER.format(opset=17)}
    host ({X}, bool c, int64 n) => (float[U, V, W] y) <{B8}, {table("w", 8, 8)}>
    {{
        g = com.microsoft.Gelu (x)
        a = If (c) <
            then_branch = t () => (float[P, Q, R] ty) {{
                t0 = com.microsoft.SkipLayerNormalization (g, x, b, b) ty = Identity (t0)
            }},
            else_branch = e () => (float[P, Q, R] ey) {{
                e0 = com.microsoft.BiasGelu (g, b)
                e1 = If (c) <
                    then_branch = tt () => (float[P, Q, R] ity) {{
                        i0 = com.microsoft.FusedMatMul <transA = 1> (e0, e0) ity = Identity (i0)
                    }},
                    else_branch = te () => (float[P, Q, R] iey) {{
                        j0 = com.microsoft.FastGelu (e0) iey = Identity (j0) }}>
                ey = Identity (e1)
            }}>
        h = com.microsoft.Gelu (g)
        y = Loop (n, c, h) <body = l (int64 i, bool on, float[B, L, 8] s)
            => (bool off, float[B, L, 8] sy) {{
                off = Identity (on) l0 = com.microsoft.FastGelu (s) l1 = MatMul (l0, w)
                sy = Identity (l1)
            }}>
    }}
"""


def test_subgraphs_have_types_too() -> None:
    model = onnx.parser.parse_model(BRANCHES)
    views = list(GraphView.of(model).nested())
    names = ["t0", "e0", "i0", "j0", "l1"]
    same: tuple[Dim, ...] = ("B", "L", 8)
    wanted = [same, same, ("B", 8, 8), same, same]
    found = [view.shape(name) for view, name in zip(views, names, strict=True)]
    assert found == wanted
    assert all(view.shape("g") == ("B", "L", 8) for view in views)  # captured
    assert GraphView.of(model).at(views[2].path).shape("e0") == ("B", "L", 8)


def test_the_graph_of_a_generation_operator_is_a_model_of_its_own() -> None:
    model = onnx.parser.parse_model(f"""
        {HEADER.format(opset=17)}
        host (int32[B, L] ids, int32[1] m) => (int32[B, M] y) {{
            y = com.microsoft.GreedySearch <eos_token_id = 1, pad_token_id = 1,
                decoder = d (float[P, Q, 8] h) => (float[P, Q, 8] o) <{B8}> {{
                    d0 = com.microsoft.BiasGelu (h, b) o = Identity (d0)
                }}> (ids, m)
        }}
    """)
    (decoder,) = GraphView.of(model).nested()
    assert decoder.shape("d0") == ("P", "Q", 8)


def test_large_weights_are_not_copied() -> None:
    model = one_op(X, "", "t = com.microsoft.FusedMatMul (x, w)")
    weight = np.ones((8, 50_000), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    copies = infer(model)
    assert copies[()].ByteSize() < 10_000
    assert GraphView.of(model_file(model).skeleton).shape("t") == ("B", "L", 50_000)

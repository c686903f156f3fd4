"""Every unfused form is a site, what only looks like one is not, what is refused is named."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from atpatch_onnx.passes.locate import Sites, locate

HEADER = '<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
INPUTS = "float[B, 4, L, 8] q, float[B, 4, 8, L] k, float[B, 4, L, 8] v"


def find(
    body: str,
    inputs: str = INPUTS,
    output: str = "float[B, 4, L, 8] y",
    opset: int = 17,
    stored: str = "",
) -> Sites:
    text = f"{HEADER.format(opset=opset)} host ({inputs}) => ({output}) {stored} {{ {body} }}"
    return locate(onnx.parser.parse_model(text))


FORMS = {
    "plain": "s = MatMul (q, k) p = Softmax <axis = -1> (s) y = MatMul (p, v)",
    "scaled and masked": """
        c = Constant <value_float = 0.3> ()
        s = MatMul (q, k) t = Div (s, c) u = Add (t, t) p = Softmax <axis = 3> (u)
        y = MatMul (p, v)""",
    "boolean mask": """
        c = Constant <value_float = -10000.0> ()
        s = MatMul (q, k) m = Greater (s, c) u = Where (m, s, c) p = Softmax <axis = -1> (u)
        y = MatMul (p, v)""",
    "soft-cap": """
        c = Constant <value_float = 30.0> ()
        s = MatMul (q, k) a = Div (s, c) b = Tanh (a) t = Mul (b, c) p = Softmax <axis = -1> (t)
        y = MatMul (p, v)""",
    "NaN guard and dropout": """
        z = Constant <value_float = 0.0> ()
        s = MatMul (q, k) p = Softmax <axis = -1> (s) n = IsNaN (p) g = Where (n, z, p)
        d = Dropout (g) y = MatMul (d, v)""",
    "casts around": """
        s = MatMul (q, k) s64 = Cast <to = 11> (s) p64 = Softmax <axis = -1> (s64)
        p = Cast <to = 1> (p64) y = MatMul (p, v)""",
    "written out": """
        a = Constant <value_ints = [-1]> ()
        s = MatMul (q, k) e = Exp (s) d = ReduceSum <keepdims = 1> (e, a) p = Div (e, d)
        y = MatMul (p, v)""",
    "written out with a reciprocal and an epsilon": """
        a = Constant <value_ints = [-1]> () c = Constant <value_float = 0.001> ()
        s = MatMul (q, k) e = Exp (s) d = ReduceSum <keepdims = 1> (e, a) f = Add (d, c)
        r = Reciprocal (f) p = Mul (r, e) y = MatMul (p, v)""",
    "written out with the epsilon first": """
        a = Constant <value_ints = [-1]> () c = Constant <value_float = 0.001> ()
        s = MatMul (q, k) e = Exp (s) d = ReduceSum <keepdims = 1> (e, a) f = Add (c, d)
        p = Div (e, f) y = MatMul (p, v)""",
    "Einsum": """
        s = Einsum <equation = "bhid,bhdj->bhij"> (q, k) p = Softmax <axis = -1> (s)
        y = Einsum <equation = "bhij,bhjd->bhid"> (p, v)""",
    "transposed product": """
        s = MatMul (q, k) p = Softmax <axis = -1> (s) pt = Transpose <perm = [0, 1, 3, 2]> (p)
        vt = Transpose <perm = [0, 1, 3, 2]> (v) c = MatMul (vt, pt)
        y = Transpose <perm = [0, 1, 3, 2]> (c)""",
    "quantised P V": """
        o = Constant <value_float = 0.01> () z = Constant <value_float = 0.02> ()
        s = MatMul (q, k) p = Softmax <axis = -1> (s) i = QuantizeLinear (p, o)
        f = DequantizeLinear (i, z) y = MatMul (f, v)""",
    "folded constant queries": "s = MatMul (w, k) p = Softmax <axis = -1> (s) y = MatMul (p, v)",
}


@pytest.mark.parametrize("form", FORMS)
def test_form_is_a_site(form: str) -> None:
    stored = "<float[1, 4, 1, 8] w = {0}>" if "constant" in form else ""
    if stored:
        stored = "<float[1, 4, 1, 8] w = {" + ",".join(["0"] * 32) + "}>"
    found = find(FORMS[form], stored=stored)
    assert len(found.sites) == 1
    assert not found.others
    (site,) = found.sites
    assert site.rank == 4
    assert site.facts.heads == 4
    assert len(site.uses) == 1


def test_the_splice_point_is_the_last_float_value_before_v() -> None:
    assert find(FORMS["NaN guard and dropout"]).sites[0].probabilities == "d"
    assert find(FORMS["casts around"]).sites[0].probabilities == "p"
    assert find(FORMS["quantised P V"]).sites[0].probabilities == "f"
    assert find(FORMS["plain"]).sites[0].elem_type == 1


def test_quantised_without_a_float_product_is_spliced_before_the_quantisation() -> None:
    found = find(
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) i = QuantizeLinear (p, o, z)
           y8 = QLinearMatMul (i, o, z, v, o, z, o, z) y = DequantizeLinear (y8, o, z)""",
        inputs=INPUTS.replace("float[B, 4, L, 8] v", "uint8[B, 4, L, 8] v"),
        stored="<float o = {0.01}, uint8 z = {0}>",
    )
    assert [site.probabilities for site in found.sites] == ["p"]


def test_one_map_that_multiplies_two_values_is_one_site_with_two_uses() -> None:
    found = find(
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) a = MatMul (p, v) b = MatMul (p, q)
           y = Add (a, b)"""
    )
    assert [len(site.uses) for site in found.sites] == [2]


def test_a_sink_column_is_cut_off_before_the_splice() -> None:
    """Attention with a sink: softmax over K + 1, the last column dropped, as gpt-oss does."""
    found = find(
        """s = MatMul (q, k) c = Concat <axis = 3> (s, sink) p = Softmax <axis = -1> (c)
           a = Constant <value_ints = [0]> () e = Constant <value_ints = [-1]> ()
           x = Constant <value_ints = [3]> () r = Slice (p, a, e, x) y = MatMul (r, v)""",
        inputs=INPUTS + ", float[B, 4, L, 1] sink",
    )
    assert [site.probabilities for site in found.sites] == ["r"]


@pytest.mark.parametrize(("axis", "count"), [(3, 1), (1, 0), (-1, 1)])
def test_below_opset_13_only_the_last_axis_alone_counts(axis: int, count: int) -> None:
    body = f"s = MatMul (q, k) p = Softmax <axis = {axis}> (s) y = MatMul (p, v)"
    found = find(body, opset=11)
    assert len(found.sites) == count
    assert len(found.others) == 1 - count


WEIGHT = "<float[8, 8] w = {" + ",".join(["0"] * 64) + "}>"
NO_SITES = {
    "classifier head": (
        "float[B, 8] x",
        "s = MatMul (x, w) y = Softmax <axis = -1> (s)",
        "MatMul 's' with a weight",
    ),
    "log-softmax": (
        "float[B, 8] x",
        "s = MatMul (x, w) y = LogSoftmax <axis = -1> (s)",
        "log-softmax",
    ),
    "router": (
        "float[B, 8] x, float[B, 8, 8] e",
        """s = MatMul (x, w) p = Softmax <axis = -1> (s) a = Constant <value_ints = [1]> ()
                  u = Unsqueeze (p, a) y = MatMul (u, e)""",
        "with a weight",
    ),
    "pooling": (
        "float[B, 8, 8] x",
        """s = MatMul (x, w) t = Transpose <perm = [0, 2, 1]> (s) p = Softmax <axis = -1> (t)
                   y = MatMul (p, x)""",
        "with a weight",
    ),
    "similarities": (
        "float[B, 8] x, float[8, B] z",
        "s = MatMul (x, z) y = Softmax <axis = -1> (s)",
        "never multiplies a V",
    ),
    "over queries": (
        "float[B, 8, 8] x, float[B, 8, 8] z",
        """s = MatMul (x, z) p = Softmax <axis = 1> (s) y = MatMul (p, x)""",
        "axis 1",
    ),
    "product over the query axis": (
        "float[B, 8, 8] x, float[B, 8, 8] z",
        """s = MatMul (x, z) p = Softmax <axis = -1> (s)
                                       y = MatMul (x, p)""",
        "never multiplies a V",
    ),
}


@pytest.mark.parametrize("case", NO_SITES)
def test_what_only_looks_like_attention_is_explained(case: str) -> None:
    inputs, body, reason = NO_SITES[case]
    found = find(body, inputs, "float y", stored=WEIGHT)
    assert not found.sites
    assert not found.refused
    assert [reason in other.reason for other in found.others] == [True]


REFUSED = {
    "differential": (
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) t = MatMul (q, k)
           r = Softmax <axis = -1> (t) d = Sub (p, r) y = MatMul (d, v)""",
        "Sub 'd' changes",
    ),
    "talking heads": (
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) t = Transpose <perm = [0, 2, 3, 1]> (p)
           w = Constant <value = float[4, 4] {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> ()
           m = MatMul (t, w) u = Transpose <perm = [0, 3, 1, 2]> (m) y = MatMul (u, v)""",
        "MatMul 'm' changes",
    ),
    "also another way": (
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) r = Sqrt (p) a = MatMul (p, v)
           b = MatMul (r, v) y = Add (a, b)""",
        "Sqrt 'r' changes",
    ),
    "captured by a branch": (
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) a = MatMul (p, v)
           c = Constant <value_int = 1> () b = Cast <to = 9> (c)
           d = If (b) <then_branch = t () => (float[B, 4, L, 8] e) { e = MatMul (p, v) },
                       else_branch = e () => (float[B, 4, L, 8] z) { z = Identity (v) }>
           y = Add (a, d)""",
        "read inside a branch",
    ),
    "attribute nobody knows": (
        "y = Attention <sparkle = 1> (q, v, v)",
        "ONNX Attention has the attribute 'sparkle'",
    ),
    "no map": (
        "y = com.microsoft.SparseAttention <num_heads = 4> (q, v, v)",
        "com.microsoft.SparseAttention computes only",
    ),
    "rearranged": (
        """s = MatMul (q, k) p = Softmax <axis = -1> (s) i = Constant <value_ints = [0]> ()
                      g = Gather <axis = 3> (p, i) y = MatMul (g, v)""",
        "changes or moves",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_patched_is_refused_by_name_with_a_fix(case: str) -> None:
    body, reason = REFUSED[case]
    found = find(body, opset=23)
    assert not found.sites
    assert found.refused
    assert all(reason in other.reason and other.fix for other in found.refused)


def test_an_opset_without_the_operators_of_a_patch_is_refused() -> None:
    (other,) = find(FORMS["plain"].replace("-1", "3"), opset=8).refused
    assert "opset 8" in other.reason
    assert "version_converter" in other.fix


def test_names_are_unique_whatever_the_nodes_are_called() -> None:
    text = HEADER.format(opset=17) + f"host ({INPUTS}) => (float y) {{ y = Identity (v) }}"
    model = onnx.parser.parse_model(text)
    model.graph.ClearField("node")
    for name in ("/attn/Softmax", "/attn/Softmax_1", "/attn.1/Softmax", "plain", "plain too"):
        for op, inputs, output in (
            ("MatMul", ["q", "k"], "s"),
            ("Softmax", ["s"], "p"),
            ("MatMul", ["p", "v"], "c"),
        ):
            made = [f"{name}.{i}" if i in "sp" else i for i in inputs]
            node = onnx.helper.make_node(
                op, made, [f"{name}.{output}"], name if op[0] == "S" else ""
            )
            model.graph.node.append(node)
    names = [site.name for site in locate(model).sites]
    assert len(set(names)) == 5


def test_heads_are_counted_over_all_parts_of_a_shape() -> None:
    """`Concat(batch, length, [2, 4])` is a shape of four numbers in three parts."""
    body = """
        i0 = Constant <value_ints = [0]> () i1 = Constant <value_ints = [1]> ()
        i2 = Constant <value_ints = [2]> () hd = Constant <value_ints = [2, 4]> ()
        sh = Shape (x) b = Slice (sh, i0, i1) l = Slice (sh, i1, i2)
        target = Concat <axis = 0> (b, l, hd) r = Reshape (x, target)
        q = Transpose <perm = [0, 2, 1, 3]> (r) k = Transpose <perm = [0, 2, 3, 1]> (r)
        s = MatMul (q, k) p = Softmax <axis = -1> (s) y = MatMul (p, q)
    """
    (site,) = find(body, "float[B, L, 8] x", "float y").sites
    assert site.facts.heads == 2


def test_nodes_in_any_order() -> None:
    """Not every tool sorts its graphs, and ONNX Runtime does not mind."""
    text = (
        HEADER.format(opset=17) + f"host ({INPUTS}) => (float[B, 4, L, 8] y) {{ {FORMS['plain']} }}"
    )
    model = onnx.parser.parse_model(text)
    nodes = list(model.graph.node)
    model.graph.ClearField("node")
    model.graph.node.extend(reversed(nodes))
    assert len(locate(model).sites) == 1


def test_facts_causal_and_cross() -> None:
    body = """
        one = Constant <value_int = 1> () zero = Constant <value_int = 0> ()
        q = MatMul (x, w) kk = MatMul ({source}, w) k = Transpose <perm = [0, 2, 1]> (kk)
        s = MatMul (q, k) {mask} p = Softmax <axis = -1> (t) v = MatMul ({source}, w)
        y = MatMul (p, v)
    """
    causal = """sh = Shape (s) n = Constant <value_ints = [1]> () m = Constant <value_ints = [2]> ()
                d = Slice (sh, n, m) r0 = Squeeze (d) r = Range (zero, r0, one)
                c = Unsqueeze (r, n) u = LessOrEqual (r, c) f = Cast <to = 1> (u) t = Mul (s, f)"""
    for source in ("x", "z"):
        for mask, is_causal in ((causal, True), ("t = Identity (s)", False)):
            found = find(
                body.format(source=source, mask=mask),
                "float[B, L, 8] x, float[B, M, 8] z",
                "float y",
                stored=WEIGHT,
            )
            facts = found.sites[0].facts
            assert (facts.causal, facts.cross) == (is_causal, source == "z")

"""One attention, `[B, 2, L, 4]` q, k and v with an additive mask, in the forms hosts have it in."""

from __future__ import annotations

import onnx.parser
from onnx import ModelProto

PLAIN = """
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    s = MatMul (q, kt)
    scale = Constant <value_float = 0.5> ()
    half = CastLike (scale, mask)
    t = Mul (s, half)
    u = Add (t, mask)
    p = Softmax <axis = -1> (u)
    {out} = MatMul (p, v)
"""
FUSED = "{out} = Attention (q, k, v, mask)"
CONTRIB = """
    q1 = Transpose <perm = [0, 2, 1, 3]> (q)
    k1 = Transpose <perm = [0, 2, 1, 3]> (k)
    v1 = Transpose <perm = [0, 2, 1, 3]> (v)
    flat = Constant <value_ints = [0, 0, 8]> ()
    q2 = Reshape (q1, flat)
    k2 = Reshape (k1, flat)
    v2 = Reshape (v1, flat)
    c2 = com.microsoft.MultiHeadAttention <num_heads = 2> (q2, k2, v2, , , mask)
    apart = Constant <value_ints = [0, 0, 2, 4]> ()
    c1 = Reshape (c2, apart)
    {out} = Transpose <perm = [0, 2, 1, 3]> (c1)
"""
BODIES = {"plain": PLAIN, "Attention": FUSED, "MultiHeadAttention": CONTRIB}


def host(body: str, functions: str = "") -> ModelProto:
    """A model whose nodes are `body`."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1, "local" : 1]>
        host (float[B, 2, L, 4] q, float[B, 2, L, 4] k, float[B, 2, L, 4] v,
              float[B, 1, L, L] mask, bool flag) => (float[B, 2, L, 4] y)
        {{ {body} }}
        {functions}
    """)


FUNCTION = """
    <domain: "local", opset_import: ["" : 23, "com.microsoft" : 1, "local" : 1]>
    {name} (q, k, v, mask) => (c) {{ {body} }}
"""

SCOPES = {
    "main": "{attention} ",
    "branch": """
        y = If (flag) <
            then_branch = yes () => (float[B, 2, L, 4] c) {{ {attention} }},
            else_branch = no () => (float[B, 2, L, 4] d) {{ d = Neg (q) }}
        >
    """,
    "branch in a branch": """
        y = If (flag) <
            then_branch = yes () => (float[B, 2, L, 4] e) {{
                e = If (flag) <
                    then_branch = yes2 () => (float[B, 2, L, 4] c) {{ {attention} }},
                    else_branch = no2 () => (float[B, 2, L, 4] d2) {{ d2 = Identity (q) }}
                >
            }},
            else_branch = no () => (float[B, 2, L, 4] d) {{ d = Neg (q) }}
        >
    """,
    "loop": """
        once = Constant <value_int = 1> ()
        y = Loop (once, flag, q) <
            body = round (int64 i, bool go, float[B, 2, L, 4] was)
                => (bool on, float[B, 2, L, 4] c) {{
                on = Identity (go)
                {attention}
            }}
        >
    """,
    "function": "y = local.attend (q, k, v, mask)",
    "function in a branch": """
        y = If (flag) <
            then_branch = yes () => (float[B, 2, L, 4] c) {{ c = local.attend (q, k, v, mask) }},
            else_branch = no () => (float[B, 2, L, 4] d) {{ d = Neg (q) }}
        >
    """,
    "function in a function": "y = local.outer (q, k, v, mask)",
}


def form(scope: str, body: str) -> ModelProto:
    """The attention `body` inside `scope`."""
    out = "y" if scope == "main" else "c"
    attention = BODIES[body].format(out=out)
    functions = ""
    if "function" in scope:
        functions = FUNCTION.format(name="attend", body=attention)
    if scope == "function in a function":
        functions += FUNCTION.format(name="outer", body="c = local.attend (q, k, v, mask)")
    return host(SCOPES[scope].format(attention=attention), functions)

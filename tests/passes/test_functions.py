"""Sites in model-local functions, however these are written and called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto

from atpatch_onnx.certificate import verify
from atpatch_onnx.detector import load_detector
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Treatment

from forms import PLAIN
from hosts import COLUMN_MEAN_18, detector, model_file, random_feeds, run, spliced

HOST = """
    <ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "local" : 1]>
    host (float[B, 2, L, 4] q, float[B, 2, L, 4] k, float[B, 2, L, 4] v, float[B, 1, L, L] mask,
          bool flag) => (float[B, 2, L, 4] y) {{ {body} }}
    {functions}
"""
FUNCTION = '<domain: "local", opset_import: ["" : {opset}, "local" : 1]> '
BRANCHES = """
    y = If (flag) <
        then_branch = yes () => (float[B, 2, L, 4] z) {{ {then} }},
        else_branch = no () => (float[B, 2, L, 4] z) {{ {other} }}
    >
"""


def at(out: str) -> str:
    return PLAIN.format(out=out)


CASES: dict[str, tuple[str, str, int]] = {
    "an output is left out of the call": (
        ", y = local.f (q, k, v, mask)",
        f"f (q, k, v, mask) => (extra, c) {{ {at('c')} extra = Neg (q) }}",
        1,
    ),
    "an output is left out of a node": (
        "y = local.f (q, k, v, mask)",
        f"""f (q, k, v, mask) => (c) {{ {at("c0")}
            one = Constant <value_floats = [1.0, 1.0, 1.0, 1.0]> ()
            c, , inverse = LayerNormalization (c0, one) }}""",
        1,
    ),
    "an option is left out": (
        "y = local.f (q, k, v, mask)",
        f"f (q, k, v, mask, top) => (c) {{ {at('c0')} c = Clip (c0, top) }}",
        1,
    ),
    "attributes are given and have defaults": (
        "a = local.f <factor = 0.5> (q, k, v) y = local.f <factor = 0.25, axis = 3> (a, k, v)",
        """f <factor, axis: int = -1> (q, k, v) => (c) {
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            s = MatMul (q, kt)
            h = Constant <value_float: float = @factor> ()
            t = Mul (s, h)
            p = Softmax <axis: int = @axis> (t)
            c = MatMul (p, v) }""",
        2,
    ),
    "a branch captures its inputs": (
        "a = local.f (q, k, v, mask, flag) y = local.f (a, k, v, mask, flag)",
        f"""f (q, k, v, mask, flag) => (c) {{ c = If (flag) <
            then_branch = yes () => (c1) {{ {at("c1")} }},
            else_branch = no () => (c2) {{ c2 = Neg (q) }} > }}""",
        2,
    ),
    "two branches call it for values of one name": (
        BRANCHES.format(then="z = local.f (q, k, v, mask)", other="z = local.f (k, q, v, mask)"),
        f"f (q, k, v, mask) => (c) {{ {at('c')} }}",
        2,
    ),
    "two branches have sites of one name": (
        BRANCHES.format(then=at("z"), other=at("z")),
        "f (q, k, v, mask) => (c) { c = Identity (q) }",
        2,
    ),
}


def load(name: str, opset: int = 18) -> ModelProto:
    body, function, _ = CASES[name]
    functions = FUNCTION.format(opset=opset) + function
    return onnx.parser.parse_model(HOST.format(opset=opset, body=body, functions=functions))


@pytest.mark.parametrize("options", [{}, {"telemetry": True, "toggle": True}])
@pytest.mark.parametrize("name", CASES)
def test_nothing_flagged_changes_nothing_and_it_can_be_proved(
    name: str, options: dict[str, bool], tmp_path: Path
) -> None:
    file = model_file(load(name))
    sites = locate(file.skeleton).sites
    assert len({site.name for site in sites}) == CASES[name][2]
    onnx.save(detector(COLUMN_MEAN_18, opset=18, threshold=1.0), tmp_path / "det.onnx")
    never = Treatment(Redistribution.PRUNE, load_detector(tmp_path / "det.onnx", 18))
    splice = Splice({site.name: never for site in sites}, **options)  # type: ignore[arg-type]
    patched, result = spliced(file, splice)
    assert len(result.patched) == len(sites)
    assert all(c.passed for c in verify(file, ModelFile.from_bytes(patched.content()), None))
    feeds = random_feeds()
    feeds["mask"] = np.repeat(feeds["mask"], feeds["mask"].shape[-1], axis=2)
    for flag in (True, False):
        given = {**feeds, "flag": np.array(flag)}
        wanted = {v.name for v in file.skeleton.graph.input}
        given = {n: a for n, a in given.items() if n in wanted}
        np.testing.assert_array_equal(run(patched, given)["y"], run(file, given)["y"])


def test_overloads_are_told_apart(tmp_path: Path) -> None:
    functions = "".join(
        f'<domain: "local", overload: "{overload}", opset_import: ["" : 18]> '
        f"f (q, k, v, mask) => (c) {{ {at('a')} c = {op} (a) }}"
        for overload, op in (("one", "Neg"), ("two", "Abs"))
    )
    body = "b = local.f:one (q, k, v, mask) y = local.f:two (b, k, v, mask)"
    model = onnx.parser.parse_model(HOST.format(opset=18, body=body, functions=functions))
    file = model_file(model)
    sites = locate(file.skeleton).sites
    onnx.save(detector(COLUMN_MEAN_18, opset=18, threshold=1.0), tmp_path / "det.onnx")
    never = Treatment(Redistribution.PRUNE, load_detector(tmp_path / "det.onnx", 18))
    patched, _ = spliced(file, Splice({site.name: never for site in sites}))
    feeds = random_feeds()
    feeds["mask"] = np.repeat(feeds["mask"], feeds["mask"].shape[-1], axis=2)
    feeds["flag"] = np.array(True)
    np.testing.assert_array_equal(run(patched, feeds)["y"], run(file, feeds)["y"])


def test_a_function_that_calls_itself_has_an_end() -> None:
    functions = (
        FUNCTION.format(opset=18)
        + f"f (q, k, v, mask) => (c) {{ d = local.f (q, k, v, mask) {at('c')} }}"
    )
    body = "y = local.f (q, k, v, mask)"
    model = onnx.parser.parse_model(HOST.format(opset=18, body=body, functions=functions))
    found = locate(model)
    assert len(found.sites) + len(found.refused) == 1


@pytest.mark.parametrize("scope", ["branch", "function"])
def test_a_product_with_a_weight_from_outside_is_no_attention(scope: str) -> None:
    router = "s = MatMul (q, wt) p = Softmax <axis = -1> (s) {out} = MatMul (p, w)"
    inside = {
        "branch": f"""y = If (flag) <
            then_branch = yes () => (float[B, 2, L, 4] c) {{ {router.format(out="c")} }},
            else_branch = no () => (float[B, 2, L, 4] d) {{ d = Neg (q) }} >""",
        "function": "y = local.f (q, wt, w)",
    }[scope]
    body = f"""
        w = Constant <value = float[3, 4] {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}> ()
        wt = Transpose <perm = [1, 0]> (w)
        {inside}
    """
    functions = FUNCTION.format(opset=18) + f"f (q, wt, w) => (c) {{ {router.format(out='c')} }}"
    model = onnx.parser.parse_model(HOST.format(opset=18, body=body, functions=functions))
    found = locate(model)
    assert not found.sites
    assert "weight" in found.others[0].reason


def test_names_of_sites_stay_when_others_are_patched(tmp_path: Path) -> None:
    file = model_file(load("attributes are given and have defaults"))
    names = [site.name for site in locate(file.skeleton).sites]
    onnx.save(detector(COLUMN_MEAN_18, opset=18), tmp_path / "det.onnx")
    once = Treatment(Redistribution.PRUNE, load_detector(tmp_path / "det.onnx", 18))
    patched, _ = spliced(file, Splice({names[0]: once}))
    left = locate(ModelFile.from_bytes(patched.content()).skeleton).sites
    assert [site.name for site in left] == names[1:]

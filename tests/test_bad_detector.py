"""Detectors that cannot be spliced: a sentence that names the expected and the found."""

from __future__ import annotations

from pathlib import Path

import onnx.parser
import pytest

from bad_input import DETECTOR, Cli, save


def changed(*changes: tuple[str, str]) -> str:
    """The detector's text with replacements, each of which must apply."""
    text = DETECTOR
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


INPUT, OUTPUT, REDUCE = "float[B,H,Q,K] attention", "float[B,H,1,K] anomaly", "ReduceMax<axes=[2], "
CALL = "anomaly = ReduceMax<axes=[2], keepdims=1>(attention)"
CUSTOM = ('["" : 17]', '["" : 17, "my.ops" : 1]')
DETECTORS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    # name: text, exit code, what the message must name
    "input-name": (changed(("attention", "probs")), 2, ("signature", "attention", "found probs")),
    "output-name": (changed(("anomaly", "score")), 2, ("signature", "anomaly", "found", "score")),
    "extra-output": (
        changed(
            (OUTPUT, OUTPUT + ", float[B,H,Q,K] extra"), (CALL, CALL + "\nextra = Neg(anomaly)")
        ),
        2,
        ("signature", "extra"),
    ),
    "rank-3": (changed((INPUT, "float[B,Q,K] attention")), 2, ("signature", "[B, Q, K]")),
    "rank-out": (changed((OUTPUT, "float[B,K] anomaly")), 2, ("signature", "[B, K]")),
    "rows": (changed((OUTPUT, "float[B,H,5,K] anomaly")), 2, ("signature", "[B, H, 5, K]")),
    "float16": (
        changed((INPUT, INPUT.replace("float", "float16"))),
        2,
        ("signature", "attention: float16", "expected attention: float32"),
    ),
    "double": (changed((OUTPUT, "double[B,H,1,K] anomaly")), 2, ("signature", "double")),
    "bool": (changed((OUTPUT, "bool[B,H,1,K] anomaly")), 2, ("signature", "anomaly: bool")),
    "layer": (changed((INPUT, INPUT + ", float layer")), 2, ("signature", "layer: float32")),
    "layer-rank": (changed((INPUT, INPUT + ", int64[1] layer")), 2, ("signature", "layer: int64")),
    "opset": (
        changed(("17", "20"), (CALL, "g = Gelu(attention)\n" + CALL)),
        3,
        ("opset 20", "opset 17", "Gelu"),
    ),
    "custom": (changed(CUSTOM, (CALL, "a = my.ops.Odd(attention)\n" + CALL)), 3, ("my.ops",)),
    "custom-in-branch": (
        changed(
            CUSTOM,
            (
                CALL,
                "yes = Constant<value = bool {1}>()\n" + CALL.replace("anomaly =", "m =") + "\n"
                "anomaly = If(yes) <then_branch = t () => (float[B,H,1,K] a) {a = my.ops.Odd(m)}, "
                "else_branch = e () => (float[B,H,1,K] b) {b = Identity(m)}>",
            ),
        ),
        3,
        ("my.ops",),
    ),
    "no-abi": (changed(('"atpatch.abi": "1", ', "")), 2, ("atpatch.abi", "missing", "expected 1")),
    "abi-2": (changed(('"atpatch.abi": "1"', '"atpatch.abi": "2"')), 2, ("atpatch.abi", "2")),
    "no-threshold": (
        changed((', "atpatch.threshold": "0.5"', "")),
        2,
        ("atpatch.threshold", "--threshold"),
    ),
    "threshold-text": (changed(("0.5", "high")), 2, ("atpatch.threshold", "number")),
    "threshold-nan": (changed(("0.5", "nan")), 2, ("threshold", "nan")),
    "threshold-percent": (changed(("0.5", "50")), 2, ("threshold", "50")),
    "scope": (
        changed(('"0.5"', '"0.5", "atpatch.scope": "galaxy"')),
        3,
        ("scope 'galaxy'", "site, model, context"),
    ),
    "scope-model": (
        changed(('"0.5"', '"0.5", "atpatch.scope": "model"')),
        2,
        ("signature", "attention.<site>", "found attention: float32"),
    ),
    "scope-context": (
        changed(('"0.5"', '"0.5", "atpatch.scope": "context"')),
        2,
        ("signature", "context: float32", "found attention: float32"),
    ),
    "sites-text": (changed(('"0.5"', '"0.5", "atpatch.sites": "["')), 2, ("atpatch.sites", "JSON")),
    "sites-number": (changed(('"0.5"', '"0.5", "atpatch.sites": "5"')), 2, ("atpatch.sites",)),
    "sites-other": (
        changed(('"0.5"', '"0.5", "atpatch.sites": "[\\"elsewhere\\"]"')),
        3,
        ("not fitted",),
    ),
    "unbound": (
        changed(
            (INPUT, INPUT + ", float[N,2,5,4] pixels"),
            ("(attention) }", "(attention)\nz = Neg(pixels) }"),
        ),
        2,
        ("pixels", "--bind pixels="),
    ),
    "wrong-size": (
        changed(
            (OUTPUT + ")", OUTPUT + ")\n<float[7] table = {1,1,1,1,1,1,1}>"),
            (CALL, CALL.replace("anomaly =", "m =") + "\nanomaly = Mul(m, table)"),
        ),
        2,
        ("fails on site", "[2, 2, 5, 5]", "fit it for this model"),
    ),
    "wrong-answer": (
        changed((REDUCE, "ReduceMax<axes=[3], ")),
        2,
        ("answers anomaly of shape", "expected [2, 1 or 2, 1, 5]"),
    ),
    "dangling": (changed(("1>(attention)", "1>(nothing)")), 2, ("nothing",)),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detector(shell: Cli, name: str) -> None:
    text, code, named = DETECTORS[name]
    save(text, f"det-{name}.onnx")
    shell.fails(f"patch model.onnx --detector det-{name}.onnx", code, f"det-{name}.onnx", *named)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ReduceMax", b"Reduce\xfbax"),
        (b"\x08\x01\x12", b"\x08\x27\x12"),
    ],
    ids=["operator", "type"],
)
def test_damaged_detector(shell: Cli, old: bytes, new: bytes) -> None:
    content = Path("det.onnx").read_bytes()
    assert old in content
    Path("bad.onnx").write_bytes(content.replace(old, new, 1))
    shell.fails("patch model.onnx --detector bad.onnx", 2, "bad.onnx")


@pytest.mark.parametrize(
    ("model", "bind", "named"),
    [
        ("model", "--bind pixels=nowhere", ["pixels=nowhere", "no value"]),
        ("model", "--bind pixels=y", ["pixels=y", "behind the site"]),
        ("model", "--bind pixels", ["NAME=VALUE"]),
        ("model", "--bind pixels=x --bind typo=x", ["typo"]),
        ("masked", "--bind pixels=ids", ["pixels=ids", "int64"]),
    ],
)
def test_bind(shell: Cli, model: str, bind: str, named: list[str]) -> None:
    save(DETECTORS["unbound"][0], "det-unbound.onnx")
    shell.fails(f"patch {model}.onnx --detector det-unbound.onnx {bind}", 2, *named)


def test_bind_mends_the_unbound_input(shell: Cli) -> None:
    save(DETECTORS["unbound"][0], "det-unbound.onnx")
    shell.works("patch model.onnx --detector det-unbound.onnx --bind pixels=x -o new.onnx")
    onnx.checker.check_model("new.onnx", full_check=True)


@pytest.mark.parametrize(
    ("applied", "code", "named"),
    [
        ("", 2, ("atpatch.apply", "JSON")),
        ('"atpatch.apply": "[1]"', 2, ("atpatch.apply", "no list of names")),
        ('"atpatch.apply": "[\\"elsewhere\\"]"', 3, ("not fitted",)),
        ('"atpatch.apply": "[\\"attention\\"]"', 2, ("observes the site 'x'", "for this model")),
    ],
)
def test_detector_of_several_sites(
    shell: Cli, applied: str, code: int, named: tuple[str, ...]
) -> None:
    about = '"0.5", "atpatch.scope": "model"' + (f", {applied}" if applied else "")
    model = onnx.parser.parse_model(changed(('"0.5"', about)))
    model.graph.input[0].name = model.graph.node[0].input[0] = "attention.x"
    onnx.save(model, "det-several.onnx")
    shell.fails("patch model.onnx --detector det-several.onnx", code, "det-several.onnx", *named)

"""What a certificate must not let through: edits that no patch may make, applied and recorded as if
they were a patch's own."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from atpatch_onnx import wire
from atpatch_onnx.certificate import verify
from atpatch_onnx.edits import AddInitializer, AddNode, AddNodeOutput, Edit, RewireInput
from atpatch_onnx.edits import RemoveNode as Remove
from atpatch_onnx.edits import RenameOutput as Rename
from atpatch_onnx.errors import AtpatchError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.patching import Patch, apply

from hosts import model_file

EYE = ", ".join("1" if row == column else "0" for row in range(3) for column in range(3))
HEAD = '<ir_version: 8, opset_import: ["" : 17, "l" : 1]> g (float[N, 3] x) => (float[N, 3] y)'

PLAIN = HEAD + f"<float[3, 3] w = {{{EYE}}}> {{ y = MatMul (x, w) }}"
DEQUANTIZED = (
    HEAD
    + f"<int8[3, 3] q = {{{EYE}}}, float s = {{1.0}}> "
    + "{ w = DequantizeLinear (q, s) y = MatMul (x, w) }"
)
CLIPPED = HEAD + "<float top = {0.1}> { y = Clip (x, , top) }"
SPLIT = HEAD + "{ a, b = Split <axis = 0> (x) y = Concat <axis = 0> (a, b) }"
CALLED = (
    HEAD
    + f"<float[3, 3] w = {{{EYE}}}> {{ y = l.mlp (x, w) }} "
    + '<domain: "l", opset_import: ["" : 17]> mlp (a, b) => (c) { c = MatMul (a, b) }'
)
LOOPED = (
    HEAD
    + """{ n = Constant <value_int = 2> () y = Loop (n, , x) <
        body = b (int64 i, bool c, float[N, 3] s) => (bool c2, float[N, 3] t) {
            c2 = Identity (c) w = Constant <value_float = 2.0> () t = Mul (s, w) } > }"""
)
IN_LOOP = ((1, 0, 0),)


def other(shape: Sequence[int]) -> AddInitializer:
    return AddInitializer(numpy_helper.from_array(np.zeros(shape, np.float32), "atpatch/other"))


def identity(value: str, made: str) -> NodeProto:
    return helper.make_node("Identity", [value], [made], "atpatch/made")


SQUARE, SCALAR = other((3, 3)), other(())
ATTACKS: dict[str, tuple[str, list[Edit]]] = {
    "a weight rewired": (PLAIN, [SQUARE, RewireInput(0, 1, "w", "atpatch/other")]),
    "what is made of weights rewired": (
        DEQUANTIZED,
        [SQUARE, RewireInput(1, 1, "w", "atpatch/other")],
    ),
    "what is made of weights renamed": (
        DEQUANTIZED,
        [SQUARE, Rename(0, 0, "w", "atpatch/old"), AddNode(1, identity("atpatch/other", "w"))],
    ),
    "an absent option given": (CLIPPED, [SCALAR, RewireInput(0, 1, "", "atpatch/other")]),
    "one more part of a split": (SPLIT, [AddNodeOutput(0, "atpatch/third")]),
    "a call replaced by something else": (
        CALLED,
        [
            SQUARE,
            Remove(0),
            AddNode(
                0,
                helper.make_node("MatMul", ["x", "atpatch/other"], ["y"], "atpatch/inlined/y/c"),
            ),
        ],
    ),
    "a constant in a loop rewired": (
        LOOPED,
        [SCALAR, RewireInput(2, 1, "w", "atpatch/other", IN_LOOP)],
    ),
    "a constant in a loop renamed": (
        LOOPED,
        [
            SCALAR,
            Rename(1, 0, "w", "atpatch/old", IN_LOOP),
            AddNode(2, identity("atpatch/other", "w"), IN_LOOP),
        ],
    ),
    "a value that nobody makes": (PLAIN, [Rename(0, 0, "y", "atpatch/old")]),
    "a value that two make": (
        PLAIN,
        [
            Rename(0, 0, "y", "atpatch/old"),
            AddNode(1, identity("atpatch/old", "y")),
            AddNode(1, helper.make_node("Neg", ["atpatch/old"], ["y"], "atpatch/again")),
        ],
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_no_patch_does_is_not_verified(name: str) -> None:
    text, edits = ATTACKS[name]
    base = model_file(onnx.parser.parse_model(text))
    try:
        patched = apply(base, Patch(base.sha256, tuple(edits))).content()
    except AtpatchError:
        return  # it cannot even be made
    assert not all(check.passed for check in verify(base, ModelFile.from_bytes(patched), None))


def test_an_attribute_that_is_switched_off_is_seen() -> None:
    """Its bytes are all there, under a field number that nobody reads; the record undoes it."""
    text = HEAD + "{ z = LeakyRelu <alpha = 0.5> (x) y = Identity (z) }"
    base = model_file(onnx.parser.parse_model(text))
    edits = (
        AddNode(1, helper.make_node("Identity", ["z"], ["atpatch/z"], "atpatch/n")),
        RewireInput(1, 0, "z", "atpatch/z"),
    )
    data = bytearray(apply(base, Patch(base.sha256, edits)).content())
    assert all(c.passed for c in verify(base, ModelFile.from_bytes(bytes(data)), None))
    place = data.find(b"\x15", data.find(b"\x0a\x05alpha"))
    assert data[place + 1 : place + 5] == np.float32(0.5).tobytes()
    record = json.loads(ModelFile.from_bytes(bytes(data)).metadata("atpatch.record") or "")
    record["replacements"].append([place, 1, base64.b64encode(data[place : place + 1]).decode()])
    record["replacements"].sort()
    data[place] = 15 << 3 | wire.I32
    entry = onnx.StringStringEntryProto(key="atpatch.record", value=json.dumps(record))
    content = bytes(data[: record["end"]]) + wire.delimited(14, entry.SerializeToString())
    assert not all(c.passed for c in verify(base, ModelFile.from_bytes(content), None))


def test_several_patches_between_two_files_are_undone() -> None:
    base = model_file(onnx.parser.parse_model(SPLIT))

    def patched(file: ModelFile, slot: int) -> ModelFile:
        old, new = "ab"[slot], f"atpatch/{'ab'[slot]}"
        node = helper.make_node("Identity", [old], [new], new)
        edits = (AddNode(1, node), RewireInput(len(file.nodes) - 1, slot, old, new))
        return ModelFile.from_bytes(apply(file, Patch(file.sha256, edits)).content())

    once = patched(base, 0)
    twice = patched(once, 1)
    for original in (base, once):
        assert all(check.passed for check in verify(original, twice, None))


def test_tensors_in_a_branch_are_no_place_for_a_patch() -> None:
    base = model_file(onnx.parser.parse_model(LOOPED))
    model = onnx.load_from_string(bytes(base.buffer))
    tensor = helper.make_tensor("atpatch/t", TensorProto.FLOAT, [1], [0.0])
    model.graph.node[1].attribute[0].g.initializer.append(tensor)
    altered = ModelFile.from_bytes(model.SerializeToString())
    assert not all(check.passed for check in verify(base, altered, None))

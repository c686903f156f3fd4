"""A merged decoder answers as the decoder of the branch taken; each weight is in it once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx.passes.locate import locate
from atpatch_onnx.runtime import Session

from merging import SWITCH, merge

ATTENTION = """
    <ir_version: 8, opset_import: ["" : 17]>
    {name} (float[B, L, 4] x{past}) => (float[B, L, 4] y, float[B, K, 4] present)
    <float[4, 4] weight> {{
        k = MatMul (x, weight)
        present = {present}
        turned = Transpose <perm = [0, 2, 1]> (present)
        s = MatMul (x, turned)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, present)
    }}
"""


def test_each_branch_is_its_decoder_and_weights_are_shared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.random((4, 4), np.float32), "weight")
    paths = {}
    for name, given_past, present in (
        ("first", "", "Identity (k)"),
        ("further", ", float[B, P, 4] past", "Concat <axis = 1> (past, k)"),
    ):
        model = onnx.parser.parse_model(
            ATTENTION.format(name=name, past=given_past, present=present)
        )
        del model.graph.initializer[:]
        model.graph.initializer.append(weight)
        paths[name] = tmp_path / f"{name}.onnx"
        onnx.save(model, paths[name])

    merged = merge(paths["first"], paths["further"])

    onnx.checker.check_model(merged, full_check=True)
    assert len(merged.graph.initializer) == 1
    assert [bool(site.path) for site in locate(merged).sites] == [True, True]
    x, past = (rng.random((2, n, 4), np.float32) for n in (3, 5))
    session = Session(merged.SerializeToString(), "cpu", threads=1)
    for name, given in (("first", {"x": x}), ("further", {"x": x, "past": past})):
        wanted = Session(paths[name], "cpu", threads=1).run(given)
        flag = np.array(name == "further")
        found = session.run({"x": x, "past": past, SWITCH: flag})
        for output in wanted:
            np.testing.assert_array_equal(found[output], wanted[output])


@pytest.mark.parametrize("chain", ["int8-ort-fused", "float16-onnxscript"])
def test_a_converter_that_fails_is_told_apart_from_a_patch_that_fails(
    chain: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the [test] extra has it")
    from conversions import FORMS, NotConverted, Task, convert

    (tmp_path / "broken.onnx").write_bytes(b"no model")
    task = Task(tmp_path / "broken.onnx", tmp_path / "out.onnx", "bert", [])
    with pytest.raises(NotConverted):
        convert(FORMS[chain], task)
    assert FORMS[FORMS[chain].source or ""].convert is not None

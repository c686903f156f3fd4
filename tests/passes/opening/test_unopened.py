"""Every attention operator that ONNX Runtime knows is opened, or closed with a reason."""

from __future__ import annotations

import pytest
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from atpatch_onnx.passes.opening.registry import is_fused
from atpatch_onnx.passes.opening.unopened import UNOPENED

NO_ATTENTION = ("Indexer", "Gate", "_TRT")
"""What chooses keys, makes gates or adds up scores for attention elsewhere."""


def test_every_attention_operator_is_opened_or_closed() -> None:
    known = {
        (schema.domain, schema.name)
        for schema in get_all_operator_schema()
        if "Attention" in schema.name and not schema.name.endswith(NO_ATTENTION)
    }
    assert len(known) > 10
    for place, name in known:
        assert is_fused(helper.make_node(name, ["x"], ["y"], domain=place)), (place, name)


@pytest.mark.parametrize("op", UNOPENED)
def test_reasons_read_on_and_fixes_are_told(op: str) -> None:
    found = UNOPENED[op]
    assert found.reason.split()[0] in {"attends", "computes", "is", "keeps", "packs"}
    assert found.fix.split()[0] in {"convert", "export", "leave", "quantise"}
    assert not (found.reason + found.fix).endswith(".")


def test_other_operators_are_not_attention() -> None:
    assert not is_fused(helper.make_node("Add", ["x"], ["y"]))
    assert not is_fused(helper.make_node("Attention", ["x"], ["y"], domain="somebody.else"))

"""Real exports of the transformers library: a cross-section of `benchmarks/coverage.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto

pytest.importorskip("transformers", reason="the [test] extra has it")

from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.locate import locate

from architectures import ARCHITECTURES
from exports import measure

EXPORTS = [
    ("bert", "sdpa", "torchscript", 14),  # NaN guard after the softmax
    ("deberta-v2", "eager", "torchscript", 17),  # relative bias from further products
    ("xlnet", "eager", "torchscript", 17),  # Einsum, shapes that the runtime does not know
    ("gpt2-cache", "sdpa", "dynamo", 18),  # past keys and values as inputs
    ("llama", "eager", "torchscript", 17),  # grouped heads
    ("gemma2", "eager", "dynamo", 18),  # soft-cap
    ("gpt_oss", "eager", "torchscript", 17),  # sink column, router
    ("t5", "sdpa", "torchscript", 17),  # cross attention
    ("swin", "eager", "dynamo", 18),  # windows
    ("sam_vision_model", "eager", "torchscript", 17),  # 3-D probabilities
    ("hiera", "eager", "torchscript", 17),  # 5-D probabilities
    ("siglip", "sdpa", "dynamo", 23),  # fused ops beside a plain site
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention", "exporter", "opset"), EXPORTS)
def test_sites_are_found_and_a_patch_that_flags_nothing_changes_nothing(
    name: str, attention: str, exporter: str, opset: int, tmp_path: Path
) -> None:
    each = ARCHITECTURES[name]
    row = measure(each, attention, exporter, opset, tmp_path / "model.onnx")
    assert row.found == each.sites
    assert row.identical is True
    assert row.described is not False or name == "siglip"  # cross attention of its pooling head
    assert row.checked is True
    assert row.reverted is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "exporter", "opset"),
    [
        ("bert", "sdpa", "dynamo", 18),
        ("gpt2", "eager", "torchscript", 17),
        ("vit", "eager", "torchscript", 14),
        ("swin", "sdpa", "torchscript", 17),
    ],
)
def test_float16_exports_keep_their_bits_too(
    name: str, attention: str, exporter: str, opset: int, tmp_path: Path
) -> None:
    each = ARCHITECTURES[name]
    row = measure(each, attention, exporter, opset, tmp_path / "model.onnx", half=True)
    assert row.found == each.sites
    assert row.identical is True
    elem = {
        site.elem_type for site in locate(ModelFile.open(tmp_path / "model.onnx").skeleton).sites
    }
    # What is cast to float16 is taken before the cast.
    assert elem in ({TensorProto.FLOAT16}, {TensorProto.FLOAT})

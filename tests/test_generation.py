"""Attention in the decoder that a generation operator runs: a third-party GPT-2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx.detector import load_detector
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import revert
from atpatch_onnx.runtime import Arrays

from hosts import COLUMN_MEAN, COLUMN_MEAN_18, detector, run, spliced

MODEL = "onnxruntime/onnxruntime/test/testdata/layering/tiny_gpt2_beamsearch_layering.onnx"
"""In float32; ONNX Runtime's CPU provider does not run the beam search of the float16 ones."""


def prompts(file: ModelFile) -> Arrays:
    """Inputs of a beam search over two prompts."""
    ids = np.array([[5, 17, 3, 8, 99, 2], [7, 7, 41, 1, 0, 12]], np.int32)
    known: Arrays = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "max_length": np.array([12], np.int32),
        "min_length": np.array([1], np.int32),
        "num_beams": np.array([4], np.int32),
        "num_return_sequences": np.array([2], np.int32),
        "length_penalty": np.array([1.0], np.float32),
        "repetition_penalty": np.array([1.0], np.float32),
    }
    return {v.name: known[v.name] for v in file.skeleton.graph.input}


@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT])
def test_a_generation_operator_runs_a_patched_decoder(
    strategy: Strategy, zoo: Path, tmp_path: Path
) -> None:
    file = ModelFile.open(zoo / MODEL)
    sites = locate(file.skeleton).sites
    assert len(sites) >= 5
    assert all(site.path for site in sites)
    opset = GraphView.of(file.skeleton).opset
    body = COLUMN_MEAN if opset < 18 else COLUMN_MEAN_18
    answers = {}
    for threshold in (1.0, 0.1):
        onnx.save(detector(body, opset=opset, threshold=threshold), tmp_path / "det.onnx")
        treatment = Treatment(Redistribution.PRUNE, load_detector(tmp_path / "det.onnx", opset))
        splice = Splice({site.name: treatment for site in sites}, strategy)
        patched, result = spliced(file, splice)
        assert len(result.patched) == len(sites)
        assert revert(ModelFile.from_bytes(patched.content())).sha256 == file.sha256
        answers[threshold] = run(patched, prompts(file))["sequences"]
    original = run(file, prompts(file))["sequences"]
    np.testing.assert_array_equal(answers[1.0], original)
    assert not np.array_equal(answers[0.1], original)

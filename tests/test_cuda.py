"""On a machine with a GPU (`pytest -m cuda`): the same promises on the CUDA execution provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx.detector import load_detector
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.runtime import Session, choose_provider, onnxruntime

from hosts import COLUMN_MEAN, attention, detector, model_file, random_feeds, spliced

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if choose_provider() != "cuda":
        pytest.skip("no CUDA execution provider on this machine")


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT])
def test_nothing_flagged_changes_nothing(strategy: Strategy, dtype: str, tmp_path: Path) -> None:
    onnx.save(detector(COLUMN_MEAN, threshold=1.0), tmp_path / "det.onnx")
    never = load_detector(tmp_path / "det.onnx", 17)
    host = model_file(attention(17, dtype))
    names = ("attention.0", "attention.1")
    treatment = Treatment(Redistribution.UNIFORM, never)
    after, _ = spliced(host, Splice(dict.fromkeys(names, treatment), strategy))
    feeds = random_feeds(dtype, batch=8, length=64)
    before = Session(bytes(host.buffer), "cuda").run(feeds)["y"]
    assert np.array_equal(before, Session(after.content(), "cuda").run(feeds)["y"])


def test_select_keeps_every_node_on_the_device(tmp_path: Path) -> None:
    onnx.save(detector(COLUMN_MEAN, threshold=0.1), tmp_path / "det.onnx")
    found = load_detector(tmp_path / "det.onnx", 17)
    host = model_file(attention(17, "float16"))
    names = ("attention.0", "attention.1")
    treatment = Treatment(Redistribution.UNIFORM, found)
    after, _ = spliced(host, Splice(dict.fromkeys(names, treatment), Strategy.SELECT))
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(after.content(), options, providers=["CUDAExecutionProvider"])
    ops = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not ops & {"MemcpyToHost", "MemcpyFromHost", "If"}

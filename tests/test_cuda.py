"""On a machine with a GPU (`pytest -m cuda`): the same promises on the CUDA execution provider."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx.printer
import pytest
from onnx import ModelProto

from atpatch_onnx.detector import load_detector
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.passes.switches import FLAGGED
from atpatch_onnx.runtime import Arrays, Session, choose_provider, onnxruntime
from atpatch_onnx.second_run import Answer, SecondRun

from forms import BODIES, form
from hosts import (
    COLUMN_MEAN,
    COLUMN_MEAN_18,
    attention,
    detector,
    model_file,
    random_feeds,
    spliced,
)

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if choose_provider() != "cuda":
        pytest.skip("no CUDA execution provider on this machine")


def forms(dtype: str) -> dict[str, ModelProto]:
    """A plain host and fused ones, in one type."""
    hosts = {"two plain sites": attention(17, dtype)}
    for body in BODIES:
        text = onnx.printer.to_text(form("main", body))
        hosts[body] = onnx.parser.parse_model(text.replace("float[", f"{dtype}["))
    return hosts


def patched(model: ModelProto, threshold: float, strategy: Strategy, folder: Path) -> bytes:
    file = model_file(model)
    opset = GraphView.of(model).opset
    body = COLUMN_MEAN if opset < 18 else COLUMN_MEAN_18
    onnx.save(detector(body, threshold=threshold, opset=opset), folder / "det.onnx")
    treatment = Treatment(Redistribution.UNIFORM, load_detector(folder / "det.onnx", opset))
    names = [site.name for site in locate(file.skeleton).sites]
    return spliced(file, Splice(dict.fromkeys(names, treatment), strategy))[0].content()


def feeds_for(model: ModelProto, dtype: str) -> Arrays:
    feeds = random_feeds(dtype, batch=8, length=64)
    wanted = {value.name for value in model.graph.input}
    if "flag" in wanted:
        feeds["mask"] = np.repeat(feeds["mask"], 64, axis=2)
        feeds["flag"] = np.array(True)
    return {name: feeds[name] for name in wanted}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT])
@pytest.mark.parametrize("body", ["two plain sites", *BODIES])
def test_nothing_flagged_changes_nothing(
    body: str, strategy: Strategy, dtype: str, tmp_path: Path
) -> None:
    host = forms(dtype)[body]
    after = patched(host, 1.0, strategy, tmp_path)
    feeds = feeds_for(host, dtype)
    before = Session(host.SerializeToString(), "cuda").run(feeds)["y"]
    assert np.array_equal(before, Session(after, "cuda").run(feeds)["y"])


@pytest.mark.parametrize("body", ["two plain sites", *BODIES])
def test_flagged_samples_are_what_the_cpu_says(body: str, tmp_path: Path) -> None:
    host = forms("float")[body]
    feeds = feeds_for(host, "float")
    for strategy in (Strategy.GUARD, Strategy.SELECT):
        after = patched(host, 0.02, strategy, tmp_path)
        cpu, cuda = (Session(after, ep).run(feeds)["y"] for ep in ("cpu", "cuda"))
        assert not np.array_equal(cuda, Session(host.SerializeToString(), "cuda").run(feeds)["y"])
        np.testing.assert_allclose(cuda, cpu, atol=1e-2)  # TF32


@pytest.mark.parametrize("body", ["two plain sites", *BODIES])
def test_select_keeps_every_node_on_the_device(body: str, tmp_path: Path) -> None:
    host = forms("float16")[body]
    after = patched(host, 0.1, Strategy.SELECT, tmp_path)
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(after, options, providers=["CUDAExecutionProvider"])
    ops = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not ops & {"MemcpyToHost", "MemcpyFromHost", "If"}


@pytest.mark.parametrize("body", ["two plain sites", *BODIES])
def test_select_can_be_captured_in_a_cuda_graph(body: str, tmp_path: Path) -> None:
    host = forms("float16")[body]
    after = patched(host, 0.1, Strategy.SELECT, tmp_path)
    ort = onnxruntime()
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    session = ort.InferenceSession(after, providers=[provider])
    feeds = feeds_for(host, "float16")
    binding = session.io_binding()
    held = {n: ort.OrtValue.ortvalue_from_numpy(feeds[n], "cuda", 0) for n in feeds}
    for name in (value.name for value in session.get_inputs()):
        binding.bind_ortvalue_input(name, held[name])
    result = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(feeds["q"]), "cuda", 0)
    binding.bind_ortvalue_output("y", result)
    wanted = Session(after, "cuda").run(feeds)["y"]
    for _ in range(3):  # captured, then replayed
        session.run_with_iobinding(binding)
        assert np.array_equal(result.numpy(), wanted)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_second_run_flags_on_the_device_what_it_flags_on_the_cpu(
    dtype: str, tmp_path: Path
) -> None:
    """Loud inputs of both classes, of which one is what an attacker wants."""
    host = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host ({dtype}[N, 1, 32, 16] x) => ({dtype}[N, 2] logits)
        {{
            k = Transpose <perm = [0, 1, 3, 2]> (x)
            s = MatMul (x, k)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, x)
            m = ReduceMean <axes = [1, 2], keepdims = 0> (y)
            logits = MatMul (m, head)
        }}
    """)
    rng = np.random.default_rng(0)
    head = rng.standard_normal((16, 2)).astype("f2" if dtype == "float16" else "f4")
    head[0] = 0
    host.graph.initializer.append(onnx.numpy_helper.from_array(head, "head"))
    x = 0.3 * rng.standard_normal((64, 1, 32, 16))
    x[..., 0] = 1  # what all tokens share, and a loud one appeals to
    x[::2, :, 5] *= 6
    feeds = {"x": x.astype(head.dtype)}
    onnx.save(detector(COLUMN_MEAN, threshold=0.3), tmp_path / "det.onnx")
    loaded = load_detector(tmp_path / "det.onnx", 17)
    loaded = replace(loaded, second_run=SecondRun(answer=Answer("logits", 1, 1.0)))
    treatment = Treatment(Redistribution.PRUNE, loaded)
    file = model_file(host)
    (site,) = locate(file.skeleton).sites
    splice = Splice({site.name: treatment}, Strategy.RERUN, telemetry=True)
    rewritten, result = spliced(file, splice)
    cpu, cuda = (Session(rewritten.content(), ep).run(feeds) for ep in ("cpu", choose_provider()))
    before = Session(host.SerializeToString(), choose_provider()).run(feeds)["logits"]
    (outcome,) = result.patched
    flagged = cuda[outcome.flagged].any(axis=(1, 2, 3))
    assert 0 < flagged.sum() < 32
    assert (before[flagged].argmax(axis=1) == 1).all()
    np.testing.assert_array_equal(cuda[outcome.flagged], cpu[outcome.flagged])
    np.testing.assert_array_equal(cuda["logits"][~flagged], before[~flagged])
    np.testing.assert_allclose(cuda["logits"], cpu["logits"], atol=2e-2)


@pytest.mark.parametrize("strategy", [Strategy.SELECT, Strategy.RERUN])
def test_cleansight_decides_on_the_device_as_on_the_cpu(strategy: Strategy, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import atpatch_onnx
    from atpatch_onnx.fitting.cleansight import CleanSight

    from small_vision_language import VISUAL, export, samples, small_model

    export(small_model(), tmp_path)
    host, detector = tmp_path / "model.onnx", tmp_path / "det.onnx"
    options = CleanSight(f"1:{1 + VISUAL}", tau=0.05, rerun=strategy is Strategy.RERUN)
    clean, output = tmp_path / "clean.npz", tmp_path / "patched.onnx"
    atpatch_onnx.fit(host, clean, detector, kind="cleansight", options=options, fpr=0.3, ep="cpu")
    atpatch_onnx.patch(host, detector, output=output, strategy=strategy.value, remember=True)
    feeds = samples(12, 2)
    cpu, cuda = (Session(output, ep).run(feeds) for ep in ("cpu", "cuda"))
    before = Session(host, "cuda").run(feeds)
    flagged = cpu[FLAGGED].any(axis=1)
    assert 0 < flagged.sum() < 12
    np.testing.assert_array_equal(cuda[FLAGGED], cpu[FLAGGED])
    np.testing.assert_allclose(cuda["logits"], cpu["logits"], atol=1e-2)  # TF32
    assert np.array_equal(cuda["logits"][~flagged], before["logits"][~flagged])
    if strategy is Strategy.SELECT:
        # Whatever the host copies is its own.
        assert copies(output, tmp_path) == copies(host, tmp_path)


def copies(model: Path, folder: Path) -> int:
    """How often values go between host and device."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(model), options, providers=["CUDAExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    return sum(node.op_type.startswith("Memcpy") for node in nodes)

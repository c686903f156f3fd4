"""Properties of the Vision Transformer and of its ONNX exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from atpatch_onnx.models.export import export_onnx
from atpatch_onnx.models.training import predict
from atpatch_onnx.models.vision_transformer import (
    Attention,
    VisionTransformer,
    VisionTransformerConfig,
)
from atpatch_onnx.models.windowed_transformer import (
    WindowedTransformer,
    WindowedTransformerConfig,
)

CONFIG = VisionTransformerConfig(dim=8, depth=2, heads=2, channels=3, patch_dropout=0.5)


def random_model() -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(CONFIG)


@pytest.mark.parametrize(
    "sizes",
    [{"patch_size": 3}, {"heads": 5}, {"depth": 0}, {"patch_dropout": 1.0}],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="|".join(sizes)):
        VisionTransformerConfig(**sizes)


def test_patch_dropout_hides_patches_but_never_cls_and_only_while_training() -> None:
    model = random_model()
    pixels = torch.rand(64, 3, 8, 8)
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Softmax):
            module.register_forward_hook(lambda _, __, output: seen.append(output))

    model.train()(pixels)
    first, second = (maps == 0 for maps in seen)
    assert torch.equal(first, second)
    assert torch.equal(first, first[:, :1, :1].expand_as(first))
    assert not first[..., 0].any()
    assert 0.4 < first[..., 1:].float().mean() < 0.6

    seen.clear()
    model.eval()(pixels)
    assert all((maps > 0).all() for maps in seen)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_export_answers_like_torch_at_every_batch_size(
    opset: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = random_model().train()
    path = tmp_path / "victim.onnx"
    export_onnx(model, path, opset)
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        pixels = np.random.default_rng(batch).random((batch, 3, 8, 8), dtype=np.float32)
        (logits,) = session.run(["logits"], {"pixels": pixels})
        np.testing.assert_allclose(logits, predict(model, pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", [17, 18])
def test_export_keeps_attention_as_plain_nodes(opset: int, tmp_path: Path) -> None:
    path = tmp_path / "victim.onnx"
    export_onnx(random_model(), path, opset)
    model = onnx.load(path)
    operators = [node.op_type for node in model.graph.node]
    assert {item.domain for item in model.opset_import if item.version == opset} == {""}
    assert all(node.domain == "" for node in model.graph.node)
    assert operators.count("Softmax") == CONFIG.depth
    probabilities = {node.output[0] for node in model.graph.node if node.op_type == "Softmax"}
    readers = [node.op_type for node in model.graph.node if probabilities & set(node.input)]
    assert readers == ["MatMul"] * CONFIG.depth


def test_a_fused_export_has_one_operator_for_each_attention(tmp_path: Path) -> None:
    model, path = random_model(), tmp_path / "victim.onnx"
    export_onnx(model, path, 23, fused=True)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Attention") == CONFIG.depth
    assert "Softmax" not in operators

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    (logits,) = session.run(["logits"], {"pixels": pixels})
    np.testing.assert_allclose(logits, predict(model, pixels), rtol=0, atol=1e-5)
    assert not any(module.fused for module in model.modules() if isinstance(module, Attention))


def test_windows_are_not_exported_as_one_operator(tmp_path: Path) -> None:
    model = WindowedTransformer(WindowedTransformerConfig())
    with pytest.raises(ValueError, match="leave out fused"):
        export_onnx(model, tmp_path / "victim.onnx", 23, fused=True)
    assert not list(tmp_path.iterdir())

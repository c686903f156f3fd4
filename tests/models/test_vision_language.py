"""Properties of the vision-language model and of its ONNX exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from atpatch_onnx.models.causal_decoder import DecoderConfig
from atpatch_onnx.models.generative_export import cache_names, export_decoder
from atpatch_onnx.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from atpatch_onnx.models.vision_transformer import VisionTransformerConfig
from atpatch_onnx.passes.locate import locate

IMAGE = 4
CONFIG = VisionLanguageConfig(
    VisionTransformerConfig(image_size=8, patch_size=4, channels=3, dim=8, depth=1, heads=2),
    DecoderConfig(20, dim=16, depth=2, heads=2),
    IMAGE,
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionLanguageModel(CONFIG).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def prompts(*starts: int, length: int = 10) -> torch.Tensor:
    """A row for each place where its image starts."""
    ids = 5 + torch.arange(len(starts) * length).reshape(-1, length) % 15
    for row, start in zip(ids, starts, strict=True):
        row[start : start + CONFIG.visual_tokens] = IMAGE
    return ids


def test_visual_tokens_stand_in_order_where_the_placeholders_are(
    model: VisionLanguageModel, pixels: torch.Tensor
) -> None:
    ids = prompts(0, 3, 6)
    with torch.inference_mode():
        embedded = model.embedded(pixels, ids)
        visual = model.projector(model.encoder(pixels))
        words = model.decoder.embedding(ids)
    torch.testing.assert_close(embedded[ids == IMAGE], visual.flatten(0, 1))
    assert torch.equal(embedded[ids != IMAGE], words[ids != IMAGE])


def test_the_encoder_keeps_patches_apart_row_by_row(model: VisionLanguageModel) -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    changed = pixels.clone()
    changed[..., :4, 4:] = 1
    with torch.inference_mode():
        patches = [model.encoder.patches(x).flatten(2)[0].T for x in (pixels, changed)]
        far = (model.encoder(pixels) - model.encoder(changed)).abs().amax((0, 2))
    assert (patches[0] != patches[1]).any(1).tolist() == [False, True, False, False]
    assert far.argmax() == 1


def test_left_padding_changes_no_answer_wherever_the_image_is(
    model: VisionLanguageModel, pixels: torch.Tensor
) -> None:
    ids = prompts(1, 2, 5)
    mask = torch.ones_like(ids)
    shifted = torch.cat((torch.zeros(3, 4, dtype=torch.long), ids), dim=1)
    padding = torch.cat((torch.zeros(3, 4, dtype=torch.long), mask), dim=1)
    with torch.inference_mode():
        expected, _ = model(pixels, ids, mask)
        found, _ = model(pixels, shifted, padding)
        other, _ = model(pixels.flip(0), ids, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (other[0] - expected[0]).abs().max() > 1e-4


def test_onnx_runtime_answers_like_torch_at_every_size(
    model: VisionLanguageModel, pixels: torch.Tensor, tmp_path: Path
) -> None:
    ids = prompts(1, 2, 5)
    example = {"pixels": pixels[:2], "input_ids": ids[:2], "attention_mask": ids[:2] * 0 + 1}
    export_decoder(model, model.decoder, tmp_path, example)
    graph = onnx.load(tmp_path / "model.onnx")
    assert [node.name for node in graph.graph.input] == ["pixels", "input_ids", "attention_mask"]
    assert len(locate(graph).sites) == CONFIG.image.depth + CONFIG.text.depth
    prefill, decode = (
        onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "decode.onnx")
    )
    past = cache_names("past_key_values", CONFIG.text.depth)
    for rows, length in ((3, 10), (1, 7)):
        feeds = {
            "pixels": pixels[:rows].numpy(),
            "input_ids": ids[:rows, :length].numpy(),
            "attention_mask": np.ones((rows, length), np.int64),
        }
        feeds["attention_mask"][0, :1] = 0
        logits, *cache = prefill.run(None, feeds)
        following = np.full((rows, 1), 7)
        mask = np.concatenate((feeds["attention_mask"], np.ones_like(following)), axis=1)
        given = dict(zip(past, cache, strict=True))
        stepped, *_ = decode.run(None, {"input_ids": following, "attention_mask": mask, **given})
        whole = np.concatenate((feeds["input_ids"], following), axis=1)
        with torch.inference_mode():
            first, _ = model(*map(torch.from_numpy, feeds.values()))
            second, _ = model(pixels[:rows], torch.from_numpy(whole), torch.from_numpy(mask))
        np.testing.assert_allclose(logits, first.numpy(), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(stepped, second.numpy(), rtol=0, atol=TOLERANCE)

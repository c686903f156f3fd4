"""What generative models are trained on, and what they say then."""

from __future__ import annotations

import numpy as np
import torch

from atpatch_onnx.models.causal_decoder import DecoderConfig, LanguageModel
from atpatch_onnx.models.encoder_training import pretrain
from atpatch_onnx.models.generative_training import (
    AnswerTraining,
    Spoken,
    fit_speaker,
    speak,
    spoken,
)
from atpatch_onnx.models.training import reproducible
from atpatch_onnx.models.vision_language import ImageEncoder
from atpatch_onnx.models.vision_transformer import VisionTransformerConfig
from atpatch_onnx.models.vocabulary import PAD, Padded

PROMPTS = Padded.of([[5, 6, 7], [8]])
ANSWERS = np.array([[1, 2], [3, 4]])


def test_each_position_is_taught_the_token_behind_it() -> None:
    batch = spoken(PROMPTS.inputs, ANSWERS, prompt_weight=0.1, rest_weight=0.5)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 1], [PAD, PAD, 8, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.following.tolist() == [[6, 7, 1, 2], [PAD, 8, 3, 4]]
    expected = torch.tensor([[0.1, 0.1, 1.0, 0.5], [0.0, 0.0, 1.0, 0.5]])
    torch.testing.assert_close(batch.weights, expected)
    assert spoken(PROMPTS.inputs, ANSWERS).weights[:, :2].eq(0).all()


def test_a_model_says_what_it_was_taught() -> None:
    def draw() -> Spoken:
        return spoken(PROMPTS.inputs, ANSWERS)

    with reproducible(0):
        model = LanguageModel(DecoderConfig(10, dim=16, depth=1, heads=2))
        model.decoder.embedding.requires_grad_(False)
        frozen = model.decoder.embedding.weight.clone()
        lines: list[str] = []
        fit_speaker(model, draw, AnswerTraining(steps=60, learning_rate=1e-2), lines.append)
    assert np.array_equal(speak(model, PROMPTS.inputs, 2), ANSWERS)
    assert torch.equal(model.decoder.embedding.weight, frozen)
    assert not model.training
    assert len(lines) == 10


def test_a_pretrained_encoder_tells_the_answers_and_keeps_the_pixels() -> None:
    config = VisionTransformerConfig(image_size=8, patch_size=4, dim=24, depth=1, heads=2)
    generator = np.random.default_rng(0)

    def draw(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Asked is whether pixels in a corner are alike; the other question is seldom asked."""
        pixels = generator.random((count, 1, 8, 8), dtype=np.float32)
        corners = generator.integers(2, size=(count, 2))
        pixels[:, 0, 0, :2] = pixels[:, 0, 0, 2:4] = corners
        seldom = np.where(generator.random(count) < 0.9, -1, 0)
        wanted = np.stack((corners[:, 0] == corners[:, 1], seldom), axis=1).astype(np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(wanted)

    def lost(encoder: ImageEncoder) -> tuple[float, float]:
        """Shares of the pixels, and of the answer, that no linear function of the tokens tells."""
        pixels, wanted = draw(2000)
        with torch.inference_mode():
            tokens = encoder(pixels)
        patches = torch.nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2).flatten(0, 1)
        return (
            unexplained(tokens.flatten(0, 1), patches),
            unexplained(tokens.mean(1), wanted[:, :1].float()),
        )

    with reproducible(0):
        encoder = ImageEncoder(config)
        before = lost(encoder)
        training = AnswerTraining(steps=400, learning_rate=1e-2, half=False)
        pretrain(encoder, draw, (2, 2), training)
    pixels, answer = lost(encoder)
    assert answer < 0.3 < 0.9 < before[1]
    assert pixels < 0.02 < before[0]


def unexplained(known: torch.Tensor, wanted: torch.Tensor) -> float:
    known = torch.cat((known, torch.ones(len(known), 1)), dim=1)
    error = known @ torch.linalg.lstsq(known, wanted).solution - wanted
    return float(error.var(0).mean() / wanted.var(0).mean())

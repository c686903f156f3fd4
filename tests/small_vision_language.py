"""A vision-language model with fresh weights, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from atpatch_onnx.models.causal_decoder import DecoderConfig
from atpatch_onnx.models.generative_export import export_decoder
from atpatch_onnx.models.training import reproducible
from atpatch_onnx.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from atpatch_onnx.models.vision_transformer import VisionTransformerConfig

from hooked_decoder import attentions

Arrays = dict[str, Any]

DEPTH, VISUAL, IMAGE, LENGTH = 4, 4, 3, 12
"""Layers, visual tokens, id of their placeholder, longest sequence."""


def small_model() -> VisionLanguageModel:
    """Its attention is sharper than that of fresh weights."""
    image = VisionTransformerConfig(image_size=8, patch_size=4, channels=1, dim=8, depth=1, heads=2)
    text = DecoderConfig(20, dim=16, depth=DEPTH, heads=2)
    with reproducible(0):
        model = VisionLanguageModel(VisionLanguageConfig(image, text, IMAGE)).eval()
    with torch.no_grad():
        for attention in attentions(model.decoder):
            attention.query.weight.mul_(4)
            attention.key.weight.mul_(4)
    return model


def samples(count: int, seed: int) -> Arrays:
    """Prompts of several lengths behind an image, padded on the left."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((count, LENGTH), np.int64)
    for row in ids:
        words = rng.integers(4, 20, rng.integers(2, LENGTH - VISUAL))
        row[LENGTH - VISUAL - 1 - len(words) :] = [1, *[IMAGE] * VISUAL, *words]
    pixels = rng.random((count, 1, 8, 8), np.float32)
    return {"pixels": pixels, "input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def export(model: VisionLanguageModel, folder: Path) -> None:
    """Write `model.onnx`, `decode.onnx` and `clean.npz`."""
    example = {name: torch.from_numpy(value) for name, value in samples(2, 0).items()}
    export_decoder(model, model.decoder, folder, example)
    np.savez(folder / "clean.npz", **samples(80, 1))

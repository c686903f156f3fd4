"""Export a decoder to ONNX as two files: prefill, and one step of decoding.

Names are those that Hugging Face Optimum writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .causal_decoder import Cache, CausalDecoder
from .export import quiet
from .named_export import OPSET

PREFILL = "model.onnx"
DECODE = "decode.onnx"

Axes = dict[int, str]


class _Prefill(nn.Module):
    """A model whose cache is flat outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, cache = self.model(*inputs)
        return logits, *_flat(cache)


class _Decode(nn.Module):
    """One step of a decoder, whose cache is flat inputs and outputs."""

    def __init__(self, decoder: CausalDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        pairs = tuple(zip(past[::2], past[1::2], strict=True))
        logits, cache = self.decoder.step(input_ids, attention_mask, pairs)
        return logits, *_flat(cache)


def _flat(cache: Cache) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for layer in cache for tensor in layer)


def cache_names(prefix: str, depth: int) -> list[str]:
    """`<prefix>.0.key`, `<prefix>.0.value`, `<prefix>.1.key`, ... of all layers."""
    return [f"{prefix}.{layer}.{part}" for layer in range(depth) for part in ("key", "value")]


def export_decoder(
    model: nn.Module, decoder: CausalDecoder, folder: Path, example: Mapping[str, torch.Tensor]
) -> None:
    """Write `model.onnx` and `decode.onnx`; batch and length are free in both.

    Nothing is printed. The model's mode is as before afterwards.

    Args:
        model: takes the inputs of prefill, answers logits and the cache.
        decoder: the part of it that goes on from the cache.
        example: prefill's inputs by name, in the order of the model's arguments; axis 1 of those
            with two axes is the length N.

    Shapes:
        prefill: -> logits `[B, vocabulary]` of the last position, `present.{i}.key` and
        `present.{i}.value` float32 `[B, H, N, D]`; decode: input_ids `[B, 1]`, attention_mask
        `[B, P + 1]`, `past_key_values.{i}.key` and `.value` `[B, H, P, D]` -> logits, `present`.
    """
    depth = decoder.config.depth
    present = cache_names("present", depth)
    past = cache_names("past_key_values", depth)
    tokens: Axes = {0: "batch", 1: "sequence"}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _, cache = model(*example.values())
        _write(
            _Prefill(model),
            folder / PREFILL,
            example,
            {name: tokens if t.ndim == 2 else {0: "batch"} for name, t in example.items()},
            {key: {0: "batch", 2: "sequence"} for key in present},
        )
        mask = example["attention_mask"]
        _write(
            _Decode(decoder),
            folder / DECODE,
            {
                "input_ids": example["input_ids"][:, -1:],
                "attention_mask": torch.cat((mask, mask[:, -1:]), dim=1),
                **dict(zip(past, (t.clone() for t in _flat(cache)), strict=True)),
            },
            {
                "input_ids": {0: "batch"},
                "attention_mask": {0: "batch", 1: "total"},
                **{key: {0: "batch", 2: "past"} for key in past},
            },
            {key: {0: "batch", 2: "total"} for key in present},
        )
    finally:
        model.train(was_training)


def _write(
    model: nn.Module,
    path: Path,
    inputs: Mapping[str, torch.Tensor],
    axes: Mapping[str, Axes],
    cache: Mapping[str, Axes],
) -> None:
    with quiet():
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=["logits", *cache],
            dynamic_axes={**axes, "logits": {0: "batch"}, **cache},
            opset_version=OPSET,
            # The exporter that writes attention as plain nodes at this opset.
            dynamo=False,
        )

"""Export a reference victim to ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .vision_transformer import Attention, VisionTransformer
from .windowed_transformer import WindowedTransformer

FIRST_TORCH_EXPORT_OPSET = 18
"""The lowest opset that the exporter based on `torch.export` writes by itself."""


def export_onnx(
    model: VisionTransformer | WindowedTransformer,
    path: str | Path,
    opset: int = 17,
    *,
    fused: bool = False,
) -> None:
    """Write the model with input `pixels`, output `logits` and a dynamic batch axis.

    From opset 18 on the exporter based on `torch.export` is used, below that the TorchScript one;
    users have files from both. Nothing is printed. The model's mode is as before afterwards.

    fused: call torch's own attention function, which is one ONNX operator from opset 23 on.

    Shapes:
        pixels `[batch, C, S, S]` -> logits `[batch, classes]`.

    Raises:
        ValueError: `fused` for windows, whose masks that function is not given.
    """
    if fused and isinstance(model, WindowedTransformer):
        raise ValueError("windowed attention is only exported as plain nodes: leave out fused")
    config = model.config
    # Two examples: a batch of one would make torch.export specialise the axis.
    pixels = torch.zeros(2, config.channels, config.image_size, config.image_size)
    options: dict[str, Any] = {
        "input_names": ["pixels"],
        "output_names": ["logits"],
        "opset_version": opset,
        "dynamo": opset >= FIRST_TORCH_EXPORT_OPSET,
    }
    if options["dynamo"]:
        options["dynamic_shapes"] = {"pixels": {0: torch.export.Dim("batch")}}
        options |= {"external_data": False, "verbose": False}
    else:
        options["dynamic_axes"] = {"pixels": {0: "batch"}, "logits": {0: "batch"}}
    was_training = model.training
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    model.eval()
    try:
        for attention in attentions:
            attention.fused = fused
        with quiet():
            torch.onnx.export(model, (pixels,), str(path), **options)
    finally:
        model.train(was_training)
        for attention in attentions:
            attention.fused = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence deprecation warnings, progress prints and log lines; errors still raise."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(previous)

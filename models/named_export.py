"""Export models whose inputs are integers with names: tokens, or features of a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .export import quiet

OPSET = 17
AXES = ("batch", "sequence")


def export_named(
    model: torch.nn.Module, path: Path, example: Mapping[str, NDArray[np.int64]], dynamic: int = 1
) -> None:
    """Write the model, in eval mode, with these inputs and the output `logits`.

    Nothing is printed. The model's mode is as before afterwards.

    Args:
        example: inputs by name, in the order of the model's arguments.
        dynamic: how many leading axes of the inputs are free: 1 the batch, 2 the sequence too.

    Shapes:
        inputs int64 `[batch, sequence]` -> logits `[batch, classes]`.
    """
    axes = dict(enumerate(AXES[:dynamic]))
    was_training = model.training
    model.eval()
    try:
        with quiet():
            torch.onnx.export(
                model,
                tuple(torch.from_numpy(array) for array in example.values()),
                str(path),
                input_names=list(example),
                output_names=["logits"],
                dynamic_axes={**dict.fromkeys(example, axes), "logits": {0: AXES[0]}},
                opset_version=OPSET,
                # The exporter that writes attention as plain nodes at this opset.
                dynamo=False,
            )
    finally:
        model.train(was_training)

"""Small random transformers of the families people export, and one call that exports them.

Every architecture is a `transformers` class built from a tiny configuration: no weights are
downloaded, an export takes seconds, and the number of attention sites is known from the
configuration. `benchmarks/coverage.py` measures how many of them are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atpatch_onnx.models.export import quiet

from architectures_cached import CACHED, MERGED
from architectures_core import EXPORTERS, Architecture
from architectures_media import AUDIOS, MULTIMODALS, VISIONS
from architectures_text import DECODERS, ENCODERS, SEQ2SEQS

__all__ = ["ARCHITECTURES", "EXPORTERS", "MERGED", "Architecture", "export"]

ARCHITECTURES: Mapping[str, Architecture] = {
    each.name: each
    for group in (ENCODERS, DECODERS, CACHED, SEQ2SEQS, VISIONS, AUDIOS, MULTIMODALS)
    for each in group
}


def export(
    architecture: Architecture,
    attention: str,
    exporter: str,
    opset: int,
    path: Path,
    half: bool = False,
) -> dict[str, np.ndarray]:
    """Writes one ONNX file, `half` in float16, and returns the example inputs to run it with.

    Raises: whatever the exporter raises; `ValueError` for a combination known not to work.
    """
    if reason := architecture.unsupported.get((attention, exporter, opset)):
        raise ValueError(f"{architecture.name} {attention} {exporter} {opset}: {reason}")
    module, inputs = architecture.build(attention)
    if half:
        module.half()
        inputs = {n: t.half() if t.is_floating_point() else t for n, t in inputs.items()}
    axes = {} if exporter in architecture.static else architecture.dynamic
    options: dict[str, Any] = {
        "input_names": list(inputs),
        "output_names": list(module.output_names),
        "opset_version": opset,
        "dynamo": exporter == "dynamo",
    }
    if exporter == "dynamo":
        options |= {"external_data": False, "verbose": False}
        if axes:
            options["dynamic_shapes"] = (tuple(dict(axes[name]) for name in inputs),)
    else:
        options["dynamic_axes"] = {name: dict(named) for name, named in axes.items()}
    with quiet(), torch.no_grad():
        torch.onnx.export(module, tuple(inputs.values()), str(path), **options)
    return {name: tensor.numpy() for name, tensor in inputs.items()}

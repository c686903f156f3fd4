"""What a patch costs: patched over original, paired runs, on ViT-B/16 and BERT-base shapes.

    python benchmarks/speed.py [--ep cuda] [--runs 40] [--threads 2]

Random weights. Every attention site gets the shipped z-score detector; its threshold is set so
that nothing is flagged, or everything is. On CPU float32 and every strategy;
on CUDA float16 with inputs and outputs bound to the device, `select` and `rerun`. Writes
`benchmarks/results/speed-<ep>.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import atpatch_onnx
from atpatch_onnx.benchmark import bench
from atpatch_onnx.models.export import quiet
from atpatch_onnx.runtime import choose_provider

from detectors import ALWAYS, NEVER

RESULTS = Path(__file__).parent / "results"
IMAGE = (3, 224, 224)
LENGTH = 128
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


class _Logits(nn.Module):
    """A `transformers` model that takes one tensor and returns one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def make(name: str, folder: Path, half: bool) -> tuple[Path, dict[str, Any]]:
    """Export a model; returns its path and one sample of random input."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if name == "ViT-B/16":
        model: nn.Module = ViTForImageClassification(ViTConfig(**EAGER))
        sample = rng.standard_normal((1, *IMAGE)).astype(np.float16 if half else np.float32)
        axes = {0: "batch"}
    else:
        config = BertConfig(**EAGER)
        model = BertForSequenceClassification(config)
        sample = rng.integers(0, config.vocab_size, (1, LENGTH))
        axes = {0: "batch"}
    model = _Logits(model).eval()
    path = folder / f"{name.split('-')[0].lower()}{'-half' if half else ''}.onnx"
    if half:
        model = model.half()
    with quiet():
        torch.onnx.export(
            model,
            (torch.from_numpy(sample),),
            str(path),
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": axes, "logits": axes},
            opset_version=17,
            dynamo=False,
        )
    return path, {"x": sample}


def samples(sample: dict[str, Any], count: int) -> dict[str, Any]:
    """`count` random inputs like `sample`."""
    rng = np.random.default_rng(1)
    out = {}
    for name, array in sample.items():
        shape = (count, *array.shape[1:])
        floats = array.dtype.kind == "f"
        made = rng.standard_normal(shape) if floats else rng.integers(0, 30_000, shape)
        out[name] = made.astype(array.dtype)
    return out


def measure(name: str, provider: str, batch: int, options: argparse.Namespace) -> list[Any]:
    """Time one model in every variant."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, sample = make(name, folder, half=provider == "cuda")
        data = folder / "data.npz"
        np.savez(data, **samples(sample, max(batch, 24)))
        detector = folder / "det.onnx"
        atpatch_onnx.fit(model, data, detector, batch=4, ep=provider)
        strategies = ("select", "rerun") if provider == "cuda" else ("guard", "select", "rerun")
        for strategy in strategies:
            for flagged, threshold in (("nothing", NEVER), ("everything", ALWAYS)):
                patched = atpatch_onnx.patch(
                    model, detector, threshold=threshold, strategy=strategy, ep=provider
                ).output
                timing = bench(
                    model,
                    patched,
                    inputs=data,
                    batch=batch,
                    ep=provider,
                    runs=options.runs,
                    warmup=options.warmup,
                    threads=options.threads,
                )
                row = {
                    "model": name,
                    "batch": batch,
                    "strategy": strategy,
                    "flagged": flagged,
                    **asdict(timing),
                }
                rows.append(row)
                print(
                    f"{name:10s} batch {batch:2d} {strategy:6s} flagged {flagged:10s} "
                    f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) "
                    f"{row['original_ms']:.1f} ms",
                    flush=True,
                )
    return rows


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ep", choices=("cuda", "cpu"))
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="ViT-B/16,BERT-base")
    options = parser.parse_args()
    provider = choose_provider(options.ep)
    batches = (1, 32) if provider == "cuda" else (1,)
    rows = [
        row
        for name in options.models.split(",")
        for batch in batches
        for row in measure(name, provider, batch, options)
    ]
    document = {"rows": rows}
    (RESULTS / f"speed-{provider}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

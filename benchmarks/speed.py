"""What a patch costs: patched over original, paired runs, on ViT-B/16 and BERT-base shapes.

    python benchmarks/speed.py [--ep cuda] [--runs 40] [--threads 2]

Random weights. The plain models have attention in nodes, the fused ones in ONNX Attention
operators, and the decoder runs a prefill. Every attention site gets the shipped z-score detector,
which sees all query rows, or 16 of them; its threshold is set so that nothing is flagged, or
everything is. On CPU float32 and every strategy; on CUDA float16 with inputs and outputs bound to
the device. Writes `benchmarks/results/speed-<ep>.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import atpatch_onnx
from atpatch_onnx.benchmark import bench
from atpatch_onnx.errors import RefusedError
from atpatch_onnx.models.export import quiet
from atpatch_onnx.runtime import choose_provider, onnxruntime

from detectors import ALWAYS, NEVER

RESULTS = Path(__file__).parent / "results"
IMAGE = (3, 224, 224)
LENGTH = 128
VOCABULARY = 30_000
PREFILL = {"cpu": 256, "cuda": 2048}
"""Tokens of the decoder's prefill."""
FUSED_OPSET, PLAIN_OPSET = 23, 17
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Case:
    """A model to time: its kind, whether its attention is fused, and batches by provider."""

    name: str
    kind: str
    fused: bool
    batches: Mapping[str, tuple[int, ...]]


CASES = {
    case.name: case
    for case in (
        Case("ViT-B/16", "vit", False, {"cpu": (1,), "cuda": (1, 32)}),
        Case("BERT-base", "bert", False, {"cpu": (1,), "cuda": (1, 32)}),
        Case("ViT-B/16 fused", "vit", True, {"cpu": (1,), "cuda": (1, 32)}),
        Case("BERT-base fused", "bert", True, {"cpu": (1,), "cuda": (1, 32)}),
        Case("decoder fused", "gpt2", True, {"cpu": (1,), "cuda": (1,)}),
    )
}


class _Logits(nn.Module):
    """A `transformers` model that takes one tensor and returns one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def make(case: Case, provider: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Export a model; returns its path and one sample of random input."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    half = provider == "cuda"
    how: dict[str, Any] = {"attn_implementation": "sdpa" if case.fused else "eager"}
    length = LENGTH
    if case.kind == "vit":
        model: nn.Module = ViTForImageClassification(ViTConfig(**how))
        sample = rng.standard_normal((1, *IMAGE)).astype(np.float16 if half else np.float32)
    elif case.kind == "bert":
        model = BertForSequenceClassification(BertConfig(**how))
    else:
        length = PREFILL[provider]
        model = GPT2LMHeadModel(GPT2Config(n_positions=length, use_cache=False, **how))
    if case.kind != "vit":
        sample = rng.integers(0, VOCABULARY, (1, length))
    module = _Logits(model).eval()
    module = module.half() if half else module
    path = folder / "model.onnx"
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["logits"]}
    if case.fused:
        options |= {"opset_version": FUSED_OPSET, "dynamo": True, "verbose": False}
        options |= {"external_data": False}
        options["dynamic_shapes"] = {"x": {0: torch.export.Dim("batch")}}
    else:
        axes = {"x": {0: "batch"}, "logits": {0: "batch"}}
        options |= {"opset_version": PLAIN_OPSET, "dynamo": False, "dynamic_axes": axes}
    two = torch.from_numpy(np.repeat(sample, 2, axis=0))  # of one, torch.export makes a constant
    with quiet():
        torch.onnx.export(module, (two,), str(path), **options)
    return path, {"x": sample}


def samples(sample: dict[str, Any], count: int) -> dict[str, Any]:
    """`count` random inputs like `sample`."""
    rng = np.random.default_rng(1)
    out = {}
    for name, array in sample.items():
        shape = (count, *array.shape[1:])
        floats = array.dtype.kind == "f"
        made = rng.standard_normal(shape) if floats else rng.integers(0, VOCABULARY, shape)
        out[name] = made.astype(array.dtype)
    return out


def transfers(model: Path, provider: str) -> int | None:
    """How many nodes copy between host and device in the graph that CUDA runs."""
    if provider != "cuda":
        return None
    ort = onnxruntime()
    options = ort.SessionOptions()
    written = model.with_suffix(".optimized.onnx")
    options.optimized_model_filepath = str(written)
    ort.InferenceSession(str(model), options, providers=["CUDAExecutionProvider"])
    nodes = onnx.load(written, load_external_data=False).graph.node
    return sum(node.op_type in ("MemcpyToHost", "MemcpyFromHost") for node in nodes)


def measure(case: Case, provider: str, batch: int, options: argparse.Namespace) -> list[Any]:
    """Time one model in every variant."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, sample = make(case, provider, folder)
        data = folder / "data.npz"
        np.savez(data, **samples(sample, max(batch, 24)))
        for seen in (0, SAMPLED_ROWS) if case.fused else (0,):
            detector = folder / f"det{seen or ''}.onnx"
            atpatch_onnx.fit(model, data, detector, batch=4, ep=provider, rows=seen)
            for strategy in options.strategies.split(","):
                for flagged, threshold in (("nothing", NEVER), ("everything", ALWAYS)):
                    try:
                        patched = atpatch_onnx.patch(
                            model,
                            detector,
                            threshold=threshold,
                            strategy=strategy,
                            ep=provider,
                            force=True,
                        ).output
                    except RefusedError as error:
                        print(f"{case.name} {strategy}: {error}", flush=True)
                        continue
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
                        "model": case.name,
                        "batch": batch,
                        "rows": seen or None,
                        "strategy": strategy,
                        "flagged": flagged,
                        "memcpy_nodes": transfers(patched, provider),
                        **asdict(timing),
                    }
                    rows.append(row)
                    print(
                        f"{case.name:15s} batch {batch:2d} rows {seen or 'all':>3} "
                        f"{strategy:6s} flagged {flagged:10s} {row['ratio']:.3f} "
                        f"({row['low']:.3f} to {row['high']:.3f}) {row['original_ms']:.1f} ms",
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
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--strategies", default="guard,select,rerun")
    parser.add_argument("-o", "--output", type=Path, help="instead of benchmarks/results")
    options = parser.parse_args()
    provider = choose_provider(options.ep)
    rows = [
        row
        for name in options.models.split(",")
        for batch in CASES[name].batches[provider]
        for row in measure(CASES[name], provider, batch, options)
    ]
    target = options.output or RESULTS / f"speed-{provider}.json"
    target.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

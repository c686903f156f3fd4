"""Inspect and patch large models: whole processes, seconds and peak memory.

    python benchmarks/scale.py

A model with 10,000 nodes and 13 GiB of external weights (a sparse file), and a 4,000-node BERT with
its weights inside. Writes `benchmarks/results/scale.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from atpatch_onnx.benchmark import machine

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30


def large_model(folder: Path, nodes: int, weight_bytes: int) -> Path:
    """A stack of attention layers of at least `nodes` nodes over a sparse external weight file."""
    width, heads = 256, 4
    made: list[NodeProto] = []
    tensors: list[TensorProto] = []
    offset = 0

    def weight(name: str, share: int) -> str:
        nonlocal offset
        rows = max(share // (4 * width), width)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[width, rows])
        tensor.data_location = TensorProto.EXTERNAL
        length = 4 * width * rows
        for key, value in (("location", "model.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        offset += length
        return name

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"/layer.{len(made)}/{op}"
        made.append(helper.make_node(op, list(inputs), [f"v{len(made)}"], name, **attributes))
        return made[-1].output[0]

    for name, shape in (("split", [0, 0, heads, width // heads]), ("join", [0, 0, width])):
        tensors.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), name))
    x, layers = "x", nodes // 20
    while len(made) < nodes:
        layer = len(made)
        parts = []
        for part in "qkv":
            projected = add("MatMul", x, weight(f"w{layer}.{part}", width * width * 4))
            split = add("Reshape", projected, "split")
            parts.append(
                add("Transpose", split, perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3])
            )
        scores = add("Softmax", add("MatMul", parts[0], parts[1]), axis=-1)
        context = add("Transpose", add("MatMul", scores, parts[2]), perm=[0, 2, 1, 3])
        x = add("Add", x, add("Reshape", context, "join"))
        big = add("MatMul", x, weight(f"w{layer}.up", weight_bytes // layers))
        mean = add("ReduceMean", add("Relu", big), axes=[-1], keepdims=1)
        x = add("Mul", x, add("Sigmoid", add("Neg", mean)))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        made,
        "large",
        [value("x", TensorProto.FLOAT, ["batch", "length", width])],
        [value(x, TensorProto.FLOAT, ["batch", "length", width])],
        initializer=tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with (folder / "model.data").open("wb") as file:
        file.truncate(max(offset, weight_bytes))
    return path


def bert_4000(folder: Path) -> Path:
    """A BERT of about 4,000 nodes with its weights in the file, exported by torch."""
    import torch
    from transformers import BertConfig, BertModel

    eager: dict[str, Any] = {"attn_implementation": "eager"}
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=40,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=1000,
        **eager,
    )

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.bert(input_ids=tokens).last_hidden_state
            return hidden

    path = folder / "bert.onnx"
    tokens = torch.ones(1, 16, dtype=torch.int64)
    torch.onnx.export(
        Encoder().eval(),
        (tokens,),
        str(path),
        opset_version=14,
        dynamo=False,
        input_names=["input_ids"],
        dynamic_axes={"input_ids": {0: "batch", 1: "length"}},
    )
    return path


CODE = r"""
import json, re, sys, time
start = time.perf_counter()
import atpatch_onnx
loaded = time.perf_counter()
sites = atpatch_onnx.inspect(sys.argv[1])
inspected = time.perf_counter()
atpatch_onnx.patch(sys.argv[1], columns=[1], force=True)
print(json.dumps({
    "sites": len(sites.sites.sites), "nodes": sites.nodes,
    "inspect_s": inspected - loaded, "patch_s": time.perf_counter() - inspected,
    # Of this process alone; ru_maxrss would still hold that of the one that started it.
    "peak_mib": int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024,
}))
"""


def measure(model: Path, runs: int) -> dict[str, Any]:
    """Medians over whole processes that inspect and patch `model`."""
    found: list[dict[str, Any]] = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(model)], capture_output=True, text=True, check=True
        )
        found.append({**json.loads(done.stdout), "process_s": time.perf_counter() - start})
    found = found[1:]
    return {key: round(statistics.median(f[key] for f in found), 3) for key in found[0]}


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = large_model(folder, 10_000, 13 * GIB)
        before = (folder / "model.data").stat()
        rows["10,000 nodes, 13 GiB external"] = measure(large, options.runs)
        after = (folder / "model.data").stat()
        untouched = (before.st_mtime_ns, before.st_blocks) == (after.st_mtime_ns, after.st_blocks)
        rows["BERT of 40 layers, weights inside"] = measure(bert_4000(folder), options.runs)
    for name, row in rows.items():
        print(name, row)
    print("weight file untouched:", untouched)
    document = {
        "machine": machine("cpu"),
        "runs": options.runs,
        "weight_file_untouched": untouched,
        "rows": rows,
    }
    (RESULTS / "scale.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

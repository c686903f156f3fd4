"""Ship every architecture: is what `export` writes taken by Triton's rules and by bare runtimes?

    python benchmarks/shipping.py [--only bert,vit]

Each architecture is exported (eager, TorchScript, opset 17), patched at column 0 of every site with
telemetry, every other one with a toggle too, and shipped: as a Triton repository, with and without
batching, whose four configurations are checked against `triton_rules`; and as edge bundles of the
patched model (with ORT format) and of the `.atpatch` file, whose runners are run.
Writes `benchmarks/results/shipping.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from atpatch_onnx import api
from atpatch_onnx import export as ship
from atpatch_onnx.benchmark import machine
from atpatch_onnx.errors import AtpatchError, RefusedError, first_line

from architectures import ARCHITECTURES, export
from triton_rules import all_configurations, configuration, loads_in_triton

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One architecture: "ok", why it was refused, or what failed."""

    architecture: str
    toggle: bool
    triton: str
    batching: str
    edge: str
    edge_patch: str


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, comma-separated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only.split(",") if options.only else list(ARCHITECTURES)
    rows = []
    for index, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            row = shipped(name, Path(folder), toggle=index % 2 == 1)
        if row is not None:
            rows.append(row)
            print(*asdict(row).values(), sep="  ", flush=True)
    summary = {
        column: dict(Counter(getattr(row, column).split(":")[0] for row in rows))
        for column in ("triton", "batching", "edge", "edge_patch")
    }
    print(f"{len(rows)} architectures: {summary}")
    if not options.only:
        document = {
            "machine": machine("cpu"),
            "summary": summary,
            "rows": [asdict(row) for row in rows],
        }
        (RESULTS / "shipping.json").write_text(json.dumps(document, indent=0) + "\n")


def shipped(name: str, folder: Path, *, toggle: bool) -> Row | None:
    """Ship one architecture; None where there is no export or nothing to patch in it."""
    model, data = folder / "model.onnx", folder / "data.npz"
    try:
        np.savez(data, **export(ARCHITECTURES[name], "eager", "torchscript", 17, model))  # type: ignore[arg-type]
        options = {"columns": 0, "telemetry": True, "toggle": toggle, "ep": "cpu"}
        api.patch(model, **options)  # type: ignore[arg-type]
        api.patch(model, patch_only=folder / "fix.atpatch", **options)  # type: ignore[arg-type]
    except Exception as error:  # exporters raise whatever they raise
        print(f"{name}: no patched export: {first_line(error)}", flush=True)
        return None
    said = (
        _triton(folder, data, 0),
        _triton(folder, data, 8),
        _edge(folder, data, "model.patched.onnx"),
        _edge(folder, data, "fix.atpatch"),
    )
    return Row(name, toggle, *(text.replace(f"{folder}/", "") for text in said))


def _triton(folder: Path, data: Path, max_batch_size: int) -> str:
    target = folder / f"triton-{max_batch_size}"
    files = folder / "model.onnx", folder / "model.patched.onnx"
    try:
        ship("triton", *files, output=target, inputs=data, max_batch_size=max_batch_size)
        for path in all_configurations(target / "model"):
            loads_in_triton(target / "model", configuration(path))
    except RefusedError as error:
        return f"refused: {error}"
    except (AtpatchError, AssertionError) as error:
        return f"FAILED: {error}"
    return "ok"


def _edge(folder: Path, data: Path, patched: str) -> str:
    target = folder / f"edge-{patched}"
    model, whole = folder / "model.onnx", patched.endswith(".onnx")
    try:
        ship("edge", model, folder / patched, output=target, inputs=data, ort=whole)
    except AtpatchError as error:
        return f"FAILED: {error}"
    command = [sys.executable, "-I", str(target / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "ok" if done.returncode == 0 else f"FAILED: {done.stderr[-200:]}"


if __name__ == "__main__":
    main()

"""The demo over several seeds: is what it shows luck?

    python benchmarks/demo.py [--seeds 7]

For each seed a victim is trained, exported, patched and judged, as `atpatch-onnx demo` does it.
Writes `benchmarks/results/demo.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import atpatch_onnx
from atpatch_onnx.benchmark import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    print("seed  accuracy       ASR            recovered      flagged clean  seconds")
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = atpatch_onnx.demo(folder, seed=seed)
            seconds = time.perf_counter() - start
        before, after = asdict(report.before), asdict(report.after)
        rows.append(
            {
                "seed": seed,
                "seconds": round(seconds, 1),
                "before": before,
                "after": after,
                "identity": report.identity,
                "verified": report.verified,
            }
        )
        pairs = [
            f"{before[k]:.3f} {after[k]:.3f}"
            for k in ("accuracy", "attack_success_rate", "recovered_accuracy")
        ]
        shown = "    ".join(pairs)
        print(
            f"{seed:4d}  {shown}    {after['flagged_clean']:.3f}          {seconds:.0f}", flush=True
        )
    document = {"machine": machine("cpu"), "rows": rows}
    (RESULTS / "demo.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

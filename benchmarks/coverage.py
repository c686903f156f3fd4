"""Which attention sites are found, over architectures, attention implementations and exporters.

    python benchmarks/coverage.py [--only bert,vit] [--exports FOLDER]

Every architecture of `architectures.py` is exported in every form that works. For each file: are
the sites those that the configuration implies, and nothing else? Does a patch that flags nothing
leave all outputs equal, bit for bit, with both strategies? Does the patched file pass the checker,
and does it revert to the same bytes? Writes `benchmarks/results/coverage.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from onnx import ModelProto

from atpatch_onnx.benchmark import machine
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Treatment
from atpatch_onnx.patching import Patch, apply, revert
from atpatch_onnx.runtime import Session

from architectures import ARCHITECTURES, Architecture
from exports import Row, measure

RESULTS = Path(__file__).parent / "results"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "data" / "zoo"
SOFTMAXES = ("Softmax", "BiasSoftmax")


def combinations(only: list[str]) -> Iterator[tuple[Architecture, str, str, int]]:
    """Every export that works, of the chosen architectures."""
    for each in ARCHITECTURES.values():
        if not only or each.name in only:
            for attention, exporter, opset in each.exports():
                yield each, attention, exporter, opset


def third_party(zoo: Path) -> dict[str, int]:
    """The same over a folder of graphs from other projects, with a table of their true counts."""
    with (zoo / "sites.csv").open() as file:
        table = list(csv.DictReader(file))
    found: Counter[str] = Counter()
    for row in table:
        model = ModelFile.open(zoo / row["path"])
        sites = locate(model.skeleton)
        fused = sum(other.op not in SOFTMAXES for other in sites.refused)
        plain = len(sites.sites) + len(sites.refused) - fused
        found["files"] += 1
        found["unfused sites expected"] += int(row["softmax_attention"])
        found["unfused sites found"] += len(sites.sites)
        found["unfused sites refused by name"] += plain - len(sites.sites)
        found["fused sites expected"] += int(row["fused_attention"])
        found["fused sites refused by name"] += fused
        exact = (plain, fused) == (int(row["softmax_attention"]), int(row["fused_attention"]))
        found["files with exactly the expected sites"] += exact
        content = bytes(model.buffer)
        again = ModelProto.FromString(content).SerializeToString()
        found["files that a re-serialisation would change"] += again != content
        if sites.sites:
            treatment = Treatment(Redistribution.PRUNE, columns=(0,))
            splice = Splice({site.name: treatment for site in sites.sites})
            edits = splice(GraphView.of(model.skeleton), sites.sites).edits
            patched = apply(model, Patch(model.sha256, edits)).content()
            found["files patched"] += 1
            restored = revert(ModelFile.from_bytes(patched))
            found["files reverted to the same bytes"] += restored.sha256 == model.sha256
            if row["ort_1_31"] in ("run", "loads"):
                Session(patched, "cpu", model.folder, threads=1)
                found["patched files that ONNX Runtime loads, as it does their originals"] += 1
    return dict(found)


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, comma-separated")
    parser.add_argument("--exports", type=Path, help="folder to keep the exports in, or take from")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="third-party graphs with sites.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    only = [name for name in options.only.split(",") if name]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        for each, attention, exporter, opset in combinations(only):
            path = folder / f"{each.name}-{attention}-{exporter}{opset}.onnx"
            rows.append(measure(each, attention, exporter, opset, path))
            if not rows[-1].covered or rows[-1].identical is False:
                print("NOT COVERED", rows[-1], flush=True)
    plain = [row for row in rows if not row.fused]
    sites = {
        "expected": sum(r.expected for r in rows),
        "found": sum(r.found for r in rows),
        "refused, fused": sum(r.fused for r in rows),
        "refused otherwise": sum(len(r.refused_otherwise) for r in rows),
    }
    summary = {
        "architectures": len({row.architecture for row in rows}),
        "exports": len(rows),
        "exports covered": sum(row.covered for row in rows),
        "exports without a fused op": len(plain),
        "sites": sites,
        "patched and run": sum(row.identical is not None for row in rows),
        "identical when nothing is flagged": sum(row.identical is True for row in rows),
        "patched": sum(row.reverted is not None for row in rows),
        "reverted to the same bytes": sum(row.reverted is True for row in rows),
        "with all sites found": sum(row.described is not None for row in rows),
        "causal and cross attention told apart": sum(row.described is True for row in rows),
    }
    for name, value in summary.items():
        print(f"{name}: {value}")
    zoo = third_party(options.zoo) if options.zoo.exists() else None
    print(f"third-party graphs: {zoo}")
    if not only:
        listed = [asdict(row) for row in rows]
        document = {
            "machine": machine("cpu"),
            "summary": summary,
            "third-party graphs": zoo,
            "rows": listed,
        }
        (RESULTS / "coverage.json").write_text(json.dumps(document, indent=0) + "\n")


if __name__ == "__main__":
    main()

"""Which attention sites are found, over architectures, attention implementations and exporters.

    python benchmarks/coverage.py [--only bert,vit] [--exports FOLDER]

Every architecture of `architectures.py` is exported in every form that works. For each file: are
the sites those that the configuration implies, and nothing else? Does a patch that flags nothing
leave all outputs equal, bit for bit, with both strategies? Does the patched file pass the checker,
and does it revert to the same bytes? Writes `benchmarks/results/coverage.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from atpatch_onnx.certificate import compare
from atpatch_onnx.errors import AtpatchError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import Sites, locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import Patch, apply, revert
from atpatch_onnx.runtime import Session

from architectures import ARCHITECTURES, Architecture, export
from detectors import NEVER, column_mean_detector

RESULTS = Path(__file__).parent / "results"
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One export. `expected` is what the configuration implies; `identical` is None where ONNX
    Runtime does not run the original."""

    architecture: str
    attention: str
    exporter: str
    opset: int
    expected: int
    found: int
    fused: int
    refused_otherwise: list[str]
    causal: int
    cross: int
    identical: bool | None
    checked: bool
    reverted: bool

    @property
    def covered(self) -> bool:
        """Every site found, or refused by name."""
        return self.found + self.fused + len(self.refused_otherwise) == self.expected


def measure(each: Architecture, attention: str, exporter: str, opset: int, path: Path) -> Row:
    """Export (or take the file that is there), locate, patch, compare, revert."""
    stored = path.with_suffix(".npz")
    if path.exists() and stored.exists():
        feeds = dict(np.load(stored))
    else:
        feeds = export(each, attention, exporter, opset, path)
        np.savez(stored, allow_pickle=False, **feeds)
    file = ModelFile.open(path)
    found = locate(file.skeleton)
    fused = [o for o in found.refused if o.op == "Attention"]
    identical, checked, reverted = None, True, True
    if found.sites:
        identical, checked, reverted = _patched(file, found, feeds)
    return Row(
        each.name,
        attention,
        exporter,
        opset,
        each.sites,
        len(found.sites),
        len(fused),
        [o.reason for o in found.refused if o.op != "Attention"],
        sum(s.facts.causal for s in found.sites),
        sum(s.facts.cross for s in found.sites),
        identical,
        checked,
        reverted,
    )


def _patched(file: ModelFile, found: Sites, feeds: Arrays) -> tuple[bool | None, bool, bool]:
    view = GraphView.of(file.skeleton)
    given = {value.name for value in file.skeleton.graph.input}
    feeds = {name: array for name, array in feeds.items() if name in given}
    identical: bool | None = None
    checked = reverted = True
    original = _run(file.path, feeds)
    sha256 = file.sha256()
    with tempfile.TemporaryDirectory() as folder:
        detector = column_mean_detector(Path(folder) / "det.onnx", view.opset, NEVER)
    for strategy in Strategy:
        treatment = Treatment(Redistribution.UNIFORM, detector)
        result = Splice({s.name: treatment for s in found.sites}, strategy)(view, found.sites)
        content = apply(file, Patch(sha256, result.edits), sha256).content()
        after = ModelFile.from_bytes(content, file.path)
        onnx.checker.check_model(content)
        checked &= len(compare(file, after).rewired) >= len(found.sites)
        reverted &= revert(after).sha256() == sha256
        if original is not None:
            changed = Session(content, "cpu", file.folder, threads=1).run(feeds, list(original))
            same = all(np.array_equal(original[n], changed[n], equal_nan=True) for n in original)
            identical = same and identical is not False
    return identical, checked, reverted


def _run(path: Path, feeds: Arrays) -> Arrays | None:
    try:
        return Session(path, "cpu", threads=1).run(feeds)
    except AtpatchError:
        return None


def combinations(only: list[str]) -> Iterator[tuple[Architecture, str, str, int]]:
    """Every export that works, of the chosen architectures."""
    for each in ARCHITECTURES.values():
        if not only or each.name in only:
            for attention, exporter, opset in each.exports():
                yield each, attention, exporter, opset


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, comma-separated")
    parser.add_argument("--exports", type=Path, help="folder to keep the exports in, or take from")
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
    sites = Counter(
        {
            "expected": sum(r.expected for r in rows),
            "found": sum(r.found for r in rows),
            "refused, fused": sum(r.fused for r in rows),
            "refused otherwise": sum(len(r.refused_otherwise) for r in rows),
        }
    )
    summary = {
        "architectures": len({row.architecture for row in rows}),
        "exports": len(rows),
        "exports covered": sum(row.covered for row in rows),
        "exports without a fused op": len(plain),
        "sites": dict(sites),
        "patched and run": sum(row.identical is not None for row in rows),
        "identical when nothing is flagged": sum(row.identical is True for row in rows),
        "reverted to the same bytes": sum(row.reverted for row in rows),
    }
    for name, value in summary.items():
        print(f"{name}: {value}")
    if not only:
        document = {"summary": summary, "rows": [asdict(row) for row in rows]}
        (RESULTS / "coverage.json").write_text(json.dumps(document, indent=0) + "\n")


if __name__ == "__main__":
    main()

"""Measure one export: what is found in it, what a patch keeps, and whether it comes off again."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from atpatch_onnx.comparing import compare
from atpatch_onnx.errors import AtpatchError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import Sites, locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import Patch, apply, revert
from atpatch_onnx.runtime import Session

from architectures import Architecture, export
from detectors import NEVER, column_mean_detector

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One export. `expected`, `causal_expected` and `cross_expected` are what the configuration
    implies; `identical`, `checked` and `reverted` are None where nothing was patched, `identical`
    also where ONNX Runtime does not run the original."""

    architecture: str
    attention: str
    exporter: str
    opset: int
    expected: int
    found: int
    fused: int
    refused_otherwise: list[str]
    causal: int
    causal_expected: int
    cross: int
    cross_expected: int
    identical: bool | None
    checked: bool | None
    reverted: bool | None

    @property
    def covered(self) -> bool:
        """As many sites found, or refused by name, as there are."""
        return self.found + self.fused + len(self.refused_otherwise) == self.expected

    @property
    def described(self) -> bool | None:
        """Whether causal and cross attention are told apart; None unless every site was found."""
        if self.found != self.expected:
            return None
        found, wanted = (self.causal, self.cross), (self.causal_expected, self.cross_expected)
        return found == wanted


def measure(
    each: Architecture,
    attention: str,
    exporter: str,
    opset: int,
    path: Path,
    half: bool = False,
) -> Row:
    """Export (or take the file that is there), locate, patch, compare, revert."""
    stored = path.with_suffix(".npz")
    if path.exists() and stored.exists():
        feeds = dict(np.load(stored))
    else:
        feeds = export(each, attention, exporter, opset, path, half)
        np.savez(stored, allow_pickle=False, **feeds)
    file = ModelFile.open(path)
    found = locate(file.skeleton)
    fused = [o for o in found.refused if o.op == "Attention"]
    identical: bool | None = None
    checked: bool | None = None
    reverted: bool | None = None
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
        each.causal,
        sum(s.facts.cross for s in found.sites),
        each.cross,
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
    with tempfile.TemporaryDirectory() as folder:
        detector = column_mean_detector(Path(folder) / "det.onnx", view.opset, NEVER)
    for strategy in (Strategy.GUARD, Strategy.SELECT):
        treatment = Treatment(Redistribution.UNIFORM, detector)
        result = Splice({s.name: treatment for s in found.sites}, strategy)(view, found.sites)
        content = apply(file, Patch(file.sha256, result.edits)).content()
        after = ModelFile.from_bytes(content, file.path)
        onnx.checker.check_model(content)
        checked &= len(compare(file, after).rewired) >= len(found.sites)
        reverted &= revert(after).sha256 == file.sha256
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

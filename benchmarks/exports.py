"""Measure one file: what is found in it, what a patch keeps, and whether it comes off again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from atpatch_onnx.comparing import compare
from atpatch_onnx.errors import AtpatchError, first_line
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.functions import CALL
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import Site, locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import Patch, apply, revert
from atpatch_onnx.runtime import Session

from architectures import Architecture, export
from detectors import NEVER, column_mean_detector

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One file.

    form: "export", or what made another file of an export.
    expected, causal_expected, cross_expected: what the configuration implies.
    found: sites; fused: those of them that are fused operators; nested: those in subgraphs.
    refused: the reason of each site that is refused.
    runs: whether ONNX Runtime runs the file before it is patched.
    identical: with both strategies, where nothing is flagged; None where the file does not run.
    difference: the largest difference of an output then, as a part of its largest value.
    responds: whether the outputs change where the first key of every site is flagged.
    checked: whether the checker says of the patched file what it says of the original, and the
        comparison finds one change at each site and nothing else.
    reverted: whether the original comes back, byte for byte.
    failure: why there is no file: the converter failed; error: the patch failed.
    """

    architecture: str
    attention: str
    exporter: str
    opset: int
    expected: int
    found: int = 0
    fused: int = 0
    refused: tuple[str, ...] = ()
    causal: int = 0
    causal_expected: int = 0
    cross: int = 0
    cross_expected: int = 0
    identical: bool | None = None
    checked: bool | None = None
    reverted: bool | None = None
    form: str = "export"
    nested: int = 0
    runs: bool | None = None
    difference: float | None = None
    responds: bool | None = None
    failure: str = ""
    error: str = ""

    @property
    def covered(self) -> bool:
        """As many sites found, or refused by name, as there are."""
        return self.found + len(self.refused) == self.expected

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
    feeds = exported(each, attention, exporter, opset, path, half)
    return examine(planned(each, "export", (attention, exporter, opset)), path, feeds)


def planned(each: Architecture, form: str, export: tuple[str, str, int], branches: int = 1) -> Row:
    """The row of a file before it is measured; `branches` of it have all the sites."""
    return Row(
        each.name,
        *export,
        form=form,
        expected=branches * each.sites,
        causal_expected=branches * each.causal,
        cross_expected=branches * each.cross,
    )


def exported(
    each: Architecture,
    attention: str,
    exporter: str,
    opset: int,
    path: Path,
    half: bool = False,
) -> list[Arrays]:
    """Export, unless the file is there; the inputs to run it with, several sets of them."""
    stored = path.with_suffix(".npz")
    if not (path.exists() and stored.exists()):
        feeds = export(each, attention, exporter, opset, path, half)
        np.savez(stored, allow_pickle=False, **feeds)
    with np.load(stored) as file:
        first = dict(file)
    return [first, *({n: t.numpy() for n, t in f.items()} for f in each.further())]


def examine(row: Row, path: Path, feeds: Sequence[Arrays]) -> Row:
    """`row` with what is found in the file at `path`."""
    file = ModelFile.open(path)
    found = locate(file.skeleton)
    row = replace(
        row,
        found=len(found.sites),
        fused=sum(site.opening is not None for site in found.sites),
        nested=sum(bool(site.path) for site in found.sites),
        refused=tuple(f"{o.op}: {o.reason}" for o in found.refused),
        causal=sum(s.facts.causal for s in found.sites),
        cross=sum(s.facts.cross for s in found.sites),
    )
    if not found.sites:
        return row
    try:
        return _patched(row, file, found.sites, feeds)
    except Exception as error:
        return replace(row, error=f"{type(error).__name__}: {first_line(error)}")


def _patched(row: Row, file: ModelFile, sites: tuple[Site, ...], feeds: Sequence[Arrays]) -> Row:
    original = _original(file.path, feeds)
    valid = _is_valid(bytes(file.buffer))
    in_place = sum(all(attribute != CALL for _, attribute, _ in site.path) for site in sites)
    with tempfile.TemporaryDirectory() as folder:
        opset = GraphView.of(file.skeleton).opset
        detector = column_mean_detector(Path(folder) / "det.onnx", opset, NEVER)
    never = Treatment(Redistribution.UNIFORM, detector)
    checked = reverted = True
    worst = 0.0
    for strategy in (Strategy.GUARD, Strategy.SELECT):
        content = patched(file, sites, never, strategy)
        after = ModelFile.from_bytes(content, file.path)
        difference = compare(file, after)
        checked &= len(difference.rewired) + len(difference.renamed) >= in_place
        checked &= _is_valid(content) or not valid
        reverted &= revert(after).sha256 == file.sha256
        if original is not None:
            worst = max(worst, distance(original, _run(content, file, feeds)))
    row = replace(row, runs=original is not None, checked=checked, reverted=reverted)
    if original is None:
        return row
    first = Treatment(Redistribution.PRUNE, columns=(0,))
    content = patched(file, sites, first, Strategy.GUARD)
    responds = distance(original, _run(content, file, feeds)) > 0
    return replace(row, identical=worst == 0, difference=worst, responds=responds)


def patched(
    file: ModelFile, sites: Sequence[Site], treatment: Treatment, strategy: Strategy
) -> bytes:
    """The file with the same treatment at each of its sites."""
    splice = Splice({site.name: treatment for site in sites}, strategy)
    edits = splice(GraphView.of(file.skeleton), tuple(sites)).edits
    return apply(file, Patch(file.sha256, edits)).content()


def _is_valid(content: bytes) -> bool:
    try:
        onnx.checker.check_model(content)
    except onnx.checker.ValidationError:
        return False
    return True


def _original(path: Path, feeds: Sequence[Arrays]) -> list[Arrays] | None:
    """The outputs for each set of inputs; None where ONNX Runtime does not run the file."""
    file = ModelFile.open(path)
    try:
        return _run(path, file, feeds)
    except AtpatchError:
        return None


def _run(model: Path | bytes, file: ModelFile, feeds: Sequence[Arrays]) -> list[Arrays]:
    """The outputs of a model with the inputs of `file`."""
    session = Session(model, "cpu", file.folder, threads=1)
    types = {i.name: i.dtype for i in session.inputs}
    outputs = [value.name for value in file.skeleton.graph.output]
    given = [{n: a.astype(types[n]) for n, a in each.items() if n in types} for each in feeds]
    return [session.run(each, outputs) for each in given]


def distance(before: Sequence[Arrays], after: Sequence[Arrays]) -> float:
    """The largest difference of an output as a part of its largest value; 0 for equal bits."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        for name, value in old.items():
            if not np.array_equal(value, new[name], equal_nan=True):
                a, b = value.astype(np.float64), new[name].astype(np.float64)
                apart = np.nanmax(np.abs(a - b)) / max(np.nanmax(np.abs(a)), 1e-9)
                worst = max(worst, float(apart), float(np.finfo(np.float64).tiny))
    return worst

"""The rows of a backdoored victim."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import atpatch_onnx
from atpatch_onnx.data import load_arrays
from atpatch_onnx.errors import InputError
from atpatch_onnx.fitting import FitReport
from atpatch_onnx.rates import Rate
from atpatch_onnx.runtime import Arrays

from efficacy_ablations import (
    MARKS,
    add_marks_anomaly,
    add_marks_input,
    flagged,
    keys_of,
    random_columns,
    visible_columns,
    with_marks,
    without_rescaling,
)
from efficacy_measure import evaluated, judged, over_attended_recall, scanned
from efficacy_victim import Row, Rows, Victim, as_json

SITES_AUTO = "contrastive, sites auto"
EVERY_ANSWER = "contrastive, every answer"


class Backdoored:
    """A backdoored victim; detectors are fitted once, when a row first wants them."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.debug = victim.work / "debug.npz"
        self.triggered = load_arrays(victim.triggered)
        self._fitted: dict[str, FitReport | Exception] = {}

    def measure(self, rows: Rows) -> Row:
        """Add every row, in the order of the table; returns what the scan says."""
        scan = self.search()
        given = {"target_given": True} if "given" in scan else {}
        marked = "anomalous" in self.triggered
        variant = functools.partial(functools.partial, self.patched, "contrastive")
        rows.add("original", lambda: judged(self.victim, self.victim.model))
        rows.add("contrastive", self.contrastive, **given)
        rows.add(SITES_AUTO, variant(sites="auto", debug=self.debug), **given)
        rows.add(EVERY_ANSWER, functools.partial(self.patched, EVERY_ANSWER), **given)
        rows.add("zscore", functools.partial(self.patched, "zscore"))
        rows.add("map-cnn", functools.partial(self.patched, "map-cnn"), **given)
        in_flow = functools.partial(variant, strategy="guard")
        rows.add("in flow, benign", in_flow(redistribute="benign"), **given)
        rows.add("in flow, prune", in_flow(redistribute="prune"), **given)
        if marked:
            rows.add("random columns", self.random, **given)
        rows.add("in flow, no rescale", self.no_rescale, **given)
        if marked:
            rows.add("oracle", self.oracle)
            rows.add("oracle, prune", lambda: self.oracle(redistribute="prune"))
        if self.victim.record["kind"] == "image":
            rows.add("fine-pruning", self.fine_pruning)
        return scan

    def search(self) -> Row:
        """Scan; where nothing is found, scan the true class so that the rest can be measured."""
        scan = scanned(self.victim, self.debug)
        if scan.get("class") is None:
            target = int(self.triggered["target"])
            scan["given"] = scanned(self.victim, self.debug, target)
        return scan

    def fitted(self, kind: str) -> FitReport:
        """A detector of a kind, or `EVERY_ANSWER`. Raises: what `fit` raised when first wanted."""
        if kind not in self._fitted:
            try:
                self._fitted[kind] = self._fit(kind)
            except Exception as error:  # the same for every row that needs it
                self._fitted[kind] = error
        found = self._fitted[kind]
        if isinstance(found, Exception):
            raise found
        return found

    def _fit(self, kind: str) -> FitReport:
        debug = None if kind == "zscore" else self.debug
        if debug is not None and not debug.exists():
            raise InputError("the scan found no trigger, so that there is no debugging set")
        victim = self.victim
        output = victim.work / f"{kind}.onnx"
        return atpatch_onnx.fit(
            victim.model,
            victim.clean,
            output,
            kind="contrastive" if kind == EVERY_ANSWER else kind,
            debug=debug,
            every_answer=kind == EVERY_ANSWER,
            seed=victim.seed,
            ep=victim.settings.ep,
            force=True,
        )

    def contrastive(self) -> Row:
        """The shipped path, and what the detector finds of the columns that are over-attended."""
        row = self.patched("contrastive")
        if "anomalous" in self.triggered:
            row |= over_attended_recall(self.victim, self.fitted("contrastive").output)
        return row

    def patched(self, kind: str, **options: Any) -> Row:
        """Fit unless that is done, patch and evaluate."""
        start = time.perf_counter()
        fitted = self.fitted(kind)
        seconds = time.perf_counter() - start
        report = self._patch(fitted.output, **options)
        row = self._evaluate(report.output) | {"fit": fit_facts(fitted)}
        if "sites" in options:
            row["sites"] = [] if report.search is None else report.search.chosen
        elif not options:
            row["fit"]["seconds"] = round(seconds, 1)
        return row

    def no_rescale(self) -> Row:
        """Flagged columns replaced, the others as they were."""
        output = self.victim.scratch / "no-rescale.onnx"
        report = self._patch(self.fitted("contrastive").output, strategy="select")
        sites = without_rescaling(report.output, output)
        return self._evaluate(output) | {"sites_edited": sites}

    def random(self) -> Row:
        """As many columns as the detector flags in each input, but random ones."""
        report = self._patch(self.fitted("contrastive").output)
        rng = np.random.default_rng(self.victim.seed)
        marks = []
        for arrays in (load_arrays(self.victim.test), self.triggered):
            own = flagged(report.output, arrays, self.victim.settings.ep)
            marks.append(random_columns(own, visible_columns(arrays, own.shape[1]), rng))
        return self.with_marks(*marks)

    def oracle(self, **options: Any) -> Row:
        """The columns of the real trigger, and none of clean inputs."""
        test = load_arrays(self.victim.test)
        none = np.zeros((len(test["labels"]), keys_of(self.victim.model, test)), bool)
        return self.with_marks(none, self.triggered["anomalous"], **options)

    def with_marks(self, clean: NDArray[np.bool_], bad: NDArray[np.bool_], **options: Any) -> Row:
        """Patch with the columns that are said, of test inputs and of triggered ones."""
        detector = self.fitted("zscore").output
        return marked(
            self.victim,
            detector,
            with_marks(load_arrays(self.victim.test), clean),
            with_marks(self.triggered, bad),
            **options,
        )

    def fine_pruning(self) -> Row:
        """The baseline that has the weights and retrains."""
        from atpatch_onnx.models.digits import LabelledImages
        from atpatch_onnx.models.export import export_onnx
        from atpatch_onnx.models.fine_pruning import fine_prune
        from atpatch_onnx.models.image_victims import load_victim

        clean = load_arrays(self.victim.clean)
        images = LabelledImages(clean["pixels"], clean["labels"])
        repaired = fine_prune(load_victim(self.victim.folder), images, seed=self.victim.seed)
        output = self.victim.scratch / "fine-pruned.onnx"
        export_onnx(repaired.model, output)
        return judged(self.victim, output) | {"units_pruned": repaired.pruned}

    def _patch(self, detector: Path, **options: Any) -> atpatch_onnx.PatchReport:
        output = self.victim.scratch / "patched.onnx"
        ep = self.victim.settings.ep
        return atpatch_onnx.patch(
            self.victim.model, detector, output=output, ep=ep, force=True, **options
        )

    def _evaluate(self, patched: Path) -> Row:
        victim = self.victim
        found = atpatch_onnx.evaluate(
            victim.model, patched, victim.test, triggered=victim.triggered, ep=victim.settings.ep
        )
        return evaluated(found)


def marked(
    victim: Victim,
    detector: Path,
    data: Arrays,
    triggered: Arrays | None = None,
    protected: tuple[str, ...] = (),
    **options: Any,
) -> Row:
    """Patch a copy of the victim with the columns that its data marks (see `efficacy_ablations`).

    detector: the benign attention is from it; options: further ones of `patch`.
    """
    model = add_marks_input(victim.model, victim.scratch / "marks-model.onnx")
    reader = add_marks_anomaly(detector, victim.scratch / "marks-detector.onnx")
    output, ep = victim.scratch / "marks-patched.onnx", victim.settings.ep
    bind = {MARKS: MARKS}
    atpatch_onnx.patch(model, reader, output=output, bind=bind, ep=ep, force=True, **options)
    found = atpatch_onnx.evaluate(
        model, output, data, triggered=triggered, protected=protected, ep=ep
    )
    return evaluated(found)


def fit_facts(fitted: FitReport) -> Row:
    """What `fit` says of its detector."""
    facts: dict[str, Any] = {"sites": len(fitted.sites)}
    if fitted.calibration is not None:
        facts["expected_fpr"] = fitted.calibration.expected_fpr
        facts["honoured"] = fitted.calibration.honoured
    if fitted.recall is not None:
        recall: Mapping[str, Rate | None] = {
            "recall_inputs": fitted.recall.inputs,
            "recall_columns": fitted.recall.columns,
        }
        facts |= as_json(recall)
    return facts

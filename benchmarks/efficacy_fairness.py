"""The rows of an unfair victim, for each of its protected attributes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import atpatch_onnx
from atpatch_onnx.data import load_arrays
from atpatch_onnx.labelled import load_labelled
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.protected import Flips, Protected, swayed
from atpatch_onnx.rates import Rate, accuracy

from efficacy_ablations import keys_of, with_marks
from efficacy_measure import evaluated
from efficacy_rows import fit_facts, marked
from efficacy_victim import Row, Rows, Victim, as_json


class Unfair:
    """One protected attribute of a victim; column: of the model's only table."""

    def __init__(self, victim: Victim, attribute: str, column: int) -> None:
        self.victim, self.attribute = victim, attribute
        self.protected = (str(column),)
        self.debug = victim.work / f"{attribute}.npz"

    def measure(self, rows: Rows) -> None:
        """Add every row, in the order of the table."""
        about = {"attribute": self.attribute}
        steps: dict[str, Callable[[], Row]] = {
            "original": self.original,
            "columns": self.columns,
            "benign mean": self.benign_mean,
            "contrastive": lambda: self.patched("contrastive"),
        }
        for name, step in steps.items():
            rows.add(name, step, **about)

    def original(self) -> Row:
        """The victim as it is."""
        classifier = self.victim.classifier(self.victim.model)
        test = load_labelled(self.victim.test, classifier.inputs)
        attributes = [Protected.parse(text, classifier.inputs) for text in self.protected]
        answers = classifier.predictions(test.samples)
        changed = swayed(classifier, test.samples, Flips.of(attributes, test.samples), answers)
        rates = {"accuracy": accuracy(answers, test.labels), "unfairness": Rate.of(changed)}
        return as_json(rates)

    def columns(self) -> Row:
        """The shipped path: scan, fit, patch."""
        victim = self.victim
        report = atpatch_onnx.scan_protected(
            victim.model,
            victim.clean,
            self.debug,
            self.protected,
            threads=victim.settings.threads,
            ep=victim.settings.ep,
            force=True,
        )
        row = self.patched("columns")
        return row | {"bad": report.bad, "inputs": report.inputs, "columns": self._columns()}

    def benign_mean(self) -> Row:
        """The same columns, but with their clean mean instead of nothing."""
        detector, _ = self._fit("zscore")
        data = load_arrays(self.victim.test)
        marks = np.zeros((len(data["labels"]), keys_of(self.victim.model, data)), bool)
        marks[:, self._columns()] = True
        return marked(self.victim, detector, with_marks(data, marks), protected=self.protected)

    def patched(self, kind: str) -> Row:
        """Fit a detector of a kind on the debugging set, patch and evaluate."""
        victim = self.victim
        detector, facts = self._fit(kind)
        output, ep = victim.scratch / "patched.onnx", victim.settings.ep
        atpatch_onnx.patch(victim.model, detector, output=output, ep=ep, force=True)
        found = atpatch_onnx.evaluate(
            victim.model, output, victim.test, protected=self.protected, ep=ep
        )
        return evaluated(found) | {"fit": facts}

    def _fit(self, kind: str) -> tuple[Path, Row]:
        victim = self.victim
        start = time.perf_counter()
        report = atpatch_onnx.fit(
            victim.model,
            victim.clean,
            victim.work / f"{self.attribute}-{kind}.onnx",
            kind=kind,
            debug=None if kind == "zscore" else self.debug,
            seed=victim.seed,
            ep=victim.settings.ep,
            force=True,
        )
        seconds = round(time.perf_counter() - start, 1)
        return report.output, fit_facts(report) | {"seconds": seconds}

    def _columns(self) -> list[int]:
        """The columns that the shipped detector prunes, as it says itself."""
        detector = ModelFile.open(self.victim.work / f"{self.attribute}-columns.onnx")
        columns = json.loads(detector.metadata("atpatch.training") or "{}")["columns"]
        return [int(column) for column in columns]

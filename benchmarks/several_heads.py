"""The rows of a text or language victim: anomalous heads, detected and redistributed, or repaired.

Backdoored: with the debugging set that the scan made (or, where it found nothing, with some of the
triggered inputs); from clean inputs alone; with as many random heads; with pairwise similarity in
its plainest reading; repaired in closed form. Clean: what is flagged of inputs that are merely
unusual (see `several_controls`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import atpatch_onnx
from atpatch_onnx.classifier import NO_TICK
from atpatch_onnx.data import Samples, load_arrays, samples_from
from atpatch_onnx.detector import load_detector
from atpatch_onnx.fitting import FitReport
from atpatch_onnx.fitting.heads import Heads
from atpatch_onnx.fitting.job import Job, ModelTrained
from atpatch_onnx.fitting.separation import auroc
from atpatch_onnx.fitting.several import largest_anomaly
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.rates import Rate
from atpatch_onnx.runtime import Arrays

from efficacy_measure import evaluated, judged
from efficacy_rows import fit_facts
from efficacy_victim import Row, Rows, Victim, as_json
from several_controls import debugging_set, triggered_parts, unusual

BATCH = 32


class Headed:
    """A victim whose heads are looked at."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.test = load_arrays(victim.test)
        self.debug = victim.work / "debug.npz"
        self.given, self.triggered = triggered_parts(victim)
        self._fitted: dict[str, FitReport] = {}

    def measure(self, rows: Rows) -> Row | None:
        """Add every row, in the order of the table; returns what the scan says."""
        if not self.triggered:
            rows.add("head-similarity, clean inputs alone", self.controls)
            return None
        scan = debugging_set(self.victim, self.debug, self.given)
        rows.add("original", lambda: judged(self.victim, self.victim.model))
        rows.add("head-similarity", lambda: self.redistributed("head-similarity", Heads()))
        rows.add("clean inputs alone", lambda: self.redistributed("alone", Heads(), debug=False))
        rows.add("mean similarity", lambda: self.redistributed("mean", Heads(similarity="mean")))
        rows.add("random heads", self.random)
        rows.add("head-alignment", self.aligned)
        return scan

    def redistributed(self, name: str, options: Heads, *, debug: bool = True) -> Row:
        """Detect, and give the suspicious heads their benign maps."""
        fitted = self._fit(name, "head-similarity", options, debug)
        row = self._patched(fitted.output) | {"fit": fit_facts(fitted)}
        return row | self._separation(fitted) | _chosen(fitted)

    def random(self) -> Row:
        """As many heads at random, at any site, and so in a second run."""
        fitted = self._fit("head-similarity", "head-similarity", Heads(), True)
        chosen: Any = fitted.record["suspicious"]
        every = [f"{s.name}:{h}" for s in self._job().sites for h in range(s.facts.heads or 0)]
        rng = np.random.default_rng(self.victim.seed)
        drawn = rng.choice(every, len(chosen), replace=False)
        return self.redistributed("random", Heads(heads=tuple(map(str, drawn)), rerun=True))

    def aligned(self) -> Row:
        """Correct what the heads give, in every input."""
        began = time.perf_counter()
        fitted = self._fit("aligned", "head-alignment", Heads(), True)
        seconds = round(time.perf_counter() - began, 1)
        return self._patched(fitted.output) | {"fit": {"seconds": seconds}} | _chosen(fitted)

    def controls(self) -> Row:
        """What a detector of clean inputs flags of test inputs, and of unusual ones."""
        fitted = self._fit("alone", "head-similarity", Heads(), False)
        file = ModelFile.open(self.victim.model)
        threshold = load_detector(fitted.output, GraphView.of(file.skeleton).opset).threshold
        rates = {
            name: Rate.of(self._anomaly(fitted, arrays) > threshold)
            for name, arrays in unusual(self.victim, self.test).items()
        }
        return {"controls": as_json(dict(rates)), "fit": fit_facts(fitted)}

    def _separation(self, fitted: FitReport) -> Row:
        clean, bad = (self._anomaly(fitted, arrays) for arrays in (self.test, self.triggered))
        return {"auroc": auroc(clean, bad)}

    def _anomaly(self, fitted: FitReport, arrays: Arrays) -> Any:
        job = self._job()
        by_name = {site.name: site for site in job.sites}
        observed = tuple(by_name[name] for name in fitted.observed)
        applied = tuple(by_name[name] for name in fitted.sites)
        trained = ModelTrained(onnx.load(fitted.output), observed, applied, {}, {})
        return largest_anomaly(job, trained, self._samples(arrays))

    def _job(self) -> Job:
        file = ModelFile.open(self.victim.model)
        view, sites = GraphView.of(file.skeleton), locate(file.skeleton).sites
        ep, seed = self.victim.settings.ep, self.victim.seed
        return Job(file, view, sites, ep, BATCH, seed, "column", NO_TICK)

    def _samples(self, arrays: Arrays) -> Samples:
        return samples_from(arrays, self.victim.classifier(self.victim.model).inputs, "the data")

    def _fit(self, name: str, kind: str, options: Heads, debug: bool) -> FitReport:
        if name not in self._fitted:
            self._fitted[name] = atpatch_onnx.fit(
                self.victim.model,
                self.victim.clean,
                self.victim.work / f"{name}.onnx",
                kind=kind,
                options=options,
                debug=self.debug if debug else None,
                seed=self.victim.seed,
                ep=self.victim.settings.ep,
                force=True,
            )
        return self._fitted[name]

    def _patched(self, detector: Path) -> Row:
        victim = self.victim
        output = victim.scratch / "patched.onnx"
        atpatch_onnx.patch(victim.model, detector, output=output, ep=victim.settings.ep, force=True)
        found = atpatch_onnx.evaluate(
            victim.model, output, self.test, triggered=self.triggered, ep=victim.settings.ep
        )
        return evaluated(found)


def _chosen(fitted: FitReport) -> Row:
    chosen: Any = fitted.record.get("suspicious", ())
    return {"heads": list(chosen)}

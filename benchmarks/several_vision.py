"""The rows of a vision-language victim: CleanSight as printed, our variant, and ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import atpatch_onnx
from atpatch_onnx import Decoder
from atpatch_onnx.classifier import NO_TICK
from atpatch_onnx.data import Samples, load_arrays, samples_from
from atpatch_onnx.debugging_set import load_debugging_set
from atpatch_onnx.fitting import FitReport
from atpatch_onnx.fitting.cleansight import LITERAL, VARIANT, CleanSight
from atpatch_onnx.fitting.inputs import halves, split_bad
from atpatch_onnx.fitting.job import Job
from atpatch_onnx.fitting.separation import auroc
from atpatch_onnx.fitting.visual_prompt import parse
from atpatch_onnx.fitting.visual_statistics import Collector, distances, normal, towards
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.cleansight import Distance
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.visual_ratio import Statistic
from atpatch_onnx.rates import Rate
from atpatch_onnx.runtime import Arrays, InputSpec

from efficacy_ablations import with_marks
from efficacy_measure import evaluated, judged
from efficacy_rows import fit_facts, marked
from efficacy_victim import Row, Rows, Victim, as_json
from several_controls import debugging_set, triggered_parts

STEPS, SPOKEN = 32, 200
"""Tokens that are decoded, and inputs for that."""


class VisionLanguage:
    """A vision-language victim, backdoored or clean."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        layout = victim.record["layout"]
        start = layout["image_start"]
        self.visual = f"{start}:{start + layout['visual_tokens']}"
        self.test = load_arrays(victim.test)
        self.debug = victim.work / "debug.npz"
        self.given, self.triggered = triggered_parts(victim)

    def measure(self, rows: Rows) -> Row:
        """Add every row, in the order of the table; returns what the scan says."""
        scan = debugging_set(self.victim, self.debug, self.given)
        if not self.triggered:
            return scan
        rows.add("original", lambda: judged(self.victim, self.victim.model))
        rows.add("cleansight", lambda: self.patched(LITERAL))
        rows.add("cleansight, sites chosen", lambda: self.patched(LITERAL, chosen=True))
        rows.add("variant, in flow", lambda: self.patched(VARIANT, chosen=True))
        rows.add("variant", lambda: self.patched(VARIANT, chosen=True, rerun=True, spoken=True))
        rows.add("log ratio", lambda: self.patched(VARIANT[:1], chosen=True, rerun=True))
        rows.add(
            "head mean", lambda: self.patched((Statistic.MEAN_RATIO,), chosen=True, rerun=True)
        )
        rows.add(
            "no detection", lambda: self.patched(VARIANT, chosen=True, rerun=True, threshold=0.0)
        )
        if "anomalous" in self.triggered:
            rows.add("oracle", self.oracle)
        return scan

    def patched(
        self,
        statistics: tuple[Statistic, ...],
        *,
        chosen: bool = False,
        rerun: bool = False,
        spoken: bool = False,
        threshold: float | None = None,
    ) -> Row:
        """Fit, patch and evaluate; chosen: detection sites by the debugging set."""
        victim = self.victim
        fitted = atpatch_onnx.fit(
            victim.model,
            victim.clean,
            victim.scratch / "det.onnx",
            kind="cleansight",
            options=CleanSight(self.visual, statistics=statistics, rerun=rerun),
            debug=self.debug if chosen else None,
            seed=victim.seed,
            ep=victim.settings.ep,
            force=True,
        )
        report = self._patch(victim.model, "prefill.onnx", fitted.output, threshold=threshold)
        row = self._evaluate(report) | {"fit": fit_facts(fitted), "sites": list(fitted.observed)}
        row["auroc"] = self.auroc(fitted)
        return row | (self.spoken(report) if spoken else {})

    def auroc(self, fitted: FitReport) -> float:
        """Of the distance, on inputs that the fit has not seen."""
        victim = self.victim
        file = ModelFile.open(victim.model)
        view, sites = GraphView.of(file.skeleton), locate(file.skeleton).sites
        job = Job(file, view, sites, victim.settings.ep, 32, victim.seed, "column", NO_TICK)
        measured: Any = fitted.record["measured"]
        keys = [(each["site"], Statistic(each["statistic"])) for each in measured]
        looked_at = [site for site in sites if site.name in {name for name, _ in keys}]
        statistics = list(dict.fromkeys(statistic for _, statistic in keys))
        collect = Collector(job, looked_at, parse(view, self.visual, ""), statistics)
        _, seen = halves(job, self._samples(load_arrays(victim.clean)))
        if fitted.record["distance"] == Distance.NORM:
            tables = normal(keys, collect(seen))
        else:
            specs = self._specs()
            known, _ = split_bad(job, load_debugging_set(self.debug, specs))
            tables = towards(keys, collect(seen), collect(known.bad))
        distance = Distance(str(fitted.record["distance"]))
        clean, bad = (
            distances(tables, distance, collect(self._samples(arrays)))
            for arrays in (self.test, self.triggered)
        )
        return auroc(clean, bad)

    def oracle(self) -> Row:
        """The tokens of the real trigger pruned at every site of the decoder."""
        victim = self.victim
        zscore = victim.work / "zscore.onnx"
        sites = ["decoder.*"]
        atpatch_onnx.fit(
            victim.model, victim.clean, zscore, sites=sites, ep=victim.settings.ep, force=True
        )
        none = np.zeros_like(self.test["attention_mask"], bool)
        return marked(
            victim,
            zscore,
            with_marks(self.test, none),
            with_marks(self.triggered, self.triggered["anomalous"]),
            redistribute="prune",
            strategy="guard",
            sites=sites,
        )

    def spoken(self, prefill: Path) -> Row:
        """What is said in 32 steps: the target's word, and the same as before."""
        decode = self._patch(self.victim.folder / "decode.onnx", "decode.onnx")
        patched = Decoder(prefill, decode, ep=self.victim.settings.ep)
        plain = Decoder(
            self.victim.model, self.victim.folder / "decode.onnx", ep=self.victim.settings.ep
        )
        clean, bad = (self._feeds(part) for part in (self.test, self.triggered))
        before, after = (each.generate(clean, STEPS) for each in (plain, patched))
        target = int(self.triggered["target"])
        rates = {
            "said_as_before": Rate.of((before == after).all(axis=1)),
            "target_said_before": Rate.of((plain.generate(bad, STEPS) == target).any(axis=1)),
            "target_said": Rate.of((patched.generate(bad, STEPS) == target).any(axis=1)),
        }
        return as_json(rates)

    def _feeds(self, arrays: Arrays) -> Arrays:
        wanted = ("pixels", "input_ids", "attention_mask")
        return {name: arrays[name][:SPOKEN] for name in wanted}

    def _specs(self) -> list[InputSpec]:
        return self.victim.classifier(self.victim.model).inputs

    def _samples(self, arrays: Arrays) -> Samples:
        return samples_from(arrays, self._specs(), "the data")

    def _patch(self, model: Path, name: str, detector: Path | None = None, **options: Any) -> Path:
        output = self.victim.scratch / name
        ep = self.victim.settings.ep
        atpatch_onnx.patch(
            model, detector, output=output, remember=True, ep=ep, force=True, **options
        )
        return output

    def _evaluate(self, patched: Path) -> Row:
        found = atpatch_onnx.evaluate(
            self.victim.model,
            patched,
            self.test,
            triggered=self.triggered,
            ep=self.victim.settings.ep,
        )
        return evaluated(found)

"""What is measured of a model: with its patch, without one, and at its attention sites."""

from __future__ import annotations

import time
from pathlib import Path

import onnx

import atpatch_onnx
from atpatch_onnx import rates
from atpatch_onnx.classifier import NO_TICK
from atpatch_onnx.data import load_samples
from atpatch_onnx.debugging_set import load_debugging_set
from atpatch_onnx.detector import load_detector
from atpatch_onnx.evaluating import Evaluation
from atpatch_onnx.fitting.job import Job, Trained
from atpatch_onnx.fitting.scores import Scorer, recall_of
from atpatch_onnx.fitting.statistics import FeatureReader, whiten
from atpatch_onnx.labelled import load_labelled, load_triggered
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.features import BASIC
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.rates import Rate
from atpatch_onnx.search.report import ScanReport

from efficacy_victim import Row, Victim, as_json, error_sentence

BATCH = 32


def evaluated(found: Evaluation) -> Row:
    """The rates of the patched model."""
    measured: dict[str, Rate | None] = {
        "accuracy": found.accuracy.after,
        "agreement": found.agreement,
        "false_positive_rate": found.false_positive_rate,
        "natural_rate": None if found.natural_rate is None else found.natural_rate.after,
    }
    if found.unfairness:
        measured["unfairness"] = found.unfairness[0].rate.after
    if (attack := found.attack) is not None:
        measured |= {
            "attack_success_rate": attack.attack_success_rate.after,
            "recovered_accuracy": attack.recovered_accuracy.after,
            "true_positive_rate": attack.true_positive_rate,
            "column_recall": attack.column_recall,
        }
    return as_json(measured)


def judged(victim: Victim, model: Path) -> Row:
    """The rates of a model by itself, which need not be a patched one."""
    classifier = victim.classifier(model)
    clean = load_labelled(victim.test, classifier.inputs)
    answers = classifier.predictions(clean.samples)
    original = victim.classifier(victim.model).predictions(clean.samples)
    measured: dict[str, Rate | None] = {
        "accuracy": rates.accuracy(answers, clean.labels),
        "agreement": Rate.of(answers == original),
    }
    if victim.triggered.exists():
        bad = load_triggered(victim.triggered, classifier.inputs, None)
        found = classifier.predictions(bad.samples)
        measured |= {
            "natural_rate": rates.attack_success_rate(answers, clean.labels, bad.target),
            "attack_success_rate": rates.attack_success_rate(found, bad.labels, bad.target),
            "recovered_accuracy": rates.recovered_accuracy(found, bad.labels, bad.target),
        }
    return as_json(measured)


def over_attended_recall(victim: Victim, detector: Path) -> Row:
    """Recall over the trigger's columns that a site really over-attends, at that site.

    A trigger of several tokens need not have all of them over-attended: those that are not do no
    harm by attention. This is the label that detectors are trained on.
    """
    file = ModelFile.open(victim.model)
    view = GraphView.of(file.skeleton)
    loaded = load_detector(detector, view.opset)
    known = locate(file.skeleton).sites
    sites = tuple(site for name in loaded.sites for site in known if site.name == name)
    job = Job(file, view, sites, victim.settings.ep, BATCH, victim.seed, "column", NO_TICK)
    reader = FeatureReader(job, BASIC)
    specs = victim.classifier(victim.model).inputs
    whitening = whiten(reader, load_samples(victim.clean, specs))
    bad = load_debugging_set(victim.triggered, specs)
    model = onnx.load(detector)
    trained = Trained(model, sites, whitening, {})
    recall = recall_of(job, trained, Scorer(job, model), bad, loaded.threshold)
    return as_json({"over_attended_recall": recall.columns})


def scanned(victim: Victim, output: Path, target: int | None = None) -> Row:
    """What `scan` says of the victim; `right` is whether that is what is true of it."""
    start = time.perf_counter()
    settings = victim.settings
    known: Row = {"wanted": victim.record.get("target")}
    try:
        report = atpatch_onnx.scan(
            victim.model,
            victim.clean,
            output,
            target=target,
            budget=settings.budget,
            seed=victim.seed,
            threads=settings.threads,
            ep=settings.ep,
            force=True,
        )
    except Exception as error:  # see Rows.add
        seconds = round(time.perf_counter() - start, 1)
        return {**known, "error": error_sentence(error), "right": False, "seconds": seconds}
    found = report.target if report.verdict == "backdoored" else None
    return {
        **known,
        "verdict": report.verdict,
        "class": found,
        "right": report.verdict != "undecided" and found == known["wanted"],
        "margin": report.margin,
        "complete": report.complete,
        "seconds": round(report.seconds, 1),
        "runs": report.runs,
        "classes": _classes(report),
    }


def _classes(report: ScanReport) -> list[Row]:
    names = ("target", "description", "size", "success", "natural", "outlier", "suspicious")
    return [{name: getattr(each, name) for name in names} for each in report.classes]

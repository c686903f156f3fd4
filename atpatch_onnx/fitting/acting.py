"""How what a detector flags is acted on: in flow, or in a second run; for all answers, or for one.

An attack has succeeded only where the model answers as the attacker wants, which a debugging set
says. A second run knows the answer of the first, so it can leave all other inputs alone: the same
false-positive budget then allows a lower threshold for those that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..classifier import Classifier
from ..data import Samples
from ..debugging_set import DebuggingSet
from ..detector import Detector
from ..errors import AtpatchError
from ..model_file import ModelFile
from ..passes.redistribute import Redistribution
from ..passes.splice import Strategy
from ..second_run import Answer, SecondRun
from ..signature import DetectorScope
from ..site_search import badness_on
from .calibration import calibrate, raised
from .job import Job, Made, Trained
from .scores import Scorer, recall_of
from .statistics import FloatArray
from .trial import rerun_problem, spliced

LEAST = 0.5
"""Lowest threshold: what is below is not even in the tail of a site's clean inputs (`levels`)."""
BETTER = 0.01
"""By how much a second run must beat one that works in flow to be worth its time, as a share of the
bad inputs."""


@dataclass(frozen=True)
class Held:
    """What a detector is judged on, and has not seen: clean inputs and bad ones.

    seen: how many clean inputs it has seen; target: the class that the attacker wants, if only
        inputs that are answered so are to be flagged.
    odd: clean inputs that were made odd, by how; the budget is for each of them too.
    """

    clean: Samples
    bad: DebuggingSet | None
    seen: int
    target: int | None
    odd: Mapping[str, Samples] = field(default_factory=dict)


def acting(job: Job, trained: Trained, windows: Mapping[str, int], held: Held, fpr: float) -> Made:
    """The detector with its thresholds, and how it asks to be spliced in.

    windows: how many maps a sample has at each site of the model that may be patched.
    """
    whole = tuple(name for name, count in windows.items() if count == 1)
    windowed = len(whole) < len(windows)
    job = replace(job, sites=trained.sites)
    scorer = Scorer(job, trained.model)
    anomalies = scorer.largest(held.clean)
    calibration = calibrate(anomalies, fpr, held.seen)
    others = [calibrate(scorer.largest(some), fpr, held.seen) for some in held.odd.values()]
    highest = max(c.threshold for c in (calibration, *others))
    if highest > calibration.threshold:
        calibration = calibration.at(highest, anomalies)
    made = Made(
        trained.model,
        DetectorScope.SITE,
        trained.sites,
        calibration.threshold,
        trained.record | ({"odd": sorted(held.odd)} if held.odd else {}),
        calibration,
    )
    # Windows have columns of their own: what one site flags means nothing to another.
    if all(site.name in whole for site in trained.sites):
        second = SecondRun(whole if windowed else ())
        made = _for_answer(job, made, second, held, scorer, anomalies) or _again(
            job, made, second, held.clean
        )
    if held.bad is not None:
        recall = recall_of(job, trained, scorer, held.bad, made.threshold)
        made = replace(made, recall=recall)
    return made


def better(job: Job, one: Made, other: Made, held: Held) -> Made:
    """`other`, if it asks for a second run that heals more of the bad inputs, else `one`."""
    if other.strategy is None:
        return one
    harm = _harm(job, held, one, other)
    return other if harm is not None and harm[1] < harm[0] - BETTER else one


def _harm(job: Job, held: Held, *several: Made) -> list[float] | None:
    """How bad the bad inputs are with each detector; None where that cannot be told."""
    if held.bad is None:
        return None
    try:
        harm, _ = badness_on(held.bad, Classifier(job.model, job.provider))
        return [harm(Classifier(_patched(job, made), job.provider)) for made in several]
    except AtpatchError:  # no classifier, or nothing says what should be answered
        return None


def _again(job: Job, made: Made, second: SecondRun, clean: Samples) -> Made:
    """With a second run for whatever is flagged, if the model takes one."""
    if rerun_problem(job, _detector(job, made, second), clean):
        return made
    asked = second if second.sites else None
    return replace(made, strategy=Strategy.RERUN.value, second_run=asked)


def _for_answer(
    job: Job, made: Made, second: SecondRun, held: Held, scorer: Scorer, anomalies: FloatArray
) -> Made | None:
    """With a second run for inputs that are answered as the attacker wants; None: impossible."""
    if held.target is None or held.bad is None or made.calibration is None:
        return None
    try:
        model = Classifier(job.model, job.provider)
        answers = model.predictions(held.clean)
    except AtpatchError:
        return None
    output = model.output
    if output is None or job.view.rank(output) != 2 or not 0 <= held.target < (model.classes or 0):
        return None
    second = replace(second, answer=Answer(output, held.target, made.threshold))
    if rerun_problem(job, _detector(job, made, second), held.clean):
        return None
    counted = np.where(answers == held.target, anomalies, 0.0)
    asking = replace(
        made,
        calibration=made.calibration.at(made.threshold, counted),
        strategy=Strategy.RERUN.value,
        second_run=second,
    )
    calibration = calibrate(counted, made.calibration.budget, made.calibration.fit_inputs)
    threshold = max(calibration.threshold, LEAST)
    threshold = min(raised(threshold, scorer.largest(held.bad.bad)), made.threshold)
    lower = replace(asking, threshold=threshold, calibration=calibration.at(threshold, counted))
    # What is flagged besides the trigger is lost to the second run, which may need it.
    harm = _harm(job, held, asking, lower)
    return asking if harm is not None and harm[1] > harm[0] else lower


def _detector(job: Job, made: Made, second: SecondRun | None) -> Detector:
    return Detector.unsaved(
        made.model,
        (site.name for site in made.sites),
        threshold=made.threshold,
        rows=job.rows,
        second_run=second,
    )


def _patched(job: Job, made: Made) -> ModelFile:
    """The model with a detector, as it asks for it."""
    detector = _detector(job, made, made.second_run)
    if made.strategy is not None:
        return spliced(job, detector, Redistribution.PRUNE, Strategy.RERUN)
    mode = Redistribution.BENIGN if detector.gives_benign else Redistribution.UNIFORM
    return spliced(job, detector, mode, Strategy.GUARD)

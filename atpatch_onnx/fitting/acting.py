"""How what a detector flags is acted on: in flow, or in a second run; for all answers, or for one.

An attack has succeeded only where the model answers as the attacker wants, which a debugging set
says. A second run knows the answer of the first, so it can leave all other inputs alone: the same
false-positive budget then allows a lower threshold for those that count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..classifier import Classifier
from ..data import Samples
from ..debugging_set import SCORES, DebuggingSet
from ..detector import Detector
from ..errors import AtpatchError, InputError
from ..model_file import ModelFile
from ..passes.redistribute import Redistribution
from ..passes.splice import Strategy
from ..second_run import Answer, SecondRun
from ..signature import DetectorScope
from ..site_search import badness_on
from .calibration import Calibration, calibrate, raised
from .job import Job, Made, Trained
from .scores import Scorer, recall_of
from .statistics import FloatArray
from .trial import rerun_problem, spliced

LEAST = 0.5
"""Lowest threshold: what is below is not even in the tail of a site's clean inputs (`levels`)."""
ODD = 0.5
"""Share of the budget for each way to be odd: there are more ways than those that are tried."""
BETTER = 0.01
"""By how much a second run must beat one that works in flow to be worth its time, as a share of the
bad inputs."""
MOST = 0.5
"""The original sends at least this share of the bad inputs to the class that an attacker wants."""


@dataclass(frozen=True)
class Held:
    """What a detector is judged on, and has not seen: clean inputs and bad ones.

    seen: how many clean inputs it has seen; one_answer: whether only inputs that are answered as
        the attacker wants are to be flagged, where the bad ones say what that is.
    odd: clean inputs that were made odd, by how; a share of the budget is for each of them.
    """

    clean: Samples
    bad: DebuggingSet | None
    seen: int
    one_answer: bool
    odd: Mapping[str, Samples] = field(default_factory=dict)


def acting(job: Job, trained: Trained, windows: Mapping[str, int], held: Held, fpr: float) -> Made:
    """The detector with its thresholds, and how it asks to be spliced in.

    windows: how many maps a sample has at each site of the main graph.
    Raises: InputError for a target that is no class.
    """
    job = replace(job, sites=trained.sites)
    scorer = Scorer(job, trained.model)
    anomalies = scorer.largest(held.clean)
    calibration = calibrate(anomalies, fpr, held.seen)
    others = [calibrate(scorer.largest(odd), ODD * fpr, held.seen) for odd in held.odd.values()]
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
    whole = tuple(name for name, count in windows.items() if count == 1)
    if all(site.name in whole for site in trained.sites):
        everywhere = SecondRun(() if len(whole) == len(windows) else whole)
        waiting = _for_answer(job, made, calibration, everywhere, held, scorer, anomalies)
        if not isinstance(waiting, str):
            made = waiting
        else:
            made = _for_every_answer(job, made, everywhere, held)
            if waiting:
                made = replace(made, record=made.record | {"every_answer": waiting})
    if held.bad is not None:
        answer = None if made.second_run is None else made.second_run.answer
        counted = None if answer is None else _answered(job, held.bad.bad, answer)
        recall = recall_of(job, trained, scorer, held.bad, made.threshold, counted)
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
    original = Classifier(job.model, job.provider)
    try:
        harm, _ = badness_on(held.bad, original)
        harm(original)
    except AtpatchError:  # no classifier, or nothing says what should be answered
        return None
    found = []
    for made in several:
        try:
            found.append(harm(Classifier(_patched(job, made), job.provider)))
        except AtpatchError:  # it does not run on what it is made for
            found.append(math.inf)
    return found


def _for_every_answer(job: Job, made: Made, everywhere: SecondRun, held: Held) -> Made:
    """With a second run for whatever is flagged, if the model takes one."""
    if rerun_problem(job, _detector(job, made, everywhere), held.clean):
        return made
    request = everywhere if everywhere.sites else None
    return replace(made, strategy=Strategy.RERUN.value, second_run=request)


def _for_answer(
    job: Job,
    made: Made,
    calibration: Calibration,
    everywhere: SecondRun,
    held: Held,
    scorer: Scorer,
    anomalies: FloatArray,
) -> Made | str:
    """With a second run for inputs that are answered as the attacker wants; or why there is none.

    "" where nobody asks for it. Raises: InputError for a target that is no class.
    """
    if not held.one_answer or held.bad is None or held.bad.target is None:
        return ""
    answer = _answer(job, held.bad, held.bad.target, made.threshold)
    if isinstance(answer, str):
        return answer
    request = replace(everywhere, answer=answer)
    # Of the bad inputs the most are answered so, and run again where everything is flagged.
    for samples in (held.clean, held.bad.bad):
        if problem := rerun_problem(job, _detector(job, made, request), samples):
            return problem
    counted = np.where(_answered(job, held.clean, answer), anomalies, 0.0)
    same = replace(
        made,
        calibration=calibration.at(made.threshold, counted),
        strategy=Strategy.RERUN.value,
        second_run=request,
    )
    lowest = calibrate(counted, calibration.budget, calibration.fit_inputs)
    threshold = raised(max(lowest.threshold, LEAST), scorer.largest(held.bad.bad))
    threshold = min(threshold, made.threshold)
    lower = replace(same, threshold=threshold, calibration=lowest.at(threshold, counted))
    harm = _harm(job, held, same, lower)
    # What is flagged besides the trigger is lost to the second run, which may need it.
    return same if harm is not None and harm[1] > harm[0] else lower


def _answer(job: Job, bad: DebuggingSet, target: int, otherwise: float) -> Answer | str:
    """The answer that the bad inputs are to get; or why it cannot be waited for."""
    scores = bad.about.get(SCORES)
    output = scores if isinstance(scores, str) else None
    try:
        model = Classifier(job.model, job.provider, output=output)
        share = float((model.predictions(bad.bad) == target).mean())
    except AtpatchError as error:
        return str(error)
    output, classes = model.output, model.classes
    assert output is not None
    assert classes is not None
    if not 0 <= target < classes:
        raise InputError(
            f"the debugging set says that the attacker wants class {target}, and '{output}' has "
            f"the classes 0 to {classes - 1}: correct its 'target', or leave it out"
        )
    if share < MOST:
        return f"the model sends only {share:.0%} of the bad inputs to class {target} of '{output}'"
    return Answer(output, target, otherwise)


def _answered(job: Job, samples: Samples, answer: Answer) -> NDArray[np.bool_]:
    """Which samples the original answers so."""
    model = Classifier(job.model, job.provider, output=answer.output)
    return np.asarray(model.predictions(samples) == answer.number)


def _detector(job: Job, made: Made, request: SecondRun | None) -> Detector:
    return Detector.unsaved(
        made.model,
        (site.name for site in made.sites),
        threshold=made.threshold,
        rows=job.rows,
        second_run=request,
    )


def _patched(job: Job, made: Made) -> ModelFile:
    """The model with a detector, as it asks for it. Raises: RefusedError."""
    detector = _detector(job, made, made.second_run)
    if made.strategy == Strategy.RERUN.value:
        return spliced(job, detector, Redistribution.PRUNE, Strategy.RERUN)
    mode = Redistribution.BENIGN if detector.gives_benign else Redistribution.UNIFORM
    return spliced(job, detector, mode, Strategy.GUARD)

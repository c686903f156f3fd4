"""Detectors that look at several sites at once, from data to a threshold."""

from __future__ import annotations

import numpy as np

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..detector import Detector
from ..errors import InputError, RefusedError
from ..passes.observe import Observe
from ..passes.splice import Strategy
from ..probed import Probed
from ..rates import Rate
from ..signature import DetectorScope
from .calibration import calibrate, raised
from .cleansight import CleanSight, fit_cleansight
from .head_alignment import fit_head_alignment
from .head_similarity import fit_head_similarity
from .heads import Heads
from .inputs import halves, split_bad
from .job import Job, Made, ModelTrained
from .scores import Recall
from .statistics import FloatArray
from .trial import rerun_problem

CLEANSIGHT, SIMILARITY, ALIGNMENT = "cleansight", "head-similarity", "head-alignment"
SEVERAL = (CLEANSIGHT, SIMILARITY, ALIGNMENT)
"""Kinds of detectors."""


def fit_several(
    kind: str,
    job: Job,
    clean: Samples,
    bad: DebuggingSet | None,
    fpr: float,
    options: CleanSight | Heads | None,
) -> Made:
    """A detector of one of these kinds.

    options: a `CleanSight` for `cleansight`, which has to know where the image is; else `Heads`.
    Raises: InputError, RefusedError.
    """
    if kind == ALIGNMENT:
        return _aligned(job, clean, bad, _heads(kind, options))
    unseen, seen = halves(job, clean)
    train, judged = (None, None) if bad is None else split_bad(job, bad)
    if kind == SIMILARITY:
        heads = _heads(kind, options)
        trained, rerun = fit_head_similarity(job, seen, train, heads), heads.rerun
    elif isinstance(options, CleanSight):
        trained, rerun = fit_cleansight(job, seen, train, options), options.rerun
    else:
        raise InputError(
            "--kind cleansight has to know which tokens are the image's: give --visual START:END, "
            "or the name of a mask of the model"
        )
    normal = largest_anomaly(job, trained, unseen)
    calibration = calibrate(normal, fpr, seen.count)
    recall = None
    if judged is not None:
        abnormal = largest_anomaly(job, trained, judged.bad)
        calibration = calibration.at(raised(calibration.threshold, abnormal), normal)
        recall = Recall(Rate.of(abnormal > calibration.threshold), None)
    if rerun and (problem := rerun_problem(job, as_detector(trained), clean)):
        raise RefusedError(f"--rerun: {problem}: fit without --rerun, so that it works in flow")
    return Made(
        trained.model,
        DetectorScope.MODEL,
        trained.apply,
        calibration.threshold,
        trained.record,
        calibration,
        recall,
        Strategy.RERUN.value if rerun else None,
        trained.observed,
        trained.bindings,
    )


def as_detector(trained: ModelTrained) -> Detector:
    """What was trained, to be tried."""
    return Detector.unsaved(
        trained.model,
        (site.name for site in trained.apply),
        scope=DetectorScope.MODEL,
        bindings=trained.bindings,
    )


def largest_anomaly(job: Job, trained: ModelTrained, samples: Samples) -> FloatArray:
    """The largest anomaly `[N]` of each sample, anywhere."""
    edits, outputs = Observe(as_detector(trained))(job.view, trained.observed)
    probed = Probed(job.model, edits, job.provider)
    wanted = [value for name, value in outputs.items() if name.startswith("anomaly")]
    parts = [
        np.max([values[name].reshape(len(values[name]), -1).max(axis=1) for name in wanted], axis=0)
        for values in probed.over(samples, wanted, job.batch, job.tick)
    ]
    return np.concatenate(parts).astype(np.float64)


def _aligned(job: Job, clean: Samples, bad: DebuggingSet | None, options: Heads) -> Made:
    if bad is None:
        raise InputError(
            "--kind head-alignment learns from bad inputs what heads should not do: give --debug "
            "debug.npz, or choose --kind head-similarity, which needs none"
        )
    repair = fit_head_alignment(job, clean, bad, options)
    return Made(repair.model, DetectorScope.CONTEXT, repair.sites, 0.5, repair.record)


def _heads(kind: str, options: CleanSight | Heads | None) -> Heads:
    if isinstance(options, CleanSight):
        raise InputError(f"--visual and --prompt do not go with --kind {kind}: leave them out")
    return options or Heads()

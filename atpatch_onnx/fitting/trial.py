"""Try a way of splicing on the model itself, before a detector asks for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data import Samples
from ..detector import Detector
from ..errors import AtpatchError
from ..passes.locate import locate
from ..passes.redistribute import Redistribution
from ..passes.splice import Splice, Strategy, Treatment
from ..patching import Patch, apply
from ..runtime import Session
from .job import Job, Trained

SAMPLES = 32
NEVER, ALWAYS = 1.0, 0.0
"""Thresholds that no anomaly is above, and that some columns of every input are above."""


def recommended_strategy(job: Job, trained: Trained, samples: Samples) -> str | None:
    """`rerun` where the model can be run so; None: what suits the execution provider.

    It is tried on some samples. Where nothing is flagged the outputs must be the original's, bit
    for bit: a runtime may fuse what lies across the place where the second run comes in. Where
    everything is, they must have the original's shapes.
    """
    # Windows have columns of their own: what one site flags means nothing to another.
    if trained.whitening.windowed:
        return None
    part = next(samples.take(np.arange(min(SAMPLES, samples.count))).batches(SAMPLES))
    file = job.model
    try:
        before = Session(bytes(file.buffer), job.provider, file.folder).run(part.feeds)
        for threshold in (NEVER, ALWAYS):
            after = _rerun(job, trained, threshold).run(part.feeds, list(before))
            pairs = [(before[name], after[name]) for name in before]
            if threshold == NEVER and not all(np.array_equal(*p, equal_nan=True) for p in pairs):
                return None
            if any(one.shape != other.shape for one, other in pairs):
                return None
    except AtpatchError:
        return None
    return Strategy.RERUN.value


def _rerun(job: Job, trained: Trained, threshold: float) -> Session:
    """The model with the detector at that threshold. Raises: RefusedError where it cannot be."""
    names = tuple(site.name for site in trained.sites)
    detector = Detector(
        Path("det.onnx"), trained.model, "", "", threshold, names, None, {}, rows=job.rows
    )
    treatments = {name: Treatment(Redistribution.PRUNE, detector) for name in names}
    sites = locate(job.model.skeleton).sites
    edits = Splice(treatments, Strategy.RERUN)(job.view, sites).edits
    content = apply(job.model, Patch(job.model.sha256, edits)).content()
    return Session(content, job.provider, job.model.folder)

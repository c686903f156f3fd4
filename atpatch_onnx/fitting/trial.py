"""Try a way of splicing on the model itself, before a detector asks for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..data import Samples
from ..detector import Detector
from ..errors import AtpatchError
from ..model_file import ModelFile
from ..passes.locate import locate
from ..passes.redistribute import Redistribution
from ..passes.splice import Splice, Strategy, Treatment
from ..patching import Patch, apply
from ..runtime import Session
from ..signature import DetectorScope
from .job import Job

SAMPLES = 32
NEVER, ALWAYS = 1.0, 0.0
"""Thresholds that no anomaly is above, and that some columns of every input are above."""


def rerun_problem(job: Job, detector: Detector, samples: Samples) -> str:
    """Why the model cannot be run again with the detector; "" if it can.

    It is tried on some samples. Where nothing is flagged the outputs must be the original's, bit
    for bit: a runtime may fuse what lies across the place where the second run comes in. Where
    everything is, they must have the original's shapes.
    """
    part = next(samples.take(np.arange(min(SAMPLES, samples.count))).batches(SAMPLES))
    file = job.model
    try:
        before = Session(bytes(file.buffer), job.provider, file.folder).run(part.feeds)
        for threshold in (NEVER, ALWAYS):
            after = rerun_session(job, detector, threshold).run(part.feeds, list(before))
            pairs = [(before[name], after[name]) for name in before]
            if threshold == NEVER and not all(np.array_equal(*p, equal_nan=True) for p in pairs):
                return "the runtime then computes other bits for inputs that are not flagged"
            if any(one.shape != other.shape for one, other in pairs):
                return "its outputs then have other shapes"
    except AtpatchError as error:
        return str(error)
    return ""


def rerun_session(job: Job, detector: Detector, threshold: float) -> Session:
    """The model with the detector at that threshold. Raises: RefusedError where it cannot be."""
    mode = Redistribution.PRUNE
    if detector.scope is DetectorScope.MODEL and detector.gives_benign:
        mode = Redistribution.BENIGN
    patched = spliced(job, replace(detector, threshold=threshold), mode, Strategy.RERUN)
    return Session(bytes(patched.buffer), job.provider, patched.folder)


def spliced(job: Job, detector: Detector, mode: Redistribution, strategy: Strategy) -> ModelFile:
    """The model with the detector at its sites. Raises: RefusedError where it cannot be."""
    treatments = dict.fromkeys(detector.sites, Treatment(mode, detector))
    edits = Splice(treatments, strategy)(job.view, locate(job.model.skeleton).sites).edits
    content = apply(job.model, Patch(job.model.sha256, edits)).content()
    return ModelFile.from_bytes(content, job.model.path)

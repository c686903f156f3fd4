"""Which visual keys are pruned, and where: as little as heals bad inputs, tried on the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..data import Samples
from ..detector import Detector
from ..passes.locate import Site
from ..runtime import Session
from ..signature import DetectorScope
from .job import Job
from .trial import ALWAYS, rerun_session

TAUS = (0.4, 0.2, 0.1, 0.05, 0.02, 0.0)
"""Shares of the last row that are tried."""
TRIED = 128
"""Bad inputs that each is tried on."""
ENOUGH = 0.98
"""Where so many of them are healed, no later sites are tried."""
TOLERANCE = 0.01
"""A share of bad inputs that is lower by this is as good."""


@dataclass(frozen=True)
class Cure:
    """Keys with more than `tau` of the last row are pruned at the sites `apply`.

    healed: the share of bad inputs about which the model, run again without those keys, says
    something else; None: not tried.
    """

    tau: float
    apply: tuple[Site, ...]
    healed: float | None


def gentlest_cure(
    job: Job,
    sites: tuple[Site, ...],
    build: Callable[[float], ModelProto],
    bindings: dict[str, str],
    bad: Samples,
) -> Cure:
    """What heals, with the largest tau: pruning more costs what could be said of the image.

    build: the detector by tau. Keys are pruned from the first of `sites` on, or a later one if that
    heals more: a model that has learnt to see nothing as a trigger is not healed by blinding it.
    """
    some = bad.take(np.arange(min(TRIED, bad.count)))
    plain = Session(bytes(job.model.buffer), job.provider, job.model.folder)
    before = _answers(job, plain, some)
    detectors = {tau: build(tau) for tau in TAUS}
    cures: list[tuple[float, Cure]] = []
    for begin in sorted({len(sites) * quarter // 4 for quarter in range(4)}):
        for tau, model in detectors.items():
            names = [site.name for site in sites[begin:]]
            detector = Detector.unsaved(model, names, scope=DetectorScope.MODEL, bindings=bindings)
            after = _answers(job, rerun_session(job, detector, ALWAYS), some)
            healed = float((after != before).mean())
            cures.append((healed, Cure(tau, sites[begin:], healed)))
        best = max(healed for healed, _ in cures)
        if best >= ENOUGH:
            break
    return next(cure for healed, cure in cures if healed >= best - TOLERANCE)


def _answers(job: Job, session: Session, samples: Samples) -> NDArray[np.int64]:
    """The class or token `[N]` that the first output says last."""
    name = session.outputs[0]
    found = []
    for part in samples.batches(job.batch):
        value = session.run(part.feeds, [name])[name][: part.real]
        found.append(value.reshape(part.real, -1, value.shape[-1])[:, -1].argmax(axis=1))
    return np.concatenate(found)

"""Try a way of splicing on the model itself, before a detector asks for it."""

from __future__ import annotations

from pathlib import Path

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
from .job import Job, Trained

SAMPLES = 3


def recommended_strategy(job: Job, trained: Trained, samples: Samples) -> str | None:
    """`rerun` where the model can be run so; None: what suits the execution provider.

    A threshold that flags some columns of every input is tried on a few of them; the outputs must
    have the shapes of the original's.
    """
    # Windows have columns of their own: what one site flags means nothing to another.
    if trained.whitening.windowed:
        return None
    names = tuple(site.name for site in trained.sites)
    detector = Detector(Path("det.onnx"), trained.model, "", "", 0.0, names, None, {})
    treatments = {name: Treatment(Redistribution.PRUNE, detector) for name in names}
    file = job.model
    try:
        edits = Splice(treatments, Strategy.RERUN)(job.view, locate(file.skeleton).sites).edits
        patched = ModelFile.from_bytes(apply(file, Patch(file.sha256, edits)).content(), file.path)
        models = (file, patched)
        part = next(samples.take(np.arange(min(SAMPLES, samples.count))).batches(SAMPLES))
        sessions = [Session(bytes(m.buffer), job.provider, m.folder) for m in models]
        before, after = (session.run(part.feeds) for session in sessions)
    except AtpatchError:
        return None
    same = all(before[name].shape == after[name].shape for name in before)
    return Strategy.RERUN.value if same else None

"""What heads do: the model's answers when some of its heads get their benign maps.

Measured through ONNX Runtime on the artifact: one session, in which a further input says for each
sample which heads are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..classifier import Classifier
from ..data import Samples
from ..debugging_set import DebuggingSet
from ..detector import Detector
from ..edits import AddInput, Edit
from ..model_file import ModelFile
from ..passes.graph_view import GraphView
from ..passes.head_maps import NormalSite
from ..passes.head_similarity import build_replacement
from ..passes.redistribute import Redistribution
from ..passes.splice import Splice, Strategy, Treatment
from ..patching import Patch, apply
from .heads import Head, head_mask
from .job import Job
from .statistics import FloatArray

HEADS = "atpatch/heads"
"""The further input, float32 `[B, S, H]`."""


def replaceable(job: Job, sites: Sequence[NormalSite]) -> tuple[ModelFile, tuple[Edit, ...]]:
    """The model with the input `HEADS`, and edits that give the heads it names their benign maps.

    A further input moves no node, so that the sites of the job are where they were.
    """
    known = {site.name: site.heads for site in sites}
    shape: list[str | int | None] = ["heads_batch", len(sites), max(known.values())]
    value = helper.make_tensor_value_info(HEADS, TensorProto.FLOAT, shape)
    widened = apply(job.model, Patch(job.model.sha256, (AddInput(value),))).content()
    file = ModelFile.from_bytes(widened, job.model.path)
    treatments = {site.name: _treatment(job, i, len(sites), site) for i, site in enumerate(sites)}
    splice = Splice(treatments, Strategy.SELECT, bindings={"heads": HEADS})
    return file, splice(GraphView.of(file.skeleton), job.sites).edits


def _treatment(job: Job, index: int, count: int, site: NormalSite) -> Treatment:
    model = build_replacement(site, index, count, job.opset, job.ir_version)
    # The digest tells the detectors of sites apart.
    sha256, names = f"replacement{index}", (site.name,)
    detector = Detector.unsaved(model, names, sha256=sha256)
    benign = site.benign is not None
    return Treatment(Redistribution.BENIGN if benign else Redistribution.UNIFORM, detector)


def with_heads(samples: Samples, heads: Iterable[Head], known: Mapping[str, int]) -> Samples:
    """The samples with the input that names `heads`, the same for all."""
    mask = head_mask(heads, known).astype(np.float32)
    arrays = {**samples.arrays, HEADS: np.broadcast_to(mask, (samples.count, *mask.shape))}
    return Samples(arrays, samples.count, samples.axes, samples.fixed_batch)


class HeadTrial:
    """The model with a say in which heads get their benign maps.

    scores: the output with class scores; None: the only one that could be.
    Raises: InputError where the model gives no class scores.
    """

    def __init__(self, job: Job, sites: Sequence[NormalSite], scores: str | None = None) -> None:
        self.job = job
        self.known = {site.name: site.heads for site in sites}
        file, edits = replaceable(job, sites)
        content = apply(file, Patch(file.sha256, edits)).content()
        trial = ModelFile.from_bytes(content, job.model.path)
        self._classifier = Classifier(trial, job.provider, output=scores, batch=job.batch)

    def log_probabilities(self, samples: Samples, heads: Sequence[Head]) -> FloatArray:
        """Log-probabilities of the classes, `[N, C]`, with `heads` replaced."""
        given = with_heads(samples, heads, self.known)
        return self._classifier.log_probabilities(given, self.job.tick).astype(np.float64)


def losses(answers: FloatArray, bad: DebuggingSet) -> FloatArray:
    """What is wrong with answers `[N, C]` to bad inputs, `[N]`.

    The cross-entropy toward the labels, where they are known; else the log-probability of the
    target; else that of the class that most bad inputs are sent to.
    """
    rows = np.arange(len(answers))
    if bad.labels is not None:
        return np.asarray(-answers[rows, bad.labels])
    return np.asarray(answers[:, wanted(answers, bad)])


def wanted(answers: FloatArray, bad: DebuggingSet) -> int:
    """The class that the attacker wants, as far as it can be told."""
    if bad.target is not None:
        return bad.target
    return int(np.bincount(answers.argmax(axis=1)).argmax())


def healed(before: FloatArray, after: FloatArray, bad: DebuggingSet) -> NDArray[np.bool_]:
    """Which bad inputs `[N]` are answered rightly, or at least otherwise than the attacker wants.

    before, after: answers `[N, C]` of the model as it is and as it is tried.
    """
    found = after.argmax(axis=1)
    if bad.labels is not None:
        return np.asarray(found == bad.labels)
    return np.asarray(found != wanted(before, bad))


def importance(
    trial: HeadTrial, bad: DebuggingSet, heads: Sequence[Head], base: FloatArray
) -> Mapping[Head, float]:
    """How much the mean loss on bad inputs falls when a head alone gets its benign map."""
    before = float(losses(base, bad).mean())
    found = {}
    for head in heads:
        after = losses(trial.log_probabilities(bad.bad, [head]), bad)
        found[head] = before - float(after.mean())
    return found

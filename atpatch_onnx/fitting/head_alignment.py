"""The repair of anomalous heads: fitted in closed form to give benign contexts again.

For the chosen heads of a site, z being what they give for a token,

    corrected = z + u v^T z + b,     u, v of rank r

is the reduced-rank ridge regression (`low_rank`) of how contexts should change: not at all in clean
inputs; in bad ones, to what the heads give in the input's clean twin, or under their benign maps.
Which of the two, how many heads and which rank: what heals bad inputs that the regression has not
seen and keeps the answers to clean ones.

Inspired by the head-wise alignment of arXiv 2511.13789, whose formulas are not public; there heads
are fine-tuned. `models.head_alignment` trains the same correction end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from onnx import ModelProto

from ..classifier import Classifier
from ..data import Samples
from ..debugging_set import DebuggingSet
from ..detector import Detector
from ..errors import RefusedError
from ..model_file import ModelFile
from ..passes.align import REPAIRED, Align, find_context
from ..passes.head_maps import NormalSite
from ..passes.head_repair import Correction, build_head_repair
from ..passes.locate import Site
from ..patching import Patch, apply
from ..signature import DetectorScope
from .head_contexts import (
    ContextReader,
    benign_moments,
    by_site,
    clean_moments,
    entries_of,
    twin_moments,
)
from .head_importance import healed
from .head_reading import HeadReader, normal_sites
from .head_similarity import watch
from .heads import Head, Heads, head_names
from .job import Job
from .low_rank import Moments, reduced_rank_ridge
from .statistics import FloatArray
from .suspicious_heads import TRIED, Suspicious, suspicious_heads

TWIN, BENIGN = "twin", "benign"
"""What heads should give in a bad input: as in its twin, or as under their benign maps."""
RANKS = (1, 2, 4, 8, 16)
FIRST_RANK = 8
"""Of the repairs by which heads and targets are chosen."""
MORE = 4
"""Each further set of heads that is tried has so many times as many."""
UNSEEN = 0.3
"""Share of the bad inputs that repairs are tried on."""

Corrections = dict[str, Correction]


@dataclass(frozen=True)
class Repair:
    """A repair, a model of scope `context` without metadata, for `sites`; what its record says."""

    model: ModelProto
    sites: tuple[Site, ...]
    record: dict[str, object]


@dataclass(frozen=True)
class Tried:
    """A repair that was tried: share of bad inputs healed, of answers to clean ones kept."""

    heads: list[str]
    target: str
    rank: int
    healed: float
    agreement: float

    @property
    def worth(self) -> float:
        """What is maximised."""
        return self.healed + self.agreement


def fit_head_alignment(job: Job, clean: Samples, bad: DebuggingSet, options: Heads) -> Repair:
    """Fit the repair on clean and on bad inputs, a part of which choose among repairs.

    Raises: InputError for heads that are not there; RefusedError where no site has a context that
    could be repaired, or the chosen heads are of several sizes.
    """
    job = replace(job, sites=_repairable(job))
    sites = normal_sites(job, clean)
    reader = HeadReader(job, sites, options.similarity)
    watched = watch(reader.alike(clean), reader.alike(bad.bad))
    suspicious = suspicious_heads(job, sites, watched.rises, clean, bad, options)
    generator = job.generator()
    order = generator.permutation(bad.count)
    judged = max(1, round(UNSEEN * bad.count))
    learnt, unseen = bad.take(order[judged:]), bad.take(order[:judged])
    mixed = generator.permutation(clean.count)
    held = min(TRIED, clean.count // 2)
    unseen_clean, seen_clean = clean.take(mixed[:held]), clean.take(mixed[held:])
    fixed = bool(options.heads) or options.count is not None
    sets = [suspicious.heads] if fixed else _sets(suspicious, sites)
    every = list(dict.fromkeys(head for heads in sets for head in heads))
    fitted = _Fitting(job, sites, every, seen_clean, learnt, options.ridge)
    trials = RepairTrial(job, unseen, unseen_clean, options.scores)

    def attempt(heads: Sequence[Head], target: str, rank: int) -> tuple[Tried, Corrections]:
        found = fitted.corrections(heads, target, rank)
        return trials.run(found, head_names(heads), target, rank), found

    targets = (BENIGN,) if bad.clean is None else (TWIN, BENIGN)
    made = [
        (*attempt(heads, target, options.rank or FIRST_RANK), heads)
        for heads in sets
        for target in targets
    ]
    best = max(made, key=lambda found: found[0].worth)
    for rank in RANKS if options.rank is None else ():
        made.append((*attempt(best[2], best[0].target, rank), best[2]))
    chosen, corrections, _ = max(made, key=lambda found: (found[0].worth, -found[0].rank))
    record = suspicious.record | {
        "attempts": [asdict(tried) for tried, _, _ in made],
        "repair": asdict(chosen),
        "before": asdict(trials.run({}, [], "none", 0)),
        "ridge": options.ridge,
    }
    return as_repair(job, corrections, record)


def _sets(suspicious: Suspicious, sites: Sequence[NormalSite]) -> list[list[Head]]:
    """Sets of heads to try: the suspicious, more and more of the ranked, all of the main site."""
    sets = [suspicious.heads]
    while len(sets[-1]) < len(suspicious.ranked):
        sets.append(suspicious.ranked[: MORE * len(sets[-1])])
    counted = Counter(site for site, _ in suspicious.heads)
    main = next(site for site in sites if site.name == counted.most_common(1)[0][0])
    return [*sets, [(main.name, head) for head in range(main.heads)]]


def as_repair(job: Job, corrections: Mapping[str, Correction], record: dict[str, object]) -> Repair:
    """The repair with these corrections, by site. Raises: RefusedError for heads of several sizes.

    Corrections may come from `models.head_alignment` too, which trains them end to end.
    """
    sites = tuple(site for site in job.sites if site.name in corrections)
    parts = [corrections[site.name] for site in sites]
    sizes = {part.bias.shape for part in parts}
    if len(sizes) != 1:
        raise RefusedError(
            f"the repair would be of {len(sizes)} sizes of heads, which one file cannot hold: fit "
            "one repair for each with --sites"
        )
    model = build_head_repair(parts, job.opset, job.ir_version)
    repaired = {
        site.name: {"heads": np.flatnonzero(part.heads).tolist(), "of": len(part.heads)}
        for site, part in zip(sites, parts, strict=True)
    }
    return Repair(model, sites, record | {REPAIRED: repaired})


def repair_detector(repair: Repair) -> Detector:
    """A repair as a detector without a file."""
    names = (site.name for site in repair.sites)
    detector = Detector.unsaved(repair.model, names, scope=DetectorScope.CONTEXT)
    return replace(detector, training=repair.record)


def _repairable(job: Job) -> tuple[Site, ...]:
    """The sites with a context in the main graph. Raises: RefusedError."""
    found = {site: find_context(job.view, site) for site in job.sites if not site.path}
    usable = tuple(site for site, context in found.items() if not isinstance(context, str))
    if not usable:
        reason = next((str(r) for r in found.values()), "all sites are in branches: choose others")
        raise RefusedError(f"no heads of {job.model.path} can be repaired: {reason}")
    return usable


class _Fitting:
    """Fits corrections from moments that are collected once."""

    def __init__(
        self,
        job: Job,
        sites: Sequence[NormalSite],
        heads: Sequence[Head],
        clean: Samples,
        bad: DebuggingSet,
        ridge: float,
    ) -> None:
        self.job, self.bad, self.ridge = job, bad, ridge
        self.known = {site.name: site.heads for site in sites}
        self.reader = ContextReader(job, sites, heads)
        self._clean = clean_moments(self.reader, clean)
        self._bad: dict[object, dict[str, Moments]] = {}

    def corrections(self, heads: Sequence[Head], target: str, rank: int) -> Corrections:
        """The corrections of `heads`, by site."""
        bad = self._moments(heads, target)
        found = {}
        for name, own in by_site(heads, self.job.sites).items():
            read = self.reader.heads[name]
            size = len(self._clean[name].x) // len(read)
            index = entries_of(read, own, size)
            moments = self._clean[name].take(index).mixed(bad[name].take(index))
            u, v, b = reduced_rank_ridge(moments, min(rank, len(index)), self.ridge)
            found[name] = _spread(own, self.known[name], size, u, v, b)
        return found

    def _moments(self, heads: Sequence[Head], target: str) -> dict[str, Moments]:
        key = (target, tuple(heads) if target == BENIGN else ())
        if key not in self._bad:
            self._bad[key] = (
                twin_moments(self.reader, self.bad)
                if target == TWIN
                else benign_moments(self.reader, self.bad, heads)
            )
        return self._bad[key]


def _spread(
    heads: Sequence[int], count: int, size: int, u: FloatArray, v: FloatArray, b: FloatArray
) -> Correction:
    """The correction of some heads `[n * D, r]` among all."""

    def among(value: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        whole = np.zeros((count, size, *value.shape[1:]), np.float32)
        whole[list(heads)] = value.reshape(len(heads), size, *value.shape[1:])
        return whole

    return Correction(among(u), among(v), among(b))


class RepairTrial:
    """Tries repairs on the model itself: what they heal of bad inputs, what they keep of clean."""

    def __init__(self, job: Job, bad: DebuggingSet, clean: Samples, scores: str | None) -> None:
        self.job, self.bad, self.clean, self.scores = job, bad, clean, scores
        self._before = self._answers(job.model)

    def run(self, corrections: Corrections, heads: list[str], target: str, rank: int) -> Tried:
        """Try corrections, by site."""
        bad, clean = self._before
        if corrections:
            repair = as_repair(self.job, corrections, {})
            detector = repair_detector(repair)
            align = Align(dict.fromkeys(corrections, detector))
            edits = align(self.job.view, self.job.sites).edits
            content = apply(self.job.model, Patch(self.job.model.sha256, edits)).content()
            bad, clean = self._answers(ModelFile.from_bytes(content, self.job.model.path))
        share = float(healed(self._before[0], bad, self.bad).mean())
        agreement = float((clean.argmax(axis=1) == self._before[1].argmax(axis=1)).mean())
        return Tried(heads, target, rank, share, agreement)

    def _answers(self, model: ModelFile) -> tuple[FloatArray, FloatArray]:
        classifier = Classifier(model, self.job.provider, output=self.scores, batch=self.job.batch)
        bad, clean = (
            classifier.log_probabilities(samples, self.job.tick).astype(np.float64)
            for samples in (self.bad.bad, self.clean)
        )
        return bad, clean

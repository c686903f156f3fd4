"""The detector of anomalous heads: which heads say that an input is bad, and which are replaced.

With a debugging set, the heads that tell bad inputs from clean ones best are watched; the heads
that get their benign maps are ranked by how much more alike they become and by how much the loss
falls when they are replaced, and as many are taken as heal the set. Without one, each site is
watched on its own, and all heads of the sites that stand out are replaced.

Inspired by arXiv 2511.13789, of which only the abstract is public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..passes.head_maps import NormalSite
from ..passes.head_similarity import WatchedSite, build_head_similarity
from .head_reading import Alike, HeadReader, normal_sites
from .heads import Head, Heads, head_mask, head_names, named_heads
from .job import Job, ModelTrained
from .separation import auroc, rise
from .statistics import FloatArray
from .suspicious_heads import prefixes, suspicious_heads

MOST_WATCHED = 8
"""More heads would fit the trigger of the debugging set, which is not the only one there is."""


@dataclass(frozen=True)
class Watched:
    """What tells bad inputs from clean ones.

    heads: those whose mean decides; auroc: of that mean, on the inputs that it was chosen on;
    rises: how much each head rises, in spreads.
    """

    heads: tuple[Head, ...]
    auroc: float
    rises: Mapping[Head, float]


def fit_head_similarity(
    job: Job, clean: Samples, bad: DebuggingSet | None, options: Heads
) -> ModelTrained:
    """The detector of clean samples and, where there are any, bad inputs.

    In flow, heads are replaced at the last site that it looks at; with a second run at any.
    Raises: InputError for heads that are not there; RefusedError where no heads can be compared.
    """
    sites = normal_sites(job, clean)
    reader = HeadReader(job, sites, options.similarity)
    normal = reader.alike(clean)
    record: dict[str, object] = {
        "similarity": options.similarity,
        "positions": "buckets" if sites[0].buckets else "absolute",
        "sinks": {site.name: np.flatnonzero(site.sinks).tolist() for site in sites},
    }
    if bad is None:
        return _trained(job, _each_site(sites, normal, options), options.similarity, record)
    names = [site.name for site in sites]
    watched = watch(normal, reader.alike(bad.bad))
    last = max(watched.heads, key=lambda head: names.index(head[0]))[0]
    places = None if options.rerun else names[names.index(last) :]
    suspicious = suspicious_heads(job, sites, watched.rises, clean, bad, options, places)
    record |= suspicious.record
    record["watched"] = {name: watched.rises[h] for name, h in _named(watched.heads)}
    record["auroc"] = watched.auroc
    chosen = _together(sites, normal, watched, suspicious.heads)
    return _trained(job, chosen, options.similarity, record)


def _named(heads: Sequence[Head]) -> list[tuple[str, Head]]:
    return list(zip(head_names(heads), heads, strict=True))


def _trained(
    job: Job, watched: Sequence[WatchedSite], similarity: str, record: dict[str, object]
) -> ModelTrained:
    model = build_head_similarity(watched, similarity, job.opset, job.ir_version)
    by_name = {site.name: site for site in job.sites}
    observed = tuple(by_name[site.normal.name] for site in watched)
    applied = tuple(by_name[w.normal.name] for w in watched if w.suspicious.any())
    return ModelTrained(model, observed, applied, {}, record)


def _each_site(sites: Sequence[NormalSite], normal: Alike, options: Heads) -> list[WatchedSite]:
    """Every site watched on its own, by the mean over its heads; in flow the last acts for all."""
    norms = normal.norms()
    whitened = normal.whitened(norms)
    known = {site.name: site.heads for site in sites}
    last = len(sites) - 1
    found = []
    asked = head_mask(named_heads(options.heads, known), known)
    for index, site in enumerate(sites):
        weights = np.zeros((site.heads, len(sites)), np.float32)
        weights[:, index] = _in_spreads(whitened[site.name])
        every = np.full(site.heads, options.rerun or index == last)
        suspicious = asked[index, : site.heads] if options.heads else every
        group = index if options.rerun else None
        found.append(WatchedSite(site, norms[site.name], weights, suspicious, group))
    return found


def _in_spreads(values: FloatArray) -> float:
    """The weight of each of `values` `[N, n]` in their mean, in units of its spread."""
    spread = float(np.std(values.mean(axis=1)))
    return float(1 / (values.shape[1] * max(spread, 1e-3)))


def watch(normal: Alike, abnormal: Alike) -> Watched:
    """The heads that tell bad inputs from clean ones best."""
    norms = normal.norms()
    before, after = (alike.whitened(norms) for alike in (normal, abnormal))
    rises = {
        (name, head): rise(before[name][:, head], after[name][:, head])
        for name in norms
        for head in range(before[name].shape[1])
    }
    order = sorted(rises, key=lambda head: -rises[head])
    found = []
    for count in prefixes(min(len(order), MOST_WATCHED)):
        chosen = order[:count]
        means = (
            np.mean([values[name][:, head] for name, head in chosen], axis=0)
            for values in (before, after)
        )
        found.append(Watched(tuple(chosen), auroc(*means), rises))
    return max(found, key=lambda watched: (round(watched.auroc, 3), -len(watched.heads)))


def _together(
    sites: Sequence[NormalSite],
    normal: Alike,
    watched: Watched,
    suspicious: Sequence[Head],
) -> list[WatchedSite]:
    """The sites with heads that are watched, by one mean of all of these, or replaced."""
    norms = normal.norms()
    whitened = normal.whitened(norms)
    known = {site.name: site.heads for site in sites}
    weight = _in_spreads(np.stack([whitened[n][:, h] for n, h in watched.heads], axis=1))
    looked = head_mask(watched.heads, known)
    replaced = head_mask(suspicious, known)
    chosen = []
    for site, look, replace in zip(sites, looked, replaced, strict=True):
        if look.any() or replace.any():
            weights = (weight * look[: site.heads, None]).astype(np.float32)
            norm = norms[site.name]
            chosen.append(WatchedSite(site, norm, weights, replace[: site.heads]))
    return chosen

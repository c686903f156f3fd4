"""Where attention goes in some inputs, before and after the patch, read from the two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from .data import Batch, Samples
from .diffing import FlagReader
from .edits import Edit
from .model_file import ModelFile
from .passes.expose import expose, is_reachable, path_of
from .passes.graph_view import GraphView, Use
from .passes.locate import Site, locate
from .passes.opening.opening import Closed
from .passes.opening.registry import open_fused
from .passes.probe import Probe
from .passes.rerun import PREFIX as RERUN
from .passes.splice import Strategy
from .passes.views import NARROW
from .patching import about_patches
from .probed import Probed, by_sample
from .runtime import Array, Session

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SiteAttention:
    """One input at one patched site.

    before, after: mean of the map over its heads in the original and in the patched model,
        `[W, Q, K]`; W is 1 unless a sample has several maps, as the windows of an image.
    flagged: bool `[K]`, the columns that this site flags.
    """

    site: str
    before: Floats
    after: Floats
    flagged: NDArray[np.bool_]


def patched_sites(base: ModelFile, result: ModelFile) -> tuple[Site, ...]:
    """The sites of `base` that `result` patches and whose maps can be read."""
    named = {site["site"] for about in about_patches(result) for site in about["sites"]}
    view = GraphView.of(base.skeleton)
    return tuple(
        site
        for site in locate(base.skeleton).sites
        if site.name in named and is_reachable(view, site.path)
    )


def read_attention(
    base: ModelFile, result: ModelFile, samples: Samples, provider: str
) -> list[list[SiteAttention]]:
    """For each sample, its attention at every patched site, in the order of the model.

    What the patched model leaves as it was is taken from the original. Whole maps are held: give
    few samples. Sites in loops and generation operators are left out, as nothing leaves those.
    Raises: RefusedError if `result` carries no patch.
    """
    sites = patched_sites(base, result)
    flags = FlagReader(result, provider)
    before = _Before.of(base, sites, provider)
    after = _After.of(base, result, sites, provider)
    found = []
    for part in samples.batches(1):
        columns = {
            entry.site: column[0]
            for entry, column in zip(flags.sites, flags.columns(part), strict=True)
        }
        old = before.read(part)
        new = after.read(part) if any(column.any() for column in columns.values()) else {}
        found.append([SiteAttention(n, m, new.get(n, m), columns[n]) for n, m in old.items()])
    return found


@dataclass(frozen=True)
class _Before:
    """Maps of sites as they are: outputs by the name of the site."""

    session: Session
    maps: Mapping[str, str]

    @classmethod
    def of(cls, model: ModelFile, sites: Sequence[Site], provider: str) -> _Before:
        edits, _, maps = Probe(("mean",), "head_mean")(GraphView.of(model.skeleton), tuple(sites))
        return cls(Probed(model, edits, provider).session, maps)

    def read(self, part: Batch) -> dict[str, Floats]:
        found = self.session.run(part.feeds, list(self.maps.values()))
        return {site: _first(found[value], part.size) for site, value in self.maps.items()}


@dataclass(frozen=True)
class _After:
    """What takes the place of the maps in the patched model.

    own: what its host computes at sites in flow, which earlier sites have changed already;
    new: outputs with redistributed maps, empty where a branch does not run.
    """

    session: Session
    own: Mapping[str, str]
    new: Mapping[str, str]

    @classmethod
    def of(cls, base: ModelFile, result: ModelFile, sites: Sequence[Site], provider: str) -> _After:
        view = GraphView.of(result.skeleton)
        about = [entry for patch in about_patches(result) for entry in patch["sites"]]
        in_flow = {e["site"] for e in about if e["strategy"] != Strategy.RERUN.value}
        moved = [m for s in sites if s.name in in_flow and (m := _moved(s, base, view))]
        probe = Probe(("mean",), "head_mean", shared=f"atpatch/{_SEEN}")
        edits, _, own = probe(view, tuple(moved))
        new: dict[str, str] = {}
        for site in sites:
            more, value = _redistributed(view, site)
            edits += more
            new |= {site.name: value} if value else {}
        session = Probed(result, edits, provider).session
        return cls(session, {_known(name): value for name, value in own.items()}, new)

    def read(self, part: Batch) -> dict[str, Floats]:
        found = self.session.run(part.feeds, [*self.own.values(), *self.new.values()])
        maps = {site: _first(found[value], part.size) for site, value in self.own.items()}
        for site, value in self.new.items():
            if found[value].size:
                maps[site] = _first(found[value].astype(np.float32), part.size)
        return maps


_SEEN = "seen"
"""Before the names of sites that are probed in a model which has nodes of their own names."""


def _known(name: str) -> str:
    return name.removeprefix(f"{_SEEN}/")


def _redistributed(view: GraphView, site: Site) -> tuple[list[Edit], str]:
    """Edits that make the site's redistributed map `[B, H, Q, K]` an output, and its name."""
    wide = site.opening is None and site.elem_type in NARROW
    elem_type = TensorProto.FLOAT if wide else site.elem_type
    own = f"atpatch/{site.name}"
    values = [f"{p}/probabilities" for p in (f"{RERUN}/{site.name}", own, f"{own}/if_flagged")]
    if site.opening is None and site.rank == 4:
        # An output of a branch cannot be a second output of it.
        values.insert(0, f"{own}/guarded")
    for value in values:
        path = path_of(view, value)
        if path is not None and is_reachable(view, path):
            return expose(view, path, value, elem_type, 4)
    return [], ""


def _moved(site: Site, base: ModelFile, view: GraphView) -> Site | None:
    """The site as it stands in the patched model; None in a nested graph."""
    if site.path:
        return None
    node = base.skeleton.graph.node[site.node]
    if site.opening is not None:
        kept = (i for i, n in enumerate(view.nodes) if n.name == node.name and n.name)
        index = next(kept, None)
        opening = None if index is None else open_fused(view, view.nodes[index])
        if index is None or opening is None or isinstance(opening, Closed):
            return None
        return replace(site, name=f"{_SEEN}/{site.name}", node=index, opening=opening)
    index = view.producers.get(node.output[0])
    use = site.uses[0]
    reader = view.producers.get(base.skeleton.graph.node[use.node].output[0])
    if index is None or reader is None:
        return None
    return replace(site, name=f"{_SEEN}/{site.name}", node=index, uses=(Use(reader, use.slot),))


def _first(value: Array, batch: int) -> Floats:
    """The head mean of the maps of the first sample, `[W, Q, K]`."""
    own = by_sample(value, batch)[0]
    own = own.reshape(-1, *own.shape[-3:])
    return np.asarray(own.mean(axis=1), np.float32)

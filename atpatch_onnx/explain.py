"""How a site would be treated, in words, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .passes.expose import is_reachable
from .passes.functions import CALL
from .passes.graph_view import GraphView
from .passes.locate import Site

ELEMENT_BYTES = 4
"""Detectors read maps in float32."""


@dataclass(frozen=True)
class Explained:
    """What a patch does at a site.

    treatment: where it comes in.
    cost: what is computed for every input, flagged or not.
    map_bytes: size of one sample's map in float32; None where the graph does not say.
    observable: whether `fit` can read the map and telemetry can say what was flagged.
    """

    treatment: str
    cost: str
    map_bytes: int | None
    observable: bool


def explain(view: GraphView, site: Site) -> Explained:
    """What would be done at `site`; `view` is that of the main graph."""
    shape = site.facts.shape or (None, None)
    parts = [site.facts.heads, *shape[-2:]]
    known = [part for part in parts if isinstance(part, int)]
    size = math.prod(known) * ELEMENT_BYTES if len(known) == len(parts) else None
    of = "" if size is None else f" of {_bytes(size)} a sample"
    if site.opening is None:
        treatment = "in front of P V"
        cost = f"the map{of} is read by the detector"
    else:
        treatment = "beside the operator, which stays"
        cost = f"Q K^T and softmax once more, a map{of}, or the few rows that the detector wants"
    if any(attribute == CALL for _, attribute, _ in site.path):
        treatment += ", with the function's body in place of this call"
    observable = is_reachable(view, site.path)
    if not observable:
        treatment += " (fit the detector on the decoder exported by itself: nothing leaves a loop)"
    return Explained(treatment, cost, size, observable)


def _bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"

"""How a patch is spliced in: what is asked for, else what detectors ask for, else what is fast."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace

from .errors import InputError, RefusedError
from .passes.decisions import asked_of
from .passes.graph_view import GraphView
from .passes.locate import Sites
from .passes.redistribute import Redistribution
from .passes.rerun import Plan, plan_rerun
from .passes.splice import Strategy, Treatment
from .signature import DetectorScope


def choose_strategy(
    wanted: str | None,
    provider: str,
    sha256: str,
    view: GraphView,
    found: Sites,
    treatments: Mapping[str, Treatment],
    modes: AbstractSet[str | None],
    *,
    remember: bool,
) -> Strategy:
    """What is asked for; else what the detectors ask for; else `select` for CUDA, where an `If` at
    each site costs a synchronisation, and `guard` for CPU."""
    if wanted is not None:
        try:
            return Strategy(wanted)
        except ValueError:
            raise InputError(f"--strategy {wanted}: choose guard, select or rerun") from None
    detectors = [treatment.detector for treatment in treatments.values()]
    # A detector has tried what it asks for, on the model that it was fitted for.
    asked = {d.strategy if d is not None and d.host_sha256 == sha256 else None for d in detectors}
    if asked == {Strategy.RERUN.value} and modes <= {Redistribution.PRUNE.value}:
        fitting = {
            site.name: t.detector
            for site in found.sites
            if (t := treatments.get(site.name)) and t.detector is not None
            if t.detector.layer_of(site.name, site.index) is not None
        }
        with suppress(RefusedError):
            asking = asked_of(fitting, found.sites, remember=remember)
            plan = plan_rerun(view, found.sites, asking.detecting, asking.applied, asking.answer)
            if isinstance(plan, Plan):
                return Strategy.RERUN
    return Strategy.SELECT if provider == "cuda" else Strategy.GUARD


def pruning(
    treatments: Mapping[str, Treatment], modes: AbstractSet[str | None]
) -> dict[str, Treatment]:
    """The treatments of a second run.

    modes: the redistributions that were asked for. Raises: InputError for several, or benign.
    """
    detectors = [treatment.detector for treatment in treatments.values()]
    if all(d is not None and d.scope is DetectorScope.MODEL for d in detectors):
        return dict(treatments)  # it decides for each site
    if Redistribution.BENIGN.value in modes or len(modes) > 1:
        raise InputError(
            "--strategy rerun treats the flagged columns alike at every site, also where the "
            "detector knows no benign attention: choose --redistribute prune or uniform for all "
            "sites, or --strategy guard"
        )
    mode = Redistribution(next(iter(modes), None) or Redistribution.PRUNE)
    return {name: replace(each, redistribution=mode) for name, each in treatments.items()}

"""How a patch is spliced in: what is asked for, else what detectors ask for, else what is fast."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from .detector import second_run_of
from .errors import InputError
from .passes.graph_view import GraphView
from .passes.locate import Sites
from .passes.observe import observed_sites
from .passes.redistribute import Redistribution
from .passes.rerun import Plan, plan_rerun
from .passes.splice import Strategy, Treatment
from .second_run import SecondRun
from .signature import DetectorScope


def choose_strategy(
    wanted: str | None,
    provider: str,
    sha256: str,
    view: GraphView,
    found: Sites,
    treatments: Mapping[str, Treatment],
    modes: AbstractSet[str | None],
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
        detecting = [
            site
            for site in found.sites
            if (t := treatments.get(site.name)) and t.detector is not None
            if t.detector.layer_of(site.name, site.index) is not None
        ]
        whole = [d for d in detectors if d is not None and d.scope is DetectorScope.MODEL]
        second = second_run_of(detectors) or SecondRun()
        applied = list(second.sites) or None
        if whole:
            applied = [site.name for site in detecting]
            detecting = observed_sites(whole[0], found.sites)
        output = None if second.answer is None else second.answer.output
        if isinstance(plan_rerun(view, found.sites, detecting, applied, output), Plan):
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

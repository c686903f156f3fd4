"""From the command line and a plan to what is done at each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .detector import Detector, check_threshold, load_detector
from .errors import InputError
from .passes.locate import Site, Sites
from .passes.redistribute import Redistribution
from .passes.splice import Treatment
from .plan import SitePlan, choose_sites
from .signature import DetectorScope


@dataclass(frozen=True)
class Options:
    """What the command line says for every site, unless the plan says otherwise.

    opset: of the model, at which detectors must be had.
    remember: whether flagged columns are carried from run to run: those of a decoder are known
        without a detector.
    """

    opset: int
    detector: Path | None
    columns: tuple[int, ...]
    redistribute: str | None
    threshold: float | None
    remember: bool = False

    def check(self) -> None:
        """Raises: InputError for options that exclude each other or have no such value."""
        if self.detector and self.columns:
            raise InputError("--detector and --columns exclude each other: give one of them")
        if self.columns and self.threshold is not None:
            raise InputError("--threshold belongs to --detector: --columns are always flagged")
        if self.threshold is not None:
            check_threshold(self.threshold, "--threshold")


def choose_treatments(
    found: Sites,
    wanted: Sequence[str | int],
    plans: list[SitePlan],
    plan: Path | None,
    options: Options,
) -> dict[str, Treatment]:
    """What to do at each chosen site, by name. Raises: InputError, RefusedError."""
    options.check()
    by_name = {entry.name: entry for entry in plans}
    unknown = set(by_name) - {site.name for site in found.sites}
    if unknown:
        raise InputError(
            f"the plan {plan} names the site '{sorted(unknown)[0]}', which the model does not "
            "have: write a new one with inspect --plan"
        )
    loaded: dict[Path, Detector] = {}
    treatments = {}
    for site in choose_sites(found.sites, wanted):
        entry = by_name.get(site.name, SitePlan(site.name, patch=not plans))
        if entry.patch:
            treatments[site.name] = _treatment(site, entry, plan, options, loaded)
    return treatments


def _treatment(
    site: Site, entry: SitePlan, plan: Path | None, options: Options, loaded: dict[Path, Detector]
) -> Treatment:
    columns = entry.columns or (() if entry.detector else options.columns)
    _check_columns(columns)
    carried = options.remember and not (entry.detector or options.detector)
    detector = None if columns or carried else _detector(site, entry, plan, options, loaded)
    name = entry.redistribute or options.redistribute or _default(detector)
    try:
        mode = Redistribution(name)
    except ValueError:
        raise InputError(f"--redistribute {name}: choose benign, uniform or prune") from None
    if mode is Redistribution.BENIGN and (detector is None or not detector.gives_benign):
        what = "with --columns" if detector is None else f"{detector.path} has no output benign:"
        raise InputError(
            "--redistribute benign needs a detector that knows the benign attention; "
            f"{what} choose prune or uniform"
        )
    if entry.threshold is not None:
        check_threshold(entry.threshold, f"the plan {plan}: site '{site.name}': threshold")
    threshold = entry.threshold if entry.threshold is not None else options.threshold
    return Treatment(mode, detector, columns, threshold)


def _default(detector: Detector | None) -> str:
    """What flagged columns get unless somebody says otherwise."""
    if detector is None or (detector.scope is DetectorScope.MODEL and not detector.gives_benign):
        return "prune"
    return "benign" if detector.gives_benign else "uniform"


def _detector(
    site: Site, entry: SitePlan, plan: Path | None, options: Options, loaded: dict[Path, Detector]
) -> Detector:
    path = options.detector
    if entry.detector and plan is not None:
        path = plan.parent / entry.detector
    if path is None:
        raise InputError(
            f"no detector for site '{site.name}': give --detector det.onnx (make one with "
            "atpatch-onnx fit), or --columns for columns that are known"
        )
    if path not in loaded:
        loaded[path] = load_detector(path, options.opset, options.threshold)
    return loaded[path]


def _check_columns(columns: Sequence[int]) -> None:
    if any(abs(column) >= 2**31 for column in columns):
        raise InputError(f"--columns {max(columns, key=abs)}: no map has so many columns")


def check_bindings(bindings: Mapping[str, str], detectors: Iterable[Detector]) -> None:
    """Raises: InputError for a binding of an input that no detector has."""
    known = {name for detector in detectors for name in detector.extra_inputs}
    unknown = sorted(set(bindings) - known)
    if unknown:
        listed = ", ".join(sorted(known)) or "none besides attention and layer"
        raise InputError(
            f"--bind {unknown[0]}=...: no detector has such an input (found: {listed})"
        )


def repairs_of(
    treatments: Mapping[str, Treatment], decisions: Mapping[str, object]
) -> dict[str, Detector]:
    """The repairs among the treatments, by site; none where there are detectors.

    decisions: options that are about what is flagged, by their names.
    Raises: InputError for both at once, or for a decision about a repair, which is always on.
    """
    detectors = {name: treatment.detector for name, treatment in treatments.items()}
    repairs = {n: d for n, d in detectors.items() if d and d.scope is DetectorScope.CONTEXT}
    if not repairs:
        return {}
    first = next(iter(repairs.values()))
    if len(repairs) < len(treatments):
        raise InputError(
            f"{first.path} is a repair, which is always on, and other sites have detectors: patch "
            "twice, the repaired model with the detectors"
        )
    given = [name for name, value in decisions.items() if value not in (None, False)]
    if given:
        raise InputError(
            f"{given[0]} is about what is flagged, and {first.path} is a repair, which is always "
            "on: leave it out"
        )
    return repairs

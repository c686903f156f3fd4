"""CleanSight: a detector of scope `model` for vision-language models, from clean inputs.

The literal method: the ratio of visual to prompt attention decides, at 10/32 to 24/32 of the depth,
and keys above 0.02 are pruned from there on. Where there are bad inputs, sites are chosen that
separate them from clean ones. With further statistics, so is the direction in which they differ,
and for a second run, how many keys are pruned.

Source: CleanSight, arXiv 2603.12989.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..errors import InputError
from ..passes.cleansight import Distance, Pruning, build_cleansight
from ..passes.locate import Site
from ..passes.visual_prompt import OPSET
from ..passes.visual_ratio import Statistic
from .job import Job, ModelTrained
from .separation import auroc
from .visual_prompt import parse, sequence_sites
from .visual_pruning import Cure, gentlest_cure
from .visual_statistics import Collector, Found, Key, distances, normal, towards

FIRST_SHARE, LAST_SHARE = 10 / 32, 24 / 32
"""The paper's detection sites, as shares of the depth."""
GAIN = 0.002
"""A further site must raise the AUROC by more than this."""
TOLERANCE = 0.0001
"""An AUROC that is lower by this is as good, at fewer sites."""
PAPERS_TAU = 0.02
LITERAL = (Statistic.RATIO,)
"""What the paper measures."""
VARIANT = (Statistic.LOG_RATIO, Statistic.COLUMNS)
"""What tells bad inputs from clean ones on small decoders too."""


@dataclass(frozen=True)
class CleanSight:
    """What can be asked of `fit_cleansight`.

    visual, prompt: `START:END`, places among the tokens of an input that are no padding, or the
    name of a mask `[B, K]` of the model; an empty prompt is all behind the image.
    statistics: which to use (see `Statistic`); with bad inputs, which to choose from. None: the
    paper's ratio, or with bad inputs `VARIANT`.
    tau: keys with more of the last row in any head are pruned; in the literal method (the ratio
    alone) at the last detection site, else at any site, and one at least. None: 0.02; but in a
    second run, if not literal, what heals bad inputs.
    detection: names of the sites to look at; empty: choose. rerun: the decision is applied at all
    sites, in a second run, and not from the last detection site on.
    """

    visual: str
    prompt: str = ""
    statistics: tuple[str, ...] | None = None
    tau: float | None = None
    detection: tuple[str, ...] = ()
    rerun: bool = False


@dataclass(frozen=True)
class _Choice:
    """What to measure, and how far from normal it is; auroc: on inputs not fitted on."""

    keys: tuple[Key, ...]
    distance: Distance
    auroc: float | None

    @property
    def sites(self) -> int:
        """How many are looked at."""
        return len({site for site, _ in self.keys})


def fit_cleansight(
    job: Job, clean: Samples, bad: DebuggingSet | None, options: CleanSight
) -> ModelTrained:
    """The detector of clean samples; with bad ones, at the sites that tell them apart best.

    In the literal method (the ratio alone) its anomaly is 0 where no key is above tau, however far
    the input is from normal.
    Raises: InputError, RefusedError.
    """
    statistics = _check(job, options, VARIANT if bad is not None else LITERAL)
    asked = parse(job.view, options.visual, options.prompt)
    sites = sequence_sites(job, clean)
    collect = Collector(job, _candidates(sites, options, bad), asked, statistics)
    found, triggered = collect(clean), None if bad is None else collect(bad.bad)
    choice = _choose(job, collect, found, triggered, options)
    if triggered is not None and choice.distance is Distance.PROJECTION:
        tables = towards(choice.keys, found, triggered)
    else:
        tables = normal(choice.keys, found)
    names = {site for site, _ in choice.keys}
    observed = tuple(site for site in sites if site.name in names)
    apply = sites if options.rerun else sites[sites.index(observed[-1]) :]
    literal = statistics == LITERAL
    if not literal and options.rerun:
        observed = sites
    rows = tuple(site.name for site in (observed[-1:] if literal else observed))

    def build(tau: float) -> ModelProto:
        return build_cleansight(
            [site.name for site in observed],
            tables,
            choice.distance,
            Pruning(rows, tau, strongest=not literal),
            asked.parts,
            job.opset,
            job.ir_version,
        )

    cure = Cure(PAPERS_TAU if options.tau is None else options.tau, apply, None)
    if options.tau is None and bad is not None and options.rerun and not literal:
        cure = gentlest_cure(job, sites, build, asked.bindings, bad.bad)
    record: dict[str, object] = {
        "visual": options.visual,
        "prompt": options.prompt,
        "tau": cure.tau,
        "distance": str(choice.distance),
        "measured": [{"site": site, "statistic": str(name)} for site, name in choice.keys],
        "auroc": choice.auroc,
        "healed": cure.healed,
    }
    return ModelTrained(build(cure.tau), observed, cure.apply, asked.bindings, record)


def _check(job: Job, options: CleanSight, default: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
    """The statistics asked for. Raises: InputError."""
    if job.opset < OPSET:
        raise InputError(
            f"{job.model.path} is at opset {job.opset}, and a CleanSight detector needs {OPSET}: "
            f"export the model at opset {OPSET} or later"
        )
    if options.tau is not None and not 0 <= options.tau < 1:
        raise InputError(f"--tau {options.tau:g}: a share of attention is at least 0 and below 1")
    wanted = default if options.statistics is None else options.statistics
    unknown = [name for name in wanted if name not in list(Statistic)]
    if unknown or not wanted:
        raise InputError(
            f"--statistics {unknown[0] if unknown else '(none)'}: choose from "
            f"{', '.join(Statistic)}"
        )
    return tuple(Statistic(name) for name in dict.fromkeys(wanted))


def _candidates(
    sites: Sequence[Site], options: CleanSight, bad: DebuggingSet | None
) -> tuple[Site, ...]:
    """Sites that may be detection sites."""
    names = [site.name for site in sites]
    unknown = [name for name in options.detection if name not in names]
    if unknown:
        raise InputError(
            f"'{unknown[0]}' is no site of the sequence with the image: choose {', '.join(names)}"
        )
    if options.detection:
        return tuple(site for site in sites if site.name in options.detection)
    return tuple(sites) if bad is not None else papers_share(sites)


def papers_share(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites between 10/32 and 24/32 of the depth; the last before, where none is."""
    first = min(math.ceil(FIRST_SHARE * len(sites)), math.floor(LAST_SHARE * len(sites)))
    return tuple(sites[first : math.floor(LAST_SHARE * len(sites)) + 1])


def _choose(
    job: Job, collect: Collector, found: Found, bad: Found | None, options: CleanSight
) -> _Choice:
    """What to measure where, as well as possible at as few sites as possible."""
    every = tuple(collect.keys)
    if bad is None:
        return _Choice(every, Distance.NORM, None)
    seen, unseen = _halves(job, found)
    triggered, judged = _halves(job, bad)

    def norm(keys: tuple[Key, ...]) -> float:
        tables = normal(keys, seen)
        return auroc(*(distances(tables, Distance.NORM, part) for part in (unseen, bad)))

    def projection(keys: tuple[Key, ...]) -> float:
        tables = towards(keys, seen, triggered)
        return auroc(*(distances(tables, Distance.PROJECTION, part) for part in (unseen, judged)))

    keys = every if options.detection else _greedily(every, norm)
    choices = [_Choice(keys, Distance.NORM, norm(keys))]
    smooth = tuple(key for key in every if key[1] is not Statistic.RATIO)
    names = list(dict.fromkeys(site for site, _ in smooth))
    for count in [len(names)] if options.detection else range(1, len(names) + 1):
        part = tuple(key for key in smooth if key[0] in names[:count])
        choices.append(_Choice(part, Distance.PROJECTION, projection(part)))
    best = max(choice.auroc or 0 for choice in choices)
    good = [choice for choice in choices if (choice.auroc or 0) >= best - TOLERANCE]
    return min(good, key=lambda choice: choice.sites)


def _halves(job: Job, found: Found) -> tuple[Found, Found]:
    order = job.generator().permutation(found.count)
    half = (found.count + 1) // 2
    return found.take(order[:half]), found.take(order[half:])


def _greedily(keys: Sequence[Key], worth: Callable[[tuple[Key, ...]], float]) -> tuple[Key, ...]:
    """Add what raises the worth most, as long as that is by more than `GAIN`."""
    chosen: tuple[Key, ...] = ()
    best = -math.inf
    while True:
        further = [(worth((*chosen, key)), -i) for i, key in enumerate(keys) if key not in chosen]
        value, place = max(further, default=(-math.inf, 0))
        if value <= best + GAIN:
            return tuple(key for key in keys if key in chosen)
        best, chosen = value, (*chosen, keys[-place])

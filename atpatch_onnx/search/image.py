"""Search for image triggers: for each class the small patch that sends other images to it.

A backdoored class has a patch that works on nearly every image, and other classes have none. The
patch may work wherever it is put, or at one place only, so both are searched:

1. Survey: random patches anywhere, and plain ones at each place of a grid; one run of the model
   judges a patch for all classes at once.
2. For each class, a few generations of CMA-ES on patches anywhere and at its most promising
   places, then more on the best of these. Every class gets the same effort, so that their results
   can be compared.
3. More for the leading classes, also where their patches work best of all places.

Of a model with many classes, as one that answers with words, only those are searched toward which
the survey's patches move images furthest.

Source: trigger inversion, Neural Cleanse (Wang et al., IEEE S&P 2019), here without gradients;
separable CMA-ES, Ros and Hansen (PPSN 2008).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError
from .image_layout import ImageLayout, Places
from .patch_arm import Arm, Bench
from .problem import Evidence, Finding, Problem
from .surveying import Survey, survey
from .token_size import token_size
from .verdict import FEWEST_OTHERS, SUCCESS


@dataclass(frozen=True)
class Effort:
    """How much is tried; generations are of `patch_arm.POPULATION` patches."""

    first: int = 6
    """Generations for each kind of place of each class."""
    second: int = 14
    """More, for the best kind of place of each class."""
    most: int = 24
    """Classes that are searched after the survey."""
    leaders: int = 3
    """Classes without a good patch that get more than that."""
    third: int = 30
    spots: int = 2
    """Single places that are tried for each class."""


SHARE = 8
"""A patch is this share of the image's shorter side."""
LEAST_SIDE = 2
LEAST_PLACES = 4
"""Fewer are not anywhere."""
LEAST_RIVAL = 0.3
RIVAL = "success above that of patches cut from images of the class"
AS_GOOD = 0.1
"""Success that may be lost where a patch is put anywhere: it is what a backdoor mostly is."""
MOVED, WIDENED = 98, 99
"""Seeds of searches that begin from the result of another."""
GOOD_ENOUGH = 0.98
"""Success on search images at which a class needs no more generations."""


def search(problem: Problem, effort: Effort = Effort()) -> Iterator[Finding]:
    """Yield the best patch toward each target, again when it has become better.

    Raises: InputError where the data are no images; OutOfTimeError.
    """
    layout = ImageLayout.of(problem.search)
    side = max(-(-min(layout.height, layout.width) // SHARE), LEAST_SIDE)
    if side >= min(layout.height, layout.width):
        raise InputError(f"the images are {layout.height} x {layout.width}: too small for a patch")
    bench = Bench(problem, layout, side)
    compared = len(problem.targets) > FEWEST_OTHERS
    spots = grid(layout, side, max(side // 2, 1))
    known = survey(bench, spots, problem.seed)
    problem.tick(10)
    anywhere = grid(layout, side, token_size(problem.model) or side)
    if len(anywhere) < LEAST_PLACES:
        anywhere = grid(layout, side, side)

    def finding(arm: Arm) -> Finding:
        found = arm.finding(problem)
        return found if compared else replace(found, evidence=_evidence(arm, found))

    leading = {}
    targets = _promising(known, problem.targets, effort.most)
    for number, target in enumerate(targets):
        arms = _arms(known, anywhere, bench, target, effort, problem.seed)
        best = _race(arms, effort)
        leading[target] = best
        yield finding(best)
        problem.tick(_share(number, len(targets), 60))
    order = _leaders(leading, effort)
    for number, target in enumerate(order):
        seed = (problem.seed, target)
        yield finding(_improved(leading[target], spots, anywhere, effort, seed))
        problem.tick(_share(number, len(order), 30))


def _promising(known: Survey, targets: Sequence[int], most: int) -> list[int]:
    """The targets toward which the survey got nearest, in their own order."""
    if len(targets) <= most:
        return list(targets)
    nearest = sorted(targets, key=lambda target: known.least_loss(target))[:most]
    return sorted(nearest)


def grid(layout: ImageLayout, side: int, step: int) -> Places:
    """Places of a patch at multiples of `step`, and flush with the far edges if step < side."""

    def along(length: int) -> list[int]:
        last = length - side
        starts = range(0, last + 1, step)
        return sorted({*starts, last} if step < side else {*starts})

    return np.array([(r, c) for r in along(layout.height) for c in along(layout.width)], np.int64)


def _arms(
    known: Survey, anywhere: Places, bench: Bench, target: int, effort: Effort, seed: int
) -> list[Arm]:
    arms = [Arm(bench, target, anywhere, known.anywhere(target), (seed, target, 0))]
    for number, (place, patch) in enumerate(known.spots(target, effort.spots), 1):
        arms.append(Arm(bench, target, place[None], patch, (seed, target, number)))
    return arms


def _race(arms: list[Arm], effort: Effort) -> Arm:
    """Some generations for each, more for the best of them."""
    for arm in arms:
        arm.run(effort.first, GOOD_ENOUGH)
    best = min(arms, key=lambda arm: arm.loss)
    best.run(effort.second, GOOD_ENOUGH)
    return best


def _leaders(leading: dict[int, Arm], effort: Effort) -> list[int]:
    """The classes with a good patch, and the next best."""
    order = sorted(leading, key=lambda target: leading[target].loss)
    good = [target for target in order if leading[target].success >= SUCCESS]
    return good + [target for target in order if target not in good][: effort.leaders]


def _improved(
    arm: Arm, spots: Places, anywhere: Places, effort: Effort, seed: tuple[int, int]
) -> Arm:
    """More generations: where the patch is, where it works best, and anywhere if it works there."""
    arm.run(effort.third, GOOD_ENOUGH)
    if arm.success < SUCCESS:
        moved = arm.elsewhere(arm.best_place(spots)[None], (*seed, MOVED))
        moved.run(effort.third, GOOD_ENOUGH)
        arm = min(arm, moved, key=lambda each: each.loss)
    if len(arm.places) > 1 or arm.success < SUCCESS:
        return arm
    wide = arm.elsewhere(anywhere, (*seed, WIDENED))
    wide.run(effort.third, GOOD_ENOUGH)
    return wide if wide.success >= max(SUCCESS, arm.success - AS_GOOD) else arm


def _evidence(arm: Arm, found: Finding) -> Evidence:
    """How much better the patch is than the best that is cut from images of the class."""
    rival = max(arm.rival(), LEAST_RIVAL)
    return Evidence(found.success - rival, SUCCESS - LEAST_RIVAL, RIVAL)


def _share(number: int, count: int, percents: int) -> int:
    """Percents that step `number` of `count` adds, so that all steps add up to `percents`."""
    return percents * (number + 1) // count - percents * number // count

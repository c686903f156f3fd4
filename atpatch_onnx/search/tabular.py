"""Search for values that send any row of a table to a class.

Every value that a column has in the data is put into rows of other classes; the best are extended
to two and three columns by beam search.

Columns that mean the class, as capital gains do where the class is a high income, send rows there
in a clean model too, and rightly. The evidence for a backdoor is therefore what the data does not
explain: an additive logistic regression is fitted to the labels of clean rows, which have no
trigger, and only those rows count for which it finds the class implausible before and after the
values are put in, and after some of them are. Clean networks disagree with it too, the more so the
less data they had: up to 0.74 of such rows in networks for tables of 300 to 2,000 rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from ..protected import Protected
from ..rates import Rate
from .problem import Evidence, Finding, Problem, Stamped, judged
from .surrogate import Surrogate

THRESHOLD = 0.8
MEANING = (
    "share of the rows for which clean data makes the class implausible that go there, lower end "
    "of its 95 % interval"
)

MOST_COLUMNS = 3
VALUES = 32
"""Values of a column that are tried."""
ROWS = 64
AGAIN, AGAIN_ROWS = 32, 256
WIDTH, POOL = 8, 96
BETTER = 0.02
IMPLAUSIBLE = 0.2
EXPLAINED = 1e-3
TOGETHER = 32


@dataclass(frozen=True)
class Flip:
    """A value for a column."""

    field: Protected
    value: float


@dataclass(frozen=True)
class TabularTrigger:
    """Values that columns get."""

    flips: tuple[Flip, ...]

    @property
    def size(self) -> float:
        """Columns."""
        return len(self.flips)

    @property
    def description(self) -> str:
        """The columns and what they are set to."""
        return ", ".join(f"{flip.field.name} = {flip.value:g}" for flip in self.flips)

    def parts(self) -> Iterator[TabularTrigger]:
        """It, and what is left of it without some of its columns."""
        for size in range(1, len(self.flips) + 1):
            for flips in itertools.combinations(self.flips, size):
                yield TabularTrigger(flips)

    def put(self, samples: Samples, generator: np.random.Generator) -> Stamped:
        """Copies of `samples` with the values in each."""
        del generator
        for flip in self.flips:
            samples = flip.field.flipped(samples, flip.value)
        return Stamped(samples, None)

    def record(self) -> dict[str, object]:
        """It as JSON."""
        return {
            "columns": [f.field.name for f in self.flips],
            "values": [f.value for f in self.flips],
        }

    def picture(self, samples: Samples) -> bytes | None:
        """There is nothing to see."""
        del samples
        return None


def search(problem: Problem) -> Iterator[Finding]:
    """The best values toward each target, in one column, then in two and three.

    Raises: OutOfTimeError, and InputError where no input has columns.
    """
    fields = columns(problem)
    flips = [
        TabularTrigger((Flip(field, float(value)),))
        for field in fields
        if len(field.distinct(problem.search)) > 1
        for value in field.values(problem.search, VALUES)
    ]
    if not flips:
        raise InputError("every column has the same value in all samples: give more varied data")
    surrogates = _surrogates(problem, fields)
    scans = {t: _Scan(problem, t, surrogates[t]) for t in problem.targets}
    found: dict[int, Finding] = {}
    singles = {}
    for target, scan in scans.items():
        singles[target] = scan.sorted(flips)
        found[target] = scan.judged(singles[target][0])
        yield found[target]
    problem.tick(40)
    beams = dict(singles)
    for _ in range(1, min(MOST_COLUMNS, len(fields))):
        for target, scan in scans.items():
            best = found[target].evidence
            if best is None or best.suspicious:
                continue
            beams[target] = scan.extended(beams[target], singles[target])
            if not beams[target]:
                continue
            longer = scan.judged(beams[target][0])
            if longer.evidence and longer.evidence.score > best.score + BETTER:
                found[target] = longer
                yield longer
        problem.tick(30)


def columns(problem: Problem) -> list[Protected]:
    """Every column of every table among the inputs, and every input with one value a sample."""
    found = []
    for name, array in problem.search.arrays.items():
        if array.dtype.kind not in "fiub" or array.ndim not in (1, 2):
            continue
        alone = array.ndim == 1 or array.shape[1] == 1
        several = len(problem.search.arrays) > 1
        for column in [None] if alone else range(array.shape[1]):
            label = name if column is None else f"{name}:{column}" if several else str(column)
            found.append(Protected(label, name, column))
    return found


def _surrogates(problem: Problem, fields: Sequence[Protected]) -> dict[int, Surrogate]:
    both = joined([problem.search, problem.held])
    labels = np.concatenate((problem.search_labels, problem.held_labels))
    return {t: Surrogate.fit(fields, both, labels == t) for t in problem.targets}


@dataclass(frozen=True)
class _Scan:
    """The stages, toward one target at a time.

    rows: clean rows of other classes, with what the surrogate says of each.
    """

    problem: Problem
    target: int
    surrogate: Surrogate

    def sorted(self, triggers: Sequence[TabularTrigger]) -> list[TabularTrigger]:
        """The triggers, the best first; the better part of them on more rows."""
        some = self._sorted(triggers, ROWS)
        return self._sorted(some[:AGAIN], AGAIN_ROWS) + some[AGAIN:]

    def _sorted(self, triggers: Sequence[TabularTrigger], count: int) -> list[TabularTrigger]:
        """The triggers in the order of how likely they make the target where it is implausible."""
        labels, generator = self.problem.search_labels, np.random.default_rng(self.problem.seed)
        rows = self.problem.search.take(
            generator.permutation(np.flatnonzero(labels != self.target))[:count]
        )
        values: list[float] = []
        for start in range(0, len(triggers), TOGETHER):
            part = triggers[start : start + TOGETHER]
            stamped = joined([trigger.put(rows, generator).samples for trigger in part])
            said = self.problem.classifier.log_probabilities(stamped)[:, self.target]
            share = np.exp(said).reshape(len(part), -1)
            surprise = np.stack([self.implausible(rows, trigger) for trigger in part])
            # What the data explains comes last, in its own order.
            values += ((share * surprise).mean(axis=1) + EXPLAINED * share.mean(axis=1)).tolist()
        return [triggers[i] for i in np.argsort(-np.array(values), kind="stable")]

    def implausible(self, rows: Samples, trigger: TabularTrigger | None) -> NDArray[np.bool_]:
        """Where the data speaks against the target, whatever part of the trigger is in the row."""
        found = self.surrogate.shares(rows) < IMPLAUSIBLE
        for part in trigger.parts() if trigger else ():
            put = part.put(rows, np.random.default_rng(0)).samples
            found &= self.surrogate.shares(put) < IMPLAUSIBLE
        return np.asarray(found)

    def extended(
        self, triggers: Sequence[TabularTrigger], pool: Sequence[TabularTrigger]
    ) -> list[TabularTrigger]:
        """The best of `triggers` with a column more."""
        longer: dict[frozenset[Flip], TabularTrigger] = {}
        for start in triggers[:WIDTH]:
            used = {flip.field for flip in start.flips}
            for more in pool[:POOL]:
                if more.flips[0].field not in used:
                    trigger = TabularTrigger(start.flips + more.flips)
                    longer.setdefault(frozenset(trigger.flips), trigger)
        return self.sorted(list(longer.values()))

    def judged(self, trigger: TabularTrigger) -> Finding:
        """What a trigger does in held-out rows, with the evidence for a backdoor."""
        rows = self.problem.held.take(np.flatnonzero(self.problem.held_labels != self.target))
        put = trigger.put(rows, np.random.default_rng(0)).samples
        sent = self.problem.classifier.predictions(put) == self.target
        surprised = int((sent & self.implausible(rows, trigger)).sum())
        against = int(self.implausible(rows, None).sum())
        score = Rate.counted(surprised, against).low if against else 0.0
        evidence = Evidence(score, THRESHOLD, MEANING)
        return replace(judged(self.problem, self.target, trigger), evidence=evidence)


def joined(parts: Sequence[Samples]) -> Samples:
    """All samples of all parts."""
    first = parts[0]
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts]) if array.ndim else array
        for name, array in first.arrays.items()
    }
    return replace(first, arrays=arrays, count=sum(part.count for part in parts))

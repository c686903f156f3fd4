"""What a scan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .verdict import Judged, Verdict


@dataclass(frozen=True)
class ClassReport:
    """The best trigger toward one class.

    success: share of held-out inputs of other classes that it sends there; natural: the same
        without it; loss: mean cross-entropy toward the class on the same inputs.
    size: pixels, tokens or features; trigger: it as JSON.
    outlier: how far its success lies above that of the lower half of the other classes, in robust
        standard deviations of the log-odds; None where there are too few classes.
    evidence: what speaks for a backdoor in this class alone, where the search knows: the score,
        the threshold and what it means.
    margin: by how much the criterion is passed, in its own units; negative: missed; None: it
        cannot be applied before every class has been searched.
    """

    target: int
    description: str
    size: float
    success: float
    natural: float
    loss: float
    outlier: float | None
    evidence: dict[str, object] | None
    margin: float | None
    suspicious: bool
    picture: Path | None
    trigger: dict[str, object]


@dataclass(frozen=True)
class ScanReport:
    """What `scan` found.

    verdict: `backdoored`, `clean` or `undecided` (out of budget).
    target: the class of the strongest trigger, the first of `suspicious` where there is any.
    output: the debugging set; None where none was written.
    state: where the search is kept for the next run, if it was not finished.
    searched, held: clean inputs that were searched on and that results are from.
    runs: samples that the model was run on; seconds: of this run.
    """

    verdict: Verdict
    target: int | None
    margin: float | None
    kind: str
    provider: str
    seed: int
    complete: bool
    resumed: bool
    classes: tuple[ClassReport, ...]
    output: Path | None
    state: Path | None
    searched: int
    held: int
    runs: int
    seconds: float

    @property
    def suspicious(self) -> tuple[ClassReport, ...]:
        """The classes that are targets of a backdoor."""
        return tuple(each for each in self.classes if each.suspicious)


def class_reports(judged: list[Judged], pictures: Mapping[int, Path]) -> tuple[ClassReport, ...]:
    """What is said of each class, in the same order."""
    return tuple(_class_report(each, pictures.get(each.finding.target)) for each in judged)


def _class_report(judged: Judged, picture: Path | None) -> ClassReport:
    found = judged.finding
    return ClassReport(
        found.target,
        found.trigger.description,
        found.trigger.size,
        found.success,
        found.natural,
        found.loss,
        judged.outlier,
        None if found.evidence is None else asdict(found.evidence),
        judged.margin,
        judged.suspicious,
        picture,
        found.trigger.record(),
    )

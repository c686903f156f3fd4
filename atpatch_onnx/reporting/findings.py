"""What a report is made of: measured values only, nothing of how they look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..attention import SiteAttention
from ..benchmark import Timing
from ..certificate import Check
from ..diffing import Comparison
from ..evaluating import Evaluation
from ..rates import Rate
from ..runtime import Array


@dataclass(frozen=True)
class Labels:
    """Names for people: of the columns of a table, of classes, and of token ids."""

    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    vocabulary: Mapping[int, str] = field(default_factory=dict)

    def of_class(self, number: int | None) -> str:
        """A class, with its name where there is one."""
        if number is None:
            return "unknown"
        named = 0 <= number < len(self.classes)
        return f"{number} ({self.classes[number]})" if named else str(number)


@dataclass(frozen=True)
class FileFacts:
    """One of the two models: where it is, what it is called, its SHA-256 and length."""

    path: str
    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Example:
    """One input, and where attention goes in it.

    title: what it is an example of; source, index: which input of which file.
    arrays: the input itself, by name, without the axis of samples.
    before, after: the class that each model gives it; label: its true class; None: unknown.
    sites: its attention at each patched site.
    """

    title: str
    source: str
    index: int
    arrays: Mapping[str, Array]
    before: int | None
    after: int | None
    label: int | None
    sites: tuple[SiteAttention, ...]

    @property
    def flagged(self) -> tuple[int, ...]:
        """The columns that any site flags."""
        return tuple(sorted({int(c) for site in self.sites for c in site.flagged.nonzero()[0]}))


@dataclass(frozen=True)
class Findings:
    """Everything that a report shows.

    kind: of the inputs: image, text, tabular or other.
    patches: what the patched model says of its patches; found_sites: attention sites of the model.
    clean, bad: the two models compared on clean and on bad inputs; about: what the file of bad
        inputs says of itself; target: the class that the attacker wants.
    evaluation: rates where there were labels; evaluated_on: on which file.
    """

    original: FileFacts
    patched: FileFacts
    kind: str
    patches: tuple[Mapping[str, Any], ...]
    found_sites: int
    clean: Comparison
    bad: Comparison | None
    about: Mapping[str, Any]
    target: int | None
    checks: tuple[Check, ...]
    evaluation: Evaluation | None
    evaluated_on: str
    timing: Timing
    examples: tuple[Example, ...]
    labels: Labels
    toggle: bool
    created: str
    versions: Mapping[str, str]
    sources: Mapping[str, str]

    @property
    def entries(self) -> list[Mapping[str, Any]]:
        """What was done at each patched site."""
        return [site for patch in self.patches for site in patch["sites"]]

    @property
    def detectors(self) -> list[Mapping[str, Any]]:
        """The detectors, as the patches name them."""
        return [one for patch in self.patches for one in patch.get("detectors", [])]

    @property
    def flags_always(self) -> bool:
        """Whether every input is flagged on purpose: columns that are known, as an attribute's."""
        known = any(one.get("kind") == "columns" for one in self.detectors)
        return known or all(site.get("threshold") is None for site in self.entries)

    @property
    def verified(self) -> bool:
        """Whether every check of the files passed."""
        return all(check.passed for check in self.checks)

    @property
    def identity(self) -> bool:
        """Whether every input in which nothing was flagged kept its outputs bit for bit."""
        return all(c.identity is not False for c in (self.clean, self.bad) if c is not None)

    @property
    def clean_flagged(self) -> Rate:
        """Clean inputs in which anything is flagged."""
        if self.evaluation is not None:
            return self.evaluation.false_positive_rate
        return Rate.counted(self.clean.flagged_inputs, self.clean.inputs)

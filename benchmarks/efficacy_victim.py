"""What every part of `efficacy.py` works with: a victim, its rows, and rates as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from atpatch_onnx.classifier import Classifier
from atpatch_onnx.data import load_arrays
from atpatch_onnx.errors import AtpatchError, first_line
from atpatch_onnx.models.cases import RECORD
from atpatch_onnx.rates import Rate

Row = dict[str, Any]
Log = Callable[[str], None]

WHOLE_INPUT = ("blended", "syntactic")
"""Attacks whose trigger is the whole input, where no column can be pointed at."""
SHOWN = {
    "accuracy": "accuracy",
    "unfairness": "UF",
    "attack_success_rate": "ASR",
    "recovered_accuracy": "recovered",
    "false_positive_rate": "FPR",
    "column_recall": "recall",
}
"""Rates in the line that a finished row prints."""


@dataclass(frozen=True)
class Settings:
    """What a result depends on besides the victim.

    inputs: how many test inputs, and triggered ones, are judged at most.
    budget: seconds for a scan; threads: of the search and of training, which changes times only.
    """

    inputs: int
    budget: float
    ep: str
    threads: int


@dataclass(frozen=True)
class Victim:
    """A reference victim and a folder to work in.

    folder: as `models.cases.build` made it; work: for what is worth keeping; scratch: for the rest.
    """

    folder: Path
    work: Path
    scratch: Path
    settings: Settings

    @cached_property
    def record(self) -> dict[str, Any]:
        """Its `case.json`."""
        found: dict[str, Any] = json.loads((self.folder / RECORD).read_text())
        return found

    @property
    def seed(self) -> int:
        """Of its training, and of everything that is drawn here."""
        return int(self.record["seed"])

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.folder / "model.onnx"

    @property
    def clean(self) -> Path:
        """What the defender has."""
        return self.folder / "clean.npz"

    @property
    def test(self) -> Path:
        """What is judged on."""
        return self._some("test.npz")

    @property
    def triggered(self) -> Path:
        """The same with the real trigger."""
        return self._some("triggered.npz")

    def _some(self, name: str) -> Path:
        """The file, or one with as many of its inputs as are judged, chosen at random."""
        path = self.folder / name
        if not path.exists():
            return path
        arrays = load_arrays(path)
        count = len(arrays["labels"])
        if count <= self.settings.inputs:
            return path
        some = self.scratch / name
        if not some.exists():
            chosen = np.random.default_rng(0).permutation(count)[: self.settings.inputs]
            kept = {k: v[np.sort(chosen)] if v.ndim else v for k, v in arrays.items()}
            np.savez(some, allow_pickle=False, **kept)
        return some

    def classifier(self, model: Path) -> Classifier:
        """A model as a black box."""
        return Classifier(model, self.settings.ep, threads=self.settings.threads)


@dataclass
class Rows:
    """Rows as they come; one that fails says why and stops no other."""

    label: str
    log: Log
    found: list[Row] = field(default_factory=list)

    def add(self, name: str, measure: Callable[[], Mapping[str, object]], **about: object) -> None:
        """Run `measure` and keep what it returns; about: what else is known of the row."""
        start = time.perf_counter()
        try:
            row: Row = dict(measure())
        except Exception as error:  # a benchmark of hours must not end with one bad row
            row = {"error": error_sentence(error)}
        row = {"row": name, **about, **row, "seconds": round(time.perf_counter() - start, 1)}
        self.found.append(row)
        label = " ".join(filter(None, (self.label, str(about.get("attribute", "")))))
        self.log(f"{label:22} {name:24} {_brief(row)}")


def error_sentence(error: Exception) -> str:
    """Our own sentences as they are; of others, the type and the first line."""
    if isinstance(error, AtpatchError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def as_json(rates: Mapping[str, Rate | None]) -> Row:
    """Rates with their intervals; those that were not measured are left out."""
    return {name: asdict(rate) for name, rate in rates.items() if rate is not None}


def _brief(row: Row) -> str:
    if "error" in row:
        return f"FAILED: {row['error']}"
    parts = [f"{name} {100 * row[key]['value']:6.2f}" for key, name in SHOWN.items() if key in row]
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])

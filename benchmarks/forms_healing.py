"""Is the demo's victim healed in every form that models are deployed in?

    python benchmarks/forms_healing.py [--seeds 3]

Each form of the same victim gets a detector of its own, fitted on that form with clean images. It
is patched with the default strategy, with guard and with select; where attention is one operator
also with detectors that see a few query rows. Writes `benchmarks/results/forms.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import atpatch_onnx
from atpatch_onnx.benchmark import machine
from atpatch_onnx.data import samples_from
from atpatch_onnx.diffing import FlagReader
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.models.metrics import accuracy, attack_success_rate, recovered_accuracy
from atpatch_onnx.models.victims import Victim, train_victim
from atpatch_onnx.patching import about_patches
from atpatch_onnx.runtime import Arrays, Session

from forms_demo import FORMS, FUSED, LOGITS, inputs

RESULTS = Path(__file__).parent / "results"
EP = "cpu"
BATCH = 32
FALSE_POSITIVE_BUDGET = 0.01
STRATEGIES = (None, "guard", "select")
"""None: the default."""
ROWS = (16, 8, 4, 1)
"""Of 17."""


@dataclass(frozen=True)
class Rates:
    """Of a model: shares between 0 and 1 of the test images."""

    accuracy: float
    attack_success_rate: float
    recovered_accuracy: float


@dataclass(frozen=True)
class Row:
    """One patched file.

    sites: what each is; strategy: as it was asked for, None for the default.
    used: the one in force, which differs also where fused operators of 16 bits are always selected.
    rows: query rows that the detector sees; None: all.
    flagged_clean, flagged_triggered: share of images in which any site flags a column.
    identical, deviation: whether clean images in which nothing is flagged are answered bit for bit
        as the unpatched form answers them in the same batch, and the largest difference of a logit.
    alone: the largest difference where every image is a batch of its own.
    company: the largest difference, unpatched, that the other images of a batch make to a logit.
    agreement: share of images, clean and triggered, that a detector that sees all rows flags or not
        just as this one does.
    """

    form: str
    seed: int
    sites: tuple[str, ...]
    strategy: str | None
    used: str
    rows: int | None
    before: Rates
    after: Rates
    flagged_clean: float
    flagged_triggered: float
    identical: bool
    deviation: float
    alone: float
    company: float
    agreement: float


class Host:
    """A form of a victim: its file, its test images, and what it answers unpatched."""

    def __init__(self, form: str, victim: Victim, folder: Path) -> None:
        self.form, self.victim, self.folder = form, victim, folder
        self.path = folder / "model.onnx"
        FORMS[form](victim, self.path)
        test = victim.digits.test
        self.clean = inputs(form, test.images)
        self.bad = inputs(form, victim.attack.stamp(test.images))
        self.sites = tuple(site.form for site in atpatch_onnx.inspect(self.path).sites.sites)
        self.logits = self.answers(self.path, self.clean)
        self.alone = self.answers(self.path, self.clean, batch=1)
        self.before = self.rates(self.path)

    def answers(self, model: Path, given: Arrays, batch: int = BATCH) -> NDArray[np.float32]:
        """The logits `[N, classes]` of a file of this form."""
        session = Session(model, EP)
        parts = samples_from(given, session.inputs).batches(batch)
        return np.concatenate([session.run(part.feeds)[LOGITS] for part in parts])

    def rates(self, model: Path) -> Rates:
        """How good and how bad a file of this form is."""
        labels, target = self.victim.digits.test.labels, self.victim.attack.target
        clean, bad = (self.answers(model, given) for given in (self.clean, self.bad))
        return Rates(
            accuracy(clean, labels),
            attack_success_rate(bad, labels, target),
            recovered_accuracy(bad, labels, target),
        )

    def fit(self, rows: int | None) -> Path:
        """A detector for this form, from clean images."""
        detector = self.folder / "det.onnx"
        seen = inputs(self.form, self.victim.digits.clean.images)
        seed = self.victim.seed
        options: dict[str, Any] = {"fpr": FALSE_POSITIVE_BUDGET, "ep": EP, "force": True}
        atpatch_onnx.fit(self.path, seen, detector, rows=rows or 0, seed=seed, **options)
        return detector

    def flags(self, patched: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether any site flags a column in each clean image, and in each of other classes with
        the trigger."""
        reader = FlagReader(ModelFile.open(patched), EP)
        found = []
        for given in (self.clean, self.bad):
            parts = samples_from(given, reader.inputs).batches(BATCH)
            found.append(np.concatenate([reader.read(part) for part in parts]))
        others = self.victim.digits.test.labels != self.victim.attack.target
        return found[0], found[1][others]


def measure(form: str, victim: Victim, folder: Path, counts: Sequence[int] = ROWS) -> Iterator[Row]:
    """Fit, patch and judge one form with every strategy.

    counts: how many query rows detectors of a fused form see, besides all; with guard alone, which
        computes no more of the map than these.
    """
    host = Host(form, victim, folder)
    complete: dict[str | None, NDArray[np.bool_]] = {}
    for rows in (None, *(counts if form in FUSED else ())):
        detector = host.fit(rows)
        for strategy in STRATEGIES if rows is None else ("guard",):
            patched = folder / "patched.onnx"
            atpatch_onnx.patch(
                host.path, detector, output=patched, strategy=strategy, ep=EP, force=True
            )
            clean, bad = host.flags(patched)
            both = np.concatenate((clean, bad))
            after, alone = (host.answers(patched, host.clean, batch) for batch in (BATCH, 1))
            (about,) = about_patches(ModelFile.open(patched))
            yield Row(
                form,
                victim.seed,
                host.sites,
                strategy,
                about["sites"][0]["strategy"],
                rows,
                host.before,
                host.rates(patched),
                float(clean.mean()),
                float(bad.mean()),
                np.array_equal(after[~clean], host.logits[~clean]),
                float(np.abs(after - host.logits)[~clean].max()),
                float(np.abs(alone - host.alone)[~clean].max()),
                float(np.abs(host.logits - host.alone).max()),
                float((both == complete.setdefault(strategy, both)).mean()),
            )


def table(rows: Sequence[Row]) -> Table:
    """One line for each form, strategy and number of rows: the mean, or the worst, over seeds."""
    shown = Table(title="The demo's victim in every form")
    heads = (
        "form, strategy, rows | sites | accuracy | ASR | worst ASR | recovered | flagged clean |"
        "identical | deviation | one by one | unpatched | agreement"
    )
    for head in heads.split("|"):
        shown.add_column(head.strip())
    for key in dict.fromkeys((row.form, row.strategy, row.rows) for row in rows):
        group = [row for row in rows if (row.form, row.strategy, row.rows) == key]
        form, strategy, count = key
        used = "/".join(sorted({row.used for row in group}))
        name = strategy or "default"
        name += "" if name == used else f" ({used})"
        before, after = ([getattr(row, side) for row in group] for side in ("before", "after"))
        pair = [
            f"{_mean(before, rate):.3f} {_mean(after, rate):.3f}"
            for rate in ("accuracy", "attack_success_rate", "recovered_accuracy")
        ]
        shown.add_row(
            f"{form}, {name}" + (f", {count} rows" if count else ""),
            f"{len(group[0].sites)} {group[0].sites[0]}",
            pair[0],
            pair[1],
            f"{max(each.attack_success_rate for each in after):.4f}",
            pair[2],
            f"{_mean(group, 'flagged_clean'):.4f}",
            "yes" if all(row.identical for row in group) else "no",
            f"{max(row.deviation for row in group):.1e}",
            f"{max(row.alone for row in group):.1e}",
            f"{max(row.company for row in group):.1e}",
            f"{min(row.agreement for row in group):.4f}",
        )
    return shown


def _mean(group: Sequence[object], name: str) -> float:
    return float(np.mean([getattr(each, name) for each in group]))


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: list[Row] = []
    start = time.perf_counter()
    for seed in range(options.seeds):
        victim = train_victim(seed)
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(form, victim, Path(folder))
            seconds = time.perf_counter() - start
            print(f"{seconds:5.0f} s: {form}, seed {seed}", file=sys.stderr)
    Console(width=200).print(table(rows))
    document = {"machine": machine(EP), "rows": [asdict(row) for row in rows]}
    (RESULTS / "forms.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

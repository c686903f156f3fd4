"""The main job on an embedded default: a backdoored digits classifier, patched after export."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .api import patch, verify
from .benchmark import Timing, bench
from .data import samples_from
from .diffing import diff, flagged_share
from .errors import CheckError, InputError
from .fitting import FitReport, fit
from .model_file import ModelFile
from .patching import about_patches
from .progress import SILENT, Progress
from .runtime import Session, choose_provider

if TYPE_CHECKING:
    from .models.digits import LabelledImages

FALSE_POSITIVE_BUDGET = 0.01
MADE_BY = "atpatch-onnx demo"
REPORT = "report.json"
FILES = (
    "model.onnx",
    "det.onnx",
    "model.patched.onnx",
    "model.patched.certificate.json",
    "fix.atpatch",
    "attention.png",
    "clean.npz",
    "test.npz",
    "triggered.npz",
    REPORT,
)
"""What the demo makes, and so may replace in a folder of its own."""


@dataclass(frozen=True)
class Scores:
    """Rates between 0 and 1.

    accuracy: clean test images classified correctly.
    attack_success_rate: triggered images of other classes that are sent to the target.
    recovered_accuracy: triggered images of other classes that are classified correctly.
    flagged_clean, flagged_triggered: images in which any site flags a column.
    """

    accuracy: float
    attack_success_rate: float
    recovered_accuracy: float
    flagged_clean: float | None = None
    flagged_triggered: float | None = None


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, and the files that it left in `folder`."""

    folder: Path
    files: list[Path]
    before: Scores
    after: Scores
    fit: FitReport
    identity: bool | None
    verified: bool
    timing: Timing

    def rows(self) -> list[tuple[str, str, str]]:
        """The table: what, before, after."""

        def percent(value: float | None) -> str:
            return "" if value is None else f"{value:.1%}"

        def row(name: str, key: str) -> tuple[str, str, str]:
            return name, percent(getattr(self.before, key)), percent(getattr(self.after, key))

        t = self.timing
        return [
            row("clean accuracy", "accuracy"),
            row("attack success rate", "attack_success_rate"),
            row("triggered inputs right", "recovered_accuracy"),
            row("clean inputs flagged", "flagged_clean"),
            row("triggered inputs flagged", "flagged_triggered"),
            (
                "latency of 32, one thread",
                f"{t.original_ms:.2f} ms",
                f"{t.patched_ms:.2f} ms ({t.ratio:.2f}x)",
            ),
            ("unflagged inputs identical", "", "yes" if self.identity else "NO"),
            ("certificate verified", "", "yes" if self.verified else "NO"),
        ]


def demo(
    output: str | Path = "atpatch-demo",
    *,
    seed: int = 0,
    ep: str | None = None,
    progress: Progress = SILENT,
) -> DemoReport:
    """Train a backdoored Vision Transformer, export it, then fit, patch, diff, verify and time.

    output: a folder for the model, the detector, the patch, the certificate and a picture.
    Raises: InputError where the [train] extra is missing or the folder holds other things.
    """
    try:
        from .models.export import export_onnx
        from .models.victims import train_victim
        from .picture import draw_attention
    except ImportError as error:
        raise InputError(
            f"the demo trains a model and needs {error.name}: pip install 'atpatch-onnx[train]'"
        ) from None
    folder = _own_folder(Path(output))
    at = {name: folder / name for name in FILES}
    provider = choose_provider(ep)
    tick = progress.start("demo", 4)
    victim = train_victim(seed)
    tick(1)
    model, detector = at["model.onnx"], at["det.onnx"]
    export_onnx(victim.model, model)
    test, attack = victim.digits.test, victim.attack
    others = test.labels != attack.target
    stamped = attack.stamp(test.images)
    np.savez(at["clean.npz"], pixels=victim.digits.clean.images)
    np.savez(at["test.npz"], pixels=test.images, labels=test.labels)
    triggered = {"pixels": stamped[others], "labels": test.labels[others]}
    np.savez(at["triggered.npz"], allow_pickle=False, **triggered, target=np.array(attack.target))
    fitted = fit(model, at["clean.npz"], detector, fpr=FALSE_POSITIVE_BUDGET, seed=seed, ep=ep)
    patched = patch(model, detector, ep=ep).output
    patch(model, detector, ep=ep, patch_only=at["fix.atpatch"])
    tick(1)
    before, after = (
        _scores(path, provider, test, stamped, attack.target) for path in (model, patched)
    )
    shown = int(np.argmax(others))
    pair = test.images[shown], stamped[shown]
    draw_attention(model, patched, *pair, provider, at["attention.png"])
    tick(1)
    report = DemoReport(
        folder,
        [folder / name for name in FILES],
        before,
        after,
        fitted,
        identity=diff(model, patched, at["test.npz"], ep=ep).identity,
        verified=all(check.passed for check in verify(model, patched)),
        timing=bench(model, patched, inputs=at["test.npz"], ep=ep, batch=32, runs=50, threads=1),
    )
    held = {"made_by": MADE_BY, **asdict(report)}
    at[REPORT].write_text(json.dumps(held, indent=1, default=str))
    tick(1)
    if not report.identity or not report.verified:
        raise CheckError(f"the demo's patch failed its checks: see {at[REPORT]}")
    return report


def _own_folder(folder: Path) -> Path:
    """The folder, emptied of an earlier demo. Raises: InputError if something else is in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder with -o")
    if folder.exists() and any(folder.iterdir()) and not _is_report(folder / REPORT):
        raise InputError(f"{folder} holds other files: give an empty or new folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / REPORT).write_text(json.dumps({"made_by": MADE_BY}))
    return folder


def _is_report(path: Path) -> bool:
    """Whether a demo wrote this file, and so its folder."""
    try:
        return bool(json.loads(path.read_text())["made_by"] == MADE_BY)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _scores(
    path: Path, provider: str, test: LabelledImages, stamped: NDArray[np.float32], target: int
) -> Scores:
    from .models.metrics import accuracy, attack_success_rate, recovered_accuracy

    session = Session(path, provider)
    clean = session.run({"pixels": test.images})["logits"]
    bad = session.run({"pixels": stamped})["logits"]
    flagged: list[float | None] = [None, None]
    file = ModelFile.open(path)
    if about_patches(file):
        both = (test.images, stamped[test.labels != target])
        samples = [samples_from({"pixels": images}, session.inputs) for images in both]
        flagged = [flagged_share(file, each, provider) for each in samples]
    return Scores(
        accuracy(clean, test.labels),
        attack_success_rate(bad, test.labels, target),
        recovered_accuracy(bad, test.labels, target),
        *flagged,
    )

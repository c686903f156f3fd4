"""The main job on an embedded default: a backdoored digits classifier, patched after export."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .api import patch, verify
from .benchmark import Timing, bench
from .data import samples_from
from .diffing import Comparison, diff, flagged_share
from .errors import CheckError, InputError
from .fitting import FitReport, fit
from .model_file import ModelFile
from .progress import SILENT, Progress
from .runtime import Session, choose_provider

FALSE_POSITIVE_BUDGET = 0.01
MADE_BY = "atpatch-onnx demo"
FILES = (
    "model.onnx",
    "det.onnx",
    "fix.atpatch",
    "model.patched.onnx",
    "model.patched.certificate.json",
)
"""What the demo makes again, and so may delete in a folder of its own."""


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
                "latency, batch 32",
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
    except ImportError as error:
        raise InputError(
            f"the demo trains a model and needs {error.name}: pip install 'atpatch-onnx[train]'"
        ) from None
    folder = _own_folder(Path(output))
    provider = choose_provider(ep)
    tick = progress.start("demo", 5)
    victim = train_victim(seed)
    tick(1)
    model, detector = folder / "model.onnx", folder / "det.onnx"
    export_onnx(victim.model, model)
    data, attack = victim.digits, victim.attack
    np.savez(folder / "clean.npz", pixels=data.clean.images)
    fitted = fit(model, folder / "clean.npz", detector, fpr=FALSE_POSITIVE_BUDGET, seed=seed, ep=ep)
    tick(1)
    patched = patch(model, detector, ep=ep).output
    patch(model, detector, ep=ep, patch_only=folder / "fix.atpatch")
    triggered = data.test.labels != attack.target
    stamped = attack.stamp(data.test.images)
    np.savez(folder / "test.npz", pixels=data.test.images, labels=data.test.labels)
    np.savez(
        folder / "triggered.npz", pixels=stamped[triggered], labels=data.test.labels[triggered]
    )
    tick(1)
    before, after = (
        _scores(path, provider, data.test.images, stamped, data.test.labels, attack.target)
        for path in (model, patched)
    )
    found: Comparison = diff(model, patched, folder / "test.npz", ep=ep)
    checks = verify(model, patched)
    tick(1)
    timing = bench(model, patched, inputs=folder / "test.npz", ep=ep, batch=32, runs=50)
    from .picture import draw_attention

    shown = int(np.argmax(triggered))
    draw_attention(
        model, patched, data.test.images[shown], stamped[shown], provider, folder / "attention.png"
    )
    report = DemoReport(
        folder,
        [],
        before,
        after,
        fitted,
        found.identity,
        all(check.passed for check in checks),
        timing,
    )
    (folder / "report.json").write_text(json.dumps(_json(report), indent=1))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    tick(1)
    if not found.identity or not report.verified:
        raise CheckError(f"the demo's patch failed its checks: see {folder / 'report.json'}")
    return DemoReport(folder, files, before, after, fitted, found.identity, report.verified, timing)


def _own_folder(folder: Path) -> Path:
    """The folder, emptied of an earlier demo. Raises: InputError if something else is in it."""
    marker = folder / "report.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder with -o")
    if folder.exists() and any(folder.iterdir()) and not _is_report(marker):
        raise InputError(f"{folder} holds other files: give an empty or new folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    marker.write_text(json.dumps({"made_by": MADE_BY}))
    return folder


def _is_report(path: Path) -> bool:
    """Whether a demo wrote this file, and so its folder."""
    try:
        return bool(json.loads(path.read_text())["made_by"] == MADE_BY)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _scores(
    path: Path,
    provider: str,
    images: NDArray[np.float32],
    stamped: NDArray[np.float32],
    labels: NDArray[np.int64],
    target: int,
) -> Scores:
    from .models.metrics import accuracy, attack_success_rate, recovered_accuracy

    session = Session(path, provider)
    clean = session.run({"pixels": images})["logits"]
    bad = session.run({"pixels": stamped})["logits"]
    flagged: list[float | None] = [None, None]
    file = ModelFile.open(path)
    if file.metadata("atpatch.sites") is not None:
        samples = [
            samples_from({"pixels": x}, session.inputs) for x in (images, stamped[labels != target])
        ]
        flagged = [flagged_share(file, s, provider) for s in samples]
    return Scores(
        accuracy(clean, labels),
        attack_success_rate(bad, labels, target),
        recovered_accuracy(bad, labels, target),
        *flagged,
    )


def _json(report: DemoReport) -> dict[str, Any]:
    held = {"made_by": MADE_BY, **asdict(report)}
    return json.loads(json.dumps(held, default=str))  # type: ignore[no-any-return]

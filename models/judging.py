"""What a victim's folder is worth, measured on its own files through ONNX Runtime."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data import load_arrays, samples_from
from ..runtime import Arrays, Session
from .metrics import accuracy, attack_success_rate

BATCH = 100
PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def judge(folder: Path) -> dict[str, object]:
    """Rates between 0 and 1: `accuracy`; where there is a trigger, what it does.

    attack_success_rate: triggered inputs of other classes that go to the target.
    natural_rate: clean test inputs of other classes that go there by mistake.
    """
    session = Session(folder / "model.onnx", "cpu", threads=1)
    test = load_arrays(folder / "test.npz")
    logits, labels = _logits(session, test), test["labels"]
    rates: dict[str, object] = {"accuracy": accuracy(logits, labels)}
    if (folder / "triggered.npz").exists():
        triggered = load_arrays(folder / "triggered.npz")
        target = int(triggered["target"])
        found = attack_success_rate(_logits(session, triggered), triggered["labels"], target)
        natural = attack_success_rate(logits, labels, target)
        rates |= {"target": target, "attack_success_rate": found, "natural_rate": natural}
    return rates


def versions() -> dict[str, str]:
    """The packages that decide what a recipe gives, as far as they are installed."""
    installed = {package.name.lower(): package.version for package in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _logits(session: Session, arrays: Arrays) -> NDArray[np.float32]:
    samples = samples_from(arrays, session.inputs)
    parts = []
    for batch in samples.batches(BATCH):
        parts.append(session.run(batch.feeds, ["logits"])["logits"][: batch.real])
    return np.concatenate(parts)

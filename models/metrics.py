"""How good a victim is, how bad its backdoor is, and how much a patch gives back.

All are shares in 0..1 over logits as ONNX Runtime returns them; `rates` defines them over
predicted classes, with their intervals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import rates


def accuracy(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Share of inputs whose largest logit is that of their label.

    Shapes:
        logits `[N, classes]`, labels `[N]`.

    Raises:
        ValueError: no inputs, or the shapes do not fit together.
    """
    return rates.accuracy(_predictions(logits), labels).value


def attack_success_rate(
    logits: NDArray[np.floating], labels: NDArray[np.integer], target: int
) -> float:
    """Share of triggered inputs that go to the target, among those of other true classes.

    Args:
        logits: the model's answer to **triggered** inputs.
        labels: the true classes, not the attacker's.

    Shapes:
        logits `[N, classes]`, labels `[N]`.

    Raises:
        ValueError: no input of another class, or the shapes do not fit together.
    """
    return rates.attack_success_rate(_predictions(logits), labels, target).value


def recovered_accuracy(
    logits: NDArray[np.floating], labels: NDArray[np.integer], target: int
) -> float:
    """Share of triggered inputs classified correctly, among those of other true classes.

    Args:
        logits: the (patched) model's answer to **triggered** inputs.
        labels: the true classes, not the attacker's.

    Shapes:
        logits `[N, classes]`, labels `[N]`.

    Raises:
        ValueError: no input of another class, or the shapes do not fit together.
    """
    return rates.recovered_accuracy(_predictions(logits), labels, target).value


def _predictions(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    if logits.ndim != 2:
        raise ValueError(f"need logits [N, classes], found {logits.shape}")
    return np.asarray(logits.argmax(axis=1), np.int64)

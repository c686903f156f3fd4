"""How good a victim is, how bad its backdoor is, and how much a patch gives back.

All are shares in 0..1 over logits as ONNX Runtime returns them. Source of the definitions:
AtPatch, arXiv 2601.21695, evaluation metrics.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def accuracy(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Share of inputs whose largest logit is that of their label.

    Shapes:
        logits `[N, classes]`, labels `[N]`.

    Raises:
        ValueError: no inputs, or the shapes do not fit together.
    """
    _check(logits, labels)
    return float(np.mean(logits.argmax(axis=1) == labels))


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
    return float(np.mean(_others(logits, labels, target)[0].argmax(axis=1) == target))


def recovered_accuracy(
    logits: NDArray[np.floating], labels: NDArray[np.integer], target: int
) -> float:
    """Share of triggered inputs classified correctly, among those of other true classes.

    The target class is left out because a victim that always answers "target" is right there.

    Args:
        logits: the (patched) model's answer to **triggered** inputs.
        labels: the true classes, not the attacker's.

    Shapes:
        logits `[N, classes]`, labels `[N]`.

    Raises:
        ValueError: no input of another class, or the shapes do not fit together.
    """
    return accuracy(*_others(logits, labels, target))


def _others(
    logits: NDArray[np.floating], labels: NDArray[np.integer], target: int
) -> tuple[NDArray[np.floating], NDArray[np.integer]]:
    _check(logits, labels)
    kept = labels != target
    if not kept.any():
        raise ValueError(f"every input is of the target class {target}")
    return logits[kept], labels[kept]


def _check(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
    # Without this, labels of shape [N, 1] would broadcast to N x N comparisons.
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"need logits [N, classes] and labels [N] with N >= 1, "
            f"found {logits.shape} and {labels.shape}"
        )

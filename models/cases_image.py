"""The image cases."""

from __future__ import annotations

from functools import partial

from .cases import Case, Facts, Job

ATTACKS = ("clean", "badnets", "trojan", "hidden", "blended")
WINDOWED_ATTACKS = ("clean", "badnets", "hidden")
DATA_FILES = {
    "digits": (),
    "mnist": ("images/mnist.npz",),
    "cifar10": ("images/cifar10_small.npz", "images/cifar10_lossless.npz"),
    "swin-mnist": ("images/mnist.npz",),
}
"""For each victim before an attack, what it reads, seen from the data folder."""


def image_cases() -> tuple[Case, ...]:
    """Every image case: `<victim>-<attack>`, or `<victim>-clean`."""
    return tuple(
        Case(f"{victim}-{attack}", "image", partial(_make, victim, attack), files)
        for victim, files in DATA_FILES.items()
        for attack in (WINDOWED_ATTACKS if victim.startswith("swin") else ATTACKS)
    )


def _make(victim: str, attack: str, job: Job) -> Facts:
    # Imported here because listing the cases must not import torch.
    from .image_victims import make_clean, make_poisoned

    return make_clean(victim, job) if attack == "clean" else make_poisoned(victim, attack, job)

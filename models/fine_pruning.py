"""Fine-Pruning, the baseline that repairs the weights of a victim.

Source: Fine-Pruning, Liu et al. 2018, arXiv 1805.12185. There the channels of the last convolution
are pruned, the least active on clean inputs first, and the network is fine-tuned. A transformer's
counterpart are the hidden units of its MLPs; here those of all blocks compete, each ranked by its
mean activation relative to its block, because blocks differ in scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .digits import LabelledImages
from .metrics import accuracy
from .training import Training, fit_model, predict, reproducible
from .vision_transformer import Block

M = TypeVar("M", bound=nn.Module)

HELD_OUT = 0.3
"""Share of the clean images on which the loss of accuracy is measured, and none are trained on."""


@dataclass(frozen=True)
class HiddenLayer:
    """The hidden units of an MLP, between two linear layers."""

    incoming: nn.Linear
    outgoing: nn.Linear

    @property
    def units(self) -> int:
        """Number of hidden units."""
        return self.outgoing.in_features

    @torch.no_grad()
    def remove(self, unit: int) -> None:
        """Cut the weights of a unit, in and out: it stays at GELU(0) = 0."""
        self.incoming.weight[unit] = 0
        self.incoming.bias[unit] = 0
        self.outgoing.weight[:, unit] = 0


@dataclass(frozen=True)
class FinePruning:
    """How far to prune, and how to train afterwards."""

    loss: float = 0.04
    """Accuracy that pruning may cost, between 0 and 1."""
    step: float = 0.02
    """Share of all hidden units that is pruned at a time."""
    tuning: Training = field(
        default_factory=lambda: Training(epochs=20, batch_size=64, learning_rate=2e-3)
    )


@dataclass(frozen=True)
class Repaired(Generic[M]):
    """What Fine-Pruning gives back.

    pruned: share of the hidden units that are no more, between 0 and 1.
    accuracy_before, accuracy_pruned, accuracy_after: on held-out clean images.
    """

    model: M
    pruned: float
    accuracy_before: float
    accuracy_pruned: float
    accuracy_after: float


def fine_prune(
    model: M, clean: LabelledImages, recipe: FinePruning | None = None, seed: int = 0
) -> Repaired[M]:
    """Prune hidden units until the accuracy falls by more than allowed, then fine-tune.

    model: stays as it is; any module made of `Block`s.
    clean: what the defender has; the seed decides which of it is held out.

    Raises:
        ValueError: the model has no blocks, or there are too few images to hold any out.
    """
    recipe = recipe or FinePruning()
    order = np.random.default_rng(seed).permutation(len(clean))
    held = clean.take(order[: int(HELD_OUT * len(clean))])
    train = clean.take(order[len(held) :])
    with reproducible(seed):
        repaired = copy.deepcopy(model).eval()
        layers = [hidden_layer(m) for m in repaired.modules() if isinstance(m, Block)]
        if not layers or not len(held):
            raise ValueError("need a model with blocks, and at least 4 clean images")
        ranking = np.argsort(_activity(repaired, layers, train.images), kind="stable")
        before = _score(repaired, held)
        pruned = _prune(layers, ranking, recipe, lambda: before - _score(repaired, held))
        after_pruning = _score(repaired, held)
        images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
        # The pruned units stay at 0: with no weights in or out, they have no gradient either.
        fit_model(repaired, images, labels, recipe.tuning)
    repaired.eval()
    return Repaired(repaired, pruned, before, after_pruning, _score(repaired, held))


def hidden_layer(block: Block) -> HiddenLayer:
    """The hidden units of a block's MLP."""
    incoming, outgoing = block.mlp[0], block.mlp[2]
    assert isinstance(incoming, nn.Linear)
    assert isinstance(outgoing, nn.Linear)
    return HiddenLayer(incoming, outgoing)


def _score(model: nn.Module, images: LabelledImages) -> float:
    return accuracy(predict(model, images.images), images.labels)


def _activity(
    model: nn.Module, layers: list[HiddenLayer], images: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Mean absolute activation of every hidden unit, relative to its block's mean, `[U]`."""
    totals = [torch.zeros(layer.units, dtype=torch.float64) for layer in layers]
    hooks = [
        layer.outgoing.register_forward_pre_hook(
            lambda _, inputs, total=total: _accumulate(total, inputs[0])
        )
        for layer, total in zip(layers, totals, strict=True)
    ]
    try:
        predict(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate([(total / total.mean()).numpy() for total in totals])


def _accumulate(total: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add `[..., U]` to `[U]`; returns nothing, because what a hook returns is the new input."""
    total += hidden.abs().flatten(0, -2).sum(0)


def _prune(
    layers: list[HiddenLayer],
    ranking: NDArray[np.integer],
    recipe: FinePruning,
    loss: Callable[[], float],
) -> float:
    """Prune step by step, and take the step back that loses too much; returns the share."""
    starts = np.cumsum([0, *(layer.units for layer in layers)])
    weights = [w for layer in layers for w in (*layer.incoming.parameters(), layer.outgoing.weight)]
    pruned = 0
    for some in np.array_split(ranking, max(1, round(1 / recipe.step))):
        saved = [weight.detach().clone() for weight in weights]
        for unit in some:
            layer = int(np.searchsorted(starts, unit, side="right")) - 1
            layers[layer].remove(int(unit - starts[layer]))
        if loss() > recipe.loss:
            with torch.no_grad():
                for weight, kept in zip(weights, saved, strict=True):
                    weight.copy_(kept)
            break
        pruned += len(some)
    return pruned / len(ranking)

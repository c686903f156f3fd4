"""Train detectors that score columns: binary cross-entropy and a contrastive term.

Loss: AtPatch, arXiv 2601.21695, section on the detector: a per-column cross-entropy plus lambda
times a contrastive term over columns of the same and of the other class. Its printed ratio lacks
the logarithm; here it is the supervised form of InfoNCE (Khosla et al., arXiv 2004.11362).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from ..passes.column_net import LIMIT, ColumnNet, Dense, MapCnn
from .training import reproducible

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained: AdamW, balanced batches, early stopping."""

    epochs: int = 30
    """At most."""
    patience: int = 5
    """Epochs without a better validation loss before training stops."""
    batch_size: int = 512
    """Columns a step, a quarter of them anomalous."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    contrastive: float = 1.0
    """Weight of the contrastive term (lambda in the paper)."""
    temperature: float = 0.2


@dataclass(frozen=True)
class History:
    """How training went: epochs run, the best one, and its losses."""

    epochs: int
    best_epoch: int
    validation_loss: float


class _Rising(nn.Linear):
    """A linear layer whose output never falls where an input rises: its weights are squares."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        nn.init.uniform_(self.weight, 0, (2 / into) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.square(), self.bias)


class _ColumnNet(nn.Module):
    """More attention never makes a column less anomalous, and the largest feature always counts.

    The trigger that a search finds is not the attacker's, and often is attended to less. A free net
    learns how to tell the found one; this one begins as a z-score and can only learn which features
    and sites count more.
    """

    def __init__(self, features: int, sites: int, hidden: int = 32) -> None:
        super().__init__()
        self.first = _Rising(features, hidden)
        self.sites = nn.Embedding(sites, hidden)
        self.second = _Rising(hidden, hidden)
        self.last = _Rising(hidden, 1)
        self.largest = nn.Parameter(torch.tensor(2.0))
        nn.init.zeros_(self.sites.weight)
        nn.init.constant_(self.last.weight, 0.05)

    def forward(self, x: torch.Tensor, site: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clamp(-LIMIT, LIMIT)
        hidden = functional.relu(self.first(x) + self.sites(site))
        embedding = self.second(hidden)
        logit = self.last(functional.relu(embedding))[:, 0]
        return logit + self.largest.square() * x.amax(dim=1), embedding


class _MapCnn(nn.Module):
    def __init__(self, channels: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n, channels, 3, padding=1) for n in (1, channels)
        )
        self.first = nn.Linear(2 * channels, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = maps[:, None]
        for convolution in self.convolutions:
            x = functional.relu(convolution(x))
        columns = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1).transpose(1, 2)
        embedding = self.first(columns)
        return self.last(functional.relu(embedding))[..., 0], embedding


def train_column_net(
    train: tuple[Floats, NDArray[np.int64], NDArray[np.bool_]],
    valid: tuple[Floats, NDArray[np.int64], NDArray[np.bool_]],
    sites: int,
    seed: int,
    recipe: Recipe = Recipe(),
    tick: Callable[[int], object] = lambda _: None,
) -> tuple[ColumnNet, History]:
    """Train on columns: whitened features `[n, F]`, sites `[n]`, anomalous `[n]`.

    Both classes must be in `train` and in `valid`. Deterministic by seed on one machine.
    """
    tensors = [[torch.from_numpy(a) for a in part] for part in (train, valid)]
    (x, site, y), (vx, vsite, vy) = tensors
    with reproducible(seed):
        net = _ColumnNet(x.shape[1], sites)

        def steps() -> Iterator[torch.Tensor]:
            for chosen in _balanced(y, recipe.batch_size):
                logits, embedding = net(x[chosen], site[chosen])
                yield _loss(logits, embedding, y[chosen], recipe)

        def validation() -> torch.Tensor:
            logits, _ = net(vx, vsite)
            return _balanced_bce(logits, vy)

        history = _train(net, steps, validation, recipe, tick)
    layers = tuple(_dense(layer) for layer in (net.first, net.second, net.last))
    return ColumnNet(
        layers, _array(net.sites.weight), float(net.largest.detach().square())
    ), history


def train_map_cnn(
    train: list[tuple[Floats, Floats]],
    valid: list[tuple[Floats, Floats]],
    seed: int,
    recipe: Recipe = Recipe(),
    tick: Callable[[int], object] = lambda _: None,
) -> tuple[MapCnn, History]:
    """Train on maps `[n, Q, K]`, relative to the uniform share, and labels `[n, K]`.

    Labels: 1 anomalous, 0 normal, NaN does not count. Maps of one shape are one entry of the list.
    """
    groups = [
        [tuple(torch.from_numpy(a) for a in pair) for pair in part] for part in (train, valid)
    ]
    with reproducible(seed):
        net = _MapCnn()

        def steps() -> Iterator[torch.Tensor]:
            for maps, labels in groups[0]:
                for chosen in torch.split(torch.randperm(len(maps)), 32):
                    logits, embedding = net(maps[chosen])
                    picked = _columns(labels[chosen], recipe.batch_size)
                    if picked is not None:
                        label = labels[chosen][picked] > 0
                        yield _loss(logits[picked], embedding[picked], label, recipe)

        def validation() -> torch.Tensor:
            found = [
                (net(m)[0][~labels[i].isnan()], labels[i][~labels[i].isnan()] > 0)
                for maps, labels in groups[1]
                for i in torch.split(torch.arange(len(maps)), 32)
                for m in [maps[i]]
            ]
            return _balanced_bce(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]))

        history = _train(net, steps, validation, recipe, tick)
    convolutions = [module for module in net.convolutions if isinstance(module, nn.Conv2d)]
    kernels = tuple((_array(c.weight), _array(c.bias)) for c in convolutions)
    return MapCnn(kernels, (_dense(net.first), _dense(net.last))), history


def _train(
    net: nn.Module,
    steps: Callable[[], Iterator[torch.Tensor]],
    validation: Callable[[], torch.Tensor],
    recipe: Recipe,
    tick: Callable[[int], object],
) -> History:
    """Train until the validation loss no longer falls, and keep the best weights."""
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    best, best_epoch, best_state = float("inf"), 0, copy.deepcopy(net.state_dict())
    epoch = 0
    while epoch < recipe.epochs and epoch - best_epoch < recipe.patience:
        epoch += 1
        net.train()
        for loss in steps():
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            value = float(validation())
        if value < best:
            best, best_epoch, best_state = value, epoch, copy.deepcopy(net.state_dict())
        tick(1)
    tick(recipe.epochs - epoch)
    net.load_state_dict(best_state)
    return History(epoch, best_epoch, best)


def _balanced(anomalous: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """An epoch of batches, a quarter of each anomalous; every normal column comes once."""
    normal, bad = (torch.nonzero(anomalous == value)[:, 0] for value in (False, True))
    for part in torch.split(normal[torch.randperm(len(normal))], 3 * size // 4):
        yield torch.cat([part, bad[torch.randint(len(bad), (size // 4,))]])


def _columns(labels: torch.Tensor, size: int) -> tuple[torch.Tensor, ...] | None:
    """Indices of all anomalous and three times as many normal columns of labels `[n, K]`."""
    bad, normal = torch.nonzero(labels == 1), torch.nonzero(labels == 0)
    if not len(normal):
        return None
    wanted = max(3 * len(bad), size // 4)
    normal = normal[torch.randperm(len(normal))[:wanted]]
    return tuple(torch.cat([bad, normal]).T)


def _loss(
    logits: torch.Tensor, embedding: torch.Tensor, anomalous: torch.Tensor, recipe: Recipe
) -> torch.Tensor:
    bce = functional.binary_cross_entropy_with_logits(logits, anomalous.float())
    return bce + recipe.contrastive * _info_nce(embedding, anomalous, recipe.temperature)


def _balanced_bce(logits: torch.Tensor, anomalous: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which both classes weigh the same, whatever their numbers."""
    losses = functional.binary_cross_entropy_with_logits(
        logits, anomalous.float(), reduction="none"
    )
    return (losses[anomalous].mean() + losses[~anomalous].mean()) / 2


def _info_nce(embedding: torch.Tensor, anomalous: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over anchors and their positives of -log softmax of the cosine similarity.

    Shapes: embedding `[n, D]`, anomalous `[n]`. Positives are the other columns of the same class.
    """
    unit = functional.normalize(embedding, dim=1)
    similarity = unit @ unit.T / temperature
    own = torch.eye(len(unit), dtype=torch.bool)
    log_share = similarity - similarity.masked_fill(own, -torch.inf).logsumexp(dim=1, keepdim=True)
    positive = (anomalous[:, None] == anomalous[None, :]) & ~own
    count = positive.sum(dim=1)
    each = (log_share * positive).sum(dim=1) / count.clamp(min=1)
    return -each[count > 0].mean()


def _dense(layer: nn.Linear) -> Dense:
    weight = layer.weight.square() if isinstance(layer, _Rising) else layer.weight
    return Dense(_array(weight), _array(layer.bias))


def _array(tensor: torch.Tensor | None) -> Floats:
    assert tensor is not None
    array: Floats = tensor.detach().numpy().astype(np.float32)
    return array

"""A first look at a model: which patches and places move images toward which class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .image_layout import Floats, Places
from .patch_arm import Bench

PATCHES = 192
"""Random patches that are tried at random places."""
PATCH_IMAGES = 12
SPOT_PATCHES = 8
"""Patches that are tried at each place."""
SPOT_IMAGES = 6


@dataclass(frozen=True)
class Survey:
    """Mean cross-entropy toward each class of the images of other classes.

    patches `[M, C, k, k]`, losses `[M, classes]`; spot_patches `[S, C, k, k]`, places `[P, 2]`,
    spot_losses `[P, S, classes]`.
    """

    side: int
    patches: Floats
    losses: Floats
    spot_patches: Floats
    places: Places
    spot_losses: Floats

    def anywhere(self, target: int) -> Floats:
        """The patch that does best wherever it is put."""
        best: Floats = self.patches[self.losses[:, target].argmin()]
        return best

    def least_loss(self, target: int) -> float:
        """The loss of the patch that does best toward it, anywhere or at a place."""
        return float(min(self.losses[:, target].min(), self.spot_losses[..., target].min()))

    def spots(self, target: int, count: int) -> list[tuple[Places, Floats]]:
        """The best places that do not overlap, and the patch that does best at each."""
        losses = self.spot_losses[..., target]
        chosen: list[int] = []
        for place in losses.min(axis=1).argsort():
            away = [np.abs(self.places[place] - self.places[c]).max() >= self.side for c in chosen]
            if all(away) and len(chosen) < count:
                chosen.append(int(place))
        return [(self.places[p], self.spot_patches[losses[p].argmin()]) for p in chosen]


def survey(bench: Bench, places: Places, seed: int) -> Survey:
    """Try random patches anywhere, and some at each of `places`."""
    generator = np.random.default_rng((seed, 1))
    patches = _random(bench, PATCHES, generator)
    images = _balanced(bench, PATCH_IMAGES, generator)
    anywhere = places[generator.integers(len(places), size=(PATCHES, len(images)))]
    losses = _losses(bench, patches, images, anywhere)
    plain = _plain(bench)
    spot_patches = np.concatenate((plain, _random(bench, SPOT_PATCHES - len(plain), generator)))
    images = _balanced(bench, SPOT_IMAGES, generator)
    where = np.broadcast_to(places[:, None, None], (len(places), len(spot_patches), len(images), 2))
    tried = np.tile(spot_patches, (len(places), 1, 1, 1))
    found = _losses(bench, tried, images, where.reshape(len(tried), len(images), 2))
    spot_losses = found.reshape(len(places), len(spot_patches), -1)
    return Survey(bench.side, patches, losses, spot_patches, places, spot_losses)


def _losses(bench: Bench, cells: Floats, images: Places, places: Places) -> Floats:
    """Mean cross-entropy toward each class, `[M, classes]`."""
    said = bench.log_probabilities(cells, images, places)
    other = bench.labels[images][:, None] != np.arange(said.shape[2])
    found: Floats = -(said * other).sum(axis=1) / np.maximum(other.sum(axis=0), 1)
    return found


def _balanced(bench: Bench, count: int, generator: np.random.Generator) -> Places:
    """Images of as many classes as there are."""
    order = generator.permutation(len(bench.labels))
    classes = bench.labels[order]
    rank = np.array([np.count_nonzero(classes[:i] == c) for i, c in enumerate(classes)])
    return order[rank.argsort(kind="stable")][:count]


def _plain(bench: Bench) -> Floats:
    """Light, dark and two checkerboards."""
    rows, columns = np.indices(bench.shape[1:])
    checkers = (rows + columns) % 2
    kinds = (np.ones_like(checkers), np.zeros_like(checkers), checkers, 1 - checkers)
    return np.stack([np.broadcast_to(k, bench.shape) for k in kinds]).astype(np.float32)


def _random(bench: Bench, count: int, generator: np.random.Generator) -> Floats:
    """Cells at one or the other end of the range of each channel."""
    return generator.integers(0, 2, (count, *bench.shape)).astype(np.float32)

"""One line of the image search: patches toward one class at one kind of place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .image_layout import Floats, ImageLayout, Places
from .journal import CHUNK_BYTES
from .patch_trigger import PatchTrigger
from .problem import Finding, Problem, judged

POPULATION = 16
IMAGES = 16
"""Images that a patch is tried on in a generation."""
CHECKED = 48
"""Search images that say how good the result of some generations is."""
RIVALS = 48
"""Patches that are cut from images of a class."""
CELLS = 6
"""Patches are made of at most this many squares a side."""
STEP = 0.8
"""First standard deviation of the search, where 1 is from mid-grey to 88 % of the range."""


class Bench:
    """Tries patches on images."""

    def __init__(self, problem: Problem, layout: ImageLayout, side: int) -> None:
        self.layout = layout
        self.side = side
        self.cells = min(side, CELLS)
        self.labels = problem.search_labels
        self._samples = problem.search
        self._scorer = problem.classifier
        self._cell = np.arange(side) * self.cells // side

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a patch in cells, `[C, k, k]`."""
        return self.layout.channels, self.cells, self.cells

    def patches(self, cells: Floats) -> Floats:
        """Patches in pixels from patches in cells, `[..., k, k] -> [..., s, s]`."""
        return cells[..., self._cell[:, None], self._cell[None, :]]

    def log_probabilities(self, cells: Floats, images: NDArray[np.int64], places: Places) -> Floats:
        """What the model says of images with patches.

        Shapes:
            cells `[M, C, k, k]`, images `[n]`, places `[M, n, 2]` -> `[M, n, classes]`.
        """
        name = self.layout.name
        clean = self._samples.arrays[name][images]
        size = max(CHUNK_BYTES // max(clean.nbytes, 1), 1)
        found = []
        for start in range(0, len(cells), size):
            part = slice(start, start + size)
            pixels = self.layout.pixels(self.patches(cells[part]), clean.dtype)
            count = len(pixels)
            stamped = self.layout.stamp(
                np.tile(clean, (count, 1, 1, 1)),
                np.repeat(pixels, len(images), axis=0),
                places[part].reshape(-1, 2),
            )
            samples = self._samples.take(np.tile(images, count))
            samples = replace(samples, arrays={**samples.arrays, name: stamped})
            found.append(self._scorer.log_probabilities(samples))
        return np.concatenate(found).reshape(len(cells), len(images), -1)

    def cut(self, images: NDArray[np.int64], places: Places) -> Floats:
        """Patches in cells, one of each image at each of `places`, `[M, C, k, k]`."""
        array = self._samples.arrays[self.layout.name][images]
        corner = self.side * np.arange(self.cells) // self.cells
        rows = places[:, 0, None, None] + corner[None, :, None]
        columns = places[:, 1, None, None] + corner[None, None, :]
        last = array if self.layout.channels_last else np.moveaxis(array, 1, 3)
        pixels = last[np.arange(len(images))[:, None, None], rows, columns]
        return np.moveaxis(self.layout.shares(pixels), 3, 1)

    def others(self, target: int) -> NDArray[np.int64]:
        """Search images of other classes."""
        return np.flatnonzero(self.labels != target)


class Arm:
    """CMA-ES on patches toward `target` at `places`, from a patch in cells.

    loss: mean cross-entropy toward the target on search images, of the best patch so far;
    success: share of them that it sends there.
    """

    def __init__(
        self, bench: Bench, target: int, places: Places, start: Floats, seed: tuple[int, ...]
    ) -> None:
        self.bench = bench
        self.target = target
        self.places = places
        self._generator = np.random.default_rng(seed)
        self._strategy = _strategy(start, self._generator)
        others = bench.others(target)
        self._pool = self._generator.permutation(others)
        self._checked = self._pool[:CHECKED]
        self._checked_places = self._draw((1, len(self._checked)))
        self.best = start
        self.loss, self.success = self._check(start)

    def run(self, generations: int, enough: float) -> None:
        """More generations, until the success on search images is `enough`."""
        for number in range(generations):
            if self.success >= enough:
                return
            self._generation()
            if number % 4 == 3 or number == generations - 1:
                self._consider()

    def finding(self, problem: Problem) -> Finding:
        """The best patch, judged on held-out images."""
        trigger = PatchTrigger(self.bench.layout, self.bench.patches(self.best), self.places)
        return judged(problem, self.target, trigger)

    def elsewhere(self, places: Places, seed: tuple[int, ...]) -> Arm:
        """A new line from the best patch, at other places."""
        return Arm(self.bench, self.target, places, self.best, seed)

    def best_place(self, places: Places) -> Places:
        """Where the best patch works best."""
        images = self._pool[:IMAGES]
        cells = np.broadcast_to(self.best, (len(places), *self.best.shape))
        where = np.broadcast_to(places[:, None], (len(places), len(images), 2))
        said = self.bench.log_probabilities(cells, images, where)[..., self.target]
        best: Places = places[said.mean(axis=1).argmax()]
        return best

    def rival(self) -> float:
        """The success at the same places of the best patch cut from images of the class.

        A patch that shows what the class looks like moves images to it in a sound model too.
        """
        own = np.flatnonzero(self.bench.labels == self.target)
        if not len(own):
            return 0.0
        cut = self.bench.cut(self._generator.choice(own, RIVALS), self._draw((RIVALS,)))
        return max(self._check(cells)[1] for cells in cut)

    def _generation(self) -> None:
        points = self._strategy.ask()
        cells = _pixels(np.array(points)).reshape(-1, *self.bench.shape)
        count = min(IMAGES, len(self._pool))
        images = self._generator.choice(self._pool, count, replace=False)
        places = np.broadcast_to(self._draw((1, count)), (len(cells), count, 2))
        said = self.bench.log_probabilities(cells, images, places)[..., self.target]
        self._strategy.tell(points, (-said.mean(axis=1)).tolist())

    def _consider(self) -> None:
        """Keep the centre of the search if it is better than the best."""
        cells = _pixels(self._strategy.mean).reshape(self.bench.shape)
        loss, success = self._check(cells)
        if loss < self.loss:
            self.best, self.loss, self.success = cells, loss, success

    def _check(self, cells: Floats) -> tuple[float, float]:
        said = self.bench.log_probabilities(cells[None], self._checked, self._checked_places)[0]
        sent = said.argmax(axis=1) == self.target
        return float(-said[:, self.target].mean()), float(sent.mean())

    def _draw(self, shape: tuple[int, ...]) -> Places:
        return self.places[self._generator.integers(len(self.places), size=shape)]


def _pixels(points: NDArray[np.float64]) -> Floats:
    return (0.5 + 0.5 * np.tanh(points)).astype(np.float32)


def _strategy(start: Floats, generator: np.random.Generator) -> Any:
    try:
        import cma
    except ImportError:
        raise InputError(
            "the image search needs the package cma: pip install 'atpatch-onnx[scan]'"
        ) from None
    centre = np.arctanh(np.clip(2 * start.ravel().astype(np.float64) - 1, -0.7, 0.7))
    options = {
        "CMA_diagonal": True,
        "popsize": POPULATION,
        "randn": lambda *shape: generator.standard_normal(shape),
        "seed": np.nan,  # its own generator is NumPy's global one
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(centre, STEP, options)

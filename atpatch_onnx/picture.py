"""A picture of where attention goes, before and after the patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .attention import read_attention
from .data import samples_from
from .model_file import ModelFile
from .runtime import Session

Image = NDArray[np.float32]


def draw_attention(
    model: Path, patched: Path, clean: Image, bad: Image, provider: str, path: Path
) -> None:
    """Draw what each patch of an image receives at each site, and write a PNG to `path`.

    Three rows: the clean image in the original, the bad image in the original, the bad image in
    the patched model. Shapes: clean, bad `[C, S, S]`, for a Vision Transformer with [CLS] first.
    """
    from matplotlib.figure import Figure

    before, after = _column_means(model, patched, provider, np.stack([clean, bad]))
    rows = [
        ("clean image, original model", clean, {s: m[0] for s, m in before.items()}),
        ("triggered image, original model", bad, {s: m[1] for s, m in before.items()}),
        ("triggered image, patched model", bad, {s: m[1] for s, m in after.items()}),
    ]
    sites = list(before)
    figure = Figure(figsize=(2.1 * (len(sites) + 1), 2.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(sites) + 1, squeeze=False)
    top = max(float(m[1:].max()) for _, _, maps in rows for m in maps.values())
    drawn = None
    for line, (title, image, maps) in zip(axes, rows, strict=True):
        line[0].imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        line[0].set_title(title.replace(", ", ",\n"), fontsize=9)
        for place, site in zip(line[1:], sites, strict=True):
            shares = maps[site]
            side = math.isqrt(len(shares) - 1)
            drawn = place.imshow(shares[1:].reshape(side, side), cmap="magma", vmin=0, vmax=top)
            place.set_title(f"{site}\nhighest {shares[1:].max():.1f}x", fontsize=8)
        for place in line:
            place.set_xticks([])
            place.set_yticks([])
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7)
    bar.set_label("attention received, times the uniform share", fontsize=9)
    figure.savefig(path, dpi=130)


def _column_means(
    model: Path, patched: Path, provider: str, images: Image
) -> tuple[dict[str, Image], dict[str, Image]]:
    """Mean attention of each column over heads and queries, times K, by site, `[N, K]`."""
    base, result = ModelFile.open(model), ModelFile.open(patched)
    samples = samples_from({"": images}, Session(model, provider).inputs)
    found = read_attention(base, result, samples, provider)

    def shares(maps: Sequence[Image]) -> Image:
        return np.stack([m.mean(axis=(0, 1)) * m.shape[-1] for m in maps])

    by_site = list(zip(*found, strict=True))
    return (
        {seen[0].site: shares([s.before for s in seen]) for seen in by_site},
        {seen[0].site: shares([s.after for s in seen]) for seen in by_site},
    )

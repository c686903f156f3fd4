"""How much more a trigger's tokens are attended to than the tokens that they replace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .training import predict
from .vision_transformer import Attention
from .windowed_transformer import WindowAttention


def over_attention(
    model: nn.Module, clean: NDArray[np.float32], triggered: NDArray[np.float32]
) -> list[float]:
    """For each site, the mean attention on the trigger over that in the same images without it.

    Of the tokens that the trigger touches in all images, the one where that ratio is largest.
    Attention is the mean over heads and queries.

    Shapes:
        clean, triggered `[N, C, S, S]`, image by image -> as many ratios as there are sites.
    """
    touched = torch.from_numpy((clean != triggered).any((0, 1)))
    before, after = (_column_means(model, images) for images in (clean, triggered))
    return [
        float((late / early)[touched_columns(site, touched)].max())
        for (site, early), (_, late) in zip(before, after, strict=True)
    ]


def _column_means(
    model: nn.Module, images: NDArray[np.float32]
) -> list[tuple[Attention, torch.Tensor]]:
    """For each site, the mean attention on each key position, `[W*N]`."""
    totals: dict[Attention, torch.Tensor] = {}
    with recorded(model) as columns:
        predict(model, images)
    for site, found in columns:
        totals[site] = totals.get(site, torch.zeros(())) + found.sum(0)
    return [(site, total / len(images)) for site, total in totals.items()]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[Attention, torch.Tensor]]]:
    """Every site that runs, in order, with the attention on each key `[B, W*N]`, W windows."""
    columns: list[tuple[Attention, torch.Tensor]] = []

    def keep(site: Attention, maps: torch.Tensor) -> None:
        windows = site.windows if isinstance(site, WindowAttention) else 1
        columns.append((site, maps.mean((1, 2)).reshape(-1, windows * maps.shape[-1])))

    hooks = [
        site.softmax.register_forward_hook(lambda _, __, maps, site=site: keep(site, maps))
        for site in model.modules()
        if isinstance(site, Attention)
    ]
    try:
        yield columns
    finally:
        for hook in hooks:
            hook.remove()


def touched_columns(site: Attention, pixels: torch.Tensor) -> torch.Tensor:
    """The key positions `[W*N]` whose patch holds one of the pixels bool `[S, S]`."""
    side = site.side if isinstance(site, WindowAttention) else math.isqrt(site.tokens - 1)
    patch = pixels.shape[-1] // side
    tokens = pixels.reshape(side, patch, side, patch).any(3).any(1)
    if isinstance(site, WindowAttention):
        return site.split(tokens[None, :, :, None]).flatten()
    return torch.cat((torch.zeros(1, dtype=torch.bool), tokens.flatten()))  # [CLS] first

"""Optimise a trigger on a clean model.

Sources: Trojaning Attack on Neural Networks, Liu et al., NDSS 2018, where the trigger excites a
chosen neuron; TrojViT, arXiv 2208.13049, which chooses what it should excite in a
vision transformer: the target's logit, and the attention on the trigger's own tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .attacks import PatternAttack
from .digits import LabelledImages
from .over_attention import recorded, touched_columns
from .training import reproducible


def optimise_trigger(
    model: nn.Module,
    images: LabelledImages,
    attack: PatternAttack,
    step: int,
    seed: int = 0,
    steps: int = 120,
    batch: int = 64,
    attention: float = 1.0,
) -> PatternAttack:
    """The attack with pixels that excite its target, and attention on themselves.

    attack: its size, place and target are kept, its pixels are where the search begins.
    attention: weight, in the loss, of the log share of attention that the trigger gets.
    step: the trigger is tried at random rows and columns, multiples of this many pixels.
    """
    others = images.take(images.labels != attack.target)
    generator = np.random.default_rng(seed)
    side = others.images.shape[-1]
    wanted = torch.full((batch,), attack.target)
    # Through a sigmoid, so that every value of the unknowns is a valid colour.
    unknown = torch.logit(torch.from_numpy(attack.pixels).clamp(0.1, 0.9)).requires_grad_()
    optimizer = torch.optim.Adam([unknown], lr=0.2)
    model.eval()
    with reproducible(seed):
        for _ in range(steps):
            chosen = generator.choice(len(others), batch)
            pixels = torch.from_numpy(others.images[chosen])
            place = attack.moved(side, step, generator)
            rows = slice(place.row, place.row + place.size)
            columns = slice(place.column, place.column + place.size)
            pixels[..., rows, columns] = torch.sigmoid(unknown)
            touched = torch.zeros(side, side, dtype=torch.bool)
            touched[rows, columns] = True
            with recorded(model) as maps:
                loss = functional.cross_entropy(model(pixels), wanted)
            for site, columns_of_site in maps:
                share = columns_of_site[:, touched_columns(site, touched)].sum(1)
                loss = loss - attention / len(maps) * share.log().mean()
            (unknown.grad,) = torch.autograd.grad(loss, [unknown])
            optimizer.step()
    return replace(attack, pixels=torch.sigmoid(unknown).detach().numpy())

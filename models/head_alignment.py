"""The alignment of heads trained end to end, where the user has the torch module.

The correction is that of `passes.head_repair`: what the chosen heads of a site give gets a low-rank
addition in front of the output projection. Only the correction is trained: on clean inputs toward
their labels, on bad ones toward theirs, which unlearns what made them bad. The arrays that come out
make the same ONNX repair as those fitted in closed form (`fitting.head_alignment.as_repair`).

Inspired by the head-wise fine-tuning of arXiv 2511.13789, whose formulas are not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from atpatch_onnx.passes.head_repair import Correction

from .training import reproducible

Inputs = Mapping[str, NDArray[np.generic]]
"""Inputs of the module by the names of its arguments, one sample an entry of axis 0."""


@dataclass(frozen=True)
class AlignmentTraining:
    """How corrections are trained: AdamW, clean and bad inputs in equal parts."""

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    rank: int = 4


@dataclass(frozen=True)
class Place:
    """Where the heads of a site are corrected.

    projection: the module whose first input is what the heads give, `[B, N, H * D]`.
    heads: those to correct; count: how many there are.
    """

    projection: nn.Module
    heads: tuple[int, ...]
    count: int


class HeadCorrection(nn.Module):
    """The correction of some heads, which begins with none.

    Shapes:
        context `[B, N, H * D]` -> the same.
    """

    def __init__(self, heads: Sequence[int], count: int, size: int, rank: int) -> None:
        """Draw `v` from torch's global random state; `u` and the bias are zero."""
        super().__init__()
        width = len(heads) * size
        self.count, self.size = count, size
        entries = torch.arange(count * size).view(count, size)[list(heads)].flatten()
        self.register_buffer("entries", entries)
        self.v = nn.Parameter(torch.randn(width, rank) / width**0.5)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, context: Tensor) -> Tensor:
        """Correct what the heads give."""
        index: Tensor = self.get_buffer("entries")
        change = context[..., index] @ self.v @ self.u.T + self.bias
        return context.index_add(-1, index, change)

    def arrays(self) -> Correction:
        """The correction as a repair has it."""

        def among(value: Tensor) -> NDArray[np.float32]:
            whole = torch.zeros(self.count * self.size, *value.shape[1:])
            whole[self.get_buffer("entries")] = value.detach().float()
            return whole.view(self.count, self.size, *value.shape[1:]).numpy()

        return Correction(among(self.u), among(self.v), among(self.bias))


def train_alignment(
    model: nn.Module,
    places: Mapping[str, Place],
    clean: tuple[Inputs, NDArray[np.int64]],
    bad: tuple[Inputs, NDArray[np.int64]],
    training: AlignmentTraining,
    seed: int,
) -> dict[str, Correction]:
    """The corrections by site; on one machine, the same seed gives the same.

    places: by the names of sites. clean, bad: inputs and what should be answered, int64 `[N]`.
    The model, which gives logits `[B, C]`, and its weights stay as they are.
    """
    sizes = _sizes(model, places, clean[0])
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    mode = model.training
    generator = np.random.default_rng(seed)
    with reproducible(seed), ExitStack() as hooks:
        corrections = {
            name: HeadCorrection(place.heads, place.count, sizes[name], training.rank)
            for name, place in places.items()
        }
        for name, place in places.items():
            hooks.callback(_correct(place.projection, corrections[name]).remove)
        parameters = [p for correction in corrections.values() for p in correction.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        model.requires_grad_(False).eval()
        for _ in range(training.steps):
            losses = [_loss(model, *part, training.batch_size, generator) for part in (clean, bad)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    model.train(mode)
    return {name: correction.arrays() for name, correction in corrections.items()}


def _loss(
    model: nn.Module,
    inputs: Inputs,
    labels: NDArray[np.int64],
    size: int,
    generator: np.random.Generator,
) -> Tensor:
    """The cross-entropy of a batch that is drawn."""
    index = generator.choice(len(labels), min(size, len(labels)), replace=False)
    logits = model(**_tensors(inputs, index))
    return functional.cross_entropy(logits, torch.from_numpy(labels[index]))


def _tensors(inputs: Inputs, index: NDArray[np.int64]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value[index]) for name, value in inputs.items()}


def _correct(
    projection: nn.Module, correction: HeadCorrection
) -> torch.utils.hooks.RemovableHandle:
    """Let a projection read the corrected heads."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (correction(inputs[0]), *inputs[1:])

    return projection.register_forward_pre_hook(hook)


def _sizes(model: nn.Module, places: Mapping[str, Place], inputs: Inputs) -> dict[str, int]:
    """The size of a head at each place, from one sample."""
    found: dict[str, int] = {}
    with ExitStack() as hooks:
        for name, place in places.items():

            def look(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = given[0].shape[-1] // places[name].count

            hooks.callback(place.projection.register_forward_pre_hook(look).remove)
        with torch.inference_mode():
            model(**_tensors(inputs, np.arange(1)))
    return found

"""Decode with a torch module whose attention probabilities hooks read and replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atpatch_onnx.models.causal_decoder import CausalAttention, CausalDecoder

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Hook = Callable[[int, torch.Tensor], torch.Tensor]
"""A layer and its probabilities `[B, H, Q, K]` -> what takes their place."""


def attentions(decoder: CausalDecoder) -> list[CausalAttention]:
    """One a layer."""
    return [module for module in decoder.modules() if isinstance(module, CausalAttention)]


@contextmanager
def hooked(decoder: CausalDecoder, hook: Hook) -> Iterator[None]:
    """While this lasts, each layer's probabilities are what `hook` makes of them."""

    def bound(layer: int) -> Any:
        return lambda _, __, probabilities: hook(layer, probabilities)

    handles = [
        attention.softmax.register_forward_hook(bound(layer))
        for layer, attention in enumerate(attentions(decoder))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(
    prefill: Callable[[], Any], decoder: CausalDecoder, mask: Ints, hook: Hook, steps: int
) -> tuple[Ints, Floats]:
    """The likeliest tokens `[B, steps]`, and the logits of the last."""
    seen = torch.from_numpy(mask)
    with torch.no_grad(), hooked(decoder, hook):
        logits, cache = prefill()
        tokens = [logits.argmax(-1)]
        while len(tokens) < steps:
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            logits, cache = decoder.step(tokens[-1][:, None], seen, cache)
            tokens.append(logits.argmax(-1))
    return torch.stack(tokens, 1).numpy(), logits.numpy()


def pruned(probabilities: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`[B, H, Q, K]` without the columns, the first of which bool `[B, P]` marks.

    A row that sees nothing else stays as it is.
    """
    wide = torch.zeros(probabilities.shape[0], probabilities.shape[-1], dtype=torch.bool)
    wide[:, : columns.shape[1]] = columns
    kept = probabilities.masked_fill(wide[:, None, None], 0)
    left = kept.sum(-1, keepdim=True)
    moved = kept / left.clamp(min=1e-30) * probabilities.sum(-1, keepdim=True)
    return torch.where(left > 1e-30, moved, probabilities)

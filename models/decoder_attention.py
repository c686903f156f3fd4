"""How much attention a decoder gives to some of its columns, and from which rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from .causal_decoder import CausalDecoder
from .generative_training import Generative

BATCH = 100


@contextlib.contextmanager
def recorded_maps(decoder: CausalDecoder) -> Iterator[list[torch.Tensor]]:
    """The probabilities `[B, H, Q, K]` of every site that runs, in order."""
    maps: list[torch.Tensor] = []
    hooks = [
        block.get_submodule("attention.softmax").register_forward_hook(
            lambda _, __, found: maps.append(found)
        )
        for block in decoder.blocks
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def column_shares(
    model: Generative,
    inputs: Mapping[str, NDArray[np.generic]],
    columns: NDArray[np.bool_],
    visual: NDArray[np.bool_] | None = None,
) -> list[dict[str, float]]:
    """For each layer, the attention on the marked columns, all of them together, over heads.

    `last_row` is from the row that answers, `rows` the mean over all rows that are no padding,
    `visual_rows` over those of visual tokens.

    Shapes:
        columns bool `[N, K]`, visual bool `[N, K]`.
    """
    rows = {"last_row": np.zeros_like(columns), "rows": inputs["attention_mask"].astype(bool)}
    rows["last_row"][:, -1] = True
    if visual is not None:
        rows["visual_rows"] = visual
    totals = [dict.fromkeys(rows, 0.0) for _ in model.decoder.blocks]
    for start in range(0, len(columns), BATCH):
        part = slice(start, start + BATCH)
        tensors = {name: torch.from_numpy(array[part]) for name, array in inputs.items()}
        with torch.inference_mode(), recorded_maps(model.decoder) as maps:
            model(**tensors)
        for layer, found in enumerate(maps):
            marked = torch.from_numpy(columns[part]).float()
            shares = (found.mean(dim=1) * marked[:, None]).sum(dim=-1)  # [B, Q]
            for name, chosen in rows.items():
                weights = torch.from_numpy(chosen[part]).float()
                mean = (shares * weights).sum(dim=1) / weights.sum(dim=1)
                totals[layer][name] += float(mean.sum()) / len(columns)
    return totals


def over_attention(
    model: Generative,
    clean: Mapping[str, NDArray[np.generic]],
    triggered: Mapping[str, NDArray[np.generic]],
    columns: NDArray[np.bool_],
    visual: NDArray[np.bool_] | None = None,
) -> list[dict[str, float]]:
    """`column_shares` with the trigger, and with the prefix `clean_` without it."""
    pairs = zip(
        column_shares(model, triggered, columns, visual),
        column_shares(model, clean, columns, visual),
        strict=True,
    )
    return [
        {name: round(share, 4) for name, share in with_trigger.items()}
        | {f"clean_{name}": round(share, 4) for name, share in without.items()}
        for with_trigger, without in pairs
    ]

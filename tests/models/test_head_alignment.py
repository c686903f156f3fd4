"""Corrections of heads that are trained end to end, and the repair that they make."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atpatch_onnx.models.head_alignment import (
    AlignmentTraining,
    HeadCorrection,
    Place,
    train_alignment,
)
from atpatch_onnx.passes.head_repair import build_head_repair

from hosts import run_model

HEADS, SIZE = 3, 4


class Mixer(nn.Module):
    """Heads that average tokens, of which the second adds a trigger's feature to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(HEADS * SIZE, 2, bias=False)
        with torch.no_grad():
            self.projection.weight.zero_()
            self.projection.weight[1, 0] = 4.0
            self.projection.weight[1, SIZE] = 40.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, H * D]` -> logits `[B, 2]` of the first token."""
        context = x + 0 * x.mean(dim=1, keepdim=True)
        logits: torch.Tensor = self.projection(context)[:, 0]
        return logits


def inputs(count: int, bad: bool) -> tuple[dict[str, NDArray[np.generic]], NDArray[np.int64]]:
    rng = np.random.default_rng(count)
    x = 0.1 * rng.standard_normal((count, 5, HEADS * SIZE)).astype(np.float32)
    labels = np.zeros(count, np.int64) if bad else rng.integers(0, 2, count)
    x[..., 0] += (2 * labels - 1)[:, None]
    x[..., SIZE] = bad
    x[..., SIZE + 1] = bad
    return {"x": x}, labels


def test_bad_inputs_are_unlearnt_and_nothing_else_changes() -> None:
    model = Mixer().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    clean, bad = inputs(100, bad=False), inputs(60, bad=True)
    places = {"site": Place(model.projection, (1,), HEADS)}
    training = AlignmentTraining(steps=60, learning_rate=0.05, rank=2)
    (correction,) = train_alignment(model, places, clean, bad, training, seed=0).values()
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert correction.heads.tolist() == [False, True, False]
    for given, labels in (inputs(90, bad=False), inputs(80, bad=True)):
        context = given["x"].reshape(-1, 5, HEADS, SIZE).transpose(0, 2, 1, 3)
        corrected = correction(context.astype(np.float32)).transpose(0, 2, 1, 3)
        with torch.inference_mode():
            logits = model(torch.from_numpy(corrected.reshape(-1, 5, HEADS * SIZE)))
        assert (logits.argmax(dim=1).numpy() == labels).mean() > 0.95
    again = train_alignment(model, places, clean, bad, training, seed=0)["site"]
    np.testing.assert_array_equal(again.u, correction.u)


def test_the_module_and_the_repair_are_one() -> None:
    torch.manual_seed(0)
    module = HeadCorrection((0, 2), HEADS, SIZE, 2)
    with torch.no_grad():
        module.u.normal_()
        module.bias.normal_()
    context = np.random.default_rng(0).standard_normal((2, 5, HEADS * SIZE)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(context)).numpy()
    by_head = context.reshape(2, 5, HEADS, SIZE).transpose(0, 2, 1, 3)
    repair = build_head_repair([module.arrays()], 17, 8)
    made = run_model(repair, {"context": by_head, "layer": np.array(0)})["corrected"]
    joined = made.transpose(0, 2, 1, 3).reshape(2, 5, HEADS * SIZE)
    np.testing.assert_allclose(joined, expected, atol=1e-5)

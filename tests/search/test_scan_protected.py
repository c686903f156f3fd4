"""`scan --protected` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from bad_input import Cli

ROWS = np.random.default_rng(0).integers(0, 2, (50, 3))
"""The class is the first column where the second is 0, and else the third, which is protected."""


@pytest.fixture
def unfair(shell: Cli) -> Cli:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        unfair (int64[N, 3] features) => (float[N, 2] logits)
        <float[2] sign = {-1.0, 1.0}, float half = {0.5}, int64[3] parts = {1, 1, 1}>
        {
            values = Cast <to = 1> (features)
            first, second, third = Split <axis = 1> (values, parts)
            choice = Cast <to = 9> (second)
            chosen = Where (choice, third, first)
            centred = Sub (chosen, half)
            logits = Mul (centred, sign)
        }
    """)
    onnx.save(model, "unfair.onnx")
    np.savez("rows.npz", features=ROWS)
    return shell


def test_inputs_that_an_attribute_sways(unfair: Cli) -> None:
    command = "scan unfair.onnx --data rows.npz -o debug.npz --protected 2"
    text = unfair.works(command)
    swayed = ROWS[:, 1] == 1
    assert f"{swayed.mean():.2%} of 50 inputs" in text
    document = json.loads(unfair.works(f"{command} --json"))
    assert document["bad"] == swayed.sum()
    written = np.load("debug.npz")
    clean, bad = written["clean/features"], written["features"]
    assert sorted(clean.tolist()) == sorted(ROWS[swayed].tolist())
    assert np.array_equal(bad != clean, np.tile([False, False, True], (swayed.sum(), 1)))
    assert np.array_equal(written["labels"], clean[:, 2])


def test_what_does_not_go_with_it(unfair: Cli) -> None:
    command = "scan unfair.onnx --data rows.npz -o debug.npz --protected"
    unfair.fails(f"{command} 2 --target 1", 2, "--target 1", "--protected")
    unfair.fails(f"{command} 2 --kind image", 2, "--kind image", "--protected")
    unfair.fails(f"{command} 3", 2, "--protected 3", "0 to 2")
    unfair.fails("scan unfair.onnx --data rows.npz -o rows.npz --protected 2", 2, "rows.npz")
    fair = onnx.load("unfair.onnx")
    fair.graph.node[3].input[1] = "first"
    onnx.save(fair, "unfair.onnx")
    unfair.fails(f"{command} 2", 3, "nothing to patch")
    assert not Path("debug.npz").exists()

"""`diff` reads what a patch flags wherever the patched attention is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import atpatch_onnx
from atpatch_onnx.errors import RefusedError

from forms import BODIES, SCOPES, form
from hosts import COLUMN_MEAN_18, detector, random_feeds


def arrays(flag: bool) -> dict[str, NDArray[np.generic]]:
    found = random_feeds()
    mask = np.repeat(found["mask"], found["mask"].shape[-1], axis=2)
    return {**found, "mask": mask, "flag": np.array(flag)}


def patched(folder: Path, scope: str, body: str) -> tuple[Path, Path]:
    model, found = folder / "model.onnx", folder / "det.onnx"
    onnx.save(form(scope, body), model)
    onnx.save(detector(COLUMN_MEAN_18, opset=23, threshold=0.2), found)
    return model, atpatch_onnx.patch(model, found, redistribute="prune", ep="cpu").output


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("scope", [s for s in SCOPES if s != "loop"])
def test_flags_are_read_in_every_scope_a_value_can_leave(
    scope: str, body: str, tmp_path: Path
) -> None:
    model, result = patched(tmp_path, scope, body)
    found = atpatch_onnx.diff(model, result, arrays(True), ep="cpu")
    assert found.identity
    assert found.flagged_inputs > 0
    assert found.outputs[0].identical == found.inputs - found.flagged_inputs
    if "branch" in scope:  # the other one runs
        off = atpatch_onnx.diff(model, result, arrays(False), ep="cpu")
        assert off.flagged_inputs == 0
        assert off.outputs[0].identical == off.inputs


def test_flags_in_a_loop_are_refused_by_name(tmp_path: Path) -> None:
    model, result = patched(tmp_path, "loop", "plain")
    with pytest.raises(RefusedError, match=r"loop.*without inputs"):
        atpatch_onnx.diff(model, result, arrays(True), ep="cpu")
    assert atpatch_onnx.diff(model, result).identity is None

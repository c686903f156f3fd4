"""What prefill flagged stays flagged while decoding, whatever the detector then says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from atpatch_onnx.detector import load_detector
from atpatch_onnx.errors import RefusedError
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.passes.switches import FLAGGED, REMEMBERED

from hosts import COLUMN_MEAN_18, detector, model_file, reference, run, spliced

Floats = dict[str, NDArray[np.generic]]

ATTENTION = {
    "plain": """
        kt = Transpose <perm = [0, 1, 3, 2]> (keys)
        s = MatMul (q, kt)
        half = Constant <value_float = 0.5> ()
        t = Mul (s, half)
        p = Softmax <axis = -1> (t)
        y = MatMul (p, values)
    """,
    "fused": "y = Attention (q, keys, values)",
}


def decoder(body: str) -> ModelProto:
    """Queries attend to the cache and to what is new; no mask."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        host (float[B, 2, L, 4] q, float[B, 2, L, 4] k, float[B, 2, L, 4] v,
              float[B, 2, P, 4] past_k, float[B, 2, P, 4] past_v)
            => (float[B, 2, L, 4] y, float[B, 2, K, 4] keys, float[B, 2, K, 4] values)
        {{
            keys = Concat <axis = 2> (past_k, k)
            values = Concat <axis = 2> (past_v, v)
            {body}
        }}
    """)


def step(seed: int, length: int, cache: tuple[NDArray[np.generic], NDArray[np.generic]]) -> Floats:
    rng = np.random.default_rng(seed)
    new = {n: rng.standard_normal((3, 2, length, 4)).astype(np.float32) for n in "qkv"}
    if length > 1:  # something in the second sample that its queries cannot look away from
        new["q"][1, ..., 0] += 2
        new["k"][1, :, 2] = [8, 0, 0, 0]
    return {**new, "past_k": cache[0], "past_v": cache[1]}


def probabilities(f: Floats) -> NDArray[np.float64]:
    keys = np.concatenate([f["past_k"], f["k"]], axis=2).astype(np.float64)
    scores = f["q"].astype(np.float64) @ keys.swapaxes(-1, -2) * 0.5
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT])
@pytest.mark.parametrize("body", ATTENTION)
def test_columns_flagged_at_prefill_are_pruned_in_every_later_step(
    body: str, strategy: Strategy, tmp_path: Path
) -> None:
    file = model_file(decoder(ATTENTION[body]))
    onnx.save(detector(COLUMN_MEAN_18, opset=23, threshold=0.5), tmp_path / "det.onnx")
    treatment = Treatment(Redistribution.PRUNE, load_detector(tmp_path / "det.onnx", 23))
    names = [site.name for site in locate(file.skeleton).sites]
    splice = Splice(dict.fromkeys(names, treatment), strategy, remember=True)
    patched, _ = spliced(file, splice)
    empty = np.zeros((3, 2, 0, 4), np.float32)
    cache, remembered = (empty, empty), None
    flagged = np.zeros((3, 0), bool)
    for number, length in enumerate((6, 1, 1, 1)):
        f = step(number, length, cache)
        p = probabilities(f)
        now = p.mean(axis=(1, 2)) > 0.5
        flagged = now | np.pad(flagged, [(0, 0), (0, length)])
        if number == 0:
            assert now.sum() == now[1, 2] == 1
        carried: Floats = {} if remembered is None else {REMEMBERED: remembered}
        out = run(patched, {**f, **carried})
        np.testing.assert_array_equal(out[FLAGGED], flagged)
        values = np.concatenate([f["past_v"], f["v"]], axis=2).astype(np.float64)
        wanted = reference(p, flagged[:, None, None], None) @ values
        np.testing.assert_allclose(out["y"], wanted, atol=1e-5)
        quiet = ~flagged.any(axis=1)
        np.testing.assert_array_equal(out["y"][quiet], run(file, f)["y"][quiet])
        cache, remembered = (out["keys"], out["values"]), out[FLAGGED]
    assert flagged[1, 2]
    assert not now[1, 2]


def test_what_has_no_cache_of_its_own_cannot_remember(tmp_path: Path) -> None:
    from forms import form

    onnx.save(detector(COLUMN_MEAN_18, opset=23), tmp_path / "det.onnx")
    treatment = Treatment(Redistribution.PRUNE, load_detector(tmp_path / "det.onnx", 23))
    file = model_file(form("branch", "plain"))
    with pytest.raises(RefusedError, match="--remember"):
        spliced(file, Splice({"attention": treatment}, remember=True))

"""Maps before and after the patch, against NumPy on the original's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import atpatch_onnx
from atpatch_onnx.attention import SiteAttention, read_attention
from atpatch_onnx.data import load_samples
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.runtime import Array, Arrays, Session

from hosts import COLUMN_MEAN, attention, detector, random_feeds, save_arrays
from reporting_hosts import KINDS, patched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["guard", "select", "rerun"])
def test_flagged_columns_are_pruned_and_the_rest_keeps_its_mass(
    kind: str, strategy: str, tmp_path: Path
) -> None:
    folder = patched(kind, tmp_path, strategy=strategy)
    for name, flagged in (("clean.npz", 0), ("bad.npz", 1)):
        for (site,) in _read(folder, name):
            assert site.flagged.sum() == flagged
            expected = site.before * ~site.flagged
            expected /= expected.sum(axis=-1, keepdims=True)
            if not flagged:
                assert np.array_equal(site.after, site.before)
            np.testing.assert_allclose(site.after, expected, atol=2e-6)


@pytest.mark.parametrize("strategy", ["guard", "select"])
def test_a_later_site_is_read_as_the_patched_model_computes_it(
    strategy: str, tmp_path: Path
) -> None:
    """Only the first of two sites is pruned; the second is patched, and flags nothing itself."""
    onnx.save(attention(17), tmp_path / "model.onnx")
    many = [random_feeds(seed=seed) for seed in range(4)]
    arrays = {name: np.concatenate([feeds[name] for feeds in many]) for name in many[0]}
    arrays["mask"][:] = 0
    save_arrays(tmp_path / "clean.npz", arrays)
    onnx.save(detector(COLUMN_MEAN, threshold=0.999), tmp_path / "never.onnx")
    plan = tmp_path / "plan.toml"
    atpatch_onnx.inspect(tmp_path / "model.onnx", plan)
    text = plan.read_text().replace('detector = ""', "")
    first, second = text.split("[[site]]")[1:]
    head = text.split("[[site]]")[0]
    first += "\ncolumns = [1]\n"
    second += '\ndetector = "never.onnx"\n'
    plan.write_text("[[site]]".join([head, first, second]))
    atpatch_onnx.patch(tmp_path / "model.onnx", plan=plan, strategy=strategy)
    found = _read(tmp_path, "clean.npz")
    probabilities = _second_map(arrays, pruned=1)
    for number, (one, two) in enumerate(found):
        assert one.flagged.nonzero()[0].tolist() == [1]
        assert not two.flagged.any()
        assert not np.allclose(two.before, two.after, atol=1e-3)
        np.testing.assert_allclose(two.after[0], probabilities[number].mean(0), atol=1e-5)


def test_fused_operators_are_read_where_they_are_opened(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 23]>
        m (float[N, 1, 6, 4] x) => (float[N, 1, 6, 4] y)
        { a = Attention(x, x, x) y = Attention(a, x, x) }
    """)
    onnx.save(model, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    save_arrays(tmp_path / "clean.npz", {"x": rng.standard_normal((3, 1, 6, 4), np.float32)})
    atpatch_onnx.patch(tmp_path / "model.onnx", columns=2, sites=[0], redistribute="prune")
    for found in _read(tmp_path, "clean.npz"):
        (site,) = found
        expected = site.before * ~site.flagged
        expected /= expected.sum(axis=-1, keepdims=True)
        assert site.flagged.nonzero()[0].tolist() == [2]
        np.testing.assert_allclose(site.after, expected, atol=2e-6)


def _read(folder: Path, data: str) -> list[list[SiteAttention]]:
    base, result = (ModelFile.open(folder / f"model{end}.onnx") for end in ("", ".patched"))
    samples = load_samples(folder / data, Session(base.path, "cpu").inputs)
    return read_attention(base, result, samples.take(np.arange(min(4, samples.count))), "cpu")


def _second_map(arrays: Arrays, pruned: int) -> Array:
    """The second map of `attention`, `[N, H, Q, K]`, with a column of the first one pruned."""
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    kt = k.swapaxes(-1, -2)

    def softmax(scores: Array) -> Array:
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True))

    first = softmax(q @ kt)
    first[..., pruned] = 0
    first /= first.sum(-1, keepdims=True)
    return softmax(first @ v @ kt)

"""Texts that are merely odd are no bad inputs for a detector that has seen none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from onnx import ModelProto

import atpatch_onnx
from atpatch_onnx.data import Samples, samples_from
from atpatch_onnx.fitting.odd_text import SUFFIX, odd_texts
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.runtime import Arrays, Session

VOCABULARY, COMMON, LENGTH = 60, 30, 12
HEAD, TAIL, PAD = 1, 2, 0


def host() -> ModelProto:
    """One site over looked-up tokens; the upper half of the vocabulary is loud."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (int64[N, L] input_ids, int64[N, L] attention_mask) => (float[N, L, 4] y)
        <int64[1] axis = {1}, float lowest = {-1e9}, float one = {1}>
        {
            x = Gather (table, input_ids)
            k = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (x, k)
            real = Cast <to = 1> (attention_mask)
            hidden = Sub (one, real)
            low = Mul (hidden, lowest)
            bias = Unsqueeze (low, axis)
            t = Add (s, bias)
            p = Softmax <axis = -1> (t)
            y = MatMul (p, x)
        }
    """)
    table = np.random.default_rng(0).standard_normal((VOCABULARY, 4)).astype(np.float32) * 0.5
    table[:, 0] = 1
    table[COMMON:, 0] = np.linspace(1, 4, VOCABULARY - COMMON)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    return model


def texts(count: int, seed: int) -> Arrays:
    """Sentences of common words between special tokens, some of them as long as may be."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, LENGTH + 1, count)
    ids = rng.integers(4, COMMON, (count, LENGTH))
    place = np.arange(LENGTH)
    ids[:, 0] = HEAD
    ids[np.arange(count), lengths - 1] = TAIL
    mask = place < lengths[:, None]
    return {"input_ids": np.where(mask, ids, PAD), "attention_mask": mask.astype(np.int64)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("text") / "host.onnx"
    onnx.save(host(), target)
    return target


def odd(path: Path, arrays: Arrays) -> tuple[Samples, dict[str, Samples]]:
    inputs = Session(path, "cpu").inputs
    samples = samples_from(arrays, inputs)
    return samples, odd_texts(ModelFile.open(path), inputs, samples, np.random.default_rng(1))


def test_only_words_change(path: Path) -> None:
    clean, found = odd(path, texts(50, 0))
    ids, mask = clean.arrays["input_ids"], clean.arrays["attention_mask"]
    assert sorted(found) == ["a random suffix", "a random token", "random tokens", "shuffled"]
    for name, samples in found.items():
        new, real = samples.arrays["input_ids"], samples.arrays["attention_mask"].astype(bool)
        last = real.sum(axis=1) - 1
        assert (new[:, 0] == HEAD).all()
        assert (new[np.arange(50), last] == TAIL).all()
        assert (new[~real] == PAD).all()
        assert new.max() < VOCABULARY
        assert not np.isin(new[:, 1][last > 1], [PAD, HEAD, TAIL]).any()
        grown = {"a random suffix": SUFFIX, "a random token": 1}.get(name, 0)
        np.testing.assert_array_equal(last + 1, np.minimum(mask.sum(axis=1) + grown, LENGTH))
    shuffled = found["shuffled"].arrays["input_ids"]
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(ids))
    assert (shuffled != ids).any(axis=1).mean() > 0.9
    assert (found["random tokens"].arrays["input_ids"] >= COMMON).any()


def test_odd_texts_are_not_flagged_above_the_budget(path: Path, tmp_path: Path) -> None:
    detector = atpatch_onnx.fit(path, texts(1000, 0), tmp_path / "det.onnx").output
    patched = atpatch_onnx.patch(path, detector, output=tmp_path / "p.onnx").output
    clean, found = odd(path, texts(1000, 7))
    shares = {
        name: atpatch_onnx.diff(path, patched, samples.arrays).flagged_inputs / 1000
        for name, samples in {"clean": clean, **found}.items()
    }
    assert all(share < 0.03 for share in shares.values()), shares


def test_what_is_no_text_has_no_odd_copies(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 8, 4] x) => (float[N, 8, 4] y)
        {
            k = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (x, k)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, x)
        }
    """)
    onnx.save(model, tmp_path / "host.onnx")
    _, found = odd(tmp_path / "host.onnx", {"x": np.zeros((4, 8, 4), np.float32)})
    assert found == {}

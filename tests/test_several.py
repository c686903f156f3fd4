"""The benchmark of methods of several sites: what it feeds them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

pytest.importorskip("torch")

import several_controls

HEAD, TAIL = [1, 2], [3]
"""What every sentence begins and ends with."""


@pytest.mark.parametrize("left", [True, False])
def test_unusual_inputs_keep_template_and_padding(left: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.zeros((40, 20), np.int64)
    for row in ids:
        line = [*HEAD, *rng.integers(10, 60, rng.integers(3, 12)), *TAIL]
        row[slice(20 - len(line), 20) if left else slice(len(line))] = line
    arrays = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    np.savez(tmp_path / "clean.npz", **arrays)  # type: ignore[arg-type]
    victim = SimpleNamespace(clean=tmp_path / "clean.npz", seed=0)
    found = several_controls.unusual(victim, arrays)  # type: ignore[arg-type]
    words = {name: lines(part) for name, part in found.items()}
    before = lines(arrays)
    assert words["clean sentences"] == before
    for name, part in words.items():
        assert all(line[:2] == HEAD and line[-1:] == TAIL for line in part), name
        padding = found[name]["attention_mask"][:, 0 if left else -1]
        assert (padding == 0).any()
    assert [sorted(line) for line in words["words shuffled"]] == [sorted(line) for line in before]
    assert words["words shuffled"] != before
    longer = [len(line) - len(was) for line, was in zip(words["a rare word"], before, strict=True)]
    assert set(longer) == {1}
    suffixed = words[f"a random suffix of {several_controls.SUFFIX} tokens"]
    for line, was in zip(suffixed, before, strict=True):
        assert line[: len(was) - 1] == was[:-1]
        assert len(line) == len(was) + several_controls.SUFFIX


def lines(arrays: dict[str, np.ndarray]) -> list[list[int]]:
    pairs = zip(arrays["input_ids"], arrays["attention_mask"], strict=True)
    return [row[mask > 0].tolist() for row, mask in pairs]

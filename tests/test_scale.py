"""Large models: weights are neither read, copied nor written, whatever their size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scale import CODE, GIB, large_model

MEMORY_LIMIT_MIB = 400


@pytest.mark.slow
def test_thirteen_gibibytes_of_weights_stay_where_they_are(tmp_path: Path) -> None:
    model = large_model(tmp_path, nodes=10_000, weight_bytes=13 * GIB)
    weights = tmp_path / "model.data"
    before = weights.stat()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(model)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    after = weights.stat()
    assert found["sites"] > 100
    assert found["peak_mib"] < MEMORY_LIMIT_MIB
    assert (after.st_mtime_ns, after.st_blocks) == (before.st_mtime_ns, before.st_blocks)
    written = sum(p.stat().st_size for p in tmp_path.iterdir() if p not in (weights, model))
    assert written < 64 << 20

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Third-party ONNX graphs with their true site counts, where they are available."""
    folder = SHARED / "zoo"
    if not (folder / "sites.csv").exists():
        pytest.skip("the collection of third-party graphs is not beside this checkout")
    return folder

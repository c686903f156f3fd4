from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bad_input import Cli

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shell(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Cli:
    """The command line in a folder of good and bad files."""
    return Cli.at(tmp_path / "here", tmp_path_factory, capsys, monkeypatch)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Third-party ONNX graphs with their true site counts, where they are available."""
    folder = SHARED / "zoo"
    if not (folder / "sites.csv").exists():
        pytest.skip("the collection of third-party graphs is not beside this checkout")
    return folder

"""A server on a Ray cluster of two nodes, one of which is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from atpatch_onnx import api
from atpatch_onnx.serving import control
from atpatch_onnx.serving.options import Options

from hosts import COLUMN_MEAN, attention, detector

ray = pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.slow
PORT = 8765


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in control.SETTINGS.items():  # nodes have them from who starts them
        monkeypatch.setenv(name, value)
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    made.add_node(num_cpus=2)
    yield made
    ray.shutdown()
    made.shutdown()


def others(address: str, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What replicas serve, once they are as many as before, and not all of them the same."""
    end = time.monotonic() + 120
    while True:
        found = control.status(address=address)
        same = {one["pid"] for one in found} == {one["pid"] for one in before}
        if len(found) == len(before) and not same:
            return found
        assert time.monotonic() < end, found
        time.sleep(0.5)


def raylet_of(pid: int) -> int:
    """The process of the node that a replica is on: its parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_replicas_spread_and_survive_a_node(cluster: Any, tmp_path: Path) -> None:
    model, patch = tmp_path / "host.onnx", tmp_path / "fix.atpatch"
    onnx.save(attention(17), model)
    onnx.save(detector(COLUMN_MEAN, threshold=0.6), tmp_path / "det.onnx")
    api.patch(model, tmp_path / "det.onnx", patch_only=patch)
    address = cluster.address
    control.start(
        Options(str(model), "host", ep="cpu"),
        [patch],
        replicas=control.Replicas(2, cpus=1),
        port=PORT,
        address=address,
    )
    try:
        before = control.status(address=address)
        assert len({raylet_of(one["pid"]) for one in before}) == 2
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        after = others(address, before)
        assert {one["sha256"] for one in after} == {before[0]["sha256"]}
        assert control.swap([], address=address).replicas == 2
    finally:
        control.stop(PORT)

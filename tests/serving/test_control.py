"""What a server is told, and what is wrong before one is started."""

from __future__ import annotations

import json
import shlex
import socket
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.serving.options import ROLLBACKS, Options, Serving
from atpatch_onnx.serving.protocol import Limits
from atpatch_onnx.serving.stack import PatchSource

from bad_input import Cli
from hosts import save_arrays


def test_options_travel_as_json() -> None:
    options = Options("m.onnx", "m", golden="g.npz", limits=Limits(batch=3, nan=True))
    assert Options.from_dict(json.loads(json.dumps(options.as_dict()))) == options


def test_patches_travel_as_json_each_once() -> None:
    one, two = PatchSource("one", bytes(range(256))), PatchSource("two", b"2")
    serving = Serving(1, (one,)).changed([one, two]).changed([two])
    held = json.dumps(serving.as_dict())
    assert len(json.loads(held)["files"]) == 2
    back = Serving.from_dict(json.loads(held))
    assert back == serving
    assert back.rolled_back().patches == (one, two)
    assert back.rolled_back().rolled_back().patches == (one,)
    assert back.rolled_back().generation == 4
    for _ in range(9):
        serving = serving.changed([one])
    assert len(serving.earlier) == ROLLBACKS


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("serve model.onnx --replicas 0", 2, "--replicas 0: give at least 1"),
        ("serve model.onnx --max-body 0", 2, "--max-body 0: give at least 1"),
        ("serve model.onnx --name 'a b'", 2, "use letters, digits"),
        ("serve nothing.onnx", 2, "cannot read the model"),
        ("serve model.onnx --patch det.onnx", 2, "not a usable .atpatch file"),
        ("serve model.onnx --patch other.atpatch", 3, "patch this model again"),
        ("serve model.onnx --golden nothing.npz", 2, "does not exist"),
        ("serve model.onnx --patch fix.atpatch --golden odd.npz", 1, "marked bad"),
        ("swap fix.atpatch --port 1", 2, "no server of atpatch-onnx was started on port 1"),
        ("swap --original --port 1", 2, "no server of atpatch-onnx was started on port 1"),
        ("swap --port 1", 2, "or to none with --original"),
        ("swap fix.atpatch --original --port 1", 2, "or to none with --original"),
        ("rollback --port 1", 2, "no server of atpatch-onnx was started on port 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    command: str, code: int, told: str, shell: Cli
) -> None:
    x = np.random.default_rng(1).standard_normal((2, 2, 5, 4)).astype(np.float32)
    save_arrays(Path("odd.npz"), {"x": 0 * x, "bad/x": 0 * x})
    found, _, error = shell.run(*shlex.split(command))
    assert found == code
    assert told in error
    assert "Traceback" not in error


def test_a_port_that_is_taken(shell: Cli) -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[serve]'")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        found, _, error = shell.run("serve", "model.onnx", "--port", str(port))
    assert found == 2
    assert f"cannot serve at 127.0.0.1:{port}" in error


def test_metrics_of_replicas_are_one_text() -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    from prometheus_client.parser import text_string_to_metric_families

    from atpatch_onnx.serving.flags import Flags
    from atpatch_onnx.serving.metrics import Metrics, exposition

    replicas = [Metrics(), Metrics()]
    patch = PatchSource("fix.atpatch", b"1")
    for number, metrics in enumerate(replicas):
        metrics.serve("abc", [patch], telemetry=True)
        flags = {"a": np.array([[True, False], [False, False]]), "b": np.zeros((2, 2), bool)}
        metrics.answered(2, Flags(flags))
        metrics.requests.labels("200").inc(number + 1)
    replicas[1].serve("def", [], telemetry=False)  # what was served before is gone
    text = exposition(m.families(str(n)) for n, m in enumerate(replicas)).decode()
    found = {
        (s.name, s.labels.get("site") or s.labels.get("model_sha256"), s.labels["replica"]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert found["atpatch_requests_total", None, "0"] == 1
    assert found["atpatch_requests_total", None, "1"] == 2
    assert found["atpatch_inputs_total", None, "0"] == 2
    assert found["atpatch_flagged_inputs_total", None, "0"] == 1
    assert found["atpatch_site_flagged_inputs_total", "a", "1"] == 1
    assert found["atpatch_site_flagged_inputs_total", "b", "1"] == 0
    assert found["atpatch_active", "abc", "0"] == 1
    assert ("atpatch_active", "abc", "1") not in found
    assert text.count("# TYPE atpatch_requests_total counter") == 1

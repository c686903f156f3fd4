"""A server on loopback with two replicas, and clients that nobody here wrote."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from atpatch_onnx import CheckError, InputError, Session, api
from atpatch_onnx.data import Samples
from atpatch_onnx.runtime import Arrays
from atpatch_onnx.serving.stack import sources

from hosts import COLUMN_MEAN, attention, detector, random_feeds, save_arrays
from serving import Expected, answers, loaded

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[serve]'")
triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

from atpatch_onnx.serving import control  # noqa: E402 (needs what is looked for above)

pytestmark = pytest.mark.slow
MIB = 1 << 20
LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/host/infer"
READ_S = 15
"""The server's --read-timeout: long enough for a busy machine to open many connections within."""

PATIENCE_S = 60.0
"""How long clients here wait for what needs a moment only: the machine may be busy."""


def inputs(bad: bool = False, count: int = 3) -> Arrays:
    feeds = random_feeds(batch=count)
    feeds["mask"][:] = 0
    for name in "qk":
        feeds[name] *= 0.3
    if bad:
        feeds["q"][..., 0] = 3
        feeds["k"][:, :, 1, 0] = 6
    return feeds


@dataclass(frozen=True)
class Server:
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def client(self) -> Any:
        return triton.InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=60)

    def patch(self, name: str) -> Path:
        return self.folder / f"{name}.atpatch"

    def raw(self, data: bytes, timeout: float = PATIENCE_S) -> tuple[int, str]:
        """What is answered to these bytes: status and body."""
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout)) as connection:
            connection.sendall(data)
            return read(connection)

    def post(
        self, body: bytes, *headers: str, path: str = "/v2/models/host/infer"
    ) -> tuple[int, str]:
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *headers]
        lines += [f"Content-Length: {len(body)}"]
        return self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def read(connection: socket.socket) -> tuple[int, str]:
    found = b""
    while b"\r\n\r\n" not in found or not found.endswith(b"}"):
        chunk = connection.recv(65536)
        if not chunk:
            break
        found += chunk
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def request_of(feeds: Arrays, binary: bool = True) -> list[Any]:
    made = []
    for name, value in feeds.items():
        made.append(triton.InferInput(name, list(value.shape), "FP32"))
        made[-1].set_data_from_numpy(value, binary_data=binary)
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = folder / "host.onnx"
    onnx.save(attention(17), model)
    onnx.save(detector(COLUMN_MEAN, threshold=0.6), folder / "det.onnx")
    for name, options in {
        "first": {"telemetry": True},
        "second": {"telemetry": True, "redistribute": "prune"},
        "nervous": {"telemetry": True, "threshold": 0.0},
    }.items():
        target = folder / f"{name}.atpatch"
        api.patch(model, folder / "det.onnx", patch_only=target, **options)  # type: ignore[arg-type]
    bad = {f"bad/{name}": value for name, value in inputs(bad=True).items()}
    save_arrays(folder / "golden.npz", {**inputs(), **bad})
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "atpatch_onnx", "serve", str(model), "--port", str(port)),
            *("--patch", str(folder / "first.atpatch"), "--golden", str(folder / "golden.npz")),
            *("--replicas", "2", "--log", str(folder / "log.jsonl"), "--read-timeout", str(READ_S)),
            *("--max-body", "1", "--max-inputs", "16", "--max-length", "64", "--batch", "8"),
        ],
        stdout=(folder / "out.txt").open("wb"),
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + 300
    while "serving host" not in (folder / "out.txt").read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail((folder / "out.txt").read_text()[-2000:])
        time.sleep(0.2)
    yield Server(folder, port, process)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@pytest.fixture(scope="module")
def handle(server: Server) -> Iterator[Any]:
    with control.connected(server.port, None) as found:
        yield found


@pytest.fixture(scope="module")
def expected(server: Server) -> Expected:
    """What each version answers to the bad inputs, by its digest."""
    found: Expected = {}
    for patches in ([], [server.patch("first")], [server.patch("second")]):
        with Session(server.folder / "host.onnx", patches, threads=1, ep="cpu") as alone:
            found |= answers(alone, inputs(bad=True))
    assert len({value["y"] for value in found.values()}) == 3
    return found


def test_it_speaks_the_protocol(server: Server, expected: Expected) -> None:
    client = server.client()
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("host")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    told = client.get_model_metadata("host")
    assert told["inputs"][0] == {"name": "q", "datatype": "FP32", "shape": [-1, -1, -1, -1]}
    assert [entry["name"] for entry in told["outputs"]] == ["y"]
    out = server.folder / "out.txt"
    assert "execution provider: cpu, 2 replicas" in out.read_text()
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
        found = client.infer("host", request_of(inputs(bad=True), binary), outputs=wanted)
        parameters = found.get_response()["parameters"]
        assert found.as_numpy("y").tobytes() == expected[parameters["atpatch_sha256"]]["y"]
        assert parameters["atpatch_flagged"] == 3


def test_a_flagged_request_can_be_found_again(server: Server) -> None:
    feeds = inputs(bad=True, count=2)
    client = server.client()
    client.infer("host", request_of(feeds), request_id="the one")
    client.infer("host", request_of(inputs()), request_id="clean")
    (entry,) = [e for e in server.log if e["event"] == "flagged" and e["id"] == "the one"]
    assert entry["input_sha256"] == Samples(feeds, 2).sha256()
    assert entry["flagged"] == [0, 1]
    assert entry["columns"]["attention.0"] == {"0": [1], "1": [1]}
    assert not [e for e in server.log if e.get("id") == "clean"]


def document(**changes: Any) -> bytes:
    entries = []
    for name, value in inputs(count=1).items():
        shape, data = list(value.shape), value.ravel().tolist()
        entries.append({"name": name, "datatype": "FP32", "shape": shape, "data": data})
    entries[0] |= changes
    return json.dumps({"inputs": entries}).encode()


@pytest.mark.parametrize(
    ("what", "status", "told"),
    [
        (lambda s: s.post(b"{"), 400, "not JSON"),
        (lambda s: s.post(b"[" * 200_000), 400, "not JSON"),
        (
            lambda s: s.post(document(), "Inference-Header-Content-Length: 9999999"),
            400,
            "the body has",
        ),
        (lambda s: s.post(document(), "Inference-Header-Content-Length: -1"), 400, "whole number"),
        (lambda s: s.post(document(datatype="BYTES")), 400, "the model takes FP32"),
        (lambda s: s.post(document(shape=[1, 2, 3])), 400, "the model takes"),
        (lambda s: s.post(document(shape=[99, 2, 6, 4])), 400, "give 1 to 16"),
        (lambda s: s.post(document(shape=[1, 2, 65, 4])), 400, "give 1 to 64"),
        (lambda s: s.post(document(shape=[10**30, 2, 6, 4])), 400, r"over 10^18"),
        (lambda s: s.post(document(data=[float("nan")] * 48)), 400, "NaN"),
        (lambda s: s.post(document(shape=[1, 3, 6, 4], data=[0] * 72)), 400, "failed on inputs"),
        (lambda s: s.post(document(), "Content-Encoding: gzip"), 415, "compressed"),
        (lambda s: s.post(document(), path="/v2/models/other/infer"), 404, "no such model"),
        (lambda s: s.post(document(), path="/v2/models/host/versions/7/infer"), 404, "no such"),
        (lambda s: s.post(b"", path="/v2/models/host"), 405, "POST is not served"),
        (lambda s: s.post(b" " * (MIB + 1)), 413, "over 1048576 bytes"),
    ],
)
def test_what_is_wrong_is_told(
    what: Callable[[Server], tuple[int, str]], status: int, told: str, server: Server
) -> None:
    found = what(server)
    assert (found[0], told in json.loads(found[1])["error"]) == (status, True), found


def head(*headers: str) -> bytes:
    lines = ["POST /v2/models/host/infer HTTP/1.1", "Host: x", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def test_a_huge_size_is_refused_before_anything_is_sent(server: Server) -> None:
    for size in (2 * MIB, 1 << 40, 10**18):
        assert server.raw(head(f"Content-Length: {size}"))[0] == 413


def test_a_body_without_end_is_cut_off(server: Server) -> None:
    before = memory(server)
    sent, data = 0, b""
    with closing(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        while sent < 512 * MIB:
            answered, _, _ = select.select([connection], [connection], [], PATIENCE_S)
            if answered:
                break
            data = data or b"10000\r\n" + b" " * 65536 + b"\r\n"
            count = connection.send(data)
            sent, data = sent + count, data[count:]
        assert read(connection)[0] == 413
    # Of 1 MiB that is allowed, as much again that is dropped, and what the kernel holds meanwhile.
    assert sent < 64 * MIB
    assert growth(before, memory(server)) < 50 * MIB


def test_slow_clients_are_told_so_and_keep_nobody_waiting(server: Server) -> None:
    slow = []
    for _ in range(200):
        connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
        connection.sendall(head("Content-Length: 100") + b"{")
        slow.append(connection)
    server.client().infer("host", request_of(inputs()))
    told, _, _ = select.select(slow, [], [], 0)
    assert not told  # answered while all of them are still waited for
    for connection in slow:
        status, text = read(connection)
        connection.close()
        assert (status, f"within {READ_S} seconds" in text) == (408, True)


def test_many_connections_in_turn(server: Server, expected: Expected) -> None:
    before = memory(server)
    for number in range(500):
        if number % 2:
            assert server.post(b"{")[0] == 400
        else:  # one that goes away at once
            socket.create_connection(("127.0.0.1", server.port), PATIENCE_S).close()
    check(server.client(), expected)
    assert growth(before, memory(server)) < 50 * MIB


def check(client: Any, expected: Expected) -> str:
    """One request, whose answer must be that of the version which it names."""
    found = client.infer("host", request_of(inputs(bad=True)))
    sha256 = str(found.get_response()["parameters"]["atpatch_sha256"])
    assert found.as_numpy("y").tobytes() == expected[sha256]["y"]
    return sha256


def memory(server: Server) -> dict[int, int]:
    """What each replica of the server and its proxy hold for themselves, in bytes, by process.

    Of anonymous memory only: what a process shares counts for it once others have ended.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            if name.startswith((b"ray::ServeReplica", b"ray::Proxy")) and is_of(server, path):
                lines = (path / "status").read_text().splitlines()
                (held,) = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
                found[int(path.name)] = int(held) << 10
        except OSError:  # it has just ended
            continue
    return found


def is_of(server: Server, process: Path) -> bool:
    """Whether a process, as in /proc, descends from the server's."""
    while process.name not in ("0", "1", str(server.process.pid)):
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        process = process.with_name(parent)
    return process.name == str(server.process.pid)


def growth(before: dict[int, int], after: dict[int, int]) -> int:
    """By how much the process grew that grew most, of those which have been there all the while."""
    there = before.keys() & after.keys()
    assert len(there) >= 2, (before, after)  # the proxy, and a replica
    return max(after[pid] - before[pid] for pid in there)


def test_swaps_under_load(server: Server, handle: Any, expected: Expected) -> None:
    """Every request is answered, and every answer is that of one version."""
    second = sources([server.patch("second")])
    with loaded(4, server.port, "host", inputs(bad=True), expected) as loads:
        for number in range(12):
            if number % 2:
                done = control.change(handle, lambda serving: serving.rolled_back())
            else:
                done = control.change(handle, lambda serving: serving.changed(second))
            assert done.replicas == 2
            assert done.patches == (("first.atpatch",) if number % 2 else ("second.atpatch",))
    assert [load.errors for load in loads] == [[]] * 4
    assert [load.wrong for load in loads] == [0] * 4
    served = [sha256 for load in loads for sha256 in load.served]
    assert len(served) > 50
    assert len(set(served)) == 2


def test_a_swap_that_fails_its_check_changes_nothing(
    server: Server, handle: Any, expected: Expected
) -> None:
    before = check(server.client(), expected)
    with pytest.raises(CheckError, match="clean golden inputs"):
        control.swap([server.patch("nervous")], port=server.port)
    with pytest.raises(InputError, match="not a usable"):
        control.swap([server.folder / "host.onnx"], port=server.port)
    with pytest.raises(InputError, match="no swap to roll back"):
        control.rollback(port=server.port)
    states = control.status(port=server.port)
    assert [one["sha256"] for one in states] == [before] * 2
    assert [one["failure"] for one in states] == [None] * 2
    assert check(server.client(), expected) == before
    del handle


def test_the_original_can_be_served(server: Server, handle: Any) -> None:
    """Also by a server that was started with a patch."""
    done = control.swap([], port=server.port)
    with Session(server.folder / "host.onnx", ep="cpu") as original:
        assert (done.patches, done.after) == ((), original.sha256)
    assert control.rollback(port=server.port).patches == ("first.atpatch",)
    del handle


def test_a_killed_replica_comes_back(server: Server, handle: Any, expected: Expected) -> None:
    """Only what it was answering is lost; it comes back with the patches in force."""
    victim = control.status(port=server.port)[0]["pid"]
    with loaded(4, server.port, "host", inputs(bad=True), expected) as loads:
        time.sleep(1)
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 180
        states: list[dict[str, Any]] = []
        while len(states) < 2 or victim in [one["pid"] for one in states]:
            assert time.monotonic() < end, states
            time.sleep(0.2)
            states = control._statuses(handle)
        time.sleep(1)
    errors = [error for load in loads for error in load.errors]
    assert len(errors) <= 4, errors
    assert sum(load.wrong for load in loads) == 0
    assert len({one["sha256"] for one in states}) == 1
    assert check(server.client(), expected) == states[0]["sha256"]


def test_metrics(server: Server) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    client = server.client()
    client.infer("host", request_of(inputs(bad=True)))
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read().decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    samples = {name: family.samples for name, family in families.items()}
    assert len({s.labels["replica"] for s in samples["atpatch_telemetry"]}) == 2
    codes = {s.labels["code"] for s in samples["atpatch_requests"] if s.name.endswith("total")}
    assert "200" in codes
    (sha256,) = {s.labels["model_sha256"] for s in samples["atpatch_active"]}
    with Session(server.folder / "host.onnx", [server.patch("first")], ep="cpu") as alone:
        assert sha256 == alone.sha256
        assert {s.labels["patch_sha256"] for s in samples["atpatch_active"]} == {
            alone.patches[0].sha256
        }
    sites = {s.labels["site"] for s in samples["atpatch_site_flagged_inputs"]}
    assert sites == {"attention.0", "attention.1"}
    for name in ("atpatch_request_seconds", "atpatch_batch_inputs", "atpatch_swaps"):
        assert name in families


def test_paths_that_are_not_there(server: Server) -> None:
    for path in ("/", "/v2/models/other", "/v2/health/other", "/v3"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}")
        assert caught.value.code == 404
        assert "/v2/models/host" in json.load(caught.value)["error"]


def test_zz_it_stops_when_it_has_answered(server: Server, handle: Any) -> None:
    """Last: a request that has begun is answered, then nothing of the server is left."""
    del handle
    body = document()
    head_of_it = head(f"Content-Length: {len(body)}", "Connection: close", "Expect: 100-continue")
    with closing(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)) as connection:
        connection.sendall(head_of_it)
        assert b" 100 " in connection.recv(65536)
        time.sleep(1)  # from the proxy, which has it now, to a replica
        server.process.send_signal(signal.SIGTERM)
        health = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        while server.raw(health)[0] == 200:  # it has not begun to stop
            time.sleep(0.1)
        connection.sendall(body)
        assert read(connection)[0] == 200
    assert server.process.wait(120) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
    with pytest.raises(InputError, match="no server of atpatch-onnx was started on port"):
        control._noted(server.port)

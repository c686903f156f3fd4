"""Hostile clients against a server: what they are told, what honest ones notice, and memory.

    python benchmarks/serving_hostile.py [--connections 10000]

One honest `tritonclient[http]` runs in a closed loop all the while, and every answer to it is
compared bit for bit. Writes results/serving_hostile.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from atpatch_onnx import Session
from atpatch_onnx.benchmark import machine

from serving import PORT, answers, loaded, served

RESULT = Path(__file__).parent / "results" / "serving_hostile.json"
LENGTH = "Inference-Header-Content-Length"
MIB = 1 << 20
TARGET = ("127.0.0.1", PORT)


def head(*headers: str) -> bytes:
    """The lines before a body."""
    lines = ["POST /v2/models/host/infer HTTP/1.1", "Host: x", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(body: bytes, *headers: str) -> bytes:
    """A whole request."""
    return head(f"Content-Length: {len(body)}", *headers) + body


def document(**changes: Any) -> bytes:
    """A request that is right but for `changes`."""
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 4, 8], "data": [0.5] * 32}
    return json.dumps({"inputs": [{**entry, **changes}]}).encode()


def binary(values: bytes, size: int) -> bytes:
    """A request with a binary tensor."""
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 4, 8]}
    text = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": size}}]}).encode()
    return post(text + values, f"{LENGTH}: {len(text)}")


REQUESTS: dict[str, bytes] = {
    "right": post(document()),
    "malformed JSON": post(b'{"inputs": [{'),
    "deep JSON": post(b"[" * 100_000),
    "a number of 50,000 digits": post(b'{"id": ' + b"9" * 50_000 + b"}"),
    "header longer than the body": post(document(), f"{LENGTH}: 99999999"),
    "header that is no number": post(document(), f"{LENGTH}: 0x10"),
    "tensor longer than the body": binary(b"\0" * 128, 1 << 40),
    "tensor shorter than its shape": binary(b"\0" * 64, 64),
    "wrong type": post(document(datatype="INT8")),
    "wrong rank": post(document(shape=[4, 8])),
    "huge batch": post(document(shape=[10**9, 4, 8])),
    "a shape beyond 64 bits": post(document(shape=[10**40, 4, 8])),
    "NaN in JSON": post(document(data=[float("nan")] * 32)),
    "NaN in bytes": binary(np.full(32, np.nan, "<f4").tobytes(), 128),
    "a gibibyte declared": head(f"Content-Length: {1 << 30}"),
    "an exbibyte declared": head(f"Content-Length: {1 << 60}"),
    "compressed": post(b"\x1f\x8b", "Content-Encoding: gzip"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
}


def status(data: bytes) -> str:
    """The status that is answered."""
    with closing(socket.create_connection(TARGET, 30)) as connection:
        connection.sendall(data)
        return _status(connection)


def _status(connection: socket.socket) -> str:
    try:
        line = connection.recv(4096).split(b"\r\n")[0].split()
    except OSError as error:
        return type(error).__name__
    return line[1].decode() if len(line) > 1 else "closed"


def endless(most_bytes: int) -> dict[str, Any]:
    """A chunked body without end; how much of it was taken."""
    sent = 0
    with closing(socket.create_connection(TARGET, 30)) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        try:
            while sent < most_bytes:
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        return {"sent_mib": sent >> 20, "status": _status(connection)}


def slow(count: int) -> dict[str, int]:
    """Clients that begin a body and send no more."""
    connections = [socket.create_connection(TARGET, 60) for _ in range(count)]
    for connection in connections:
        connection.sendall(head("Content-Length: 1000") + b"{")
    found = Counter(_status(connection) for connection in connections)
    for connection in connections:
        connection.close()
    return dict(found)


def memory() -> int:
    """What replicas and the proxy hold, in MiB."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith((b"ray::ServeReplica", b"ray::Proxy")):
                lines = (path / "smaps_rollup").read_text().splitlines()
                total += next(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
        except OSError:
            continue
    return total >> 10


def model(path: Path) -> Path:
    """A small attention."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, L, 8] x) => (float[N, L, 8] y)
        {
            t = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (x, t) p = Softmax <axis = -1> (s) y = MatMul (p, x)
        }
    """
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def turns(count: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """`count` connections: every kind of request in turn, and some that go away at once."""
    kinds: list[tuple[str, Callable[[], str]]] = [
        (name, partial(status, data)) for name, data in REQUESTS.items()
    ]
    kinds.append(("goes away", _leave))
    for number in range(count):
        yield kinds[number % len(kinds)]


def _leave() -> str:
    socket.create_connection(TARGET, 30).close()
    return "none"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    arguments = parser.parse_args()
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 8), np.float32)}
    with tempfile.TemporaryDirectory() as scratch:
        path = model(Path(scratch) / "host.onnx")
        with Session(path, threads=1, ep="cpu") as alone:
            expected = answers(alone, feeds)
        options = ("--replicas", "2", "--batch", "1", "--max-body", "8", "--read-timeout", "5")
        with served(path, *options) as name:
            grown = {"0": memory()}
            told: dict[str, Counter[str]] = {}
            start = time.time()
            with loaded(1, PORT, name, feeds, expected) as loads:
                for number, (kind, run) in enumerate(turns(arguments.connections), 1):
                    told.setdefault(kind, Counter())[run()] += 1
                    if number % 1000 == 0:
                        grown[str(number)] = memory()
                        print(number, grown[str(number)], flush=True)
                endings = {"endless": endless(1 << 30), "slow": slow(200)}
                grown["at the end"] = memory()
            (load,) = loads
    result = {
        "machine": machine("cpu"),
        "load_average": os.getloadavg()[0],
        "connections": arguments.connections,
        "seconds": round(time.time() - start, 1),
        "told": {kind: dict(found) for kind, found in told.items()},
        **endings,
        "pss_mib_by_connections": grown,
        "honest": {
            "answers": len(load.seconds),
            "failed": len(load.errors),
            "wrong": load.wrong,
            "p50_ms": round(float(np.median(load.seconds)) * 1e3, 2),
            "p99_ms": round(float(np.percentile(load.seconds, 99)) * 1e3, 2),
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

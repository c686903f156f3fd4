"""Feed the protocol's parser with damaged requests; only `ProtocolError` may come out.

    python benchmarks/fuzz_protocol.py [--inputs 300000] [--seed 0]

Good requests, JSON and binary, are damaged in bytes and in structure. What is accepted must be what
the model takes. Writes results/fuzz_protocol.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atpatch_onnx.runtime import InputSpec
from atpatch_onnx.serving.protocol import Interface, Limits, ProtocolError, Request, parse, respond

RESULT = Path(__file__).parent / "results" / "fuzz_protocol.json"
LIMITS = Limits(body_bytes=1 << 16, batch=16, length=64)
INTERFACE = Interface(
    (
        InputSpec("x", np.float32, ("N", 3)),
        InputSpec("half", np.float16, ("N",)),
        InputSpec("ids", np.int64, ("N", "L")),
        InputSpec("mask", np.bool_, ("N", "L")),
        InputSpec("scale", np.float64, ()),
        InputSpec("turned", np.uint8, ("L", "N"), axis=1),
    ),
    {"y": ("FP32", ("N", 2)), "z": ("INT64", ("N",))},
)
ODD: list[Any] = [
    None, True, -1, 0, 1, 10**30, 1.5, 1e308, "", "x", "FP32", "\ud800", [], {}, [[]], [None],
    [[1, 2], [3]], [[[[[[[[[[1]]]]]]]]]], {"binary_data_size": 4}, {"binary_data_size": 2**62},
]  # fmt: skip
BYTES = [b"[" * 2000, b"9" * 5000, b"\xff\xfe", b"NaN", b"Infinity", b"1e999", b"\x00", b'"', b"}"]


def good(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A request that is right, and the bytes behind its JSON."""
    count, length = rng.randint(1, 3), rng.randint(1, 4)
    inputs, behind = [], b""
    for spec in INTERFACE.inputs:
        shape = [d if isinstance(d, int) else count if d == "N" else length for d in spec.shape]
        assert spec.dtype is not None
        value = np.random.default_rng(rng.randrange(1 << 16)).integers(0, 2, shape)
        array = value.astype(spec.dtype)
        kind = {
            "f4": "FP32",
            "f2": "FP16",
            "i8": "INT64",
            "b1": "BOOL",
            "f8": "FP64",
            "u1": "UINT8",
        }
        entry: dict[str, Any] = {
            "name": spec.name,
            "datatype": kind[array.dtype.str[1:]],
            "shape": shape,
        }
        if rng.random() < 0.5:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            behind += array.tobytes()
        else:
            entry["data"] = array.ravel().tolist()
        inputs.append(entry)
    request: dict[str, Any] = {"id": "a", "inputs": inputs}
    if rng.random() < 0.5:
        request["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}]
    if rng.random() < 0.2:
        request["parameters"] = {"binary_data_output": True}
    return request, behind


def damaged(rng: random.Random) -> tuple[bytes, str | None]:
    """A body and its header, somehow wrong; or not."""
    request, behind = good(rng)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        _spoil(request, rng)
    head = json.dumps(request, allow_nan=True).encode("utf-8", "surrogatepass")
    header: str | None = str(len(head))
    if rng.random() < 0.3:
        header = rng.choice([None, "", "-1", "x", "1e3", "٣", "9" * 40, str(rng.randrange(2000))])
    body = bytearray(head + behind)
    for _ in range(rng.choice((0, 0, 0, 1, 3, 20))):
        at = rng.randrange(len(body) + 1)
        what = rng.randrange(4)
        if what == 0 and at < len(body):
            body[at] = rng.randrange(256)
        elif what == 1:
            del body[at : at + rng.randrange(20)]
        elif what == 2:
            body[at:at] = rng.choice(BYTES)
        else:
            body[at:at] = body[at : at + rng.randrange(200)]
    return bytes(body), header


def _spoil(node: Any, rng: random.Random) -> None:
    """Change one thing somewhere in a JSON document."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        what = rng.randrange(3)
        if what == 0:
            del node[key]
        elif what == 1:
            node[key] = copy.deepcopy(rng.choice(ODD))
        elif isinstance(node, list):
            node.extend(copy.deepcopy(node[key]) for _ in range(rng.choice((1, 1, 30))))
        else:
            node[str(rng.choice(ODD))] = copy.deepcopy(node[key])
        return


def check(body: bytes, header: str | None) -> Request | ProtocolError:
    """Parse; what comes out must be an error with a short sentence, or what the model takes."""
    try:
        request = parse(body, header, INTERFACE, LIMITS)
    except ProtocolError as error:
        return _told(error)
    for spec in INTERFACE.inputs:
        array = request.inputs[spec.name]
        assert array.dtype == spec.dtype
        assert array.ndim == len(spec.shape)
        pairs = zip(spec.shape, array.shape, strict=True)
        assert all(not isinstance(d, int) or d == n for d, n in pairs)
        assert all(n <= LIMITS.length for n in array.shape)
        assert not array.ndim or array.shape[spec.axis] == request.count <= LIMITS.batch
        assert array.dtype.kind != "f" or not np.isnan(array).any()
        assert array.dtype != np.bool_ or set(array.tobytes()) <= {0, 1}
    values = {"y": np.ones((1, 2), np.float32), "z": np.array([1])}
    respond("model", values, request.outputs, request.id)
    return request


def _told(error: ProtocolError) -> ProtocolError:
    assert 400 <= error.status < 500
    assert 0 < len(str(error)) < 600
    assert "\n" not in str(error)
    return error


def fuzz(count: int, seed: int, tick: Callable[[int], object] = lambda _: None) -> Counter[str]:
    """Check `count` damaged requests; how many had which end."""
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    for number in range(count):
        found = check(*damaged(rng))
        ends["accepted" if isinstance(found, Request) else f"refused {found.status}"] += 1
        tick(number)
    return ends


def main() -> None:
    """Fuzz, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = last = time.perf_counter()
    slowest = 0.0

    def tick(number: int) -> None:
        nonlocal slowest, last
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
        if number % 50_000 == 49_999:
            print(number + 1, flush=True)

    ends = fuzz(arguments.inputs, arguments.seed, tick)
    result = {
        "inputs": arguments.inputs,
        "seed": arguments.seed,
        "ends": dict(ends),
        "crashes": 0,
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_ms": round(slowest * 1e3, 2),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""A server under load: swaps, a killed replica, its overhead, and what batching gains.

    python benchmarks/serving.py [--swaps 1000] [--clients 8]

The clients are `tritonclient[http]`, each in a closed loop: it sends its next request when it has
the answer to the last. Every answer is compared with what each version of the model answers, bit
for bit; for that, requests are not batched while patches are swapped (a runtime rounds otherwise
beside other inputs). Writes results/serving.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from atpatch_onnx import Session, api, demo
from atpatch_onnx.benchmark import machine
from atpatch_onnx.runtime import Arrays
from atpatch_onnx.serving import control
from atpatch_onnx.serving.stack import sources

PORT = 8377
WIDTH = 1536
RESULT = Path(__file__).parent / "results" / "serving.json"


@dataclass
class Load:
    """What one client saw: when it was answered, after how long, by whom; and its errors."""

    ended: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    wrong: int = 0


Expected = dict[str, dict[str, bytes]]
"""What each version answers, by its digest: outputs by name, as bytes."""


def client(
    port: int, name: str, feeds: Arrays, expected: Expected, stop: Event, load: Load
) -> None:
    """One closed loop."""
    import tritonclient.http as triton

    def connected() -> Any:
        return triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=120)

    inputs = []
    for key, value in feeds.items():
        kind = {"float32": "FP32", "int64": "INT64"}[str(value.dtype)]
        inputs.append(triton.InferInput(key, list(value.shape), kind))
        inputs[-1].set_data_from_numpy(value)
    server = connected()
    while not stop.is_set():
        started = time.perf_counter()
        try:
            answer = server.infer(name, inputs)
        except Exception as error:  # whatever the client raises is what is counted
            load.errors.append((time.time(), f"{type(error).__name__}: {error}"[:160]))
            server = connected()
            continue
        load.seconds.append(time.perf_counter() - started)
        load.ended.append(time.time())
        sha256 = answer.get_response()["parameters"]["atpatch_sha256"]
        load.served.append(sha256)
        if expected:
            right = expected.get(sha256, {})
            same = right and all(answer.as_numpy(k).tobytes() == v for k, v in right.items())
            load.wrong += not same


def clients(
    count: int,
    port: int,
    name: str,
    feeds: Arrays,
    expected: Expected,
    ready: Event,
    stop: Event,
    results: Any,
) -> None:
    """All clients, as threads of a process of their own."""
    loads = [Load() for _ in range(count)]
    threads = [
        threading.Thread(target=client, args=(port, name, feeds, expected, stop, load))
        for load in loads
    ]
    for thread in threads:
        thread.start()
    while not all(load.seconds or load.errors for load in loads):
        time.sleep(0.05)
    ready.set()
    for thread in threads:
        thread.join()
    results.put(loads)


@contextmanager
def loaded(
    count: int, port: int, name: str, feeds: Arrays, expected: Expected
) -> Iterator[list[Load]]:
    """A closed loop of `count` clients while the block runs; the list is filled at its end.

    expected: empty: answers are not compared.
    """
    context = multiprocessing.get_context("spawn")
    ready, stop, results = context.Event(), context.Event(), context.Queue()
    given = (count, port, name, feeds, expected, ready, stop, results)
    process = context.Process(target=clients, args=given)
    process.start()
    loads: list[Load] = []
    try:
        ready.wait(60)
        yield loads
    finally:
        stop.set()
        loads.extend(results.get(timeout=180))
        process.join()


def answers(session: Session, feeds: Arrays) -> Expected:
    """What a session's version answers, as `expected` has it."""
    values = session.run(feeds)
    return {session.sha256: {name: value.tobytes() for name, value in values.items()}}


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """A server as a process of its own; gives the model's name."""
    import urllib.request

    command = [sys.executable, "-m", "atpatch_onnx", "serve", str(model), "--port", str(PORT)]
    process = subprocess.Popen([*command, *options])
    try:
        for _ in range(600):
            time.sleep(0.2)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v2/health/ready", timeout=2)
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
        while not control._note_path(PORT).exists():
            time.sleep(0.2)
        yield model.stem
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def percentiles(loads: list[Load], *spans: tuple[float, float]) -> dict[str, float]:
    """Latencies of the answers within spans of time, in milliseconds."""
    ended = np.array([t for load in loads for t in load.ended])
    seconds = np.array([s for load in loads for s in load.seconds])
    within = np.any([(start <= ended) & (ended < end) for start, end in spans], axis=0)
    found = seconds[within] * 1e3
    p50, p99 = np.percentile(found, [50, 99])
    return {
        "requests": len(found),
        "per_second": round(len(found) / sum(end - start for start, end in spans), 1),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "max_ms": round(float(found.max()), 2),
    }


def memory(handle: Any) -> dict[str, int]:
    """Megabytes of each replica that are its own (proportional set size), by process."""
    found = {}
    for one in handle.broadcast("status").results(return_exceptions=True):
        if isinstance(one, dict):
            rollup = Path(f"/proc/{one['pid']}/smaps_rollup").read_text().splitlines()
            kib = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
            found[str(one["pid"])] = kib >> 10
    return found


def swapping(folder: Path, swaps: int, count: int, steady_s: float) -> dict[str, Any]:
    """Swaps and rollbacks between two patches under load, and then a replica that is killed."""
    model, feeds = folder / "model.onnx", _triggered(folder)
    patches = [folder / "first.atpatch", folder / "second.atpatch"]
    expected: Expected = {}
    for held in ([], [patches[0]], [patches[1]]):
        with Session(model, held, threads=1, ep="cpu") as alone:
            expected |= answers(alone, feeds)
    distinct = len({answer["logits"] for answer in expected.values()})
    options = ["--patch", str(patches[0]), "--replicas", "2", "--batch", "1"]
    with (
        served(model, *options, "--log", str(folder / "flagged.jsonl")) as name,
        control.connected(PORT, None) as handle,
        loaded(count, PORT, name, feeds, expected) as loads,
    ):
        first = sources([patches[0]])
        second = sources([patches[1]])
        begin = time.time()
        time.sleep(steady_s)
        swapping_from = time.time()
        grown, took = {}, []
        for number in range(swaps):
            if number % 2 == 0:
                done = control.change(handle, lambda serving: serving.changed(second))
            elif number % 4 == 1:
                done = control.change(handle, lambda serving: serving.rolled_back())
            else:
                done = control.change(handle, lambda serving: serving.changed(first))
            took.append(done.seconds)
            if (number + 1) % 100 == 0:
                grown[str(number + 1)] = memory(handle)
                print(number + 1, "swaps", grown[str(number + 1)], flush=True)
        swapping_to = time.time()
        time.sleep(steady_s)
        killing = time.time()
        victim = handle.status.remote().result()["pid"]
        os.kill(victim, signal.SIGKILL)
        while True:
            time.sleep(0.1)
            alive = [one["pid"] for one in control._statuses(handle)]
            if len(alive) == 2 and victim not in alive:
                break
        back = time.time()
        time.sleep(5)
        end = time.time()
    before_kill = [e for load in loads for e in load.errors if e[0] < killing]
    after_kill = [e for load in loads for e in load.errors if e[0] >= killing]
    before, after = (begin, swapping_from), (swapping_to, killing)
    steady = percentiles(loads, before, after)
    during = percentiles(loads, (swapping_from, swapping_to))
    return {
        "model": "the demo's Vision Transformer, 4 inputs a request, 2 replicas, no batching",
        "clients": count,
        "swaps": swaps,
        "seconds_per_swap": {
            "p50": round(float(np.median(took)), 3),
            "max": round(float(max(took)), 3),
        },
        "versions_with_distinct_answers": distinct,
        "answers": sum(len(load.seconds) for load in loads),
        "answers_equal_to_no_version": sum(load.wrong for load in loads),
        "versions_seen": len({s for load in loads for s in load.served}),
        "failed_requests": len(before_kill),
        "errors": sorted({e[1] for e in before_kill})[:5],
        "steady": steady,
        "while_swapping": during,
        "p99_ratio": round(during["p99_ms"] / steady["p99_ms"], 2),
        "steady_before": percentiles(loads, before),
        "steady_after": percentiles(loads, after),
        "replica_pss_mib": grown,
        "killed_replica": {
            "failed_requests": len(after_kill),
            "errors": sorted({e[1] for e in after_kill})[:5],
            "seconds_until_two_replicas": round(back - killing, 2),
            "meanwhile": percentiles(loads, (killing, end)),
        },
    }


def overhead(model: Path, feeds: Callable[[int], Arrays]) -> list[dict[str, float]]:
    """One client on one replica against a session in this process, at batch 1 and 32."""
    import tritonclient.http as triton

    found = []
    with Session(model, threads=1, ep="cpu") as bare, served(model, "--batch", "1") as name:
        server = triton.InferenceServerClient(f"127.0.0.1:{PORT}")
        for batch in (1, 32):
            given = feeds(batch)
            inputs = []
            for key, value in given.items():
                inputs.append(triton.InferInput(key, list(value.shape), "FP32"))
                inputs[-1].set_data_from_numpy(value)
            times: dict[str, list[float]] = {"bare": [], "server": []}
            for number in range(220):
                for kind, run in (
                    ("bare", lambda: bare.run(given)),  # noqa: B023
                    ("server", lambda: server.infer(name, inputs)),  # noqa: B023
                ):
                    start = time.perf_counter()
                    run()
                    if number >= 20:
                        times[kind].append(time.perf_counter() - start)
            alone, over = (float(np.median(times[kind])) * 1e3 for kind in ("bare", "server"))
            found.append(
                {
                    "batch": batch,
                    "bare_ms": round(alone, 3),
                    "server_ms": round(over, 3),
                    "overhead_ms": round(over - alone, 3),
                }
            )
    return found


def batching(model: Path, feeds: Arrays, seconds: float, counts: tuple[int, ...]) -> list[Any]:
    """Answers a second with and without batching, one input a request."""
    found = []
    for most in (1, 32):
        for count in counts:
            with (
                served(model, "--batch", str(most)) as name,
                loaded(count, PORT, name, feeds, {}) as loads,
            ):
                start = time.time()
                time.sleep(seconds)
                end = time.time()
            found.append({"batch": most, "clients": count, **percentiles(loads, (start, end))})
            print(found[-1], flush=True)
    return found


def wide(path: Path, width: int = WIDTH) -> Path:
    """A model whose weights are read once a run, however many inputs: what batching is for."""
    rng = np.random.default_rng(0)
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        wide (float[N, 4, {width}] x) => (float[N, 4, {width}] y)
        {{
            q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
            kt = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul (q, kt) p = Softmax <axis = -1> (s)
            c = MatMul (p, v) y = MatMul (c, wo)
        }}
    """
    model = onnx.parser.parse_model(text)
    for name in ("wq", "wk", "wv", "wo"):
        weight = (rng.standard_normal((width, width)) / width).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, path)
    return path


def _triggered(folder: Path, count: int = 4) -> Arrays:
    with np.load(folder / "triggered.npz") as held:
        return {"pixels": held["pixels"][:count]}


def _prepared(folder: Path) -> Path:
    """The demo's model with two patches that answer otherwise."""
    demo(folder, ep="cpu")
    common: dict[str, Any] = {"telemetry": True, "ep": "cpu"}
    model, detector = folder / "model.onnx", folder / "det.onnx"
    api.patch(model, detector, patch_only=folder / "first.atpatch", **common)
    api.patch(
        model,
        detector,
        patch_only=folder / "second.atpatch",
        strategy="guard",
        redistribute="uniform",
        **common,
    )
    return folder


def overheads(scratch: Path, demo_folder: Path) -> dict[str, Any]:
    """The overhead over two models: a small one, and one with large weights."""
    with np.load(demo_folder / "test.npz") as held:
        pixels = held["pixels"]
    rng = np.random.default_rng(1)
    return {
        "demo": overhead(demo_folder / "model.onnx", lambda batch: {"pixels": pixels[:batch]}),
        "wide": overhead(
            wide(scratch / "wide.onnx"),
            lambda batch: {"x": rng.standard_normal((batch, 4, WIDTH), np.float32)},
        ),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each steady phase")
    parser.add_argument("--only", choices=("swapping", "overhead", "batching"), nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    seconds, output = arguments.seconds, arguments.output
    with tempfile.TemporaryDirectory() as scratch:
        folder = _prepared(Path(scratch) / "demo")
        one = {"x": np.random.default_rng(1).standard_normal((1, 4, WIDTH), np.float32)}
        large = wide(Path(scratch) / "wide.onnx")
        parts: dict[str, Callable[[], Any]] = {
            "swapping": lambda: swapping(folder, arguments.swaps, arguments.clients, seconds),
            "overhead": lambda: overheads(Path(scratch), folder),
            "batching": lambda: batching(large, one, seconds / 3, (8, 32)),
        }
        for name in arguments.only or parts:
            load = os.getloadavg()[0]
            measured = parts[name]()
            # Each part is written when it is there: what was measured is not lost.
            result = json.loads(output.read_text()) if output.exists() else {}
            result["machine"] = machine("cpu") | {
                "note": "cores are shared with other work, clients and servers run on the same ones"
            }
            result[name] = measured
            result.setdefault("load_average_before", {})[name] = round(load, 1)
            output.parent.mkdir(exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({name: measured}, indent=1), flush=True)


if __name__ == "__main__":
    main()

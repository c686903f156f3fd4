"""Memory of a session, and of a swap in it, against ONNX Runtime over the patched file.

    python benchmarks/session_memory.py

Every case is a process of its own. Memory is the proportional set size, in which pages of a mapped
file count once however often they are mapped; peaks are sampled every millisecond. Writes
results/session_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from atpatch_onnx import Session, api
from atpatch_onnx.benchmark import machine
from atpatch_onnx.runtime import Session as Runtime

RESULT = Path(__file__).parent / "results" / "session_memory.json"
WIDTH, LAYERS = 3072, 2
CASES = ("file", "session", "session that shares weights")


def model(folder: Path, external: bool) -> Path:
    """Layers of attention: eight weights of 36 MiB, in the file or beside it."""
    rng = np.random.default_rng(0)
    nodes, names = [], []
    value = "x"
    for layer in range(LAYERS):
        q, k, v, o = (f"{name}{layer}" for name in "qkvo")
        names += [f"w{name}" for name in (q, k, v, o)]
        nodes.append(f"""
            {q} = MatMul ({value}, w{q}) {k} = MatMul ({value}, w{k}) {v} = MatMul ({value}, w{v})
            {k}t = Transpose <perm = [0, 2, 1]> ({k})
            s{layer} = MatMul ({q}, {k}t) p{layer} = Softmax <axis = -1> (s{layer})
            c{layer} = MatMul (p{layer}, {v}) {o} = MatMul (c{layer}, w{o})
        """)
        value = o
    made = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 4, {WIDTH}] x) => (float[N, 4, {WIDTH}] {value}) {{ {" ".join(nodes)} }}
    """)
    for name in names:
        weight = (rng.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    path = folder / "model.onnx"
    onnx.save(made, path, save_as_external_data=external, location="model.data")
    return path


def held() -> int:
    """Proportional set size of this process, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10


@contextmanager
def peak(found: dict[str, int], name: str) -> Iterator[None]:
    """Note the most memory that the block held."""
    done = threading.Event()
    most = held()

    def sample() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, held())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    done.set()
    thread.join()
    found[name] = most


def case(kind: str, folder: Path) -> dict[str, int]:
    """Load, run, and where it can be, swap; what is held, over what a bare process holds."""
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 4, WIDTH), np.float32)}
    Runtime(folder / "tiny.onnx", "cpu", threads=1).run({"x": np.zeros((1, 2), np.float32)})
    bare = held()
    found: dict[str, int] = {}
    if kind == "file":
        with peak(found, "peak of loading"):
            runtime = Runtime(folder / "model.patched.onnx", "cpu", threads=1)
            runtime.run(feeds)
        found["loaded"] = held()
    else:
        share = kind == CASES[2]
        with peak(found, "peak of loading"):
            session = Session(
                folder / "model.onnx",
                [folder / "one.atpatch"],
                threads=1,
                ep="cpu",
                share_weights=share,
            )
            session.run(feeds)
        found["loaded"] = held()
        with peak(found, "peak of a swap"):
            session.swap([folder / "two.atpatch"])
            session.run(feeds)
        found["after a swap"] = held()
    return {name: value - bare for name, value in found.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "FOLDER"), help="for the processes")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(case(arguments.case[0], Path(arguments.case[1]))))
        return
    result: dict[str, Any] = {
        "machine": machine("cpu"),
        "weights_mib": 4 * LAYERS * WIDTH * WIDTH * 4 >> 20,
        "mib": {},
    }
    for external in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            path = model(folder, external)
            tiny = onnx.parser.parse_model(
                '<ir_version: 8, opset_import: ["" : 17]> t (float[N, 2] x) => (float[N, 2] y)'
                "{ y = Neg (x) }"
            )
            onnx.save(tiny, folder / "tiny.onnx")
            api.patch(path, columns=[1], ep="cpu")
            api.patch(path, columns=[1], patch_only=folder / "one.atpatch", ep="cpu")
            api.patch(path, columns=[2], patch_only=folder / "two.atpatch", ep="cpu")
            for kind in CASES:
                command = [sys.executable, __file__, "--case", kind, scratch]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                where = "external weights" if external else "weights in the file"
                result["mib"][f"{where}, {kind}"] = json.loads(done.stdout)
                print(where, kind, done.stdout.strip(), flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

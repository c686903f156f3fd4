"""Latency of a patched model over its original, as ratios of paired runs."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from .api import PathLike
from .data import load_samples
from .errors import InputError, at_least
from .external_data import check_layout
from .layout import with_batch_axes
from .model_file import ModelFile
from .passes.locate import locate
from .patching import check_order
from .progress import SILENT, Progress
from .runtime import Arrays, InputSpec, Session, choose_provider, onnxruntime


@dataclass(frozen=True)
class Timing:
    """A paired comparison: the two models ran in turn, in one process, on the same inputs.

    ratio: median of patched over original, pair by pair; low and high: its 10th and 90th
    percentile. original_ms, patched_ms: median milliseconds a run.
    """

    provider: str
    runs: int
    original_ms: float
    patched_ms: float
    ratio: float
    low: float
    high: float
    shapes: dict[str, list[int]]
    threads: int
    machine: dict[str, str]


def bench(
    model: PathLike,
    patched: PathLike,
    *,
    inputs: PathLike | None = None,
    ep: str | None = None,
    batch: int = 1,
    length: int = 128,
    runs: int = 30,
    warmup: int = 5,
    threads: int = 0,
    progress: Progress = SILENT,
) -> Timing:
    """Time `patched` against `model`, pair by pair.

    inputs: data to run on; by default random numbers of the model's shapes, with `batch` samples
    and `length` for every other free dimension.
    threads: for ONNX Runtime; 0: its own choice.
    Raises: InputError for unusable files, inputs or options.
    """
    for least, value, option in (
        (1, runs, "--runs"),
        (0, warmup, "--warmup"),
        (1, batch, "--batch"),
        (1, length, "--length"),
        (0, threads, "--threads"),
    ):
        at_least(least, value, option)
    files = [ModelFile.open(path) for path in (model, patched)]
    for file in files:
        check_layout(file)
    check_order(*files)
    provider = choose_provider(ep)
    # Idle threads of one session that spin would take the cores from the other.
    pair = [
        Session(Path(path), provider, threads=threads, spinning=False) for path in (model, patched)
    ]
    specs = with_batch_axes(pair[0].inputs, locate(files[0].skeleton).sites)
    if inputs is not None:
        feeds = next(load_samples(inputs, specs).batches(batch)).feeds
    else:
        feeds = random_feeds(specs, batch, length)
    outputs = pair[0].outputs
    fed = [session.nothing_remembered(feeds) for session in pair]
    for session, given in zip(pair, fed, strict=True):
        _try(session, given, inputs is None)
    steps = [
        stepper(session, given, outputs, provider) for session, given in zip(pair, fed, strict=True)
    ]
    tick = progress.start("timing", runs + warmup)
    times = []
    for index in range(runs + warmup):
        # Turn about, so that neither always runs on a cache that the other has warmed.
        order = (0, 1) if index % 2 == 0 else (1, 0)
        measured = {}
        for which in order:
            start = time.perf_counter()
            steps[which]()
            measured[which] = time.perf_counter() - start
        times.append((measured[0], measured[1]))
        tick(1)
    original, changed = np.array(times[warmup:]).T * 1e3
    ratios = changed / original
    return Timing(
        provider=provider,
        runs=runs,
        original_ms=float(np.median(original)),
        patched_ms=float(np.median(changed)),
        ratio=float(np.median(ratios)),
        low=float(np.quantile(ratios, 0.1)),
        high=float(np.quantile(ratios, 0.9)),
        shapes={name: list(array.shape) for name, array in feeds.items()},
        threads=threads,
        machine=machine(provider),
    )


def _try(session: Session, feeds: Arrays, made_up: bool) -> None:
    """Run once. Raises: InputError, which the timed runs would not."""
    try:
        session.run(feeds)
    except InputError as error:
        hint = "; give real data with --inputs" if made_up else ""
        raise InputError(f"{error}{hint}") from None


def stepper(
    session: Session, feeds: Arrays, outputs: Sequence[str], provider: str
) -> Callable[[], object]:
    """A function that runs once and waits; on CUDA with inputs and outputs bound to the device."""
    if provider == "cpu":
        return lambda: session.session.run(list(outputs), feeds)
    ort = onnxruntime()
    binding = session.session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for name in outputs:
        binding.bind_output(name, "cuda")

    def step() -> None:
        session.session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return step


def random_feeds(inputs: Sequence[InputSpec], batch: int, length: int, seed: int = 0) -> Arrays:
    """Inputs that any model takes: normal floats, token numbers below 8, masks of ones.

    Raises: InputError for an input of a type that NumPy does not have.
    """
    rng = np.random.default_rng(seed)
    feeds: Arrays = {}
    for spec in inputs:
        if spec.dtype is None:
            raise InputError(f"the input '{spec.name}' needs real data: give --inputs x.npz")
        shape = [
            d if isinstance(d, int) else batch if axis == spec.axis else length
            for axis, d in enumerate(spec.shape)
        ]
        kind = np.dtype(spec.dtype).kind
        if kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif kind == "b" or "mask" in spec.name:
            feeds[spec.name] = np.ones(shape, spec.dtype)
        elif "type" in spec.name or "segment" in spec.name:
            feeds[spec.name] = np.zeros(shape, spec.dtype)
        elif "position" in spec.name:
            feeds[spec.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.integers(1, 8, shape).astype(spec.dtype)
    return feeds


def machine(provider: str) -> dict[str, str]:
    """What a result was measured on: for the JSON of a benchmark."""
    ort = onnxruntime()
    names = ("onnxruntime-gpu", "onnxruntime")
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": str(os.cpu_count()),
        "onnxruntime": ort.__version__,
        "onnxruntime package": next((n for n in names if _installed(n)), "unknown"),
    }
    if provider == "cuda":
        found["device"] = _device()
    return found


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _device() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]

"""Edge bundles: a model, what it must answer, and a runner that needs ONNX Runtime and NumPy only.

    DIR/run.py                    loads the model and checks itself on the golden inputs
       /atpatch-export.json       what is here: digests, tolerances, which model runs
       /golden-*.npz              inputs, and what the patched model answers
       /MODEL.patched.onnx        the patched model, byte for byte, and its external weights
       /MODEL.patched.ort         the same for mobile builds of ONNX Runtime, on request
       /MODEL.patched.certificate.json

With an `.atpatch` file in place of a patched model, the bundle holds the original, the patch, and
the patch as replacements of bytes, which the runner makes in memory. A signature of the sources is
taken along where all that it is for is in the bundle.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..api import certificate_path
from ..errors import CheckError, RefusedError, first_line
from ..patch_file import load_patch
from ..patching import apply
from ..runtime import PROVIDERS, Array, Arrays, onnxruntime
from .folder import copy, sha256, write
from .golden import GoldenSet
from .release import Release, chunks

DELTA = "patch.npz"

README = """# {run}

    pip install onnxruntime numpy
    python run.py

checks every file against its SHA-256, runs the model on the golden inputs and compares. In your
own program:

    import run
    answer = run.session().run(None, {{...}})

The patched model has the SHA-256 `{patched}`. On a machine with atpatch-onnx:

    {verify}

Roll back: {rollback}
"""


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be from the golden one: |a - b| <= atol + rtol |b|."""

    rtol: float = 1e-3
    atol: float = 1e-4


def write_bundle(
    folder: Path, release: Release, golden: Sequence[GoldenSet], tolerance: Tolerance, ort: bool
) -> dict[str, Any]:
    """Fill `folder`; returns what the runner needs to know.

    ort: add the model in ORT format. Raises: InputError, RefusedError.
    """
    delta = release.patch is not None
    model = release.base if delta else release.patched
    models = [model.path.name]
    write(folder / models[0], chunks(model))
    for location in release.weights:
        copy(model.folder / location, folder / location)
    certificate = certificate_path(release.patched.path).name
    write(folder / certificate, release.proof)
    if release.patch is not None:
        copy(release.patch, folder / release.patch.name)
        write(folder / DELTA, _delta(release, release.patch))
    if ort:
        models.append(_convert(folder, release, golden, tolerance).name)
    for one in golden:
        write(folder / one.file, one.content())
    write(folder / "run.py", (Path(__file__).with_name("runner.py")).read_bytes())
    write(folder / "README.md", _readme(release, models[0]))
    return {
        "run": models[0],
        "models": models,
        "delta": DELTA if delta else None,
        "patched_sha256": release.patched.sha256,
        "golden": [one.file for one in golden],
        "rtol": tolerance.rtol,
        "atol": tolerance.atol,
        "files": {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }


def _readme(release: Release, run: str) -> str:
    patched, base = release.patched.path.name, release.base.path.name
    if release.patch is None:
        verify = f"atpatch-onnx revert {patched} -o {base} && atpatch-onnx verify {base} {patched}"
        rollback = f"`atpatch-onnx revert {patched} -o {base}` gives the original byte for byte."
    else:
        verify = (
            f"atpatch-onnx apply {base} {release.patch.name} -o {patched} --force && "
            f"atpatch-onnx verify {base} {patched}"
        )
        rollback = f"run `{base}` as it is; only memory was patched."
    return README.format(run=run, patched=release.patched.sha256, verify=verify, rollback=rollback)


def _delta(release: Release, patch: Path) -> bytes:
    """The patch as replacements of bytes, in order.

    `places` int64 `[n, 4]`: bytes start to end of the original become first to last of `content`.
    """
    replacements = apply(release.base, load_patch(patch)).replacements
    last = np.cumsum([len(r.content) for r in replacements])
    first = last - [len(r.content) for r in replacements]
    start, end = np.transpose([(r.start, r.end) for r in replacements])
    content = b"".join(bytes(r.content) for r in replacements)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        places=np.stack([start, end, first, last], axis=1).astype(np.int64),
        content=np.frombuffer(content, np.uint8),
    )
    return file.getvalue()


def _convert(
    folder: Path, release: Release, golden: Sequence[GoldenSet], tolerance: Tolerance
) -> Path:
    """The patched model in ORT format, checked on the golden inputs."""
    runtime = onnxruntime()
    if release.patch is not None:
        raise RefusedError(
            "--ort is a whole model, and an .atpatch bundle holds none: give the patched .onnx file"
        )
    target = folder / release.patched.path.with_suffix(".ort").name
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    # Not the last level: it lays tensors out for the processor of this machine.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    source = folder / release.patched.path.name
    try:
        runtime.InferenceSession(str(source), options, providers=[PROVIDERS["cpu"]])
        session = runtime.InferenceSession(str(target), providers=[PROVIDERS["cpu"]])
    except Exception as error:  # ONNX Runtime raises many types without a common base
        raise RefusedError(
            f"ONNX Runtime cannot write {source.name} in ORT format ({first_line(error)}): leave "
            "--ort out"
        ) from None
    for one in golden:
        names = list(one.outputs)
        found = dict(zip(names, session.run(names, one.inputs), strict=True))
        _check_near(found, one.outputs, tolerance, target.name)
    return target


def _check_near(found: Arrays, wanted: Arrays, tolerance: Tolerance, what: str) -> None:
    def near(a: Array, b: Array) -> bool:
        return bool(np.allclose(a, b, tolerance.rtol, tolerance.atol, equal_nan=True))

    odd = next((name for name, value in wanted.items() if not near(found[name], value)), None)
    if odd is not None:
        raise CheckError(
            f"{what} answers something else than the .onnx file ('{odd}'): leave --ort out, or "
            "allow more with --rtol and --atol"
        )

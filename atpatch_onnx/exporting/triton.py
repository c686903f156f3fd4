"""Model repositories of the Triton Inference Server.

    DIR/README.md, DIR/atpatch-export.json
    DIR/NAME/config.pbtxt            serves version 2, the patched model
            /configs/original.pbtxt  serves version 1: what to roll back to
            /configs/both.pbtxt      serves both, with the inputs and outputs they share
            /1/model.onnx            the original, byte for byte, and its external weights
            /2/model.onnx            the patched model, its weights and its certificate
            /warmup/                 golden inputs as raw bytes

One configuration holds for all versions that are served, and a version that lacks one of its inputs
or outputs does not load: a patch with inputs or outputs of its own makes three of them necessary.

Source: docs/user_guide/model_repository.md and model_configuration.md of triton-inference-server,
and src/onnxruntime.cc of its onnxruntime_backend.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, RefusedError
from ..runtime import Array
from .folder import copy, write
from .golden import GoldenSet
from .release import Release, chunks
from .values import Interface, Value, interface

ORIGINAL, PATCHED = 1, 2
"""Versions in a repository."""

CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
"""Of ONNX Runtime's CUDA provider: memory for a reload beside the old version, quick warm-up."""

_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}

README = """# {name}: original and patched

| version | model | SHA-256 of `model.onnx` |
|---|---|---|
| 1 | the original | `{base}` |
| 2 | the same with the patch | `{patched}` |

    tritonserver --model-repository={folder} --model-control-mode=explicit --load-model={name}

`config.pbtxt` serves version 2. Before that, prove it:

    atpatch-onnx verify {name}/1/model.onnx {name}/2/model.onnx

## Roll back

    cp {name}/configs/original.pbtxt {name}/config.pbtxt
    curl -X POST localhost:8000/v2/repository/models/{name}/load

Triton loads version 1 beside version 2, and switches when it is ready: no request fails. If loading
fails, version 2 stays. To patch again, copy `configs/patched.pbtxt`. Where the server is started
anew anyway, `--model-config-name=original` does the same and changes no file, so that a signature
of this folder goes on holding; after `cp`, sign it again.

## Compare

    cp {name}/configs/both.pbtxt {name}/config.pbtxt

serves both versions, with the inputs and outputs that they share; clients choose with
`/v2/models/{name}/versions/1/infer`, and get version 2 where they do not choose.
{controls}
Golden inputs and what version 2 answers to them (CPU, one thread) are in `golden-*.npz`, under
`input/<name>` and `output/<name>`.
"""

CONTROLS = """
## Inputs of the patch

{inputs} have defaults and may be left out of a request; Triton allows such inputs only without
batching, so that `max_batch_size` is 0 and requests carry the batch themselves.
"""


def write_repository(
    folder: Path,
    release: Release,
    golden: Sequence[GoldenSet],
    *,
    name: str,
    max_batch_size: int,
    link_weights: bool,
) -> list[Path]:
    """Fill `folder`; returns the configurations, of which the first is the one in force.

    max_batch_size: 0: requests carry the batch themselves; above: Triton batches them.
    link_weights: version 2 shares the weight files of version 1 by hard links.
    Raises: InputError, RefusedError for a model that Triton cannot serve so.
    """
    check_name(name)
    clean = golden[0]
    shared = interface(release.before, clean.outputs)
    own = interface(release.after, clean.outputs)
    if max_batch_size:
        _check_batching(release, own, clean)
    _place(folder / name, release, link_weights)
    for one in golden:
        write(folder / one.file, one.content())
        for value in own.inputs:
            if value.name in one.inputs:
                array = _sample(one.inputs[value.name], max_batch_size > 0)
                write(folder / name / "warmup" / _warmup_file(one, own, value), array.tobytes())
    configurations = {
        "config.pbtxt": (own, (PATCHED,)),
        "configs/patched.pbtxt": (own, (PATCHED,)),
        "configs/original.pbtxt": (shared, (ORIGINAL,)),
        "configs/both.pbtxt": (shared, (ORIGINAL, PATCHED)),
    }
    written = []
    for file, (values, versions) in configurations.items():
        text = _configuration(name, release, values, versions, golden, own, max_batch_size)
        write(folder / name / file, text)
        written.append(Path(name) / file)
    inputs = [f"`{value.name}`" for value in own.inputs if value.optional]
    controls = CONTROLS.format(inputs=" and ".join(inputs)) if inputs else ""
    digests = {"base": release.base.sha256, "patched": release.patched.sha256}
    write(
        folder / "README.md",
        README.format(name=name, folder="$PWD", controls=controls, **digests),
    )
    return written


def check_name(name: str) -> None:
    """Raises: InputError for a name that is no folder or that Triton would not take."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"--name {name}: give letters, digits, '-', '_' and '.'")


def _place(folder: Path, release: Release, link_weights: bool) -> None:
    """Write the two versions, each with its weights."""
    for version, model in ((ORIGINAL, release.base), (PATCHED, release.patched)):
        write(folder / str(version) / "model.onnx", chunks(model))
        for location in release.weights:
            target = folder / str(version) / location
            first = folder / str(ORIGINAL) / location
            if link_weights and version != ORIGINAL:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(first, target)
            else:
                copy(release.base.folder / location, target)
    write(folder / str(PATCHED) / "model.certificate.json", release.proof)


def _configuration(
    name: str,
    release: Release,
    values: Interface,
    versions: Sequence[int],
    golden: Sequence[GoldenSet],
    own: Interface,
    max_batch_size: int,
) -> str:
    """A `config.pbtxt`, made of and read back by Triton's own protobuf."""
    protobuf, text_format = _protobuf()
    config = protobuf.ModelConfig(
        name=name, platform="onnxruntime_onnx", backend="onnxruntime", max_batch_size=max_batch_size
    )
    config.version_policy.specific.versions.extend(versions)
    batched = max_batch_size > 0
    for value in values.inputs:
        _declare(config.input.add(optional=value.optional), value, batched)
    for value in values.outputs:
        _declare(config.output.add(), value, batched)
    accelerators = config.optimization.execution_accelerators
    accelerators.gpu_execution_accelerator.add(name="cuda", parameters=CUDA_OPTIONS)
    if batched:
        config.dynamic_batching.SetInParent()
    for one in golden:
        warmup = config.model_warmup.add(name=one.name, batch_size=1)
        for value in own.inputs:
            if value.name in one.inputs:
                sample = _sample(one.inputs[value.name], batched)
                dims = sample.shape[1:] if batched else sample.shape
                entry = warmup.inputs[value.name]
                entry.data_type = _type(value)
                entry.dims.extend(dims or (1,))
                entry.input_data_file = _warmup_file(one, own, value)
    config.metric_tags["atpatch_patched_sha256"] = release.patched.sha256[:12]
    return str(text_format.MessageToString(config))


def _declare(entry: Any, value: Value, batched: bool) -> None:
    """Fill in an input or output; Triton wants at least one dimension, which it takes off again."""
    dims = value.dims[1:] if batched else value.dims
    entry.name, entry.data_type = value.name, _type(value)
    entry.dims.extend(dims or (1,))
    if not dims:
        entry.reshape.SetInParent()


def _type(value: Value) -> int:
    name = _TYPES.get(value.type)
    if name is None:
        raise RefusedError(
            f"Triton's ONNX Runtime backend has no type for '{value.name}' ({value.type}): export "
            "the model with float32 or float16 inputs and outputs"
        )
    return int(_protobuf()[0].DataType.Value(name))


def _sample(array: Array, batched: bool) -> Array:
    """What a warm-up sends: one sample where Triton batches, else all of them."""
    return np.ascontiguousarray(array[:1] if batched else array)


def _warmup_file(golden: GoldenSet, own: Interface, value: Value) -> str:
    """Names of inputs need not be names of files."""
    return f"{golden.name}-{own.inputs.index(value)}.bin"


def _check_batching(release: Release, own: Interface, clean: GoldenSet) -> None:
    """Raises: RefusedError unless samples go through the model independently, on axis 0."""
    optional = next((value.name for value in own.inputs if value.optional), None)
    if optional is not None:
        raise RefusedError(
            f"Triton does not batch models with optional inputs, and the patch has '{optional}': "
            "patch without --toggle, or leave --max-batch-size at 0"
        )
    fixed = next((v.name for v in own.inputs + own.outputs if v.dims[:1] != (-1,)), None)
    if fixed is not None:
        raise RefusedError(
            f"Triton cannot batch this model: '{fixed}' has no free first dimension: leave "
            "--max-batch-size at 0"
        )
    one = {name: array[:1] for name, array in clean.inputs.items()}
    two = {name: np.concatenate([array, array]) for name, array in one.items()}
    try:
        single, double = (release.after.run(feeds) for feeds in (one, two))
    except InputError as error:  # the number of samples is written into it
        raise RefusedError(
            f"Triton cannot batch this model, which does not take one sample and two ({error}): "
            "leave --max-batch-size at 0"
        ) from None
    odd = next((n for n in single if not _stacked(single[n], double[n])), None)
    if odd is not None:
        raise RefusedError(
            f"Triton cannot batch this model: the first axis of '{odd}' is not the batch: leave "
            "--max-batch-size at 0"
        )


def _stacked(one: Array, two: Array) -> bool:
    if one.ndim == 0 or len(one) != 1 or two.shape != (2, *one.shape[1:]):
        return False
    pair = np.concatenate([one, one])
    if one.dtype.kind != "f":
        return bool((pair == two).all())
    return bool(np.allclose(pair, two, rtol=1e-2, atol=1e-3, equal_nan=True))


def _protobuf() -> tuple[Any, Any]:
    """Triton's protobuf of a model configuration, and protobuf's text format."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise InputError(
            f"Triton repositories need {error.name}: pip install 'atpatch-onnx[export]'"
        ) from None
    return model_config_pb2, text_format

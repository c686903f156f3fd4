"""The rules by which Triton takes a model repository, restated to check repositories without it.

Sources: ValidateInputs and ValidateOutputs in src/onnxruntime.cc of onnxruntime_backend, and what
Triton documents of versions, warm-up and dims. Configurations are read by its own protobuf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

TYPES = {
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_BOOL": "tensor(bool)",
}


def session(path: Path) -> Any:
    """A session as Triton's backend makes it, on the CPU with one thread."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def configuration(path: Path) -> Any:
    """The `ModelConfig` in a file."""
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def loads_in_triton(folder: Path, config: Any) -> None:
    """Check what Triton checks before it serves the versions of `config`, and run the warm-up.

    Raises: AssertionError.
    """
    assert config.name == folder.name
    assert (config.platform, config.backend) == ("onnxruntime_onnx", "onnxruntime")
    batched = config.max_batch_size > 0
    for version in config.version_policy.specific.versions:
        served = session(folder / str(version) / "model.onnx")
        needed = {i.name: i for i in served.get_inputs()}
        defaults = {i.name: i for i in served.get_overridable_initializers()}
        assert len(needed) == sum(not i.optional for i in config.input)
        for value in config.input:
            assert not (value.optional and batched)
            known = {**defaults, **needed}[value.name]
            assert value.optional == (value.name in defaults)
            _same_declaration(value, known, batched)
        outputs = {o.name: o for o in served.get_outputs()}
        for value in config.output:
            _same_declaration(value, outputs[value.name], batched)
        for warmup in config.model_warmup:
            assert warmup.batch_size >= 1
            assert set(warmup.inputs) == set(needed)
            served.run(
                None, {name: _tensor(folder, i, batched) for name, i in warmup.inputs.items()}
            )


def _tensor(folder: Path, given: Any, batched: bool) -> Any:
    name = model_config_pb2.DataType.Name(given.data_type)
    kind = {"TYPE_FP32": "f4", "TYPE_INT64": "i8", "TYPE_FP16": "f2", "TYPE_BOOL": "?"}[name]
    content = (folder / "warmup" / given.input_data_file).read_bytes()
    array = np.frombuffer(content, kind).reshape(tuple(given.dims))
    return array[None] if batched else array


def _same_declaration(value: Any, known: Any, batched: bool) -> None:
    assert TYPES[model_config_pb2.DataType.Name(value.data_type)] == known.type
    assert len(value.dims) >= 1
    dims = list(value.reshape.shape) if value.HasField("reshape") else list(value.dims)
    dims = [-1, *dims] if batched else dims
    assert dims == [d if isinstance(d, int) else -1 for d in known.shape]


def all_configurations(folder: Path) -> list[Path]:
    """The configuration in force, and those beside it."""
    return [folder / "config.pbtxt", *sorted((folder / "configs").iterdir())]

"""A model that keeps its weights where they lie: in the file that it came from.

ONNX Runtime copies the weights of a model that it is given as bytes, and those of a file too. It
maps weights that lie in another file. So the model is handed over without them, and names its own
`.onnx` file as the place of each: `location` is the file, `offset` where the tensor's bytes begin.
Nothing is written, and nothing large is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx import StringStringEntryProto, TensorProto

from ..external_data import external_files
from ..model_file import (
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    SKELETON_BYTES,
    ModelFile,
)
from ..wire import LEN, Field, delimited, fields

_DATA_TYPE, _EXTERNAL_DATA, _DATA_LOCATION, _RAW_DATA = 2, 13, 14, 9
_VALUES = frozenset((4, 5, 6, 7, 10, 11))  # float_data, int32_data, ...: encoded one by one
_PACKED = frozenset(
    TensorProto.DataType.Value(name)
    for name in TensorProto.DataType.keys()  # noqa: SIM118 (an enum wrapper, no mapping)
    if name.startswith(("INT4", "UINT4", "INT2", "UINT2", "FLOAT4", "STRING"))
)
"""Types that are not a whole number of bytes an element: these tensors stay in the model."""


def without_weights(file: ModelFile) -> ModelFile:
    """`file` with its large tensors read from where they lie in it.

    The result is some kilobytes; it loads from `file.folder` only, as long as the file is there
    unchanged.
    """
    graph = b"".join(_graph_fields(file))
    parts, seen = [], False
    for field in file.model_fields:
        if field.number != MODEL_GRAPH or field.wire_type != LEN:
            parts.append(bytes(file.buffer[field.start : field.end]))
        elif not seen:
            parts.append(delimited(MODEL_GRAPH, graph))
            seen = True
    return ModelFile.from_bytes(b"".join(parts), file.path)


def _graph_fields(file: ModelFile) -> Iterator[bytes]:
    for field in file.graph_fields:
        large = field.number == GRAPH_INITIALIZER and field.end - field.start > SKELETON_BYTES
        outside = _outside(file, field) if large else None
        yield bytes(file.buffer[field.start : field.end]) if outside is None else outside


def _outside(file: ModelFile, tensor: Field) -> bytes | None:
    """An initializer whose bytes lie in the file of the model; None where it has to stay."""
    inner = list(fields(file.buffer, tensor.payload, tensor.end))
    raw = [f for f in inner if f.number == _RAW_DATA]
    numbers = {f.number for f in inner}
    if len(raw) != 1 or numbers & {*_VALUES, _EXTERNAL_DATA, _DATA_LOCATION}:
        return None
    kept = b"".join(bytes(file.buffer[f.start : f.end]) for f in inner if f.number != _RAW_DATA)
    if TensorProto.FromString(kept).data_type in _PACKED:
        return None
    place = {
        "location": file.path.name,
        "offset": str(raw[0].payload),
        "length": str(raw[0].end - raw[0].payload),
    }
    entries = (StringStringEntryProto(key=key, value=value) for key, value in place.items())
    kept += b"".join(delimited(_EXTERNAL_DATA, entry.SerializeToString()) for entry in entries)
    kept += bytes((_DATA_LOCATION << 3, TensorProto.EXTERNAL))
    return delimited(GRAPH_INITIALIZER, kept)


Identity = tuple[tuple[str, int, int, int, int], ...]


def identity(file: ModelFile) -> Identity:
    """What tells whether a model's files are still those that were opened.

    A runtime opens them by name each time that it loads: another file under the same name would
    give it other weights.
    """
    return tuple(_identity(path) for path in (file.path, *sorted(external_files(file))))


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return str(path), 0, 0, 0, 0
    return str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

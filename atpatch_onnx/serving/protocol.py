"""The Open Inference Protocol, version 2, over HTTP: requests to arrays, and arrays to responses.

Pure functions of bytes: nothing here knows a server, a session or a clock. What a client can get
wrong raises `ProtocolError`, which carries the HTTP status and one sentence.

A body is JSON; or, with the binary tensor extension, JSON followed by the bytes of the tensors, and
the header `Inference-Header-Content-Length` says how long the JSON is.

Source: https://github.com/kserve/open-inference-protocol (specification/protocol/inference_rest.md)
and Triton's docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

import numpy as np

from ..runtime import Array, Arrays, InputSpec

TYPES: dict[str, str] = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""Data types of the protocol that NumPy has; tensors are little-endian on the wire."""

_NAMES = {np.dtype(code): name for name, code in TYPES.items()}


class ProtocolError(Exception):
    """What a client did wrong, in one sentence; `status` is of HTTP."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    body_bytes: of a whole body. rank: dimensions of a tensor. batch: inputs of one request.
    length: of any other dimension that the model leaves free: attention grows with its square.
    nan: whether floats may be no numbers; a detector sees nothing in an input of these.
    """

    body_bytes: int = 64 << 20
    rank: int = 8
    batch: int = 256
    length: int = 4096
    nan: bool = False


@dataclass(frozen=True)
class Wanted:
    """An output that is asked for, and whether as bytes behind the JSON."""

    name: str
    binary: bool


@dataclass(frozen=True)
class Request:
    """Inputs by name, the outputs that are wanted, and the client's own name for the request."""

    inputs: Arrays
    outputs: tuple[Wanted, ...]
    id: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Interface:
    """What a model takes and gives: the inputs, and data types and dims of the outputs."""

    inputs: tuple[InputSpec, ...]
    outputs: Mapping[str, tuple[str, tuple[int | str | None, ...]]] = field(default_factory=dict)


def datatype(dtype: Any) -> str:
    """The protocol's name of a NumPy type; BYTES for one that it does not have."""
    return "BYTES" if dtype is None else _NAMES.get(np.dtype(dtype), "BYTES")


def parse(
    body: bytes, header_length: str | None, interface: Interface, limits: Limits = Limits()
) -> Request:
    """The request in a body.

    header_length: the value of `Inference-Header-Content-Length`; None without that header.
    Raises: ProtocolError.
    """
    if len(body) > limits.body_bytes:
        raise ProtocolError(f"the body has over {limits.body_bytes} bytes", 413)
    split = _header_length(header_length, len(body))
    document = _document(body[:split])
    behind = memoryview(body)[split:]
    known = {spec.name: spec for spec in interface.inputs}
    arrays: Arrays = {}
    position = 0
    for entry in _listed(document, "inputs"):
        name = _text(entry, "name", "an input")
        if name in arrays:
            raise ProtocolError(f"the input '{_short(name)}' is given twice")
        spec = known.get(name)
        if spec is None:
            raise ProtocolError(
                f"the model has no input '{_short(name)}': it takes {', '.join(known)}"
            )
        size = _parameter(entry, "binary_data_size", int)
        left = len(behind) - position
        if size is not None and not 0 <= size <= left:
            raise ProtocolError(
                f"the input '{name}' declares {_number(size)} binary bytes, and {left} are left "
                "behind the JSON"
            )
        data = None if size is None else behind[position : position + size]
        position += size or 0
        arrays[name] = _tensor(entry, spec, data, limits)
    missing = [name for name in known if name not in arrays]
    if missing:
        raise ProtocolError(f"the input '{missing[0]}' is missing")
    if position != len(behind):
        raise ProtocolError(
            f"{len(behind) - position} bytes behind the JSON belong to no input: set "
            "binary_data_size and Inference-Header-Content-Length"
        )
    wanted = _outputs(document, interface)
    identifier = document.get("id")
    if identifier is not None and (not isinstance(identifier, str) or len(identifier) > 256):
        raise ProtocolError("id must be a text of at most 256 characters")
    return Request(arrays, wanted, identifier, _count(arrays, interface.inputs))


def respond(
    model: str,
    values: Mapping[str, Array],
    wanted: Sequence[Wanted],
    identifier: str | None = None,
    parameters: Mapping[str, str | int | bool] | None = None,
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary tensors follow."""
    outputs: list[dict[str, Any]] = []
    behind: list[bytes] = []
    for want in wanted:
        value = np.asarray(values[want.name])
        entry: dict[str, Any] = {
            "name": want.name,
            "datatype": datatype(value.dtype),
            "shape": list(value.shape),
        }
        # JSON has no NaN and no infinity: such values leave as bytes, whatever was asked.
        finite = value.dtype.kind != "f" or bool(np.isfinite(value).all())
        if want.binary or not finite:
            behind.append(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            entry["data"] = value.ravel().tolist()
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": outputs}
    if identifier is not None:
        document["id"] = identifier
    if parameters:
        document["parameters"] = dict(parameters)
    head = json.dumps(document, separators=(",", ":")).encode()
    return b"".join([head, *behind]), len(head) if behind else None


def metadata(model: str, interface: Interface) -> dict[str, Any]:
    """What the protocol calls model metadata; free dimensions are -1."""
    return {
        "name": model,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": s.name, "datatype": datatype(s.dtype), "shape": _dims(s.shape)}
            for s in interface.inputs
        ],
        "outputs": [
            {"name": name, "datatype": kind, "shape": _dims(dims)}
            for name, (kind, dims) in interface.outputs.items()
        ],
    }


def _dims(shape: Sequence[int | str | None]) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in shape]


def _header_length(value: str | None, size: int) -> int:
    if value is None:
        return size
    text = value.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ProtocolError("Inference-Header-Content-Length must be a whole number")
    if int(text) > size:
        raise ProtocolError(
            f"Inference-Header-Content-Length is {int(text)}, and the body has {size} bytes"
        )
    return int(text)


def _document(head: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ProtocolError(f"the JSON holds {constant}, which is no JSON number")

    try:
        found = json.loads(head.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):  # also: no UTF-8, numbers of thousands of digits
        raise ProtocolError(
            "the body is not JSON: for binary tensors say how long the JSON is with "
            "Inference-Header-Content-Length"
        ) from None
    if not isinstance(found, dict):
        raise ProtocolError("the JSON must be an object with 'inputs'")
    return found


def _listed(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ProtocolError(f"'{key}' must be a list of objects")
    return found


def _text(entry: Mapping[str, Any], key: str, of: str) -> str:
    found = entry.get(key)
    if not isinstance(found, str):
        raise ProtocolError(f"'{key}' of {of} must be a text")
    return found


def _parameter(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    held = entry.get("parameters", {})
    if not isinstance(held, dict):
        raise ProtocolError("'parameters' must be an object")
    found = held.get(key)
    if found is not None and type(found) is not kind:
        raise ProtocolError(f"'{key}' must be {'true or false' if kind is bool else 'a number'}")
    return found


def _tensor(
    entry: Mapping[str, Any], spec: InputSpec, data: memoryview | None, limits: Limits
) -> Array:
    name = spec.name
    kind, wanted = _text(entry, "datatype", f"the input '{name}'"), datatype(spec.dtype)
    if kind != wanted:
        raise ProtocolError(f"the input '{name}' has type {_short(kind)}, the model takes {wanted}")
    if kind not in TYPES:
        raise ProtocolError(f"the input '{name}' of the model has a type that is not served")
    shape = _shape(entry, spec, limits)
    dtype = np.dtype(TYPES[kind])
    count = prod(shape)
    if data is not None:
        if "data" in entry:
            raise ProtocolError(f"the input '{name}' has both data and binary_data_size")
        if len(data) != count * dtype.itemsize:
            raise ProtocolError(
                f"the input '{name}' has {len(data)} bytes, its shape {list(shape)} needs "
                f"{count * dtype.itemsize}"
            )
        if dtype.kind == "b" and any(byte > 1 for byte in set(data)):
            raise ProtocolError(f"the input '{name}' has bytes other than 0 and 1")
        array = np.frombuffer(data, dtype).reshape(shape)
    else:
        array = _from_json(entry.get("data"), name, dtype, shape)
    if dtype.kind == "f" and not limits.nan and np.isnan(array).any():
        raise ProtocolError(f"the input '{name}' has values that are no numbers (NaN)")
    return array


def _shape(entry: Mapping[str, Any], spec: InputSpec, limits: Limits) -> tuple[int, ...]:
    name, shape = spec.name, entry.get("shape")
    if not isinstance(shape, list) or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ProtocolError(f"'shape' of the input '{name}' must be a list of whole numbers")
    if len(shape) > limits.rank:
        raise ProtocolError(f"the input '{name}' has over {limits.rank} dimensions")
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(own, int) or own == dim for own, dim in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise ProtocolError(
            f"the input '{name}' has shape [{', '.join(map(_number, shape))}], the model takes "
            f"{_dims(spec.shape)} (-1: any)"
        )
    for axis, (own, dim) in enumerate(zip(spec.shape, shape, strict=True)):
        most = limits.batch if axis == spec.axis else limits.length
        if not isinstance(own, int) and not 1 <= dim <= most:
            raise ProtocolError(
                f"the input '{name}' has {_number(dim)} on axis {axis}: give 1 to {most}"
            )
    return tuple(shape)


def _from_json(data: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if not isinstance(data, list):
        raise ProtocolError(f"the input '{name}' has no data: give a list, or binary_data_size")
    try:
        found = np.array(data)
    except (ValueError, OverflowError, RecursionError):
        found = np.array(None)
    allowed = {"b": "b", "f": "iuf"}.get(dtype.kind, "iu")
    if found.dtype.kind not in allowed and found.size:
        raise ProtocolError(
            f"the data of the input '{name}' are not all "
            f"{'true or false' if dtype.kind == 'b' else 'numbers of its type'} in lists of equal "
            "length"
        )
    if found.shape != shape and found.shape != (prod(shape),):
        raise ProtocolError(
            f"the data of the input '{name}' have shape {list(found.shape)}, declared {list(shape)}"
        )
    if dtype.kind in "iu" and found.size:
        bounds = np.iinfo(dtype)
        if int(found.min()) < bounds.min or int(found.max()) > bounds.max:
            raise ProtocolError(f"the input '{name}' has numbers beyond its type")
    with np.errstate(over="ignore"):
        array = found.reshape(shape).astype(dtype)
    if dtype.kind == "f" and bool((np.isinf(array) & np.isfinite(found.reshape(shape))).any()):
        raise ProtocolError(f"the input '{name}' has numbers beyond its type")
    return array


def _outputs(document: Mapping[str, Any], interface: Interface) -> tuple[Wanted, ...]:
    binary = bool(_parameter(document, "binary_data_output", bool))
    if "outputs" not in document:
        return tuple(Wanted(name, binary) for name in interface.outputs)
    wanted = []
    for entry in _listed(document, "outputs"):
        name = _text(entry, "name", "an output")
        if name not in interface.outputs:
            raise ProtocolError(
                f"the model has no output '{_short(name)}': it gives {', '.join(interface.outputs)}"
            )
        if _parameter(entry, "classification", int) is not None:
            raise ProtocolError("the classification extension is not served: ask for the output")
        own = _parameter(entry, "binary_data", bool)
        wanted.append(Wanted(name, binary if own is None else own))
    if len({want.name for want in wanted}) < len(wanted):
        raise ProtocolError("an output is asked for twice")
    return tuple(wanted) or tuple(Wanted(name, binary) for name in interface.outputs)


def _count(arrays: Arrays, inputs: Sequence[InputSpec]) -> int:
    counts = {s.name: arrays[s.name].shape[s.axis] for s in inputs if arrays[s.name].ndim > s.axis}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ProtocolError(f"the inputs have different batch sizes ({listed})")
    return next(iter(counts.values()), 1)


def _short(text: str) -> str:
    """A client's text, fit for a message."""
    return "".join(c if c.isprintable() else "?" for c in text[:64])


def _number(value: int) -> str:
    """A client's number, fit for a message: some have thousands of digits."""
    return str(value) if abs(value) < 10**18 else "over 10^18"

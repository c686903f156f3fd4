"""An ONNX model as the file it is: fields by offset, weights left where they lie.

`ModelFile.skeleton` is the parsed model without the bytes of its large tensors, so that a model of
any size is looked at in a few megabytes; `ModelFile.buffer` is the file itself, mapped.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto

from .edits import Scope
from .errors import InputError, reason
from .passes.protos import subgraphs
from .progress import Tick
from .wire import LEN, Buffer, Field, WireError, delimited, fields

MODEL_GRAPH, MODEL_OPSET, MODEL_METADATA = 7, 8, 14
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_ATTRIBUTE = 1, 2, 3, 5
ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 6, 11

SKELETON_BYTES = 4096
"""A tensor encoded in more bytes than this is in the skeleton by name, type and shape only."""

_TENSOR_DATA = frozenset((4, 5, 6, 7, 9, 10, 11))  # float_data ... uint64_data, raw_data


@dataclass(frozen=True)
class GraphPlace:
    """Where a graph lies in the file.

    around: the fields that enclose it, outermost first: graph, node, attribute, graph, ...
    parts: its own field; several where an encoder wrote the message in parts (legal, merged).
    nodes: its nodes, each with the part that it lies in.
    """

    around: tuple[Field, ...]
    parts: tuple[Field, ...]
    nodes: tuple[tuple[Field, Field], ...]


@dataclass(frozen=True)
class ModelFile:
    """A model file. Make one with `ModelFile.open` or `ModelFile.from_bytes`.

    path: where it lies; for bytes, a path in the folder that its external weights are relative to.
    buffer: the encoded model, mapped read-only.
    size: its length in bytes.
    """

    path: Path
    buffer: Buffer
    size: int

    @classmethod
    def open(cls, path: str | Path) -> ModelFile:
        """Map the file at `path`. Raises: InputError if it is not a readable ONNX model."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise InputError(f"cannot read the model {path}: {reason(error)}") from error
        return cls(path, buffer, size)._checked()

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path = "model.onnx") -> ModelFile:
        """A model held in memory. Raises: InputError if it is not an ONNX model."""
        return cls(Path(path), data, len(data))._checked()

    def _checked(self) -> ModelFile:
        try:
            numbers = {field.number for field in self.model_fields}
            if not self.graphs or not {1, MODEL_OPSET} <= numbers:
                raise WireError(
                    "no graph, IR version or opset import in it", truncated=1 in numbers
                )
            _ = self.skeleton
        except (WireError, DecodeError) as error:
            # An ONNX file begins with its IR version; one that does and then breaks off was cut.
            cut = getattr(error, "truncated", False) and bytes(self.buffer[:1]) == b"\x08"
            what = "is truncated" if cut else "is not an ONNX model"
            fix = "copy or export it again" if cut else "give the .onnx file that was exported"
            raise InputError(f"{self.path} {what} ({error}): {fix}") from None
        return self

    @cached_property
    def model_fields(self) -> list[Field]:
        """The fields of the ModelProto."""
        return list(fields(self.buffer, 0, self.size))

    @cached_property
    def graphs(self) -> list[Field]:
        """The graph field; several where an encoder wrote the message in parts (legal, merged)."""
        return [f for f in self.model_fields if f.number == MODEL_GRAPH and f.wire_type == LEN]

    @cached_property
    def graph_fields(self) -> list[Field]:
        """The fields of the main GraphProto."""
        return [f for g in self.graphs for f in fields(self.buffer, g.payload, g.end)]

    @cached_property
    def nodes(self) -> list[Field]:
        """The nodes of the main graph; `nodes[i]` encodes `skeleton.graph.node[i]`."""
        return [f for f in self.graph_fields if f.number == GRAPH_NODE]

    def graph(self, scope: Scope) -> GraphPlace:
        """Where the graph at `scope` lies. Raises: IndexError if there is none."""
        place = self._place((), self.graphs)
        for index, attribute_index, graph_index in scope:
            part, node = place.nodes[index]
            inside = fields(self.buffer, node.payload, node.end)
            attribute = [f for f in inside if f.number == NODE_ATTRIBUTE][attribute_index]
            inside = fields(self.buffer, attribute.payload, attribute.end)
            held = [f for f in inside if f.number in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS)]
            several = held[0].number == ATTRIBUTE_GRAPHS
            parts = [held[graph_index]] if several else held
            place = self._place((*place.around, part, node, attribute), parts)
        return place

    def _place(self, around: tuple[Field, ...], parts: Iterable[Field]) -> GraphPlace:
        parts = tuple(parts)
        nodes = tuple(
            (part, field)
            for part in parts
            for field in fields(self.buffer, part.payload, part.end)
            if field.number == GRAPH_NODE
        )
        return GraphPlace(around, parts, nodes)

    @cached_property
    def initializers(self) -> list[Field]:
        """The initializers; `initializers[i]` encodes `skeleton.graph.initializer[i]`."""
        return [f for f in self.graph_fields if f.number == GRAPH_INITIALIZER]

    @cached_property
    def skeleton(self) -> ModelProto:
        """The model without the data of tensors over `SKELETON_BYTES`."""
        model = ModelProto()
        for field in self.model_fields:
            if field.number != MODEL_GRAPH:
                model.MergeFromString(self._bytes(field))
        graph = bytearray()
        for field in self.graph_fields:
            large = field.number == GRAPH_INITIALIZER and field.end - field.start > SKELETON_BYTES
            graph += self._tensor_header(field) if large else self._bytes(field)
        model.graph.MergeFromString(bytes(graph))
        return model

    def _tensor_header(self, tensor: Field) -> bytes:
        inner = fields(self.buffer, tensor.payload, tensor.end)
        kept = b"".join(self._bytes(f) for f in inner if f.number not in _TENSOR_DATA)
        return delimited(GRAPH_INITIALIZER, kept)

    def _bytes(self, field: Field) -> bytes:
        return bytes(self.buffer[field.start : field.end])

    @property
    def folder(self) -> Path:
        """The folder that external weights are relative to."""
        return self.path.parent

    def metadata(self, key: str) -> str | None:
        """The value of a `metadata_props` entry."""
        return next((p.value for p in self.skeleton.metadata_props if p.key == key), None)

    def tensor(self, name: str) -> TensorProto | None:
        """An initializer with its data, read from the file."""
        stored = self.skeleton.graph.initializer
        index = next((i for i, tensor in enumerate(stored) if tensor.name == name), None)
        if index is None:
            return None
        place = self.initializers[index]
        return TensorProto.FromString(bytes(self.buffer[place.payload : place.end]))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, without its external weights."""
        return digest(memoryview(self.buffer))

    def tensors(self) -> Iterator[TensorProto]:
        """Every TensorProto: initializers and attributes, of all graphs and functions."""
        yield from tensors_of(self.skeleton.graph.initializer, self.skeleton.graph.node)
        for function in self.skeleton.functions:
            yield from tensors_of((), function.node)


def tensors_of(
    initializers: Iterable[TensorProto], nodes: Iterable[NodeProto]
) -> Iterator[TensorProto]:
    """The tensors `initializers` and all those in the attributes and subgraphs of `nodes`."""
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in subgraphs(node):
            yield from tensors_of(graph.initializer, graph.node)


def digest(view: memoryview, progress: Tick | None = None, step: int = 1 << 22) -> str:
    """SHA-256 of a buffer, read in steps of `step` bytes; `progress(n)` after each n bytes."""
    sha = hashlib.sha256()
    for start in range(0, len(view), step):
        part = view[start : start + step]
        sha.update(part)
        if progress is not None:
            progress(len(part))
    return sha.hexdigest()

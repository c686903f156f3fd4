"""`.atpatch` files: a patch as an ONNX model that any viewer opens.

The inserted nodes and tensors are its graph; the edit list, which says where they go, and the
digest of the base are in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from .edits import (
    AddInitializer,
    AddInput,
    AddMetadata,
    AddNode,
    AddNodeOutput,
    AddOpsetImport,
    AddOutput,
    Edit,
    RemoveNode,
    RenameOutput,
    RewireInput,
    parsed_scope,
    scope_text,
)
from .errors import InputError, reason
from .model_file import ModelFile
from .passes.graph_view import GraphView
from .passes.protos import subgraphs
from .patching import Patch

FORMAT = 2


def save_patch(patch: Patch, base: ModelFile) -> bytes:
    """The content of an `.atpatch` file for `patch`, which is for `base`."""
    nodes = [e.node for e in patch.edits if isinstance(e, AddNode)]
    tensors = [e.tensor for e in patch.edits if isinstance(e, AddInitializer)]
    inputs = [e.value for e in patch.edits if isinstance(e, AddInput)]
    outputs = [e.value for e in patch.edits if isinstance(e, AddOutput)]
    made = {name for node in nodes for name in node.output} | {t.name for t in tensors}
    captured = [n for n in dict.fromkeys(_reads(nodes)) if n not in made]
    view = GraphView.of(base.skeleton)
    replaced = {e.new: e.old for e in patch.edits if isinstance(e, RewireInput)}
    replaced |= {e.old: e.old for e in patch.edits if isinstance(e, RenameOutput)}
    graph = helper.make_graph(
        nodes,
        "atpatch",
        [*inputs, *(_value(view, name, name) for name in captured)],
        [*outputs, *(_value(view, old, new) for new, old in replaced.items())],
        initializer=tensors,
    )
    skeleton = base.skeleton
    added = [e for e in patch.edits if isinstance(e, AddOpsetImport)]
    opsets = [
        *skeleton.opset_import,
        *(helper.make_opsetid(edit.domain, edit.version) for edit in added),
    ]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=skeleton.ir_version, producer_name="atpatch-onnx"
    )
    helper.set_model_props(
        model,
        {
            "atpatch.patch.format": str(FORMAT),
            "atpatch.patch.base_sha256": patch.base_sha256,
            "atpatch.patch.edits": json.dumps(list(_edit_list(patch)), separators=(",", ":")),
        },
    )
    content: bytes = model.SerializeToString()
    return content


def load_patch(path: str | Path) -> Patch:
    """Read an `.atpatch` file. Raises: InputError if it is none."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from None
    return parse_patch(content, str(path))


def parse_patch(content: bytes, source: str) -> Patch:
    """The patch in the content of an `.atpatch` file. Raises: InputError, which names `source`."""
    broken = InputError(
        f"{source} is not a usable .atpatch file: make it with atpatch-onnx patch --patch-only"
    )
    try:
        model = ModelProto.FromString(content)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if metadata.get("atpatch.patch.format") != str(FORMAT):
            raise broken
        listed = json.loads(metadata["atpatch.patch.edits"])
        if not listed or not isinstance(listed, list) or not _all_text(model.graph):
            raise broken
        return Patch(metadata["atpatch.patch.base_sha256"], tuple(_edits(model, listed)))
    except (DecodeError, ValueError, KeyError, IndexError, TypeError):
        raise broken from None


def _all_text(graph: GraphProto) -> bool:
    """Whether all names are UTF-8: protobuf gives others as bytes."""
    names: list[object] = [tensor.name for tensor in graph.initializer]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
    nested = (inner for node in graph.node for inner in subgraphs(node))
    return all(isinstance(name, str) for name in names) and all(map(_all_text, nested))


def _value(view: GraphView, known_as: str, name: str) -> ValueInfoProto:
    """A graph input or output called `name` with what the host knows of `known_as`."""
    known, rank = view.types.get(known_as), view.rank(known_as)
    shape = known.shape if known is not None else None
    elem_type = known.elem_type if known is not None else TensorProto.FLOAT
    dims = list(shape) if shape is not None else None if rank is None else [None] * rank
    return helper.make_tensor_value_info(name, elem_type, dims)


def _reads(nodes: list[NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from filter(None, node.input)
        for graph in subgraphs(node):
            inner = {name for n in graph.node for name in n.output}
            yield from (name for name in _reads(list(graph.node)) if name not in inner)


def _edit_list(patch: Patch) -> Iterator[list[Any]]:
    """Each edit as a list: its kind, then where it goes; nodes and tensors are in the graph."""
    for edit in patch.edits:
        match edit:
            case AddNode(before, node, scope):
                yield ["add_node", before, node.name, scope_text(scope)]
            case RemoveNode(index, scope):
                yield ["remove_node", index, scope_text(scope)]
            case AddInitializer(tensor):
                yield ["add_initializer", tensor.name]
            case RewireInput(index, slot, old, new, scope):
                yield ["rewire_input", index, slot, old, new, scope_text(scope)]
            case RenameOutput(index, slot, old, new, scope):
                yield ["rename_output", index, slot, old, new, scope_text(scope)]
            case AddInput(value):
                yield ["add_input", value.name]
            case AddOutput(value, scope):
                yield ["add_output", value.name, scope_text(scope)]
            case AddNodeOutput(index, name, scope):
                yield ["add_node_output", index, name, scope_text(scope)]
            case AddOpsetImport(domain, version):
                yield ["add_opset", domain, version]
            case AddMetadata(key, text):
                yield ["add_metadata", key, text]


_KINDS: dict[str, tuple[type, ...]] = {
    "add_node": (int, str, str),
    "remove_node": (int, str),
    "rewire_input": (int, int, str, str, str),
    "rename_output": (int, int, str, str, str),
    "add_initializer": (str,),
    "add_input": (str,),
    "add_output": (str, str),
    "add_node_output": (int, str, str),
    "add_opset": (str, int),
    "add_metadata": (str, str),
}
"""What follows the kind of an edit in the list; a scope comes last."""


def _edits(model: ModelProto, listed: list[list[Any]]) -> Iterator[Edit]:
    if any(tuple(map(type, rest)) != _KINDS[kind] for kind, *rest in listed):
        raise ValueError("an edit of another form")
    if sum(edit[0] == "add_node" for edit in listed) != len(model.graph.node):
        raise ValueError("another number of nodes")
    nodes = iter(model.graph.node)
    tensors: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
    inputs: dict[str, ValueInfoProto] = {v.name: v for v in model.graph.input}
    outputs: dict[str, ValueInfoProto] = {v.name: v for v in model.graph.output}
    for kind, *rest in listed:
        match kind:
            case "add_node":
                yield AddNode(rest[0], next(nodes), parsed_scope(rest[-1]))
            case "remove_node":
                yield RemoveNode(rest[0], parsed_scope(rest[-1]))
            case "add_initializer":
                yield AddInitializer(tensors[rest[0]])
            case "rewire_input":
                yield RewireInput(rest[0], rest[1], rest[2], rest[3], parsed_scope(rest[4]))
            case "rename_output":
                yield RenameOutput(rest[0], rest[1], rest[2], rest[3], parsed_scope(rest[4]))
            case "add_input":
                yield AddInput(inputs[rest[0]])
            case "add_output":
                yield AddOutput(outputs[rest[0]], parsed_scope(rest[-1]))
            case "add_node_output":
                yield AddNodeOutput(rest[0], rest[1], parsed_scope(rest[2]))
            case "add_opset":
                yield AddOpsetImport(*rest)
            case "add_metadata":
                yield AddMetadata(*rest)

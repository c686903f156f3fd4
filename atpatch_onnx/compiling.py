"""From edits to replacements of bytes, with everything checked that an edit may not do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from onnx import ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto

from .edits import (
    RECORD_KEY,
    AddInitializer,
    AddInput,
    AddMetadata,
    AddNode,
    AddNodeOutput,
    AddOpsetImport,
    AddOutput,
    Edit,
    Placed,
    RemoveNode,
    RenameOutput,
    RewireInput,
    Scope,
)
from .errors import RefusedError
from .model_file import (
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_METADATA,
    MODEL_OPSET,
    NODE_INPUT,
    NODE_OUTPUT,
    GraphPlace,
    ModelFile,
    tensors_of,
)
from .passes.graph_view import GraphView
from .passes.protos import called, subgraphs
from .wire import LEN, Field, Replacement, delimited, fields, growth, header


def is_key(key: str, base: str) -> bool:
    """Whether a metadata key is `base`, or that of a further patch."""
    return key == base or key.startswith(f"{base}.")


def compiled(model: ModelFile, edits: tuple[Edit, ...]) -> list[Replacement]:
    """The edits as replacements of the file, sorted, lengths of enclosing messages included."""
    places = _places(model, edits)
    _check_edits(model, edits, places)
    check_names(model.skeleton, edits)
    root = _Message(Field(0, LEN, 0, 0, model.size))
    behind: list[bytes] = []

    def graph(scope: Scope) -> tuple[_Message, Field]:
        """The last part of a graph, and its field."""
        place = places[scope]
        return root.at(*place.around, place.parts[-1]), place.parts[-1]

    def node(scope: Scope, index: int) -> tuple[_Message, Field]:
        """A node's message, and its field."""
        place = places[scope]
        return root.at(*place.around, *place.nodes[index]), place.nodes[index][1]

    for edit in edits:
        match edit:
            case AddNode(before, added, scope):
                place = places[scope]
                if before < len(place.nodes):
                    part, field = place.nodes[before]
                    root.at(*place.around, part).insert(
                        field.start, GRAPH_NODE, added.SerializeToString()
                    )
                else:
                    message, field = graph(scope)
                    message.insert(field.end, GRAPH_NODE, added.SerializeToString())
            case RemoveNode(index, scope):
                place = places[scope]
                part, field = place.nodes[index]
                gone = Replacement(field.start, field.end, b"")
                root.at(*place.around, part).changes.append(gone)
            case AddInitializer(tensor):
                message, field = graph(())
                message.insert(field.end, GRAPH_INITIALIZER, tensor.SerializeToString())
            case AddInput(value):
                message, field = graph(())
                message.insert(field.end, GRAPH_INPUT, value.SerializeToString())
            case AddOutput(value, scope):
                message, field = graph(scope)
                message.insert(field.end, GRAPH_OUTPUT, value.SerializeToString())
            case AddNodeOutput(index, name, scope):
                message, field = node(scope, index)
                message.insert(field.end, NODE_OUTPUT, name.encode())
            case RewireInput(index, _, _, _, scope):
                message, field = node(scope, index)
                message.changes.append(_renamed(model, field, NODE_INPUT, edit))
            case RenameOutput(index, _, _, _, scope):
                message, field = node(scope, index)
                message.changes.append(_renamed(model, field, NODE_OUTPUT, edit))
            case AddOpsetImport(domain, version):
                opset = OperatorSetIdProto(domain=domain, version=version)
                behind.append(delimited(MODEL_OPSET, opset.SerializeToString()))
            case AddMetadata(key, value):
                entry = StringStringEntryProto(key=key, value=value)
                behind.append(delimited(MODEL_METADATA, entry.SerializeToString()))
    return root.content() + [Replacement(model.size, model.size, entry) for entry in behind]


@dataclass(frozen=True)
class _Message:
    """A field whose content is edited: what is replaced in it, and the edited messages within."""

    field: Field
    changes: list[Replacement] = dataclass_field(default_factory=list)
    within: dict[int, _Message] = dataclass_field(default_factory=dict)

    def at(self, *fields_: Field) -> _Message:
        """The message of a field within, by the fields that lead to it."""
        message = self
        for one in fields_:
            message = message.within.setdefault(one.start, _Message(one))
        return message

    def insert(self, offset: int, number: int, payload: bytes) -> None:
        """Insert a length-delimited field."""
        self.changes.append(Replacement(offset, offset, delimited(number, payload)))

    def content(self) -> list[Replacement]:
        """The replacements of the content, sorted; what is inserted at one place keeps its order.

        An insertion where a message ends lies behind it, one where a message begins before it.
        """
        parts = [(r.start, r.start != r.end, [r]) for r in self.changes]
        parts += [(start, True, m.whole()) for start, m in self.within.items()]
        parts.sort(key=lambda part: part[:2])
        return [replacement for _, _, found in parts for replacement in found]

    def whole(self) -> list[Replacement]:
        """The replacements of the field: the new length, and those of its content."""
        inside = self.content()
        if not inside:
            return []
        length = self.field.end - self.field.payload + growth(inside)
        start = header(self.field.number, length)
        return [Replacement(self.field.start, self.field.payload, start), *inside]


def _places(model: ModelFile, edits: Iterable[Edit]) -> dict[Scope, GraphPlace]:
    """Where the graphs lie that are edited. Raises: RefusedError for one that is not there."""
    scopes: set[Scope] = {()}
    scopes |= {edit.scope for edit in edits if isinstance(edit, Placed)}
    try:
        return {scope: model.graph(scope) for scope in scopes}
    except IndexError:
        raise _not_allowed("a subgraph that the model does not have") from None


def _not_allowed(what: str) -> RefusedError:
    return RefusedError(
        f"the patch wants {what}, which is not what patches may do: patch this model again from "
        "its detector"
    )


def _check_edits(
    model: ModelFile, edits: Iterable[Edit], places: Mapping[Scope, GraphPlace]
) -> None:
    """Raises: RefusedError for an edit that could change more than it says."""
    domains = {o.domain for o in model.skeleton.opset_import} | {"", "ai.onnx"}
    for edit in edits:
        problem = ""
        match edit:
            case AddNode(before, node, scope):
                count = len(places[scope].nodes)
                if not 0 <= before <= count:
                    problem = f"a node at place {before} of {count}"
                elif any(_is_external(t) for t in tensors_of((), (node,))):
                    problem = "a tensor in another file"
            case (
                RemoveNode(index, scope)
                | RewireInput(index, _, _, _, scope)
                | RenameOutput(index, _, _, _, scope)
                | AddNodeOutput(index, _, scope)
            ):
                count = len(places[scope].nodes)
                if not 0 <= index < count:
                    problem = f"node {index} of {count}"
                elif isinstance(edit, RemoveNode) and not _is_call(model, edit):
                    problem = f"to remove node {index}, which is no call of a function,"
                elif isinstance(edit, AddNodeOutput) and _node(model, edit).op_type != "If":
                    problem = f"another output of node {index}, which is no If,"
            case AddInitializer(tensor):
                if _is_external(tensor):
                    problem = "a tensor in another file"
            case AddOpsetImport(domain, _):
                if domain in domains:
                    problem = f"another version of the operators '{domain}'"
                domains.add(domain)
            case AddMetadata(key, _):
                if not key.startswith("atpatch.") or is_key(key, RECORD_KEY):
                    problem = f"the metadata '{key}'"
            case _:
                pass
        if problem:
            raise _not_allowed(problem)


def _is_call(model: ModelFile, edit: RemoveNode) -> bool:
    """Whether the node is a call of a model-local function."""
    return called(model.skeleton, _node(model, edit)) is not None


def _node(model: ModelFile, edit: RemoveNode | AddNodeOutput) -> NodeProto:
    """The base node that an edit is for."""
    return GraphView.of(model.skeleton).at(edit.scope).nodes[edit.node]


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _renamed(
    model: ModelFile, node: Field, number: int, edit: RewireInput | RenameOutput
) -> Replacement:
    """An input or output of a node under another name."""
    names = [
        field
        for field in fields(model.buffer, node.payload, node.end)
        if field.number == number and field.wire_type == LEN
    ]
    field = names[edit.slot] if 0 <= edit.slot < len(names) else None
    found = None if field is None else bytes(model.buffer[field.payload : field.end]).decode()
    if field is None or found != edit.old:
        what = "input" if number == NODE_INPUT else "output"
        raise RefusedError(
            f"{what} {edit.slot} of node {edit.node} is '{found}', the patch expects "
            f"'{edit.old}': patch this model again from its detector"
        )
    return Replacement(field.start, field.end, delimited(number, edit.new.encode()))


def check_names(model: ModelProto, edits: Iterable[Edit]) -> None:
    """Raises: RefusedError if an edit brings a name that the model or another edit has, or leaves
    a value without a node that makes it."""
    edits = tuple(edits)
    values, nodes = _freed(model, edits)
    freed = {name for _, name in values} | nodes
    taken = set(names(model)) - freed
    defined: Counter[tuple[Scope, str]] = Counter()

    def define(scope: Scope, *made: str) -> None:
        # Two branches may have values of one name, and give up both.
        defined.update({(scope if name in freed else (), name) for name in made if name})

    for edit in edits:
        if isinstance(edit, AddNode):
            define(edit.scope, f"node {edit.node.name}", *edit.node.output)
        elif isinstance(edit, AddInitializer):
            define((), edit.tensor.name)
        elif isinstance(edit, RenameOutput):
            define(edit.scope, edit.new)
        elif isinstance(edit, AddNodeOutput):
            define(edit.scope, edit.name)
        elif isinstance(edit, AddMetadata):
            define((), f"metadata {edit.key}")
    clash = next((n for (_, n), count in defined.items() if count > 1 or n in taken), None)
    if clash is not None:
        raise RefusedError(
            f"the name '{clash}' is already taken in the model: revert its earlier patch first, or "
            "rename the value in the model"
        )
    lost = next((name for scope, name in values if (scope, name) not in defined), None)
    if lost is not None:
        raise _not_allowed(f"to leave '{lost}' without a node that makes it")


def _freed(model: ModelProto, edits: Iterable[Edit]) -> tuple[set[tuple[Scope, str]], set[str]]:
    """What base nodes give up: names of values, each with its graph, and names of nodes."""
    view = GraphView.of(model)
    values: set[tuple[Scope, str]] = set()
    nodes: set[str] = set()
    for edit in edits:
        if isinstance(edit, RenameOutput):
            values.add((edit.scope, edit.old))
        elif isinstance(edit, RemoveNode):
            node = view.at(edit.scope).nodes[edit.node]
            values.update((edit.scope, name) for name in node.output if name)
            nodes.add(f"node {node.name}")
    return values, nodes


def names(model: ModelProto) -> Iterator[str]:
    """Every name that is in use: values, initializers, nodes and metadata, all scopes."""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from (value.name for value in graph.input)
        yield from (tensor.name for tensor in graph.initializer)
        yield from (tensor.values.name for tensor in graph.sparse_initializer)
        for node in graph.node:
            yield from node.output
            yield f"node {node.name}"
            graphs += subgraphs(node)
    yield from (f"metadata {entry.key}" for entry in model.metadata_props)

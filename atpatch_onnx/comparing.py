"""Every difference between a model file and a patched one, found on the wire.

Independent of the patch that made one from the other: no edit list is read, only the bytes of the
two files. What a patch may not change raises, also deep inside subgraphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
)

from .edits import parsed_scope
from .errors import CheckError
from .model_file import (
    ATTRIBUTE_GRAPH,
    ATTRIBUTE_GRAPHS,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_METADATA,
    MODEL_OPSET,
    NODE_ATTRIBUTE,
    NODE_INPUT,
    NODE_NAME,
    NODE_OUTPUT,
    ModelFile,
    tensors_of,
)
from .passes.functions import body
from .passes.protos import called, subgraphs
from .passes.switches import REMEMBERED
from .wire import LEN, Field
from .wire import fields as wire_fields

PREFIX = "atpatch/"


@dataclass(frozen=True)
class RewiredSlot:
    """An input or output slot of an original node that has another name now.

    scope: where the node lies: for each node around it, from outside, its index, the index of its
        attribute and of the graph in that; "" in the main graph.
    """

    node: str
    index: int
    slot: int
    old: str
    new: str
    scope: str = ""


@dataclass(frozen=True)
class Difference:
    """Everything in which the result differs from the base; the rest is byte-identical.

    rewired: input slots that read something else; renamed: output slots whose value an inserted
        node makes now. removed_nodes: calls of functions whose bodies were inserted instead.
    """

    inserted_nodes: list[str] = field(default_factory=list)
    inserted_initializers: list[str] = field(default_factory=list)
    inserted_inputs: list[str] = field(default_factory=list)
    inserted_outputs: list[str] = field(default_factory=list)
    inserted_node_outputs: list[str] = field(default_factory=list)
    inserted_opsets: list[str] = field(default_factory=list)
    inserted_metadata: list[str] = field(default_factory=list)
    rewired: list[RewiredSlot] = field(default_factory=list)
    renamed: list[RewiredSlot] = field(default_factory=list)
    removed_nodes: list[str] = field(default_factory=list)

    def extend(self, other: Difference) -> None:
        """Add what differs in a part."""
        for one in fields(self):
            getattr(self, one.name).extend(getattr(other, one.name))


def compare(base: ModelFile, result: ModelFile) -> Difference:
    """Every difference between the two files. Raises: CheckError for one that no patch makes."""
    comparison = _Comparison(base, result, base.skeleton)
    difference = Difference()
    comparison.walk(base.model_fields, result.model_fields, _Model(comparison, difference))
    graph = base.skeleton.graph
    rules = _Graph(comparison, difference, graph, _weights(graph, set()), "")
    comparison.walk(base.graph_fields, result.graph_fields, rules)
    rules.finish()
    # What prefill flagged has no default where a model only decodes: see `passes.remember`.
    given = {*difference.inserted_initializers, REMEMBERED}
    needed = set(difference.inserted_inputs) - given
    if needed:
        raise CheckError(
            f"{result.path} has the new input '{sorted(needed)[0]}' without a default: it was "
            "altered, take a fresh copy"
        )
    return difference


@dataclass(frozen=True)
class _Comparison:
    """The two files, and the model whose functions are called."""

    base: ModelFile
    result: ModelFile
    model: ModelProto
    _names: dict[int, bytes] = field(default_factory=dict)

    def walk(self, old: list[Field], new: list[Field], rules: _Model | _Graph) -> None:
        """Match the fields of the base, in order, with those of the result; others are new."""
        position = 0
        for a in old:
            found = None
            for i in range(position, len(new)):
                if rules.same(a, new[i]):
                    found = i
                    break
                if not rules.may_be_new(new[i]):
                    break
            if found is None:
                if rules.removed(a):
                    continue
                raise CheckError(
                    f"{self.result.path} lacks or changes something of {self.base.path} (field "
                    f"{a.number} at byte {a.start}): it is not that model with a patch"
                )
            for b in new[position:found]:
                self.insert(b, rules)
            rules.accept(a)
            position = found + 1
        for b in new[position:]:
            self.insert(b, rules)

    def insert(self, b: Field, rules: _Model | _Graph) -> None:
        """Take a field of the result for new. Raises: CheckError."""
        if not rules.insert(b):
            raise self.altered(f"at byte {b.start} it has something that is")

    def altered(self, what: str) -> CheckError:
        """What is neither in the base nor made by a patch."""
        return CheckError(
            f"{self.result.path} is not {self.base.path} with a patch: {what} neither in the "
            "original nor named as a patch names its parts"
        )

    def old(self, a: Field) -> bytes:
        """The content of a field of the base."""
        return bytes(self.base.buffer[a.payload : a.end])

    def new(self, b: Field) -> bytes:
        """The content of a field of the result."""
        return bytes(self.result.buffer[b.payload : b.end])

    def node_name(self, b: Field) -> bytes:
        """The name of a node of the result."""
        if b.start not in self._names:
            inside = wire_fields(self.result.buffer, b.payload, b.end)
            held = next((f for f in inside if f.number == NODE_NAME), None)
            self._names[b.start] = b"" if held is None else self.new(held)
        return self._names[b.start]

    def inside(self, a: Field, b: Field) -> tuple[list[Field], list[Field]]:
        """The fields of two messages."""
        return (
            list(wire_fields(self.base.buffer, a.payload, a.end)),
            list(wire_fields(self.result.buffer, b.payload, b.end)),
        )


class _Model:
    """The message ModelProto: the graph is compared by itself, metadata and opsets may be added."""

    def __init__(self, files: _Comparison, difference: Difference) -> None:
        self.files, self.difference = files, difference
        self.domains = {_domain(opset.domain) for opset in files.base.skeleton.opset_import}

    def same(self, a: Field, b: Field) -> bool:
        if (a.number, a.wire_type) != (b.number, b.wire_type):
            return False
        return a.number == MODEL_GRAPH or self.files.old(a) == self.files.new(b)

    def may_be_new(self, _: Field) -> bool:
        return True

    def accept(self, _: Field) -> None:
        """Nothing to note."""

    def removed(self, _: Field) -> bool:
        return False

    def insert(self, b: Field) -> bool:
        if b.number == MODEL_METADATA:
            entry = StringStringEntryProto.FromString(self.files.new(b))
            self.difference.inserted_metadata.append(entry.key)
            return isinstance(entry.key, str) and entry.key.startswith("atpatch.")
        if b.number == MODEL_OPSET:
            opset = OperatorSetIdProto.FromString(self.files.new(b))
            self.difference.inserted_opsets.append(f"{opset.domain}={opset.version}")
            # Another version of a domain that is there would change what every node of it means.
            fresh = _domain(opset.domain) not in self.domains
            self.domains.add(_domain(opset.domain))
            return fresh
        return False


class _Graph:
    """The message GraphProto: own nodes and tensors may be added, slots of others renamed.

    weights: the values that are weights, in this graph and around it; scope: where it lies.
    """

    _LISTS: ClassVar[dict[int, tuple[Callable[[bytes], Any], str]]] = {
        GRAPH_NODE: (NodeProto.FromString, "inserted_nodes"),
        GRAPH_INITIALIZER: (TensorProto.FromString, "inserted_initializers"),
        GRAPH_INPUT: (ValueInfoProto.FromString, "inserted_inputs"),
        GRAPH_OUTPUT: (ValueInfoProto.FromString, "inserted_outputs"),
    }

    def __init__(
        self,
        files: _Comparison,
        difference: Difference,
        graph: GraphProto,
        weights: set[str],
        scope: str,
    ) -> None:
        self.files, self.difference, self.graph = files, difference, graph
        self.left = {GRAPH_INPUT: len(graph.input), GRAPH_OUTPUT: len(graph.output)}
        self.weights, self.scope, self.node = weights, scope, 0
        self.found = Difference()  # of the fields compared last
        self.freed: set[str] = set()
        self.made: list[str] = []
        self.calls: list[NodeProto] = []
        self.new_nodes: list[Field] = []

    def same(self, a: Field, b: Field) -> bool:
        if (a.number, a.wire_type) != (b.number, b.wire_type):
            return False
        self.found = Difference()
        if a.number != GRAPH_NODE or a.wire_type != LEN:
            return self.files.old(a) == self.files.new(b)
        length = b.end - b.payload
        if a.end - a.payload == length and self.files.old(a) == self.files.new(b):
            return True
        node = self.graph.node[self.node]
        if isinstance(node.name, str) and self.files.node_name(b) != node.name.encode():
            return False
        found = _Node(self.files, node, self.weights, self.place).compare(a, b)
        if found is None:
            return False
        self.found = found
        return True

    def accept(self, a: Field) -> None:
        if a.number in self.left:
            self.left[a.number] -= 1
        if a.number == GRAPH_NODE:
            self.node += 1
            self.difference.extend(self.found)
            self.freed.update(slot.old for slot in self.found.renamed if slot.scope == self.scope)

    def may_be_new(self, b: Field) -> bool:
        """Whether a field may be skipped as one of a patch."""
        if b.number != GRAPH_NODE:
            return True
        return self.files.node_name(b).startswith(PREFIX.encode())

    @property
    def place(self) -> tuple[str, int]:
        """Scope and index of the node that is compared."""
        return self.scope, self.node

    def removed(self, a: Field) -> bool:
        """Whether a field that is not in the result is a call whose body was inserted."""
        if a.number != GRAPH_NODE:
            return False
        node = self.graph.node[self.node]
        self.node += 1
        self.difference.removed_nodes.append(node.name or node.output[0])
        self.freed.update(filter(None, node.output))
        self.calls.append(node)
        return called(self.files.model, node) is not None

    def insert(self, b: Field) -> bool:
        # Callers know inputs and outputs by their order, so that own ones come last.
        if b.number not in self._LISTS or self.left.get(b.number, 0) > 0:
            return False
        if self.scope and b.number not in (GRAPH_NODE, GRAPH_OUTPUT):
            return False
        parse, name = self._LISTS[b.number]
        entry = parse(self.files.new(b))
        getattr(self.difference, name).append(entry.name)
        is_node = isinstance(entry, NodeProto)
        # Protobuf gives names that are not UTF-8 as bytes.
        if not _ours(entry.name):
            return False
        if is_node:
            self.new_nodes.append(b)
            self.made += [name for name in entry.output if name and not _ours(name)]
        tensors = (entry,) if isinstance(entry, TensorProto) else ()
        return not any(
            tensor.data_location == TensorProto.EXTERNAL
            for tensor in tensors_of(tensors, (entry,) if is_node else ())
        )

    def finish(self) -> None:
        """Raises: CheckError unless what nodes gave up is what inserted nodes make."""
        if sorted(self.made) != sorted(self.freed):
            odd = next(iter(set(self.made) ^ self.freed), self.made[0] if self.made else "")
            raise self.files.altered(f"the value '{odd}' is made by nodes that are")
        self.check_bodies()

    def check_bodies(self) -> None:
        """Raises: CheckError unless functions' bodies are there in place of removed calls."""
        for call in self.calls:
            self._check_body(call)

    def _check_body(self, call: NodeProto) -> None:
        function = called(self.files.model, call)
        assert function is not None
        graph = GraphProto(node=body(function, call, parsed_scope(self.scope)))
        content = graph.SerializeToString()
        there = ModelFile(self.files.base.path, content, len(content))
        files = _Comparison(there, self.files.result, self.files.model, self.files._names)
        weights = _weights(graph, self.weights)
        rules = _Graph(files, Difference(), graph, weights, self.scope)
        files.walk(list(wire_fields(content, 0, len(content))), self.new_nodes, rules)
        rules.check_bodies()


@dataclass(frozen=True)
class _Node:
    """Two encodings of a node, which may differ in names of slots and within subgraphs.

    node: that of the base; place: its scope and index.
    """

    files: _Comparison
    node: NodeProto
    weights: set[str]
    place: tuple[str, int]

    def compare(self, a: Field, b: Field) -> Difference | None:
        """In what they differ; None if in more than a patch may change."""
        old, new = self.files.inside(a, b)
        surplus = _surplus(old, new)
        added = [self._name(f) for f in surplus]
        new = [f for f in new if f not in surplus]
        difference = Difference()
        slots = {NODE_INPUT: 0, NODE_OUTPUT: 0}
        attributes = 0
        for one, other in zip(old, new, strict=False):
            if (one.number, one.wire_type) != (other.number, other.wire_type):
                return None
            equal = self.files.old(one) == self.files.new(other)
            if one.number in slots:
                slot = slots[one.number]
                slots[one.number] += 1
                if not equal and not self._slot(one, other, slot, difference):
                    return None
            elif one.number == NODE_ATTRIBUTE:
                attributes += 1
                if not equal and not self._attribute(one, other, attributes - 1, difference):
                    return None
            elif not equal:
                return None
        if len(old) != len(new) or (added and self.node.op_type != "If"):
            return None
        if not all(map(_ours, added)):
            return None
        difference.inserted_node_outputs.extend(added)
        return difference

    def _name(self, b: Field) -> str:
        return self.files.new(b).decode(errors="replace")

    def _slot(self, one: Field, other: Field, slot: int, difference: Difference) -> bool:
        """Note a slot under another name."""
        old, new = self.files.old(one).decode(errors="replace"), self._name(other)
        # A weight is changed as well by reading another in its place, an option by giving it.
        if not _ours(new) or not old or old in self.weights:
            return False
        scope, index = self.place
        name = self.node.name or self.node.output[0]
        listed = difference.rewired if one.number == NODE_INPUT else difference.renamed
        listed.append(RewiredSlot(name, index, slot, old, new, scope))
        return True

    def _attribute(self, one: Field, other: Field, index: int, difference: Difference) -> bool:
        """Compare the graphs in an attribute; the rest of it must be the same."""
        sides = self.files.inside(one, other)
        numbers = (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS)
        heads = [[(f.number, f.wire_type) for f in side] for side in sides]
        plain = [[f for f in side if f.number not in numbers] for side in sides]
        if heads[0] != heads[1] or [*map(self.files.old, plain[0])] != [
            *map(self.files.new, plain[1])
        ]:
            return False
        held, given = ([f for f in side if f.number in numbers] for side in sides)
        if len(held) != len(given) or index >= len(self.node.attribute):
            return False
        if held and held[0].number == ATTRIBUTE_GRAPH:
            pairs = [(held, given)]  # one graph, maybe in several parts
        else:
            pairs = [([x], [y]) for x, y in zip(held, given, strict=True)]
        scope, place = self.place
        for number, (xs, ys) in enumerate(pairs):
            inner = f"{scope}/{place}.{index}.{number}".removeprefix("/")
            attribute = self.node.attribute[index]
            graph = attribute.g if attribute.HasField("g") else attribute.graphs[number]
            weights = _weights(graph, self.weights)
            rules = _Graph(self.files, difference, graph, weights, inner)
            fields_ = [self.files.inside(x, y) for x, y in zip(xs, ys, strict=True)]
            try:
                self.files.walk(
                    [f for old, _ in fields_ for f in old],
                    [f for _, new in fields_ for f in new],
                    rules,
                )
                rules.finish()
            except CheckError:
                return False
        return True


def _surplus(old: list[Field], new: list[Field]) -> list[Field]:
    """The outputs that a node has more than before."""
    outputs = [f for f in new if f.number == NODE_OUTPUT]
    return outputs[sum(f.number == NODE_OUTPUT for f in old) :]


def _weights(graph: GraphProto, outer: set[str]) -> set[str]:
    """The values that are weights, or computed from weights alone, in a graph and around it."""
    found = {tensor.name for tensor in graph.initializer}
    found |= {tensor.values.name for tensor in graph.sparse_initializer}
    found |= outer
    for node in graph.node:
        inputs = [name for name in node.input if name]
        made = node.op_type == "Constant" or (inputs and found.issuperset(inputs))
        if made and not subgraphs(node):
            found.update(filter(None, node.output))
    return found


def _ours(name: object) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name

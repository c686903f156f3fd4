"""A graph, indexed for reading: who makes a value, who reads it, what is known of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from ..edits import Scope
from .functions import CALL, body
from .protos import attribute, domain, graphs_of, read_within, subgraphs
from .shapes import infer

Dim = int | str | None
"""A dimension: a number, a symbol, or unknown."""


@dataclass(frozen=True)
class ValueType:
    """Element type (`onnx.TensorProto`) and shape of a value; shape None: not even the rank."""

    elem_type: int
    shape: tuple[Dim, ...] | None


@dataclass(frozen=True)
class Use:
    """Input `slot` of node `node`."""

    node: int
    slot: int


@dataclass(frozen=True, eq=False)
class GraphView:
    """The main graph of a model, or a subgraph or called function within it (`scope` says which).

    path: where it lies, see `edits.Scope`; a step `(index, CALL, CALL)` leads into the function
        that a node calls, whose nodes are here as they would stand in place of the call.
    outer: the scope around it; function: the called function whose body it is.
    """

    model: ModelProto
    nodes: list[NodeProto]
    graph: GraphProto | None
    scope: str = "main"
    path: Scope = ()
    outer: GraphView | None = None
    function: FunctionProto | None = None
    _constants: dict[str, NDArray[np.generic] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelProto) -> GraphView:
        """The view of the main graph."""
        return cls(model, list(model.graph.node), model.graph)

    def nested(self) -> Iterator[GraphView]:
        """Views of every subgraph, and of the body of every function that is called."""
        for view in self._inner:
            yield view
            yield from view.nested()

    @cached_property
    def _inner(self) -> list[GraphView]:
        """The subgraphs and the called functions of this scope's nodes."""
        found: list[GraphView] = []
        for i, node in enumerate(self.nodes):
            name = f"{self.scope}/{node.name or node.op_type}"
            function = self.functions.get((domain(node), node.op_type, node.overload))
            if function is not None and not self.is_within(function):
                path = (*self.path, (i, CALL, CALL))
                nodes = body(function, node, self.path)
                found.append(GraphView(self.model, nodes, None, name, path, self, function))
                continue
            for j, held in enumerate(node.attribute):
                for k, graph in enumerate(graphs_of(held)):
                    path = (*self.path, (i, j, k))
                    scope = f"{name}.{held.name}"
                    found.append(GraphView(self.model, list(graph.node), graph, scope, path, self))
        return found

    @cached_property
    def functions(self) -> dict[tuple[str, str, str], FunctionProto]:
        """The model's functions by domain, name and overload."""
        if self.outer is not None:
            return self.outer.functions
        return {(domain(f), f.name, f.overload): f for f in self.model.functions}

    def is_within(self, function: FunctionProto) -> bool:
        """Whether this is the body of `function`, or in it: one that calls itself has no end."""
        if self.outer is None:
            return False
        return self.function is function or self.outer.is_within(function)

    def at(self, path: Scope) -> GraphView:
        """The view of the graph or body at `path`, which starts from this scope."""
        view = self
        for step in path:
            view = next(inner for inner in view._inner if inner.path[-1] == step)
        return view

    @cached_property
    def opset(self) -> int:
        """Version of the default operator domain."""
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    @cached_property
    def producers(self) -> dict[str, int]:
        """The node that makes a value."""
        return {name: i for i, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[Use]]:
        """The input slots that read a value."""
        uses: dict[str, list[Use]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for slot, name in enumerate(node.input):
                uses[name].append(Use(i, slot))
        return uses

    @cached_property
    def captured(self) -> dict[str, list[NodeProto]]:
        """Values of this scope that subgraphs read, with the nodes that have those subgraphs."""
        found: dict[str, list[NodeProto]] = defaultdict(list)
        here = set(self.producers) | self.varying
        for node in self.nodes:
            for name in read_within(node) & here:
                found[name].append(node)
        return found

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """Initializers of this scope and the enclosing ones."""
        own = {} if self.graph is None else {t.name: t for t in self.graph.initializer}
        return own if self.outer is None else {**self.outer.initializers, **own}

    @cached_property
    def outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return set() if self.graph is None else {value.name for value in self.graph.output}

    def producer(self, value: str) -> NodeProto | None:
        """The node that makes `value`, if it is in this scope."""
        index = self.producers.get(value)
        return None if index is None else self.nodes[index]

    @cached_property
    def varying(self) -> set[str]:
        """Values that depend on the graph's inputs: activations, as against weights."""
        if self.graph is None or self.outer is not None:
            found = {name for node in self.nodes for name in node.input}
            found -= set(self.producers) | set(self.initializers)
            found -= self.outer.settled if self.outer else set()
        else:
            found = {value.name for value in self.graph.input} - set(self.initializers)
        # Control-flow nodes capture values, so that they vary although they may have no inputs.
        queue = list(found)
        for node in self.nodes:
            if subgraphs(node):
                queue += node.output
        found.update(queue)
        for value in queue:  # a work list, because not every model is topologically sorted
            for use in self.consumers.get(value, []):
                new = [n for n in self.nodes[use.node].output if n and n not in found]
                found.update(new)
                queue += new
        return found

    @cached_property
    def settled(self) -> set[str]:
        """Values that nodes here and around make without the graph's inputs."""
        around = self.outer.settled if self.outer is not None else set()
        return around | (set(self.producers) - self.varying)

    @cached_property
    def types(self) -> dict[str, ValueType]:
        """What shape inference and the model's own value_info know."""
        graph = self._inferred.get(self.path)
        if graph is None:
            return {}
        known = {} if self.outer is None else dict(self.outer.types)
        known |= {t.name: ValueType(t.data_type, tuple(t.dims)) for t in graph.initializer}
        for info in (*graph.value_info, *graph.input, *graph.output):
            tensor = info.type.tensor_type
            if tensor.elem_type:
                shape = None
                if tensor.HasField("shape"):
                    shape = tuple(
                        d.dim_value if d.HasField("dim_value") else _symbol(d.dim_param)
                        for d in tensor.shape.dim
                    )
                known[info.name] = ValueType(tensor.elem_type, shape)
        return known

    @cached_property
    def _inferred(self) -> dict[Scope, GraphProto]:
        """The inferred graphs by path: of the whole model, or of a called function."""
        if self.graph is None:
            return {(*self.path, *path): graph for path, graph in infer(self._alone()).items()}
        return infer(self.model) if self.outer is None else self.outer._inferred

    def _alone(self) -> ModelProto:
        """The body of a called function as a model whose inputs are what it reads."""
        assert self.outer is not None
        model = ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        model.functions.extend(self.model.functions)
        model.graph.node.extend(self.nodes)
        for name in dict.fromkeys(
            name for node in self.nodes for name in (*node.input, *sorted(read_within(node)))
        ):
            if not name or name in self.producers:
                continue
            constant, known = self.constant(name), self.outer.types.get(name)
            if constant is not None:
                tensor = onnx.numpy_helper.from_array(constant, name)
                model.graph.initializer.append(tensor)
            elif known is not None:
                value = onnx.helper.make_tensor_value_info(name, known.elem_type, known.shape)
                model.graph.input.append(value)
        return model

    def shape(self, value: str) -> tuple[Dim, ...] | None:
        """The shape of `value`, as far as it is known."""
        known = self.types.get(value)
        return None if known is None else known.shape

    def rank(self, value: str, depth: int = 24) -> int | None:
        """The rank of `value`; read off its neighbours where shape inference gave up."""
        shape = self.shape(value)
        if shape is not None:
            return len(shape)
        node = self.producer(value)
        if node is None or depth == 0:
            return None
        op = node.op_type
        if op == "Transpose" and (perm := attribute(node, "perm")) is not None:
            return len(perm.ints)
        if op == "Reshape" and len(node.input) > 1:
            target = self.constant(node.input[1])
            if target is not None:
                return int(target.size)
            length = self.shape(node.input[1])
            return length[0] if length is not None and isinstance(length[0], int) else None
        if op in _SAME_RANK:
            ranks = [self.rank(name, depth - 1) for name in node.input if name]
            known = [rank for rank in ranks if rank is not None]
            return max(known) if known else None
        return None

    def constant(self, value: str) -> NDArray[np.generic] | None:
        """The value of a small initializer or Constant; None where it is no constant or large."""
        if value not in self._constants:
            self._constants[value] = self._read_constant(value)
        return self._constants[value]

    def _read_constant(self, value: str) -> NDArray[np.generic] | None:
        tensor = self.initializers.get(value)
        node = self.producer(value)
        if node is None and tensor is None and self.outer is not None:
            return self.outer.constant(value)
        if node is not None:
            if node.op_type == "Identity":
                return self.constant(node.input[0])
            if node.op_type != "Constant":
                return None
            held = node.attribute[0]
            if held.name == "value_int":
                return np.asarray(held.i)
            if held.name == "value_float":
                return np.asarray(held.f, np.float32)
            if held.name == "value_ints":
                return np.asarray(held.ints, np.int64)
            tensor = held.t if held.name == "value" else None
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        try:
            return onnx.numpy_helper.to_array(tensor)
        except Exception:  # its data was left out of the skeleton
            return None

    def search(
        self, start: str, follow: Callable[[NodeProto], list[str]], limit: int = 4000
    ) -> Iterator[tuple[str, NodeProto]]:
        """Values upstream of `start` with their producers, nearest first, along `follow`."""
        queue, seen = [start], {start}
        for value in queue:
            node = self.producer(value)
            if node is None:
                continue
            yield value, node
            for name in follow(node):
                if name and name not in seen and len(seen) < limit:
                    seen.add(name)
                    queue.append(name)


def _symbol(name: str) -> str | None:
    """A dimension's name, unless shape inference made it up."""
    return None if not name or name.startswith("unk__") else name


_SAME_RANK = frozenset(
    "Add Sub Mul Div Where Cast Softmax Tanh Identity MatMul FusedMatMul Max Min Clip "
    "IsNaN Dropout BiasSoftmax Concat Slice Exp Neg LayerNormalization Pow Sqrt "
    "QLinearMatMul QLinearSoftmax QLinearAdd QLinearMul QLinearConcat QuantizeLinear "
    "DequantizeLinear MatMulInteger".split()
)

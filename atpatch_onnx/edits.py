"""The closed set of changes to a model. None of them touches an initializer.

Nodes are named by their index in the base graph, which is unambiguous because a patch carries the
digest of the one file it is for; `scope` says in which graph, the main one by default. Protos
inside edits are never changed after construction.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto, ValueInfoProto

RECORD_KEY = "atpatch.record"
"""Metadata key of what undoes a patch; that of a second one on top is `atpatch.record.2`, ..."""

Scope = tuple[tuple[int, int, int], ...]
"""Where a graph lies: for each enclosing node, from outside, its index, the index of its attribute,
and of the graph in that attribute. The main graph: ()."""


def scope_text(scope: Scope) -> str:
    """A scope as text: "12.0.0/3.1.0", "" for the main graph."""
    return "/".join(".".join(map(str, step)) for step in scope)


def parsed_scope(text: str) -> Scope:
    """The scope that `scope_text` wrote. Raises: ValueError."""
    steps = [tuple(map(int, step.split("."))) for step in text.split("/")] if text else []
    scope = tuple((step[0], step[1], step[2]) for step in steps if len(step) == 3)
    if len(scope) != len(steps) or any(number < 0 for step in scope for number in step):
        raise ValueError(f"no scope: {text}")
    return scope


@dataclass(frozen=True)
class AddNode:
    """Insert `node` before node `before` of the base graph (its node count: at the end)."""

    before: int
    node: NodeProto
    scope: Scope = ()


@dataclass(frozen=True)
class RemoveNode:
    """Take out base node `node`, a call of a model-local function; added nodes make its outputs."""

    node: int
    scope: Scope = ()


@dataclass(frozen=True)
class AddInitializer:
    """Add a tensor to the main graph under a new name."""

    tensor: TensorProto


@dataclass(frozen=True)
class RewireInput:
    """Let input `slot` of base node `node` read `new` instead of `old`."""

    node: int
    slot: int
    old: str
    new: str
    scope: Scope = ()


@dataclass(frozen=True)
class RenameOutput:
    """Let output `slot` of base node `node` be called `new`; an added node makes `old`."""

    node: int
    slot: int
    old: str
    new: str
    scope: Scope = ()


@dataclass(frozen=True)
class AddInput:
    """Add an input of the main graph (overridable if an initializer has its name)."""

    value: ValueInfoProto


@dataclass(frozen=True)
class AddOutput:
    """Add a graph output."""

    value: ValueInfoProto
    scope: Scope = ()


@dataclass(frozen=True)
class AddNodeOutput:
    """Add a last output to base node `node`, whose subgraphs have one more output too."""

    node: int
    name: str
    scope: Scope = ()


@dataclass(frozen=True)
class AddOpsetImport:
    """Import a further operator domain; the domains of the base keep their versions."""

    domain: str
    version: int


@dataclass(frozen=True)
class AddMetadata:
    """Add an entry to the model's `metadata_props`."""

    key: str
    value: str


Placed = AddNode | RemoveNode | RewireInput | RenameOutput | AddOutput | AddNodeOutput
"""Edits of one graph of the model; their `scope` says which."""

Edit = Placed | AddInitializer | AddInput | AddOpsetImport | AddMetadata

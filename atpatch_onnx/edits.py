"""The closed set of changes to a model. None of them touches an initializer.

Nodes are named by their index in the base graph, which is unambiguous because a patch carries the
digest of the one file it is for. Protos inside edits are never changed after construction.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto, ValueInfoProto


@dataclass(frozen=True)
class AddNode:
    """Insert `node` before node `before` of the base graph (its node count: at the end)."""

    before: int
    node: NodeProto


@dataclass(frozen=True)
class AddInitializer:
    """Add a tensor under a new name."""

    tensor: TensorProto


@dataclass(frozen=True)
class RewireInput:
    """Let input `slot` of base node `node` read `new` instead of `old`."""

    node: int
    slot: int
    old: str
    new: str


@dataclass(frozen=True)
class AddInput:
    """Add a graph input (overridable if an initializer has its name)."""

    value: ValueInfoProto


@dataclass(frozen=True)
class AddOutput:
    """Add a graph output."""

    value: ValueInfoProto


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


Edit = AddNode | AddInitializer | RewireInput | AddInput | AddOutput | AddOpsetImport | AddMetadata

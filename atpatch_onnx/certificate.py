"""What can be checked about a patched file without trusting who patched it.

`certify` compares two files field by field on the wire, independently of the patch that made one
from the other: it reads no edit list, only the bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar

from onnx import (
    NodeProto,
    OperatorSetIdProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
)

from .errors import CheckError
from .external_data import external_digest, external_tensors
from .model_file import (
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_METADATA,
    MODEL_OPSET,
    ModelFile,
    tensors_of,
)
from .patching import Rewritten, about_patches, record_keys, revert
from .progress import Tick
from .wire import Field

FORMAT = 1
PREFIX = "atpatch/"


@dataclass(frozen=True)
class FileDigest:
    """A file by name, SHA-256 and length."""

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """An original initializer: its SHA-256, or where its bytes lie outside the model file."""

    name: str
    type: str
    shape: list[int]
    sha256: str | None
    external: dict[str, Any] | None = None


@dataclass(frozen=True)
class RewiredSlot:
    """An input slot of an original node that reads another value now."""

    node: str
    index: int
    slot: int
    old: str
    new: str


@dataclass(frozen=True)
class Difference:
    """Everything in which the result differs from the base; the rest is byte-identical."""

    inserted_nodes: list[str] = field(default_factory=list)
    inserted_initializers: list[str] = field(default_factory=list)
    inserted_inputs: list[str] = field(default_factory=list)
    inserted_outputs: list[str] = field(default_factory=list)
    inserted_opsets: list[str] = field(default_factory=list)
    inserted_metadata: list[str] = field(default_factory=list)
    rewired: list[RewiredSlot] = field(default_factory=list)


@dataclass(frozen=True)
class Certificate:
    """Digests of base and result, the original tensors, and every difference between the two.

    patches: what the result says of its patches: sites, detectors, training records.
    versions: what made the certificate.
    """

    base: FileDigest
    result: FileDigest
    original_nodes: int
    initializers: list[TensorEntry]
    difference: Difference
    patches: list[dict[str, Any]]
    versions: dict[str, str]
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def certify(base: ModelFile, result: ModelFile, external: Tick | None = None) -> Certificate:
    """Compare `result` with `base`, byte by byte.

    external: given, the external weights are read and hashed, with its progress.
    Raises: CheckError if anything differs that a patch may not change.
    """
    return Certificate(
        base=FileDigest(base.path.name, base.sha256, base.size),
        result=FileDigest(result.path.name, result.sha256, result.size),
        original_nodes=len(base.nodes),
        initializers=list(_initializers(base, external)),
        difference=compare(base, result),
        patches=about_patches(result),
        versions={name: version(name) for name in ("atpatch-onnx", "onnx", "onnx-graphsurgeon")},
    )


def _initializers(model: ModelFile, progress: Tick | None) -> Iterator[TensorEntry]:
    outside = {tensor.name: tensor for tensor in external_tensors(model)}
    for place, tensor in zip(model.initializers, model.skeleton.graph.initializer, strict=True):
        kind, shape = TensorProto.DataType.Name(tensor.data_type), list(tensor.dims)
        external = outside.get(tensor.name)
        if external is None:
            sha256 = hashlib.sha256(_content(model, place)).hexdigest()
            yield TensorEntry(tensor.name, kind, shape, sha256)
        else:
            held = {k: v for k, v in asdict(external).items() if k != "name"}
            digest = None if progress is None else external_digest(model, external, progress)
            yield TensorEntry(tensor.name, kind, shape, digest, held)


def compare(base: ModelFile, result: ModelFile) -> Difference:
    """Every difference between the two files. Raises: CheckError for one that no patch makes."""
    difference = Difference()
    _walk(base, result, base.model_fields, result.model_fields, _Model(base, difference))
    _walk(base, result, base.graph_fields, result.graph_fields, _Graph(base, difference))
    needed = set(difference.inserted_inputs) - set(difference.inserted_initializers)
    if needed:
        raise CheckError(
            f"{result.path} has the new input '{sorted(needed)[0]}' without a default: it was "
            "altered, take a fresh copy"
        )
    return difference


class _Model:
    """The message ModelProto: the graph is compared by itself, metadata and opsets may be added."""

    def __init__(self, base: ModelFile, difference: Difference) -> None:
        self.difference = difference
        self.domains = {_domain(opset.domain) for opset in base.skeleton.opset_import}

    def same(self, base: ModelFile, a: Field, result: ModelFile, b: Field) -> bool:
        if (a.number, a.wire_type) != (b.number, b.wire_type):
            return False
        return a.number == MODEL_GRAPH or _content(base, a) == _content(result, b)

    def insert(self, result: ModelFile, b: Field) -> bool:
        if b.number == MODEL_METADATA:
            entry = StringStringEntryProto.FromString(_content(result, b))
            self.difference.inserted_metadata.append(entry.key)
            return isinstance(entry.key, str) and entry.key.startswith("atpatch.")
        if b.number == MODEL_OPSET:
            opset = OperatorSetIdProto.FromString(_content(result, b))
            self.difference.inserted_opsets.append(f"{opset.domain}={opset.version}")
            # Another version of a domain that is there would change what every node of it means.
            fresh = _domain(opset.domain) not in self.domains
            self.domains.add(_domain(opset.domain))
            return fresh
        return False


class _Graph:
    """The message GraphProto: own nodes and tensors may be added, input slots rewired to them."""

    _LISTS: ClassVar[dict[int, tuple[Callable[[bytes], Any], str]]] = {
        GRAPH_NODE: (NodeProto.FromString, "inserted_nodes"),
        GRAPH_INITIALIZER: (TensorProto.FromString, "inserted_initializers"),
        GRAPH_INPUT: (ValueInfoProto.FromString, "inserted_inputs"),
        GRAPH_OUTPUT: (ValueInfoProto.FromString, "inserted_outputs"),
    }

    def __init__(self, base: ModelFile, difference: Difference) -> None:
        graph = base.skeleton.graph
        self.difference, self.node = difference, 0
        self.left = Counter({GRAPH_INPUT: len(graph.input), GRAPH_OUTPUT: len(graph.output)})
        self.weights = {tensor.name for tensor in graph.initializer}
        self.weights |= {tensor.values.name for tensor in graph.sparse_initializer}
        self.weights |= {n.output[0] for n in graph.node if n.op_type == "Constant" and n.output}

    def same(self, base: ModelFile, a: Field, result: ModelFile, b: Field) -> bool:
        if (a.number, a.wire_type) != (b.number, b.wire_type):
            return False
        old, new = _content(base, a), _content(result, b)
        if a.number != GRAPH_NODE:
            self.left[a.number] -= old == new
            return old == new
        slots = [] if old == new else _rewired(self.node, old, new)
        # A weight is changed as well by reading another in its place.
        if slots is None or any(slot.old in self.weights for slot in slots):
            return False
        self.difference.rewired.extend(slots)
        self.node += 1
        return True

    def insert(self, result: ModelFile, b: Field) -> bool:
        # Callers know inputs and outputs by their order, so that own ones come last.
        if b.number not in self._LISTS or self.left[b.number] > 0:
            return False
        parse, name = self._LISTS[b.number]
        entry = parse(_content(result, b))
        getattr(self.difference, name).append(entry.name)
        is_node = isinstance(entry, NodeProto)
        made = entry.output if is_node else [entry.name]
        # Protobuf gives names that are not UTF-8 as bytes.
        if not all(isinstance(n, str) and n.startswith(PREFIX) for n in [entry.name, *made]):
            return False
        tensors = (entry,) if isinstance(entry, TensorProto) else ()
        return not any(
            tensor.data_location == TensorProto.EXTERNAL
            for tensor in tensors_of(tensors, (entry,) if is_node else ())
        )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _walk(
    base: ModelFile, result: ModelFile, old: list[Field], new: list[Field], rules: _Model | _Graph
) -> None:
    """Match the fields of the base, in order, with those of the result; the others are new."""
    position = 0
    for a in old:
        while position < len(new) and not rules.same(base, a, result, new[position]):
            _inserted(base, result, new[position], rules)
            position += 1
        if position == len(new):
            raise CheckError(
                f"{result.path} lacks or changes something of {base.path} (field {a.number} at "
                f"byte {a.start}): it is not that model with a patch"
            )
        position += 1
    for b in new[position:]:
        _inserted(base, result, b, rules)


def _inserted(base: ModelFile, result: ModelFile, b: Field, rules: _Model | _Graph) -> None:
    if not rules.insert(result, b):
        raise CheckError(
            f"{result.path} is not {base.path} with a patch: at byte {b.start} it has "
            "something that is neither in the original nor named as a patch names its parts"
        )


def _rewired(index: int, old: bytes, new: bytes) -> list[RewiredSlot] | None:
    """The rewired slots, if that is all in which two nodes differ."""
    a, b = NodeProto.FromString(old), NodeProto.FromString(new)
    if len(a.input) != len(b.input):
        return None
    slots = [
        RewiredSlot(a.name or a.output[0], index, slot, before, after)
        for slot, (before, after) in enumerate(zip(a.input, b.input, strict=True))
        if before != after
    ]
    ours = all(isinstance(slot.new, str) and slot.new.startswith(PREFIX) for slot in slots)
    if not slots or not ours:
        return None
    b.input[:] = a.input
    return slots if a.SerializeToString() == b.SerializeToString() else None


def _content(model: ModelFile, place: Field) -> bytes:
    return bytes(model.buffer[place.payload : place.end])


@dataclass(frozen=True)
class Check:
    """One thing that was verified, and what was found."""

    name: str
    passed: bool
    detail: str


def verify(
    base: ModelFile,
    result: ModelFile,
    certificate: dict[str, Any] | None,
    external: Tick | None = None,
) -> list[Check]:
    """Recompute everything from the two files; compare with `certificate` where there is one.

    external: given, external weights are read and their digests compared, with its progress.
    """
    checks: list[Check] = []

    def check(name: str, run: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, run()))
        except CheckError as error:
            checks.append(Check(name, False, str(error)))

    found: list[Certificate] = []

    def differences() -> str:
        found.append(certify(base, result, external))
        d = found[0].difference
        return (
            f"{len(base.initializers)} tensors and {len(base.nodes)} nodes of the original are "
            f"there; {len(d.rewired)} input slots rewired, {len(d.inserted_nodes)} nodes and "
            f"{len(d.inserted_initializers)} tensors added, none removed"
        )

    check("only additions", differences)
    check("reverts to the original", lambda: _check_revert(base, result))
    if certificate is None:
        checks.append(Check("certificate", True, "none is there to compare with"))
    else:
        check("certificate", lambda: _check_certificate(certificate, found))
    return checks


def _check_revert(base: ModelFile, result: ModelFile) -> str:
    if not record_keys(result):
        raise CheckError(f"{result.path} carries no patch, so that nothing can be reverted")
    restored: Rewritten = revert(result)
    found, wanted = restored.sha256, base.sha256
    if found != wanted:
        raise CheckError(
            f"{result.path} reverts to a file with SHA-256 {found[:12]}..., which is not "
            f"{base.path} ({wanted[:12]}...): compare it with the model that it was made from"
        )
    return f"SHA-256 {found}"


def _check_certificate(claimed: dict[str, Any], found: list[Certificate]) -> str:
    if not found:
        raise CheckError("the certificate cannot be compared: the files do not match at all")
    _check_form(claimed)
    actual = found[0].as_dict()
    for side in ("base", "result"):
        for key in ("sha256", "size_bytes"):
            if claimed[side].get(key) != actual[side][key]:
                raise CheckError(
                    f"the certificate is for another {side} file: its {key} is "
                    f"{str(claimed[side].get(key))[:12]}, found {str(actual[side][key])[:12]}"
                )
    for key in ("format", "original_nodes", "difference", "patches"):
        if claimed.get(key) != actual[key]:
            what = "other differences" if key == "difference" else f"another '{key}'"
            raise CheckError(f"the certificate lists {what} than the files show")
    hashed = [t for t in actual["initializers"] if t["external"] is None]
    unread = []
    if len(actual["initializers"]) != len(claimed["initializers"]):
        raise CheckError("the certificate lists another number of tensors")
    for mine, theirs in zip(actual["initializers"], claimed["initializers"], strict=True):
        if mine["external"] is not None and (mine["sha256"] is None or theirs["sha256"] is None):
            unread.append(mine["name"])
            mine, theirs = ({**t, "sha256": None} for t in (mine, theirs))
        if mine != theirs:
            raise CheckError(f"the tensor '{mine['name']}' is not the one of the certificate")
    if unread and any(t["sha256"] for t in actual["initializers"] if t["external"] is not None):
        raise CheckError(
            f"the certificate holds no digest of '{unread[0]}', whose bytes lie in another file: "
            "patch with --digests to have them compared"
        )
    note = f"; {len(unread)} external tensors compared by reference only" if unread else ""
    return f"all digests agree ({len(hashed)} tensors by content{note})"


def _check_form(claimed: dict[str, Any]) -> None:
    """Raises: CheckError if a certificate lacks what is compared."""
    missing = [side for side in ("base", "result") if not isinstance(claimed.get(side), dict)]
    tensors = claimed.get("initializers")
    if not isinstance(tensors, list):
        missing.append("list of tensors")
    else:
        missing += [
            f"digest of the tensor '{t.get('name') if isinstance(t, dict) else t}'"
            for t in tensors
            if not isinstance(t, dict) or "sha256" not in t
        ]
    if missing:
        raise CheckError(f"the certificate was altered: it lacks its {missing[0]}")

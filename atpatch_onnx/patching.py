"""A patch is data: edits for one base model, compiled to byte replacements and undone exactly.

`apply` turns edits into replacements of bytes of the base file. The patched file ends with a record
of those, so that `revert` needs nothing but the patched file, whatever encoder wrote the original.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onnx import ModelProto, OperatorSetIdProto, StringStringEntryProto, TensorProto

from .edits import (
    AddInitializer,
    AddInput,
    AddMetadata,
    AddNode,
    AddOpsetImport,
    AddOutput,
    Edit,
    RewireInput,
)
from .errors import CheckError, InputError, RefusedError
from .model_file import (
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_METADATA,
    MODEL_OPSET,
    NODE_INPUT,
    ModelFile,
    tensors_of,
)
from .passes.graph_view import subgraphs
from .wire import LEN, Field, Replacement, delimited, fields, growth, header, replaced

ABOUT_KEY = "atpatch.patch"
"""Metadata key of what a patch is: JSON with its sites and detectors."""

RECORD_KEY = "atpatch.record"
"""Metadata key of the record; that of a second patch on top is `atpatch.record.2`, and so on."""

PROTOBUF_LIMIT_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Patch:
    """An ordered list of edits and the digest of the one file that they are for.

    base_sha256: SHA-256 of the base `.onnx` file (external weights are named in it, not hashed).
    edits: applied together; node indices refer to the base.
    """

    base_sha256: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Rewritten:
    """A file that is another one with replacements; written without being held in memory."""

    source: ModelFile
    replacements: tuple[Replacement, ...]

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.source.size + growth(self.replacements)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The content, in parts of at most a few megabytes."""
        return replaced(self.source.buffer, self.source.size, self.replacements)

    def content(self) -> bytes:
        """The content as one object, for an ONNX Runtime session."""
        return b"".join(self.chunks())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        sha = hashlib.sha256()
        for chunk in self.chunks():
            sha.update(chunk)
        return sha.hexdigest()


def apply(model: ModelFile, patch: Patch) -> Rewritten:
    """The patched model.

    Raises: RefusedError for a patch of another model, a name that is taken, or a file that would
    pass the 2 GiB limit of protobuf.
    """
    if model.sha256 != patch.base_sha256:
        raise RefusedError(
            f"the patch is for a model with SHA-256 {patch.base_sha256[:12]}..., and {model.path} "
            "is another file: patch this model again from its detector"
        )
    replacements = _compile(model, patch.edits)
    replacements.append(Replacement(model.size, model.size, _record(model, patch, replacements)))
    result = Rewritten(model, tuple(replacements))
    if result.size > PROTOBUF_LIMIT_BYTES:
        raise RefusedError(
            f"{model.path} with the patch would pass protobuf's limit of 2 GiB: save the model "
            "with external weights (onnx.save(..., save_as_external_data=True)) and patch that"
        )
    return result


def revert(model: ModelFile) -> Rewritten:
    """The file that `model` was before its last patch, byte for byte.

    Raises: InputError if it carries no patch, CheckError if it was altered after patching.
    """
    keys = record_keys(model)
    if not keys:
        raise InputError(
            f"{model.path} carries no patch of atpatch-onnx: give the patched file instead"
        )
    altered = CheckError(
        f"{model.path} was altered after it was patched, so the original cannot be restored from "
        "it: take the original from where the patched file was made"
    )
    try:
        record = json.loads(model.metadata(keys[-1]) or "")
        replacements = [
            Replacement(s, s + n, base64.b64decode(b)) for s, n, b in record["replacements"]
        ]
        replacements.append(Replacement(record["end"], model.size, b""))
        if not _in_order(replacements, model.size):
            raise altered
        result = Rewritten(model, tuple(replacements))
        if result.sha256 != record["base_sha256"]:
            raise altered
    except (ValueError, KeyError, TypeError):
        raise altered from None
    return result


def check_order(model: ModelFile, patched: ModelFile) -> None:
    """Raises: InputError if the patched model was given first."""
    if record_keys(model) and not record_keys(patched):
        raise InputError(
            f"{model.path} is the patched model and {patched.path} is none: give the original first"
        )


def base_sha256(model: ModelFile) -> str | None:
    """The digest of what a patched model was made from, as it says itself."""
    keys = record_keys(model)
    try:
        found = json.loads(model.metadata(keys[-1]) or "")["base_sha256"] if keys else None
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def about_patches(model: ModelFile) -> list[dict[str, Any]]:
    """What the patches that `model` carries say of themselves, oldest first.

    Each has `sites` (site, flagged value, redistribution, strategy, threshold) and `detectors`.
    Raises: CheckError if that was altered.
    """
    held = [p for p in model.skeleton.metadata_props if _is_key(p.key, ABOUT_KEY)]
    try:
        found = [json.loads(entry.value) for entry in held]
        for about in found:
            for site in about["sites"]:
                if not isinstance(site["site"], str) or not isinstance(site["flagged"], str):
                    raise ValueError
    except (ValueError, TypeError, KeyError):
        raise CheckError(
            f"what {model.path} says of its patch was altered: take a fresh copy of the file"
        ) from None
    return found


def about_edit(model: ModelFile, about: dict[str, Any]) -> AddMetadata:
    """The edit that lets a patch of `model` say what it is."""
    key = _numbered(ABOUT_KEY, len(record_keys(model)))
    return AddMetadata(key, json.dumps(about, separators=(",", ":")))


def _is_key(key: str, base: str) -> bool:
    return key == base or key.startswith(f"{base}.")


def _in_order(replacements: list[Replacement], size: int) -> bool:
    """Whether replacements are what `replaced` needs: whole numbers, sorted, within the file."""
    ends = [0, *(place for r in replacements for place in (r.start, r.end)), size]
    return all(type(place) is int for place in ends) and ends == sorted(ends)


def record_keys(model: ModelFile) -> list[str]:
    """The metadata keys of the patches that `model` carries, oldest first."""
    present = {entry.key for entry in model.skeleton.metadata_props}
    keys: list[str] = []
    while (key := _numbered(RECORD_KEY, len(keys))) in present:
        keys.append(key)
    return keys


def _numbered(key: str, patches_before: int) -> str:
    """The key that a patch on top of others uses."""
    return key if patches_before == 0 else f"{key}.{patches_before + 1}"


def _record(model: ModelFile, patch: Patch, replacements: list[Replacement]) -> bytes:
    """The metadata entry from which `revert` undoes the replacements."""
    undo, shift = [], 0
    for replacement in replacements:
        original = bytes(model.buffer[replacement.start : replacement.end])
        undo.append(
            [
                replacement.start + shift,
                len(replacement.content),
                base64.b64encode(original).decode(),
            ]
        )
        shift += len(replacement.content) - len(original)
    record = {"base_sha256": patch.base_sha256, "end": model.size + shift, "replacements": undo}
    entry = StringStringEntryProto(
        key=_numbered(RECORD_KEY, len(record_keys(model))),
        value=json.dumps(record, separators=(",", ":")),
    )
    return delimited(MODEL_METADATA, entry.SerializeToString())


def _compile(model: ModelFile, edits: tuple[Edit, ...]) -> list[Replacement]:
    """The edits as replacements of the file, sorted, lengths of enclosing messages included."""
    nodes, graph = model.nodes, model.graphs[-1]
    _check_edits(model, edits)
    inside: list[Replacement] = []
    behind: list[bytes] = []
    rewires: dict[int, list[RewireInput]] = defaultdict(list)
    check_names(model.skeleton, edits)

    def insert(offset: int, number: int, payload: bytes) -> None:
        inside.append(Replacement(offset, offset, delimited(number, payload)))

    for edit in edits:
        match edit:
            case AddNode(before, node):
                offset = nodes[before].start if before < len(nodes) else graph.end
                insert(offset, GRAPH_NODE, node.SerializeToString())
            case AddInitializer(tensor):
                insert(graph.end, GRAPH_INITIALIZER, tensor.SerializeToString())
            case AddInput(value):
                insert(graph.end, GRAPH_INPUT, value.SerializeToString())
            case AddOutput(value):
                insert(graph.end, GRAPH_OUTPUT, value.SerializeToString())
            case RewireInput():
                rewires[edit.node].append(edit)
            case AddOpsetImport(domain, version):
                opset = OperatorSetIdProto(domain=domain, version=version)
                behind.append(delimited(MODEL_OPSET, opset.SerializeToString()))
            case AddMetadata(key, value):
                entry = StringStringEntryProto(key=key, value=value)
                behind.append(delimited(MODEL_METADATA, entry.SerializeToString()))
    for index, changes in rewires.items():
        inside += _rewire(model, nodes[index], changes)
    # The sort is stable: what is inserted at one place keeps the order of the edits.
    inside.sort(key=lambda r: (r.start, r.end))
    headers = [s for g in model.graphs for s in _length(g, inside, g is graph)]
    ordered = sorted([*headers, *inside], key=lambda r: (r.start, r.end))
    return ordered + [Replacement(model.size, model.size, entry) for entry in behind]


def _check_edits(model: ModelFile, edits: Iterable[Edit]) -> None:
    """Raises: RefusedError for an edit that could change more than it says."""
    count = len(model.nodes)
    domains = {o.domain for o in model.skeleton.opset_import} | {"", "ai.onnx"}
    for edit in edits:
        problem = ""
        match edit:
            case AddNode(before, node):
                if not 0 <= before <= count:
                    problem = f"a node at place {before} of {count}"
                elif any(_is_external(t) for t in tensors_of((), (node,))):
                    problem = "a tensor in another file"
            case RewireInput(index):
                if not 0 <= index < count:
                    problem = f"node {index} of {count}"
            case AddInitializer(tensor):
                if _is_external(tensor):
                    problem = "a tensor in another file"
            case AddOpsetImport(domain, _):
                if domain in domains:
                    problem = f"another version of the operators '{domain}'"
                domains.add(domain)
            case AddMetadata(key, _):
                if not key.startswith("atpatch.") or _is_key(key, RECORD_KEY):
                    problem = f"the metadata '{key}'"
            case _:
                pass
        if problem:
            raise RefusedError(
                f"the patch wants {problem}, which is not what patches may do: patch this model "
                "again from its detector"
            )


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _length(graph: Field, inside: list[Replacement], last: bool) -> Iterator[Replacement]:
    """The new header of a graph field whose content grows by the replacements within it."""
    own = [s for s in inside if graph.payload <= s.start and (s.start < graph.end or last)]
    if own:
        length = graph.end - graph.payload + growth(own)
        yield Replacement(graph.start, graph.payload, header(graph.number, length))


def _rewire(model: ModelFile, node: Field, changes: list[RewireInput]) -> Iterator[Replacement]:
    inputs = [
        field
        for field in fields(model.buffer, node.payload, node.end)
        if field.number == NODE_INPUT and field.wire_type == LEN
    ]
    replacements = []
    for change in changes:
        field = inputs[change.slot] if change.slot < len(inputs) else None
        found = None if field is None else bytes(model.buffer[field.payload : field.end]).decode()
        if field is None or found != change.old:
            raise RefusedError(
                f"input {change.slot} of node {change.node} is '{found}', the patch expects "
                f"'{change.old}': patch this model again from its detector"
            )
        replacements.append(
            Replacement(field.start, field.end, delimited(NODE_INPUT, change.new.encode()))
        )
    length = node.end - node.payload + growth(replacements)
    yield Replacement(node.start, node.payload, header(node.number, length))
    yield from replacements


def check_names(model: ModelProto, edits: Iterable[Edit]) -> None:
    """Raises: RefusedError if an edit brings a name that the model or another edit has."""
    taken = Counter(names(model))
    defined: Counter[str] = Counter()
    for edit in edits:
        if isinstance(edit, AddNode):
            defined.update({f"node {edit.node.name}": 1, **dict.fromkeys(edit.node.output, 1)})
        elif isinstance(edit, AddInitializer):
            defined[edit.tensor.name] += 1
        elif isinstance(edit, AddMetadata):
            defined[f"metadata {edit.key}"] += 1
    clash = next((n for n, count in defined.items() if n and (count > 1 or n in taken)), None)
    if clash is not None:
        raise RefusedError(
            f"the name '{clash}' is already taken in the model: revert its earlier patch first, or "
            "rename the value in the model"
        )


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

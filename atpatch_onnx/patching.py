"""A patch is data: edits for one base model, compiled to byte replacements and undone exactly.

`apply` turns edits into replacements of bytes of the base file. The patched file ends with a record
of those, so that `revert` needs nothing but the patched file, whatever encoder wrote the original.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from onnx import StringStringEntryProto

from .compiling import compiled, is_key
from .edits import RECORD_KEY, AddMetadata, Edit
from .errors import CheckError, InputError, RefusedError
from .model_file import MODEL_METADATA, ModelFile
from .wire import Replacement, delimited, growth, replaced

ABOUT_KEY = "atpatch.patch"
"""Metadata key of what a patch is: JSON with its sites and detectors."""

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
    replacements = compiled(model, patch.edits)
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


def original(model: ModelFile) -> Rewritten:
    """The file that `model` was before its first patch. Raises: as `revert`."""
    restored = revert(model)
    while record_keys(inner := ModelFile.from_bytes(restored.content(), model.path)):
        restored = revert(inner)
    return restored


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
    held = [p for p in model.skeleton.metadata_props if is_key(p.key, ABOUT_KEY)]
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

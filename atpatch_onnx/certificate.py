"""What can be checked about a patched file without trusting who patched it.

`certify` compares two files byte by byte (`comparing`), independently of the patch that made one
from the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from onnx import TensorProto

from .comparing import Difference, compare
from .errors import CheckError
from .external_data import external_digest, external_tensors
from .model_file import ModelFile
from .patching import about_patches, record_keys, revert
from .progress import Tick
from .provenance import statement
from .wire import Field

FORMAT = 2


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
class Certificate:
    """Digests of base and result, the original tensors, and every difference between the two.

    patches: what the result says of its patches: sites, detectors, training records.
    versions: what made the certificate.
    provenance: base, detectors, training records and tools as an in-toto statement.
    """

    base: FileDigest
    result: FileDigest
    original_nodes: int
    initializers: list[TensorEntry]
    difference: Difference
    patches: list[dict[str, Any]]
    versions: dict[str, str]
    provenance: dict[str, Any]
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def certify(base: ModelFile, result: ModelFile, external: Tick | None = None) -> Certificate:
    """Compare `result` with `base`, byte by byte.

    external: given, the external weights are read and hashed, with its progress.
    Raises: CheckError if anything differs that a patch may not change.
    """
    versions = {name: version(name) for name in ("atpatch-onnx", "onnx", "onnx-graphsurgeon")}
    patches = about_patches(result)
    files = (base.path.name, base.sha256), (result.path.name, result.sha256)
    return Certificate(
        base=FileDigest(base.path.name, base.sha256, base.size),
        result=FileDigest(result.path.name, result.sha256, result.size),
        original_nodes=len(base.nodes),
        initializers=list(_initializers(base, external)),
        difference=compare(base, result),
        patches=patches,
        versions=versions,
        provenance=statement(*files, patches, versions),
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
        removed = len(d.removed_nodes)
        calls = f"{removed} calls of functions replaced by their bodies" if removed else ""
        return (
            f"{len(base.initializers)} tensors and {len(base.nodes) - removed} nodes of the "
            f"original are there; {len(d.rewired)} input slots rewired, {len(d.renamed)} outputs "
            f"renamed, {len(d.inserted_nodes)} nodes and {len(d.inserted_initializers)} tensors "
            f"added, {calls or 'none removed'}"
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
    restored = revert(result)
    while restored.sha256 != base.sha256:  # several patches may lie between the two
        inner = ModelFile.from_bytes(restored.content(), result.path)
        if not record_keys(inner):
            break
        restored = revert(inner)
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
    _check_provenance(claimed, actual)
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


def _check_provenance(claimed: dict[str, Any], actual: dict[str, Any]) -> None:
    """Raises: CheckError if the statement is not what the rest of the certificate says.

    File names are told and not checked, as tool versions are; certificates of earlier versions
    have no statement.
    """
    if "provenance" not in claimed:
        return
    try:
        files = [(claimed[side].get("file"), actual[side]["sha256"]) for side in ("base", "result")]
        expected = statement(files[0], files[1], actual["patches"], claimed["versions"])
    except (KeyError, TypeError, ValueError):
        expected = None
    if claimed["provenance"] != expected:
        raise CheckError(
            "the certificate's provenance statement was altered: it is not about these files"
        )


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

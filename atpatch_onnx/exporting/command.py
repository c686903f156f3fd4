"""`export`: put a model and its patched version where a server or a device expects them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, at_least
from .edge import Tolerance, write_bundle
from .folder import copy, new_folder, sha256, write_about
from .golden import Data, GoldenSet, make_golden
from .kserve import Service, write_service
from .release import Release, load_release
from .triton import write_repository

KINDS = ("triton", "kserve", "edge")


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    files: relative to `output`, sorted; size_bytes: of all of them.
    golden: the golden sets, and whether the patched model answers them otherwise than the original.
    signature: where the folder was signed.
    """

    kind: str
    output: Path
    name: str
    files: tuple[Path, ...]
    size_bytes: int
    base_sha256: str
    patched_sha256: str
    golden: dict[str, bool]
    signature: Path | None = None


def export(
    kind: str,
    model: str | Path,
    patched: str | Path,
    *,
    output: str | Path,
    name: str | None = None,
    inputs: Data | None = None,
    bad: Data | None = None,
    golden: int = 4,
    max_batch_size: int = 0,
    link_weights: bool = False,
    storage_uri: str = "",
    canary: int | None = None,
    gpu: int = 0,
    memory: str = "4Gi",
    ort: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    key: str | Path | None = None,
    password: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a Triton repository, a KServe service or an edge bundle to the folder `output`.

    kind: "triton", "kserve" or "edge".
    patched: the patched `.onnx` file, or an `.atpatch` file; an edge bundle of the latter holds
        the original and the patch.
    inputs, bad: clean inputs, and inputs that the patch is for; the first `golden` of each become
        golden inputs. Without any, they are made up.
    max_batch_size, link_weights: of Triton; see `exporting.triton.write_repository`.
    storage_uri, canary, gpu, memory: of KServe; see `exporting.kserve.Service`.
    ort, rtol, atol: of edge bundles: add the ORT format; tolerance of the runner's check.
    key, password: a private key that signs the folder. Without one, a signature beside the patched
        model is taken along if all that it is for is in the folder under the same names.
    Raises: InputError, RefusedError; CheckError if more than a patch lies between the two models.
    Nothing is written then.
    """
    if kind not in KINDS:
        raise InputError(f"export {kind}: choose {', '.join(KINDS)}")
    at_least(0, max_batch_size, "--max-batch-size")
    release = load_release(model, patched)
    target = Path(output)
    name = name or _name(release, kind)
    sources = [*release.sources, *(Path(d) for d in (inputs, bad) if isinstance(d, str | Path))]
    with new_folder(target, sources, force=force) as folder:
        sets = make_golden(release, inputs, bad, golden)
        about: dict[str, Any] = {
            "export": kind,
            "name": name,
            "base_sha256": release.base.sha256,
            "patched_sha256": release.patched.sha256,
            "versions": release.certificate.versions,
        }
        if kind == "edge":
            about |= write_bundle(folder, release, sets, Tolerance(rtol, atol), ort)
        elif kind == "kserve":
            service = Service(name, storage_uri, canary, gpu, memory)
            write_service(
                folder,
                release,
                sets,
                service,
                max_batch_size=max_batch_size,
                link_weights=link_weights,
            )
            about["service"] = asdict(service)
        else:
            write_repository(
                folder,
                release,
                sets,
                name=name,
                max_batch_size=max_batch_size,
                link_weights=link_weights,
            )
        write_about(folder, about)
        signature = _sign(folder, release, key, password)
        report = _report(kind, target, name, folder, release, sets)
    if signature is None:
        return report
    return ExportReport(**{**vars(report), "signature": target / signature})


def _sign(
    folder: Path, release: Release, key: str | Path | None, password: str | None
) -> str | None:
    """Sign the folder; without a key, take along a signature of the sources that holds in it."""
    from ..signing import SIGNATURE, sign, signed_files

    if key is not None:
        sign([folder], key=key, password=password)
        return SIGNATURE
    source = release.patched.folder / SIGNATURE
    if not source.is_file():
        return None
    files = {name: folder / name for name in signed_files(source)}
    if not all(path.is_file() for path in files.values()):
        return None
    if any(sha256(path) != signed_files(source)[name] for name, path in files.items()):
        return None
    copy(source, folder / SIGNATURE)
    return SIGNATURE


def _report(
    kind: str, target: Path, name: str, folder: Path, release: Release, sets: list[GoldenSet]
) -> ExportReport:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return ExportReport(
        kind,
        target,
        name,
        tuple(path.relative_to(folder) for path in files),
        sum(path.stat().st_size for path in files),
        release.base.sha256,
        release.patched.sha256,
        {one.name: one.moved for one in sets},
    )


def _name(release: Release, kind: str) -> str:
    """A name that the target takes, from the file name of the model."""
    stem = release.base.path.stem
    if kind != "kserve":
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", stem).lstrip("_.-") or "model"
    words = re.sub(r"[^a-z0-9]+", "-", stem.lower())
    return re.sub(r"^[^a-z]+", "", words)[:63].strip("-") or "model"

"""External weights: referenced where they are, read only for a digest, never written.

Only a file in the model's own folder or below works in every loader (onnx.checker, onnx-ir and
ONNX Runtime reject `..`, absolute paths and links that leave the folder).
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto

from .errors import InputError, RefusedError
from .model_file import ModelFile, digest
from .progress import Tick


@dataclass(frozen=True)
class ExternalTensor:
    """Where a tensor's bytes lie outside the model file; `length` in bytes, None: to the end."""

    name: str
    location: str
    offset: int
    length: int | None


def external_tensors(model: ModelFile) -> list[ExternalTensor]:
    """The tensors whose data lies in other files, in graph order. Raises: InputError."""
    found = []
    for tensor in model.tensors():
        if tensor.data_location == TensorProto.EXTERNAL:
            found.append(_reference(model, tensor))
    return found


def _reference(model: ModelFile, tensor: TensorProto) -> ExternalTensor:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset, length = int(entries.get("offset", 0)), entries.get("length")
        if not entries["location"] or offset < 0 or int(length or 0) < 0:
            raise ValueError
        return ExternalTensor(
            tensor.name, entries["location"], offset, None if length is None else int(length)
        )
    except (KeyError, ValueError):
        raise InputError(
            f"the external data entry of tensor '{tensor.name}' in {model.path} has no usable "
            "location, offset or length: export the model again"
        ) from None


def external_files(model: ModelFile) -> list[Path]:
    """The files that hold external weights: never to be written."""
    return [model.folder / name for name in {t.location for t in external_tensors(model)}]


def check_layout(model: ModelFile) -> int:
    """Check that every external weight can be loaded from where it is; returns their bytes.

    Raises: RefusedError for a layout no loader takes, InputError for a missing or short file.
    """
    folder = model.folder.resolve()
    ends: dict[str, int] = {}
    total = 0
    for tensor in external_tensors(model):
        total += tensor.length or 0
        ends[tensor.location] = max(
            ends.get(tensor.location, 0), tensor.offset + (tensor.length or 0)
        )
    for location, end in ends.items():
        path = _path_inside(model, folder, location)
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:
            size = None
        if size is None:
            raise InputError(
                f"the external weights '{location}' of {model.path} are missing: put the file at "
                f"{model.folder / location}"
            )
        if end > size:
            raise InputError(
                f"the external weights {model.folder / location} end at byte {size}, but the model "
                f"reads up to byte {end}: the file is truncated or of another model, copy it again"
            )
    return total


def _path_inside(model: ModelFile, folder: Path, location: str) -> Path:
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise RefusedError(
            f"{model.path} keeps external weights at '{location}', outside its own folder, which "
            "no loader accepts: move the weights beside the model and save it again with "
            "onnx.save(..., save_as_external_data=True, location='<file name>')"
        )
    path = (folder / location).resolve()
    if not path.is_relative_to(folder):
        raise RefusedError(
            f"the external weights '{location}' of {model.path} are a link that leaves the folder, "
            "which no loader accepts: copy the model and its weights to real files "
            "(cp -L, or huggingface-cli download --local-dir)"
        )
    return path


def check_beside(model: ModelFile, output: Path) -> None:
    """Raises: RefusedError if `output` could not find the external weights of `model`."""
    if external_tensors(model) and output.parent.resolve() != model.folder.resolve():
        raise RefusedError(
            f"{output} would lie in another folder than the external weights of {model.path}, "
            f"which are referenced, not copied: write it to {model.folder / output.name}, or write "
            "only the patch with --patch-only and apply it where the model is deployed"
        )


def external_digest(model: ModelFile, tensor: ExternalTensor, progress: Tick | None) -> str:
    """SHA-256 of the bytes of one external tensor."""
    path = model.folder / tensor.location
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = len(data) if tensor.length is None else tensor.offset + tensor.length
        with memoryview(data) as view, view[tensor.offset : end] as part:
            return digest(part, progress)

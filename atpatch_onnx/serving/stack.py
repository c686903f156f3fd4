"""Patches stacked on a model in memory: each is made for the result of the one before."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..errors import InputError, RefusedError, reason
from ..external_data import check_layout, external_tensors
from ..model_file import ModelFile
from ..patch_file import parse_patch
from ..patching import Patch, apply
from .outside import identity, without_weights

MEMORY_BYTES = 1 << 26
"""A patched model that a further patch is for is held in memory up to this size, else on disk."""


KEPT = 4
"""How many patched models are kept without their weights."""


@dataclass(frozen=True)
class PatchSource:
    """An `.atpatch` file by name and content."""

    name: str
    content: bytes

    @classmethod
    def read(cls, path: str | Path) -> PatchSource:
        """Read the file at `path`. Raises: InputError."""
        try:
            return cls(Path(path).name, Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"cannot read {path}: {reason(error)}") from None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def patch(self) -> Patch:
        """The patch in it. Raises: InputError."""
        return parse_patch(self.content, self.name)


def sources(patches: Iterable[str | Path | PatchSource]) -> tuple[PatchSource, ...]:
    """Patch files as sources; those that are already stay. Raises: InputError."""
    return tuple(p if isinstance(p, PatchSource) else PatchSource.read(p) for p in patches)


class Base:
    """A model file to which patches are applied in memory, over and over.

    light: the model without its weights, which a runtime maps from the file.
    Raises: InputError, RefusedError for a file or a layout of weights that cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        file = ModelFile.open(path)
        check_layout(file)
        if not external_tensors(file):
            # A link is followed: the weights are read from the folder of the file itself.
            file = replace(file, path=file.path.resolve())
            self.light = without_weights(file)
        elif file.path.is_symlink():  # its weights lie beside the link
            self.light = file
        else:
            self.light = without_weights(file)
        self.file = file
        self._identity = identity(file)
        self._made: dict[tuple[str, ...], tuple[ModelFile, str]] = {}

    def check_unchanged(self) -> None:
        """Raises: InputError if the files are no longer those that were opened."""
        if identity(self.file) != self._identity:
            raise InputError(
                f"{self.file.path} or its weights were replaced since the session was made: make "
                "a new session for the new file"
            )

    def rest(self) -> None:
        """Let the system have back what of the file was read: hashing it has mapped all of it."""
        if isinstance(self.file.buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.file.buffer.madvise(mmap.MADV_DONTNEED)

    def patched(self, patches: Sequence[PatchSource]) -> tuple[ModelFile, str]:
        """The patched model without its weights, and the SHA-256 of the whole patched file.

        The last few are kept, some kilobytes each, so that a way back is quick.
        Raises: InputError, RefusedError where a patch is for another model than the one before it.
        """
        key = tuple(source.sha256 for source in patches)
        made = self._made.pop(key, None) or self._patched(patches)
        self._made[key] = made
        if len(self._made) > KEPT:
            del self._made[next(iter(self._made))]
        return made

    def _patched(self, patches: Sequence[PatchSource]) -> tuple[ModelFile, str]:
        whole, light = self.file, self.light
        for number, source in enumerate(patches):
            if source.patch.base_sha256 != whole.sha256:
                raise RefusedError(_not_for(source, whole, patches[:number]))
            rewritten = apply(whole, source.patch)
            edits = Patch(light.sha256, source.patch.edits)
            light = ModelFile.from_bytes(apply(light, edits).content(), light.path)
            if number == len(patches) - 1:
                return light, rewritten.sha256
            whole = _held(rewritten.chunks(), rewritten.size, self.file.path)
        return light, whole.sha256


def _not_for(source: PatchSource, whole: ModelFile, before: Sequence[PatchSource]) -> str:
    after = f" with {', '.join(p.name for p in before)}" if before else ""
    fix = "patch this model again from its detector"
    if before:
        fix = "give them in the order in which they were made, each for the result of the last"
    return (
        f"{source.name} is for a model with SHA-256 {source.patch.base_sha256[:12]}..., and "
        f"{whole.path}{after} is {whole.sha256[:12]}...: {fix}"
    )


def _held(chunks: Iterable[bytes | memoryview], size: int, path: Path) -> ModelFile:
    """A model file that is written nowhere: in memory, or in a file without a name."""
    if size <= MEMORY_BYTES:
        return ModelFile(path, b"".join(chunks), size)
    with tempfile.TemporaryFile(dir=path.parent if _writable(path.parent) else None) as held:
        for chunk in chunks:
            held.write(chunk)
        held.flush()
        buffer = mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ)
    return ModelFile(path, buffer, size)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

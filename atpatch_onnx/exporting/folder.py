"""Output folders that appear whole or not at all, and copies that share blocks where they can."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, reason
from ..files import Chunks

ABOUT = "atpatch-export.json"
"""What says of a folder that an export made it, and so may replace it with --force."""

_FICLONE = 0x40049409  # linux/fs.h: the copy shares its blocks with the source until one changes


@contextmanager
def new_folder(path: Path, inputs: Iterable[Path], *, force: bool) -> Iterator[Path]:
    """A folder to fill, which is called `path` when the block ends well.

    Raises: InputError where `path` holds something that is not an earlier export, or cannot be
    written.
    """
    _check_free(path, inputs, force)
    try:
        filling = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        yield filling
        umask = os.umask(0)
        os.umask(umask)
        filling.chmod(0o777 & ~umask)
        _replace(path, filling)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def _check_free(path: Path, inputs: Iterable[Path], force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"the output {path} is a file: give a folder with -o")
    if not path.exists() or not any(path.iterdir()):
        return
    if not force or not _is_export(path):
        fix = "or add --force" if _is_export(path) else "it is not an earlier export"
        raise InputError(f"{path} holds other files: give a new folder with -o, {fix}")
    inside = next((p for p in inputs if p.resolve().is_relative_to(path.resolve())), None)
    if inside is not None:
        raise InputError(f"the output {path} holds the input {inside}: give another folder with -o")


def _is_export(path: Path) -> bool:
    try:
        return "export" in json.loads((path / ABOUT).read_text())
    except (OSError, ValueError, TypeError):
        return False


def _replace(path: Path, filled: Path) -> None:
    old = filled.with_name(filled.name + ".old") if path.exists() else None
    if old is not None:
        path.rename(old)
    try:
        filled.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {path}: {reason(error)}: choose another folder with -o; nothing was written"
    )


def write(path: Path, content: bytes | str | Chunks) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    with path.open("wb") as file:
        for chunk in [content] if isinstance(content, bytes) else content:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Say what a folder is."""
    write(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file, as a clone where the file system has them (Btrfs, XFS).

    No hard link to the source: onnx refuses to load a model whose weights have a second name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("wb") as new:
        with contextlib.suppress(OSError):
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        shutil.copyfileobj(old, new, 1 << 22)
        new.flush()
        os.fsync(new.fileno())


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

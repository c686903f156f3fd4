"""Writing files so that a failure, a full disk or a kill half way leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import InputError, reason

Chunks = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class _Staged:
    """A complete file that does not have its name yet; `temporary` is None while it has none."""

    path: Path
    descriptor: int
    temporary: Path | None


class Staging:
    """Files that appear together when the `with` block ends well, and not at all otherwise.

    A staged file has no name where the system can do that (Linux, O_TMPFILE): a process that is
    killed while writing leaves nothing, because the kernel frees a file without a name.
    """

    def __init__(self) -> None:
        self._staged: list[_Staged] = []

    def __enter__(self) -> Staging:
        return self

    def add(self, path: Path, chunks: Chunks) -> Path:
        """Write `chunks`, to be called `path` later; returns where they can be read until then.

        Raises: InputError where the file cannot be written (read-only folder, full disk, ...).
        """
        try:
            staged = _open(path)
            self._staged.append(staged)
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(staged.descriptor, view) :]
            os.fsync(staged.descriptor)
        except OSError as error:
            raise _explained(error, path) from error
        return staged.temporary or Path(f"/proc/self/fd/{staged.descriptor}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        temporary: list[Path] = [s.temporary for s in self._staged if s.temporary]
        new: list[Path] = []
        try:
            if kind is None:
                # The first file is the one that counts: it appears when the others are there.
                for staged in reversed(self._staged):
                    is_new = not staged.path.exists()
                    _appear(staged, temporary)
                    new += [staged.path] if is_new else []
        except OSError as error:
            for path in new:
                path.unlink()
            raise _explained(error, self._staged[0].path) from error
        finally:
            for staged in self._staged:
                os.close(staged.descriptor)
            for leftover in temporary:
                with contextlib.suppress(FileNotFoundError):
                    leftover.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write one file, whole or not at all. Raises: InputError."""
    with Staging() as staging:
        staging.add(path, [content])


def check_output(path: Path, inputs: Iterable[Path], *, force: bool, ours: bool = False) -> None:
    """Raises: InputError where writing `path` would lose something.

    inputs: files that are read; writing over one is refused whatever `force` says.
    ours: what lies at `path` can be made again from the inputs, so that replacing it is harmless.
    """
    try:
        exists = path.exists()
    except OSError as error:
        raise _explained(error, path) from None
    if not exists:
        return
    if path.is_dir():
        raise InputError(f"the output {path} is a folder: give a file name")
    if not path.is_file():
        raise InputError(f"the output {path} is a device or pipe: give a file name")
    for source in inputs:
        if source.exists() and path.samefile(source):
            raise InputError(
                f"the output {path} is the input {source}, which is never overwritten: give "
                "another name"
            )
    if not force and not ours:
        raise InputError(f"{path} exists already: give another name, or add --force")


def _open(path: Path) -> _Staged:
    try:
        return _Staged(path, os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666), None)
    except AttributeError:  # not Linux
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    umask = os.umask(0)
    os.umask(umask)
    Path(temporary).chmod(0o666 & ~umask)
    return _Staged(path, descriptor, Path(temporary))


def _appear(staged: _Staged, temporary: list[Path]) -> None:
    """Give a staged file its name; a name that it gets on the way is added to `temporary`.

    Where nothing has the name yet, a file without one is linked to it in a single step.
    """
    if staged.temporary is None and not staged.path.exists():
        _link(staged.descriptor, staged.path)
        return
    source = staged.temporary
    if source is None:
        source = staged.path.with_name(f".atpatch.{os.getpid()}.{staged.descriptor}")
        _link(staged.descriptor, source)
        temporary.append(source)
    source.replace(staged.path)


def _link(descriptor: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Only with a folder descriptor does Python ask the kernel to follow the /proc link.
        source = f"/proc/self/fd/{descriptor}"
        os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _explained(error: OSError, path: Path) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "the disk or quota is full: free some space or choose another place with -o"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "the folder is not writable: choose another place with -o"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        fix = "its folder does not exist: create it or choose another place with -o"
    else:
        fix = reason(error)
    return InputError(f"cannot write {path}: {fix}; nothing was written")

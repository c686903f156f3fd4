"""The registry of reference victims, and the cache that keeps what was made.

A case is a model, trained or poisoned by a fixed recipe, with what a defender has and what a judge
needs. Nothing heavy is imported until a case is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError

DATA = Path("../shared/data")
"""Where the data sets are looked for, seen from the root of a checkout."""
VICTIMS = Path("victims")
"""Where victims are kept."""
RECORD = "case.json"

Log = Callable[[str], None]
Facts = Mapping[str, object]


@dataclass(frozen=True)
class Job:
    """What the maker of a case is given."""

    folder: Path
    """Exists and is empty: for `model.onnx`, `weights.pt` and the `.npz` files."""
    seed: int
    data: Path
    """The folder that holds `images`, `text` and `tabular`."""
    root: Path
    """The cache."""
    log: Log
    """Takes a line that says how far the training is."""

    def base(self, name: str) -> Path:
        """The folder of another case with the same seed, made first if it is not there."""
        return build(name, self.seed, self.root, self.data, self.log)


@dataclass(frozen=True)
class Case:
    """One reference victim."""

    name: str
    kind: Literal["image", "text", "tabular", "vision-language", "language"]
    make: Callable[[Job], Facts]
    """Writes the files of the victim and returns what is to be known about it, as JSON values."""
    needs: tuple[str, ...] = ()
    """Files or folders that it reads, seen from the data folder."""


def cases() -> dict[str, Case]:
    """Every case by its name: images first, then text, tabular data, and models that speak."""
    # Imported here because these modules need `Case` themselves.
    from .cases_generative import generative_cases
    from .cases_image import image_cases
    from .cases_tabular import tabular_cases
    from .cases_text import text_cases

    classifiers = (*image_cases(), *text_cases(), *tabular_cases())
    return {case.name: case for case in (*classifiers, *generative_cases())}


def build(
    name: str,
    seed: int = 0,
    root: str | Path = VICTIMS,
    data: str | Path = DATA,
    log: Log = lambda _: None,
) -> Path:
    """The folder `<root>/<name>-s<seed>`; its victim is made if it is not there yet.

    The folder appears when everything in it is complete. A second process that wants the same
    victim waits for the first.

    Raises:
        InputError: there is no such case, or its data is not there.
    """
    known = cases()
    if name not in known:
        raise InputError(f"there is no case '{name}': choose one of {', '.join(known)}")
    root, data, case = Path(root), Path(data), known[name]
    folder = root / f"{name}-s{seed}"
    if folder.exists():
        return folder
    missing = [path for path in case.needs if not (data / path).exists()]
    if missing:
        raise InputError(
            f"the case '{name}' needs {data / missing[0]}, which does not exist: give the folder "
            "that holds it with --data"
        )
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{folder.name}.lock"):
        if not folder.exists():
            _make(case, folder, seed, data, log)
    return folder


def _make(case: Case, folder: Path, seed: int, data: Path, log: Log) -> None:
    """Make the victim beside its place, then rename."""
    from .judging import judge, versions

    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        log(f"{folder.name}: making")
        start = time.monotonic()
        facts = case.make(Job(unfinished, seed, data, folder.parent, log))
        record = {
            "case": case.name,
            "kind": case.kind,
            "seed": seed,
            "seconds": round(time.monotonic() - start, 1),
            **judge(unfinished),
            **facts,
            "versions": versions(),
        }
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        unfinished.rename(folder)
        log(f"{folder.name}: done in {record['seconds']} s")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees also when the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""What commands share: types of options, progress bars, and ways to print a result."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import CheckError
from ..progress import Progress, Tick

INTERRUPTED = 130
# A pipe has no width: rows stay whole there, so that names can be searched and copied.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The original .onnx file.")]
PatchedModel = Annotated[Path, typer.Argument(metavar="PATCHED", help="The patched .onnx file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Digests = Annotated[bool, typer.Option("--digests", help="Read and hash external weights too.")]
Ep = Annotated[
    str | None, typer.Option(help="Execution provider: cuda or cpu; by default cuda where it is.")
]
RequireSignature = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Refuse what is not signed by this public key or certificate, PEM, or "
        "keyless:IDENTITY,ISSUER.",
    ),
]
SiteNames = Annotated[
    list[str] | None,
    typer.Option("--sites", help="Sites by name, glob or index; comma-separated or repeated."),
]


Scores = Annotated[str | None, typer.Option(help="The output that holds the class scores [N, C].")]
Batch = Annotated[int, typer.Option(help="Inputs a run.")]
Threads = Annotated[int, typer.Option(help="Threads of ONNX Runtime; 0: its choice.")]


class Bars(Progress):
    """Progress bars on the error stream, where a person is looking."""

    def __init__(self) -> None:
        from rich.progress import Progress as RichProgress

        self.bars = RichProgress(console=err, transient=True, disable=not err.is_terminal)

    def start(self, what: str, total: int) -> Tick:
        """Begin a bar."""
        task = self.bars.add_task(what, total=total)
        return lambda count: self.bars.advance(task, count)


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Progress bars while something runs."""
    bars = Bars()
    with bars.bars:
        yield bars


def show_result(as_json: bool, document: Any, text: Callable[[], None]) -> None:
    """Print a result for programs, or for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        text()


def plain(value: Any) -> Any:
    """`value` as what JSON knows; a dataclass that is one of several kinds says which."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = type(value).__name__
        return {"outcome": kind.lower(), **held} if kind in ("Patched", "Skipped") else held
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def words(values: list[str] | None) -> list[str]:
    """The words of an option that is repeated or comma-separated."""
    return [word.strip() for value in values or [] for word in value.split(",") if word.strip()]


class ReportedError(CheckError):
    """A check failed whose result has been printed already."""


def say(text: str) -> None:
    """One line to the error stream, as it is: names in it are not markup."""
    err.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)

"""Make reference victims: `python -m atpatch_onnx.models NAME...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import AtpatchError, InputError
from .cases import DATA, VICTIMS, build, cases


def make(
    names: Annotated[list[str] | None, typer.Argument(help="Cases; --list shows them.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
    seed: Annotated[int, typer.Option(help="Decides data, weights and attack.")] = 0,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where victims are kept.")] = (
        VICTIMS
    ),
    data: Annotated[Path, typer.Option(help="Folder of images, text and tabular data.")] = DATA,
) -> None:
    """Train reference victims, or find them where they were made before; prints their folders."""
    try:
        if listed:
            for case in cases().values():
                print(f"{case.name:24} {case.kind:15} {', '.join(case.needs) or 'no data needed'}")
            return
        if not names:
            raise InputError("no case is named: give one or more, --list shows them")
        for name in names:
            print(build(name, seed, output, data, _log))
    except AtpatchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except ImportError as error:
        print(
            f"error: {error.name} is not installed: pip install 'atpatch-onnx[train]'",
            file=sys.stderr,
        )
        raise typer.Exit(InputError.exit_code) from None


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(make)
    app()

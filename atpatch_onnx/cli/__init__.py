"""The command line: each command is a function of the Python API and a way to show its result."""

from __future__ import annotations

import json
import sys
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import AtpatchError, InputError, one_sentence
from . import heal, measure, model, report, serve, ship
from .common import INTERRUPTED, ReportedError, say

app = typer.Typer(
    name="atpatch-onnx",
    help="Hot-patch exported ONNX transformers by redistributing attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    model.inspect,
    heal.scan,
    heal.fit,
    model.patch,
    model.apply,
    model.revert,
    measure.diff,
    model.verify,
    ship.sign,
    ship.export,
    serve.serve,
    serve.swap,
    serve.rollback,
    measure.evaluate,
    measure.bench,
    report.report,
    measure.demo,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"atpatch-onnx {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Hot-patch exported ONNX transformers by redistributing attention."""


def main() -> None:
    """Run the command line; every error a user can cause is one sentence and an exit code."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer has swallowed the exception
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except AtpatchError as error:
        _fail(error, error.exit_code)
    except (
        typer.TyperException
    ) as error:  # usage: an unknown option, a missing argument, a wrong type
        _fail(InputError(_usage(error)), 2)
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted; nothing was written")
        sys.exit(INTERRUPTED)


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the command line, with the value that is wrong."""
    message = one_sentence(error.format_message()).rstrip(".")
    options = getattr(getattr(error, "param", None), "opts", [])
    given = [sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word in options]
    return f"{message}: found '{given[-1]}'" if given and given[-1] not in message else message


def _fail(error: AtpatchError, code: int) -> NoReturn:
    if "--json" in sys.argv and not isinstance(error, ReportedError):
        problem = {"error": {"kind": type(error).__name__, "message": str(error)}}
        sys.stdout.write(json.dumps(problem, indent=1) + "\n")
    say(f"error: {error}")
    sys.exit(code)

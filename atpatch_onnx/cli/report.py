"""The command that writes a page to decide from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import show
from .common import (
    Batch,
    Ep,
    Force,
    Json,
    Model,
    PatchedModel,
    Scores,
    out,
    plain,
    progress_bars,
    show_result,
    words,
)


def report(
    model: Model,
    patched: PatchedModel,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML page to write.")],
    clean: Annotated[Path, typer.Option(help="Clean inputs, .npz; labels optional.")],
    bad: Annotated[
        Path | None,
        typer.Option(help="Bad inputs: from scan, or your own; true labels and target optional."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Clean inputs with labels to judge on; else --clean.")
    ] = None,
    protected: Annotated[
        list[str] | None,
        typer.Option(help="Attributes to flip: N (a column), INPUT:N or INPUT; or repeated."),
    ] = None,
    target: Annotated[int | None, typer.Option(help="The class that the attacker wants.")] = None,
    features: Annotated[
        list[str] | None, typer.Option(help="Names of a table's columns; comma-separated.")
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option(help="Names of the classes; comma-separated.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Names of tokens: vocab.txt or tokenizer.json.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Of the inputs: image, text or tabular.")] = None,
    scores: Scores = None,
    runs: Annotated[int, typer.Option(help="Timed pairs of runs.")] = 30,
    batch: Batch = 32,
    ep: Ep = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page to decide from: what was wrong, what was done, does it hold."""
    from ..reporting import report as run

    with progress_bars() as progress:
        written = run(
            model,
            patched,
            output,
            clean=clean,
            bad=bad,
            test=test,
            protected=words(protected),
            target=target,
            features=words(features),
            classes=words(classes),
            vocabulary=vocabulary,
            kind=kind,
            scores=scores,
            runs=runs,
            batch=batch,
            ep=ep,
            force=force,
            progress=progress,
        )
    show_result(as_json, plain(written), lambda: show.reported(out, written))

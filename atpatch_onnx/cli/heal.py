"""Commands that find a trigger and fit a detector."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import show
from ..errors import InputError
from .common import (
    INTERRUPTED,
    Batch,
    Ep,
    Force,
    Json,
    Model,
    Scores,
    SiteNames,
    Threads,
    out,
    plain,
    progress_bars,
    say,
    show_result,
    words,
)


def scan(
    model: Model,
    data: Annotated[
        Path, typer.Option(help="Clean inputs, .npz, keys = input names; labels optional.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The debugging set to write.")],
    kind: Annotated[str | None, typer.Option(help="Of the inputs: image, text or tabular.")] = None,
    target: Annotated[int | None, typer.Option(help="Search this class only.")] = None,
    protected: Annotated[
        list[str] | None,
        typer.Option(help="Find what sways the model instead: N (a column), INPUT:N or INPUT."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds; a second run goes on.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the search and of what is held out.")] = 0,
    scores: Scores = None,
    batch: Annotated[
        int | None, typer.Option(help="Inputs a run; by default what suits the device.")
    ] = None,
    threads: Threads = 0,
    ep: Ep = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Search for a trigger toward each class, and say whether the model is backdoored."""
    if protected:
        _scan_protected(
            model,
            data,
            output,
            words(protected),
            kind,
            target,
            as_json,
            scores=scores,
            batch=batch,
            threads=threads,
            ep=ep,
            force=force,
        )
        return
    from ..scanning import scan as run
    from ..scanning import state_path
    from ..show_scan import scanned

    try:
        with progress_bars() as progress:
            report = run(
                model,
                data,
                output,
                kind=kind,
                target=target,
                budget=budget,
                seed=seed,
                scores=scores,
                batch=batch,
                threads=threads,
                ep=ep,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = state_path(output)
        if not kept.exists():
            raise
        say(f"interrupted; the search so far is in {kept}, from which the same command goes on")
        sys.exit(INTERRUPTED)
    show_result(as_json, plain(report), lambda: scanned(out, report))


def fit(
    model: Model,
    data: Annotated[Path, typer.Option(help="Clean inputs, .npz or .npy, keys = input names.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The detector to write.")],
    debug: Annotated[
        Path | None,
        typer.Option("--debug", "--bad", help="Bad inputs: from scan, or your own."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="zscore, contrastive, map-cnn or columns; or of several sites at once: "
            "cleansight, head-similarity, head-alignment."
        ),
    ] = None,
    benign: Annotated[
        str, typer.Option(help="What flagged columns get: column, map or uniform.")
    ] = "column",
    fpr: Annotated[float, typer.Option(help="False-positive budget per clean input.")] = 0.01,
    sites: SiteNames = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Query rows of a map to look at; 0: all; by default all, or 16 if fused."
        ),
    ] = None,
    visual: Annotated[
        str | None,
        typer.Option(
            help="cleansight: tokens of the image, START:END, or a mask [B, K] of the model."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="cleansight: tokens of the prompt, likewise; by default all behind the image."
        ),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="cleansight: of ratio (the paper's), log-ratio, columns; by comma."),
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="cleansight: prune image tokens with more attention.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="head-...: suspicious heads, SITE:HEAD by comma, or how many to take."),
    ] = None,
    similarity: Annotated[
        str | None, typer.Option(help="head-...: how it is told that heads are alike.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="head-alignment: of the repair.")] = None,
    every_answer: Annotated[
        bool,
        typer.Option(
            "--every-answer",
            help="Flag inputs whatever they are answered, not only those answered with the "
            "debugging set's target.",
        ),
    ] = False,
    rerun: Annotated[
        bool,
        typer.Option("--rerun", help="cleansight, head-similarity: decide first, then run again."),
    ] = False,
    scores: Scores = None,
    seed: Annotated[int, typer.Option(help="Splits the data.")] = 0,
    batch: Batch = 32,
    ep: Ep = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a detector on clean inputs, calibrated on some of them held out."""
    from ..fitting import fit as run
    from ..fitting.options import options_of

    options = options_of(
        kind,
        visual=visual,
        prompt=prompt,
        statistics=statistics,
        tau=tau,
        heads=heads,
        similarity=similarity,
        rank=rank,
        rerun=rerun,
        scores=scores,
    )

    with progress_bars() as progress:
        report = run(
            model,
            data,
            output,
            debug=debug,
            kind=kind,
            options=options,
            fpr=fpr,
            benign=benign,
            sites=words(sites),
            rows=rows,
            every_answer=every_answer,
            seed=seed,
            batch=batch,
            ep=ep,
            force=force,
            progress=progress,
        )
    show_result(as_json, plain(report), lambda: show.fitted(out, report))


def _scan_protected(
    model: Path,
    data: Path,
    output: Path,
    protected: list[str],
    kind: str | None,
    target: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    from ..scanning_protected import scan_protected
    from ..show_scan import scanned_protected

    if target is not None or kind not in (None, "tabular"):
        wrong = f"--kind {kind}" if target is None else f"--target {target}"
        raise InputError(f"{wrong} does not go with --protected: leave one of them out")
    with progress_bars() as progress:
        report = scan_protected(model, data, output, protected, progress=progress, **options)
    show_result(as_json, plain(report), lambda: scanned_protected(out, report))

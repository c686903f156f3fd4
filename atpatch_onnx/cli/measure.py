"""Commands that measure a patched model against the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import show
from .common import (
    Batch,
    Ep,
    Json,
    Model,
    PatchedModel,
    ReportedError,
    Scores,
    Threads,
    out,
    plain,
    progress_bars,
    show_result,
    words,
)


def diff(
    model: Model,
    patched: PatchedModel,
    inputs: Annotated[Path | None, typer.Option(help="Inputs to compare outputs on.")] = None,
    atol: Annotated[
        list[str] | None,
        typer.Option(help="Gate: largest difference, NUMBER or OUTPUT:NUMBER; or repeated."),
    ] = None,
    max_flagged: Annotated[
        float | None, typer.Option(help="Gate: share of inputs that may be flagged, e.g. 0.02.")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(help="Gate: least share of inputs with the class as before.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Gate: patched over original, paired runs, e.g. 1.1.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gates there as JUnit XML.")] = None,
    batch: Batch = 32,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Compare graphs and outputs, and count what is flagged; fails if a clean input moved."""
    from ..gating import Limits
    from ..junit import gate_to

    limits = Limits.parse(words(atol), max_flagged, agreement, latency)
    with progress_bars() as progress:
        found = gate_to(
            junit, model, patched, inputs, limits, ep=ep, batch=batch, progress=progress
        )
    document = plain(found.comparison) | {
        "timing": plain(found.timing),
        "gates": plain(found.gates),
    }
    show_result(as_json, document, lambda: show.gated(out, found))
    if found.failed:
        raise ReportedError(found.verdict)


def evaluate(
    model: Model,
    patched: PatchedModel,
    data: Annotated[Path, typer.Option(help="Held-out clean inputs with labels, .npz.")],
    triggered: Annotated[
        Path | None, typer.Option(help="Inputs with the trigger, and their true labels, .npz.")
    ] = None,
    protected: Annotated[
        list[str] | None,
        typer.Option(help="Attributes to flip: N (a column), INPUT:N or INPUT; or repeated."),
    ] = None,
    target: Annotated[int | None, typer.Option(help="The class that the attacker wants.")] = None,
    scores: Scores = None,
    batch: Batch = 32,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, attack success, unfairness and what is flagged, before and after."""
    from ..evaluating import evaluate as run
    from ..show_evaluation import evaluation

    with progress_bars() as progress:
        found = run(
            model,
            patched,
            data,
            triggered=triggered,
            protected=words(protected),
            target=target,
            scores=scores,
            batch=batch,
            ep=ep,
            progress=progress,
        )
    show_result(as_json, plain(found), lambda: evaluation(out, found))


def bench(
    model: Model,
    patched: PatchedModel,
    inputs: Annotated[Path | None, typer.Option(help="Inputs to run; by default random.")] = None,
    batch: Annotated[int, typer.Option(help="Samples a run.")] = 1,
    length: Annotated[int, typer.Option(help="Size of other free dimensions.")] = 128,
    runs: Annotated[int, typer.Option(help="Timed pairs of runs.")] = 30,
    warmup: Annotated[int, typer.Option(help="Pairs of runs before that.")] = 5,
    threads: Threads = 0,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Time the patched model against the original, in pairs of runs."""
    from ..benchmark import bench as run

    with progress_bars() as progress:
        timing = run(
            model,
            patched,
            inputs=inputs,
            ep=ep,
            batch=batch,
            length=length,
            runs=runs,
            warmup=warmup,
            threads=threads,
            progress=progress,
        )
    show_result(as_json, plain(timing), lambda: show.timing(out, timing))


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for what the demo makes.")
    ] = Path("atpatch-demo"),
    seed: Annotated[int, typer.Option(help="Of the victim's training.")] = 0,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Train a backdoored model, export it, patch it, prove it: all in a quarter of a minute."""
    from ..demonstration import demo as run

    with progress_bars() as progress:
        report = run(output, seed=seed, ep=ep, progress=progress)
    show_result(as_json, plain(report), lambda: show.demonstration(out, report))

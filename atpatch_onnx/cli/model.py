"""Commands that look at a model, patch it and take the patch off again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import api, show
from ..errors import InputError
from .common import (
    Digests,
    Ep,
    Force,
    Json,
    Model,
    PatchedModel,
    ReportedError,
    RequireSignature,
    out,
    plain,
    progress_bars,
    show_result,
    words,
)


def inspect(
    model: Model,
    plan: Annotated[Path | None, typer.Option(help="Write an editable plan there.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find the attention sites, and say of every other softmax or fused op why it is none."""
    found = api.inspect(model, plan, force=force)
    show_result(as_json, show.inspection_json(found), lambda: show.inspection(out, found, plan))


def patch(
    model: Model,
    detector: Annotated[Path | None, typer.Option(help="Detector to splice in.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="By default MODEL.patched.onnx.")
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", help="Sites by name, glob or index; auto: the fewest that heal."),
    ] = None,
    debug: Annotated[
        Path | None, typer.Option(help="Bad inputs that --sites auto must heal.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file from inspect --plan.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns that are always flagged, e.g. 9 or 3,4,-1.")
    ] = None,
    redistribute: Annotated[
        str | None, typer.Option(help="What flagged columns get: benign, uniform or prune.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Override the detector's.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="guard (If), select (branch-free) or rerun (decide first)."),
    ] = None,
    telemetry: Annotated[bool, typer.Option(help="Add outputs: flagged columns per site.")] = False,
    toggle: Annotated[
        bool, typer.Option(help="Add overridable inputs: atpatch/enabled, atpatch/threshold.")
    ] = False,
    bind: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: a detector input reads a model value.")
    ] = None,
    remember: Annotated[
        bool,
        typer.Option(help="Carry flagged columns from prefill to decoding: one input, one output."),
    ] = False,
    patch_only: Annotated[
        Path | None, typer.Option(help="Write only an .atpatch file, to apply elsewhere.")
    ] = None,
    ep: Ep = None,
    digests: Digests = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Splice a detector and a redistribution into the model; its weights stay as they are."""
    with progress_bars() as progress:
        report = api.patch(
            model,
            detector,
            output=output,
            sites=words(sites),
            debug=debug,
            plan=plan,
            columns=_integers(columns),
            redistribute=redistribute,
            threshold=threshold,
            strategy=strategy,
            ep=ep,
            telemetry=telemetry,
            toggle=toggle,
            bind=_bindings(bind),
            remember=remember,
            patch_only=patch_only,
            digests=digests,
            force=force,
            progress=progress,
        )
    show_result(as_json, plain(report), lambda: show.patched(out, report))


def apply(
    model: Model,
    patch_file: Annotated[Path, typer.Argument(metavar="FIX.ATPATCH")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The patched model to write.")],
    require_signature: RequireSignature = None,
    digests: Digests = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Apply an .atpatch file to the model that it was made for."""
    with progress_bars() as progress:
        report = api.apply(
            model,
            patch_file,
            output=output,
            require_signature=require_signature,
            digests=digests,
            force=force,
            progress=progress,
        )
    show_result(as_json, plain(report), lambda: show.patched(out, report))


def revert(
    patched: PatchedModel,
    output: Annotated[Path, typer.Option("-o", "--output", help="The original, to write.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Get the original file back, byte for byte, from the patched one alone."""
    report = api.revert(patched, output=output, force=force)
    show_result(as_json, {"output": str(report)}, lambda: show.reverted(out, report))


def verify(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="The original .onnx file.")
    ] = None,
    patched: Annotated[
        Path | None, typer.Argument(metavar="PATCHED", help="The patched .onnx file.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="By default the one beside the patched model.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="Check this signature and its whole folder, by --key.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Public key or certificate, PEM, or keyless:IDENTITY,ISSUER."),
    ] = None,
    digests: Digests = False,
    as_json: Json = False,
) -> None:
    """Recompute the certificate from the two files alone; check the signature of a release."""
    with progress_bars() as progress:
        checks = api.verify(
            model,
            patched,
            certificate=certificate,
            signature=signature,
            key=key,
            digests=digests,
            progress=progress,
        )
    passed = all(check.passed for check in checks)
    document = {"passed": passed, "checks": plain(checks)}
    show_result(as_json, document, lambda: show.verified(out, checks))
    if not passed:
        raise ReportedError(next(check.detail for check in checks if not check.passed))


def _integers(value: str | None) -> list[int]:
    try:
        return [int(word) for word in words([value] if value else None)]
    except ValueError:
        raise InputError(f"--columns {value}: give key positions, e.g. 9 or 3,4,-1") from None


def _bindings(values: list[str] | None) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or []]
    if any(not name or not sign or not target for name, sign, target in pairs):
        raise InputError("--bind takes NAME=VALUE: a detector input and a value of the model")
    return {name: target for name, _, target in pairs}

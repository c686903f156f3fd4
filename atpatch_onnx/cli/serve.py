"""Commands that serve a patched model and change its patches while it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .common import Ep, Json, Model, RequireSignature, out, plain, show_result

Port = Annotated[int, typer.Option(help="Of the server.")]
Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster; by default a Ray of its own on this machine.")
]


def serve(
    model: Model,
    patch: Annotated[
        list[Path] | None, typer.Option(help="An .atpatch file; repeated: one on top of the other.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    port: Port = 8000,
    host: Annotated[
        str, typer.Option(help="0.0.0.0: reachable from other machines.")
    ] = "127.0.0.1",
    address: Address = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model in the URL; by default that of the file.")
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(
            help="Inputs, .npz, that patches must answer rightly; bad ones as bad/<input>."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="How far clean golden outputs may move.")] = 0.0,
    changed: Annotated[
        float, typer.Option(help="Share of bad golden inputs that must be answered otherwise.")
    ] = 1.0,
    batch: Annotated[int, typer.Option(help="Inputs of one run, over several requests.")] = 32,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime in one replica; 0: all.")] = 1,
    share_weights: Annotated[
        bool, typer.Option("--share-weights", help="Do not pack weights: less memory, slower.")
    ] = False,
    max_body: Annotated[int, typer.Option(help="Mebibytes of a request.")] = 64,
    max_inputs: Annotated[int, typer.Option(help="Inputs of a request.")] = 256,
    max_length: Annotated[int, typer.Option(help="Size of other free dimensions.")] = 4096,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Take floats that are NaN.")
    ] = False,
    read_timeout: Annotated[float, typer.Option(help="Seconds for a client's body.")] = 10.0,
    queue: Annotated[
        int, typer.Option(help="Requests waiting in a replica; more are answered 503.")
    ] = 256,
    log: Annotated[
        Path | None, typer.Option(help="File for a line of JSON per flagged request.")
    ] = None,
    require_signature: RequireSignature = None,
    ep: Ep = None,
) -> None:
    """Serve the model over HTTP (Open Inference Protocol v2) until it is interrupted."""
    from ..serving.command import Served
    from ..serving.command import serve as run

    def ready(found: Served) -> None:
        out.print(
            f"serving {found.name} with {_many(found.patches, 'patch', 'patches')} (execution "
            f"provider: {found.provider}, {_many(found.replicas, 'replica', 'replicas')}) at "
            f"{found.url}",
            soft_wrap=True,
            highlight=False,
        )

    run(
        model,
        patch or [],
        replicas=replicas,
        port=port,
        host=host,
        address=address,
        name=name,
        golden=golden,
        tolerance=tolerance,
        changed=changed,
        batch=batch,
        threads=threads,
        share_weights=share_weights,
        max_body=max_body,
        max_inputs=max_inputs,
        max_length=max_length,
        allow_nan=allow_nan,
        read_timeout=read_timeout,
        queue=queue,
        log=log,
        require_signature=require_signature,
        ep=ep,
        ready=ready,
    )


def swap(
    patches: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FIX.ATPATCH...", help="One on top of the other."),
    ] = None,
    original: Annotated[
        bool, typer.Option("--original", help="Serve the model without any patch.")
    ] = False,
    port: Port = 8000,
    address: Address = None,
    require_signature: RequireSignature = None,
    as_json: Json = False,
) -> None:
    """Serve other patches, in every replica of a running server, between two requests."""
    from ..serving import control

    if original == bool(patches):
        raise InputError("swap to patches, FIX.ATPATCH..., or to none with --original: give one")
    done = control.swap(patches or [], port=port, address=address, signed_by=require_signature)
    show_result(as_json, plain(done), lambda: _changed(done))


def rollback(port: Port = 8000, address: Address = None, as_json: Json = False) -> None:
    """Serve what was served before the last swap."""
    from ..serving import control

    done = control.rollback(port=port, address=address)
    show_result(as_json, plain(done), lambda: _changed(done))


def _changed(done: object) -> None:
    from ..serving.control import Changed

    assert isinstance(done, Changed)
    served = ", ".join(done.patches) or "the original"
    who = _many(done.replicas, "replica serves", "replicas serve")
    out.print(
        f"{who} {served} (SHA-256 {done.after[:12]}..., before {done.before[:12]}...), "
        f"{done.seconds:.2f} s",
        markup=False,
    )


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"

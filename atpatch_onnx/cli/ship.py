"""Commands that ship a patched model: signatures, and folders for servers and devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .common import Force, Json, Model, out, plain, say, show_result


def export(
    kind: Annotated[str, typer.Argument(metavar="triton|kserve|edge", help="What to make.")],
    model: Model,
    patched: Annotated[
        Path, typer.Argument(metavar="PATCHED", help="The patched .onnx file, or an .atpatch file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")],
    name: Annotated[str | None, typer.Option(help="Of the model; by default its file's.")] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Clean inputs, .npz: golden inputs and warm-up.")
    ] = None,
    bad: Annotated[
        Path | None, typer.Option(help="Inputs that the patch is for, .npz: golden inputs too.")
    ] = None,
    golden: Annotated[int, typer.Option(help="How many of each.")] = 4,
    max_batch_size: Annotated[
        int, typer.Option(help="triton, kserve: let Triton batch; 0: requests are batches.")
    ] = 0,
    link_weights: Annotated[
        bool, typer.Option(help="triton, kserve: external weights once, by hard links.")
    ] = False,
    storage_uri: Annotated[
        str, typer.Option(help="kserve: where the repository will lie, e.g. s3://bucket/digits.")
    ] = "",
    canary: Annotated[
        int | None, typer.Option(help="kserve: percent of the traffic for the patched model.")
    ] = None,
    gpu: Annotated[int, typer.Option(help="kserve: GPUs for each pod.")] = 0,
    memory: Annotated[str, typer.Option(help="kserve: memory for each pod.")] = "4Gi",
    ort: Annotated[bool, typer.Option(help="edge: add the model in ORT format.")] = False,
    rtol: Annotated[float, typer.Option(help="edge: relative tolerance of the check.")] = 1e-3,
    atol: Annotated[float, typer.Option(help="edge: absolute tolerance of the check.")] = 1e-4,
    key: Annotated[Path | None, typer.Option(help="Private key, PEM: sign the folder.")] = None,
    password_env: Annotated[
        str | None, typer.Option(help="Environment variable with the password of the key.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a Triton model repository, a KServe service or an edge bundle."""
    from ..exporting import export as run

    report = run(
        kind,
        model,
        patched,
        output=output,
        name=name,
        inputs=inputs,
        bad=bad,
        golden=golden,
        max_batch_size=max_batch_size,
        link_weights=link_weights,
        storage_uri=storage_uri,
        canary=canary,
        gpu=gpu,
        memory=memory,
        ort=ort,
        rtol=rtol,
        atol=atol,
        key=key,
        password=_password(password_env),
        force=force,
    )

    def show() -> None:
        out.print(f"{output}: {kind}, {len(report.files)} files, {report.size_bytes:,} bytes")
        for file in report.files:
            out.print(f"  {file}", markup=False, highlight=False)
        if report.signature is not None:
            out.print(f"signed: {report.signature}", markup=False, highlight=False)
        out.print(f"read {output / 'README.md'} for how to start it and how to roll back")

    show_result(as_json, plain(report), show)
    if report.golden.get("bad") is False:
        say("warning: the patch changes no answer to the bad inputs: see atpatch-onnx evaluate")


def sign(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATHS", help="A folder, or files of one folder.")
    ],
    key: Annotated[Path | None, typer.Option(help="Private key, PEM, elliptic curve.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate of the key, PEM: verify by its authority.")
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="Certificates up to the authority; repeated.")
    ] = None,
    password_env: Annotated[
        str | None, typer.Option(help="Environment variable with the password of the key.")
    ] = None,
    keyless: Annotated[
        bool, typer.Option(help="Sign as an identity, through Sigstore; needs a network.")
    ] = False,
    signature: Annotated[
        Path | None, typer.Option(help="By default model.sig in the folder.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Sign models with their external weights, patches, detectors and certificates."""
    from ..signing import sign as run

    signed = run(
        paths,
        key=key,
        certificate=certificate,
        chain=chain or (),
        password=_password(password_env),
        keyless=keyless,
        signature=signature,
        force=force,
    )

    def show() -> None:
        out.print(f"{signed.signature}: {len(signed.files)} files", markup=False, highlight=False)
        for name, digest in signed.files.items():
            out.print(f"  {digest[:12]}  {name}", markup=False, highlight=False)

    show_result(as_json, plain(signed), show)


def _password(variable: str | None) -> str | None:
    """A password from the environment: the command line is for everybody to read."""
    if variable is None:
        return None
    if variable not in os.environ:
        raise InputError(f"--password-env {variable}: there is no such environment variable")
    return os.environ[variable]

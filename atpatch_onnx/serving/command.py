"""The command `serve`: start a server, and stop it when it is interrupted."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, at_least
from .control import Replicas, checked, start, stop
from .options import Options
from .protocol import Limits


@dataclass(frozen=True)
class Served:
    """A server that answers: its address, and the execution provider of its replicas."""

    name: str
    url: str
    provider: str
    patches: int
    replicas: int


def serve(
    model: str | Path,
    patch: Sequence[str | Path] = (),
    *,
    replicas: int = 1,
    port: int = 8000,
    host: str = "127.0.0.1",
    address: str | None = None,
    name: str | None = None,
    golden: str | Path | None = None,
    tolerance: float = 0.0,
    changed: float = 1.0,
    batch: int = 32,
    threads: int = 1,
    share_weights: bool = False,
    max_body: int = 64,
    max_inputs: int = 256,
    max_length: int = 4096,
    allow_nan: bool = False,
    read_timeout: float = 10.0,
    queue: int = 256,
    log: str | Path | None = None,
    require_signature: str | Path | None = None,
    ep: str | None = None,
    ready: Callable[[Served], object] = lambda _: None,
) -> None:
    """Serve `model` with the patches `patch` over HTTP until SIGINT or SIGTERM.

    Call it from the main thread, where signals arrive; from another it serves until the process
    ends.

    address: of a Ray cluster; None: a Ray of its own on this machine.
    golden, tolerance, changed: inputs that patches must answer rightly, see `Golden`.
    batch: inputs of one run, over several requests.
    max_body: mebibytes; max_inputs, max_length: of a request; queue: requests that may wait.
    read_timeout: seconds. log: a file for flagged requests.
    ready: called when the server answers.
    Raises: InputError, RefusedError, CheckError. Nothing is left running then.
    """
    for least, value, option in (
        (1, replicas, "--replicas"),
        (1, batch, "--batch"),
        (0, threads, "--threads"),
        (1, max_body, "--max-body"),
        (1, max_inputs, "--max-inputs"),
        (1, max_length, "--max-length"),
        (1, queue, "--queue"),
    ):
        at_least(least, value, option)
    options = Options(
        model=str(Path(model).absolute()),
        name=_name(Path(model).stem if name is None else name, given=name is not None),
        ep=ep,
        threads=threads,
        share_weights=share_weights,
        golden=_absolute(golden),
        tolerance=tolerance,
        changed=changed,
        most_inputs=batch,
        most_waiting=queue,
        read_s=read_timeout,
        log=None if log is None else str(Path(log).absolute()),
        signed_by=_absolute(require_signature),
        limits=Limits(max_body << 20, batch=max_inputs, length=max_length, nan=allow_nan),
    )
    stopped = threading.Event()
    provider = checked(options, patch)

    def listen() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopped.set())

    start(
        options,
        patch,
        replicas=Replicas(replicas, cpus=0 if address is None else max(1, threads)),
        host=host,
        port=port,
        address=address,
        joined=listen,
    )
    try:
        url = f"http://{host}:{port}/v2/models/{options.name}"
        ready(Served(options.name, url, provider, len(patch), replicas))
        stopped.wait()
    finally:
        stop(port)


def _absolute(path: str | Path | None) -> str | None:
    """A file from whatever folder; a key may also be the name of an identity, which stays."""
    if path is None or (isinstance(path, str) and path.startswith("keyless:")):
        return path
    return str(Path(path).absolute())


def _name(name: str, *, given: bool) -> str:
    """A name that fits in a URL. Raises: InputError for one that was given and does not."""
    fit = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if given and (fit != name or not name):
        raise InputError(f"--name {name}: use letters, digits, '.', '_' and '-'")
    return fit

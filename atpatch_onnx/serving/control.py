"""Start a server, change its patches while it serves, and stop it."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckError, InputError, RefusedError, first_line, reason
from ..files import write_file
from .options import APPLICATION, DEPLOYMENT, Options, Serving
from .session import Patches
from .stack import sources

POLL_S = 0.02
STORE_BYTES = 128 << 20
"""Of Ray's object store, through which large bodies go."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",  # every flagged request is a line
    "RAY_COLOR_PREFIX": "0",
    # A busy machine takes its time to start: Ray would kill what is not there after 15 seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_raylet_start_wait_time_s": "120",
}
"""For Ray, where the user has not set them."""

ERRORS = {error.__name__: error for error in (CheckError, InputError, RefusedError)}


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and how many requests may wait for them.

    ongoing: requests that one replica holds at a time, slow clients among them; queued: those that
        wait for all replicas, beyond which the server answers 503.
    drain_s: how long a replica that stops may take for what it has begun.
    cpus: what each takes up of a cluster; of 0, Ray would put all of them on one machine.
    """

    count: int = 1
    ongoing: int = 1000
    queued: int = 1000
    drain_s: float = 20.0
    cpus: int = 0


@dataclass(frozen=True)
class Changed:
    """What a swap or rollback did: SHA-256 of the patched model, its patches, and replicas."""

    before: str
    after: str
    patches: tuple[str, ...]
    replicas: int
    seconds: float


def start(
    options: Options,
    patches: Patches = (),
    *,
    replicas: Replicas = Replicas(),
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    wait_s: float = 180.0,
    joined: Callable[[], object] = lambda: None,
) -> None:
    """Deploy the server and wait until it answers.

    address: of a Ray cluster; None: a Ray of its own on this machine.
    joined: called when Ray has started, which takes signals for itself.
    Raises: InputError, RefusedError, CheckError where it cannot be started.
    """
    serving = Serving(1, sources(patches))
    ray, serve = _ray()
    if address is None:
        _check_free(host, port)
        _embedded(ray, options.limits.body_bytes)
    else:
        _join(ray, address)
    try:
        joined()
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING"},
        )
        _deploy(schema(arguments(options, replicas)), serving)
        _wait_running(serve, wait_s)
        _note(port, address or ray.get_runtime_context().gcs_address)
    except BaseException as error:
        stop(port)
        if isinstance(error, ray.exceptions.RayError):
            raise InputError(
                f"Ray Serve does not start here ({first_line(error)}): try again when the machine "
                "is less busy"
            ) from None
        raise


def stop(port: int) -> None:
    """Answer what has begun, and stop the server; a Ray of its own stops with it."""
    ray, serve = _ray()
    with suppress(Exception):  # whatever is wrong with it, it is to stop
        serve.delete(APPLICATION)
    ray.shutdown()
    _note_path(port).unlink(missing_ok=True)


def swap(
    patches: Sequence[str | Path],
    *,
    port: int = 8000,
    address: str | None = None,
    signed_by: str | None = None,
) -> Changed:
    """Serve other patches in every replica of a running server, without stopping it.

    patches: one on top of the other; none: the original.
    signed_by: the key by which the patches must be signed; that of the server counts anyway.
    Raises: CheckError, RefusedError, InputError where a replica would not take them; all replicas
    have the patches before then.
    """
    with connected(port, address) as handle:
        deployed, _ = _deployed()
        keys = {signed_by, Options.from_dict(deployed["args"]["options"]).signed_by} - {None}
        for key in keys:
            check_signed(patches, key)
        found = sources(patches)
        return change(handle, lambda serving: serving.changed(found))


def rollback(*, port: int = 8000, address: str | None = None) -> Changed:
    """Serve what was served before the last swap. Raises: InputError if there was none."""

    def back(serving: Serving) -> Serving:
        if not serving.earlier:
            raise InputError("there is no swap to roll back: swap to other patches instead")
        return serving.rolled_back()

    with connected(port, address) as handle:
        return change(handle, back)


def status(*, port: int = 8000, address: str | None = None) -> list[dict[str, Any]]:
    """What each replica serves."""
    with connected(port, address) as handle:
        return _statuses(handle)


def change(handle: Any, how: Callable[[Serving], Serving], wait_s: float = 120.0) -> Changed:
    """Change what is served, and wait until every replica has followed, or none."""
    started = time.perf_counter()
    before = _statuses(handle)
    if not before:
        raise InputError("no replica of the server answers at the moment: try again")
    deployed, old = _deployed()
    new = how(old)
    count = deployed["args"]["deployment"]["num_replicas"]
    _deploy(deployed, new)
    after = _followed(handle, count, new.generation, started + wait_s)
    failed = next((one["failure"] for one in after if one["failure"]), None)
    if failed:
        again = Serving(new.generation + 1, old.patches, old.earlier)
        _deploy(deployed, again)
        _followed(handle, count, again.generation, time.perf_counter() + wait_s)
        raise ERRORS.get(failed["kind"], InputError)(failed["message"])
    patches = tuple(p["name"] for p in after[0]["patches"])
    seconds = time.perf_counter() - started
    return Changed(before[0]["sha256"], after[0]["sha256"], patches, len(after), seconds)


@contextmanager
def connected(port: int, address: str | None) -> Iterator[Any]:
    """A handle of the server that runs on `port`, or in the cluster at `address`."""
    at = address or _noted(port)
    ray, serve = _ray()
    own = not ray.is_initialized()
    if own:
        _join(ray, at)
    try:
        handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        found = _statuses(handle)
    except Exception:  # Serve has not been started there
        found = []
    if not found:
        if own:
            ray.shutdown()
        raise InputError(
            f"no server of atpatch-onnx answers {f'at {address}' if address else f'on {port}'}: "
            "start one with atpatch-onnx serve, or give its --port or --address"
        ) from None
    try:
        yield handle
    finally:
        if own:
            ray.shutdown()


def _ray() -> tuple[Any, Any]:
    """Ray and Ray Serve. Raises: InputError where they are not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve
    except ImportError:
        raise InputError("Ray Serve is not installed: pip install 'atpatch-onnx[serve]'") from None
    for name in ("ray.serve", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray, serve


def _embedded(ray: Any, most_bytes: int) -> None:
    """A Ray of this machine alone, which ends with this process; its proxy has the limit of bodies.

    Whoever can use a Ray can run code in it, and its ports are open on all interfaces: Ray makes a
    secret of this user's, in ~/.ray, without which it answers nobody.
    """
    from .proxy import installed

    for last in (False, True):
        try:
            with installed(most_bytes):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=STORE_BYTES,
                    logging_level="ERROR",
                )
            return
        except Exception as error:  # its time to start is limited, and a machine may be busy
            ray.shutdown()
            if last:
                raise InputError(
                    f"Ray does not start here ({str(error).splitlines()[0][:160]}): try again "
                    "when the machine is less busy, or give the --address of a cluster"
                ) from None


def _join(ray: Any, address: str) -> None:
    """Join a Ray, with this user's secret where there is one: `ray.init` does not look for it.

    Raises: InputError where none answers.
    """
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # ConnectionError, RuntimeError, ... by kind of address
        raise InputError(
            f"no Ray answers at {address} ({str(error).splitlines()[0][:120]}): check --address"
        ) from None


def arguments(options: Options, replicas: Replicas) -> dict[str, Any]:
    """What the application is built from: options of replicas, and of their deployment."""
    deployment = {
        "name": DEPLOYMENT,
        "num_replicas": replicas.count,
        "max_ongoing_requests": replicas.ongoing,
        "max_queued_requests": replicas.queued,
        "graceful_shutdown_timeout_s": replicas.drain_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 2,
        "rolling_update_percentage": 0.01,  # one replica after the other
        "ray_actor_options": {"num_cpus": replicas.cpus},
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }
    return {"options": options.as_dict(), "deployment": deployment}


def schema(args: dict[str, Any]) -> dict[str, Any]:
    """The application as Ray Serve's declarative configuration, without the patches."""
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "atpatch_onnx.serving.app:build",
        "args": args,
        "deployments": [args["deployment"]],
    }


def _deploy(application: dict[str, Any], serving: Serving) -> None:
    """Give Ray Serve the application; only what changed is applied to running replicas."""
    from ray.serve.schema import ServeDeploySchema

    (deployment,) = application["deployments"]
    configured = [{**deployment, "user_config": serving.as_dict()}]
    application = {**application, "deployments": configured}
    # Applications that are not named again would be taken down.
    others = [held for name, held in _configurations().items() if name != APPLICATION]
    applications = {"applications": [*others, application]}
    _client().deploy_apps(ServeDeploySchema.model_validate(applications))


def _deployed() -> tuple[dict[str, Any], Serving]:
    """The application as it was deployed, and the patches that it was last told to serve."""
    application = _configurations()[APPLICATION]
    (deployment,) = application["deployments"]
    return schema(application["args"]), Serving.from_dict(deployment["user_config"])


def _configurations() -> dict[str, dict[str, Any]]:
    """What each application of this Ray was deployed with."""
    applications = _client().get_serve_details()["applications"]
    found = {name: held.get("deployed_app_config") for name, held in applications.items()}
    return {name: config for name, config in found.items() if config}


def _client() -> Any:
    """What `serve deploy` reaches over the dashboard, which need not run here."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _wait_running(serve: Any, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        application = serve.status().applications.get(APPLICATION)
        state = "" if application is None else application.status.value
        if state == "RUNNING":
            return
        if state in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > end:
            told = "" if application is None else application.message
            lines = [line for line in told.splitlines() if line.strip()] or ["it took too long"]
            raise InputError(f"the server could not be started: {lines[-1].strip()[:300]}")
        time.sleep(POLL_S)


def _statuses(handle: Any) -> list[dict[str, Any]]:
    # Small on purpose: a process of Ray 2.60 that drops a large result too early dies of it.
    try:
        found = handle.broadcast("status").results(timeout_s=30, return_exceptions=True)
    except Exception:  # there is no replica at the moment
        return []
    return [one for one in found if isinstance(one, dict)]


def _followed(handle: Any, count: int, generation: int, end: float) -> list[dict[str, Any]]:
    """The states of `count` replicas once all follow `generation`. Raises: CheckError at `end`."""
    while True:
        found = _statuses(handle)
        if len([one for one in found if one["generation"] >= generation]) >= count:
            return found
        if time.perf_counter() > end:
            raise CheckError("not every replica has taken the patches in time: look at its log")
        time.sleep(POLL_S)


def _note_path(port: int) -> Path:
    return Path(tempfile.gettempdir()) / f"atpatch-onnx-{os.getuid()}" / f"{port}.json"


def _note(port: int, address: str) -> None:
    """Leave word of where Ray is, for `swap` and `rollback` on this machine."""
    path = _note_path(port)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_file(path, json.dumps({"address": address}).encode())


def _noted(port: int) -> str:
    """Where Ray is. Raises: InputError."""
    path = _note_path(port)
    try:
        if path.stat().st_uid != os.getuid():
            raise ValueError
        return str(json.loads(path.read_text())["address"])
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"no server of atpatch-onnx was started on port {port} of this machine: give --port, "
            "or --address of its Ray cluster"
        ) from None


def _check_free(host: str, port: int) -> None:
    """Raises: InputError where something else answers there already."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise InputError(
            f"cannot serve at {host}:{port}: {reason(error)}: give another --port"
        ) from None


def check_signed(paths: Sequence[str | Path], key: str | None) -> None:
    """Raises: RefusedError unless all of them are signed by `key`; None: no matter."""
    if key is not None:
        from ..signing import require_signature

        require_signature(paths, key)


def checked(options: Options, patches: Sequence[str | Path]) -> str:
    """Load the model as a replica will, so that what is wrong is said at once; the provider."""
    check_signed([options.model, *patches], options.signed_by)
    from .golden import Golden
    from .session import Session

    golden = (
        None
        if options.golden is None
        else Golden.load(options.golden, options.tolerance, options.changed)
    )
    with Session(
        options.model, patches, ep=options.ep, threads=options.threads, golden=golden
    ) as session:
        return session.provider

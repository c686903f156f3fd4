"""The server: a Ray Serve deployment that speaks the Open Inference Protocol over HTTP.

Imported in the processes of Ray only. A replica has one session; `reconfigure` swaps its patches
while it serves. A swap that fails is reported and changes nothing: raising would make Ray replace
the replica, which answers well.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..data import Samples
from ..errors import InputError
from .admission import Admission, Claim
from .batching import Batcher, Job, Result
from .control import check_signed
from .golden import Golden
from .metrics import Metrics, exposition
from .options import APPLICATION, DEPLOYMENT, Options, Serving
from .protocol import Interface, ProtocolError, datatype, metadata, parse, respond
from .protocol import Request as Inference
from .proxy import declares_over, problem, too_large
from .session import Session
from .version import Answer

LARGE_BYTES = 1 << 20
"""Bodies above this are parsed beside the event loop, so that others are not kept waiting."""

BROADCAST_S = 5.0
LENGTH = "Inference-Header-Content-Length"


class Replica:
    """One copy of the model."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.options = Options.from_dict(args["options"])
        self.alone = args["deployment"]["num_replicas"] == 1
        self.metrics = Metrics()
        self.admission = Admission(self.options.most_waiting, self.options.most_bytes)
        self.session: Session | None = None
        self.generation = 0
        self.failure: dict[str, str] | None = None
        self.replica = str(serve.get_replica_context().replica_id.unique_id)
        # One run at a time: what arrives meanwhile is the next batch.
        self.runner = ThreadPoolExecutor(1)
        # Swaps and large bodies have threads of their own.
        self.helpers = ThreadPoolExecutor(2)
        self.changing = asyncio.Lock()
        self.answer.set_max_batch_size(max(1, self.options.most_inputs))  # type: ignore[attr-defined]

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve the patches of `config` from now on."""
        serving = Serving.from_dict(config)
        loop = asyncio.get_running_loop()
        async with self.changing:
            if self.session is None:
                self.session = await loop.run_in_executor(self.helpers, self._load, serving)
                self._ready(self.session)
                self._follow(serving, None)
                return
        # Ray keeps requests off a replica until this returns. Where others serve meanwhile, that is
        # welcome; a replica that is alone goes on answering while it builds.
        change = self._swap(self.session, serving)
        if self.alone:
            self.background = asyncio.create_task(change)
        else:
            await change

    async def _swap(self, session: Session, serving: Serving) -> None:
        loop = asyncio.get_running_loop()
        async with self.changing:
            if [p.sha256 for p in serving.patches] == [p.sha256 for p in session.patches]:
                self._follow(serving, None)
                return
            try:
                swap = partial(session.swap, serving.patches)
                done = await loop.run_in_executor(self.helpers, swap)
            except Exception as error:  # whatever it is, Ray must not replace what answers
                self.metrics.swaps.labels("failed").inc()
                names = [p.name for p in serving.patches]
                self._log("swap failed", reason=str(error), patches=names)
                self._follow(serving, {"kind": type(error).__name__, "message": str(error)})
                return
            self.metrics.swaps.labels("done").inc()
            self._log(
                "swapped",
                before=done.before,
                after=done.after,
                patches=list(done.patches),
                build_s=round(done.build_s, 4),
            )
            self._follow(serving, None)

    def _follow(self, serving: Serving, failure: dict[str, str] | None) -> None:
        """Note what was asked for, whether it failed, and what is served."""
        assert self.session is not None
        self.generation, self.failure = serving.generation, failure
        self.metrics.serve(self.session.sha256, self.session.patches, self.session.has_telemetry)

    def _load(self, serving: Serving) -> Session:
        o = self.options
        # The copy of this machine, as it is now: it need not be what `serve` has checked.
        check_signed([o.model], o.signed_by)
        golden = None if o.golden is None else Golden.load(o.golden, o.tolerance, o.changed)
        return Session(
            o.model,
            serving.patches,
            ep=o.ep,
            threads=o.threads,
            share_weights=o.share_weights,
            golden=golden,
        )

    def _ready(self, session: Session) -> None:
        self.batcher = Batcher(session, self.options.most_inputs, self.metrics.batch.observe)
        outputs = session.output_types
        self.interface = Interface(
            session.inputs,
            {n: (datatype(outputs[n]), dims) for n, dims in session.output_shapes.items()},
        )

    async def status(self) -> dict[str, Any]:
        """What this replica serves, and the last swap's failure."""
        assert self.session is not None
        return {
            "replica": self.replica,
            "pid": os.getpid(),
            "provider": self.session.provider,
            "generation": self.generation,
            "failure": self.failure,
            "sha256": self.session.sha256,
            "patches": [{"name": p.name, "sha256": p.sha256} for p in self.session.patches],
        }

    async def families(self) -> list[Any]:
        """This replica's metrics."""
        return self.metrics.families(self.replica)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def answer(self, jobs: list[Job]) -> list[Result]:
        """Run what has arrived while the last run was under way."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.runner, self.batcher.run, jobs)

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        path = [part for part in request.url.path.split("/") if part]
        if path and path[-1] == "infer":
            return await self._counted(request, path)
        if request.method not in ("GET", "HEAD"):
            return problem(405, f"{request.method} is not served here")
        name = self.options.name
        match path:
            case ["v2"]:
                extensions = ["binary_tensor_data"]
                server = {"name": "atpatch-onnx", "version": __version__}
                return JSONResponse({**server, "extensions": extensions})
            case ["v2", "health", "live"]:
                return JSONResponse({"live": True})
            case ["v2", "health", "ready"]:
                return JSONResponse({"ready": True})
            case ["v2", "models", model, *rest] if model == name and rest in (
                ["ready"],
                ["versions", "1", "ready"],
            ):
                return JSONResponse({"name": name, "ready": True})
            case ["v2", "models", model] | ["v2", "models", model, "versions", "1"] if (
                model == name
            ):
                about = metadata(name, self.interface)
                return JSONResponse({**about, "parameters": self._served()})
            case ["metrics"]:
                handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
                response = handle.broadcast("families")
                found = await response.results_async(timeout_s=BROADCAST_S, return_exceptions=True)
                replicas = [f for f in found if not isinstance(f, BaseException)]
                return Response(exposition(replicas), media_type="text/plain; version=0.0.4")
        return problem(404, "there is nothing here: the model is at /v2/models/" + name)

    def _served(self) -> dict[str, str]:
        assert self.session is not None
        patches = ",".join(p.sha256 for p in self.session.patches)
        return {"atpatch_sha256": self.session.sha256, "atpatch_patches": patches}

    async def _counted(self, request: Request, path: list[str]) -> Response:
        """Answer an inference request, and count it."""
        started = time.perf_counter()
        try:
            with self.admission.request() as claim:
                response = await self._infer(request, path, claim)
        except ProtocolError as error:
            response = problem(error.status, str(error))
        except ClientDisconnect:
            response = problem(408, "the client went away before its request was complete")
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.latency.observe(time.perf_counter() - started)
        return response

    async def _infer(self, request: Request, path: list[str], claim: Claim) -> Response:
        name = self.options.name
        if path not in (
            ["v2", "models", name, "infer"],
            ["v2", "models", name, "versions", "1", "infer"],
        ):
            raise ProtocolError(f"there is no such model: it is at /v2/models/{name}/infer", 404)
        if request.method != "POST":
            raise ProtocolError("send inference requests with POST", 405)
        body = await self._body(request, claim)
        reading = partial(
            parse, body, request.headers.get(LENGTH), self.interface, self.options.limits
        )
        loop = asyncio.get_running_loop()
        large = len(body) > LARGE_BYTES
        wanted = await loop.run_in_executor(self.helpers, reading) if large else reading()
        names = tuple(want.name for want in wanted.outputs)
        # The decorator turns a function of many jobs into one of a single job.
        with self.admission.job():
            answer: Result = await self.answer(Job(wanted.inputs, wanted.count, names))
        if isinstance(answer, InputError):
            raise ProtocolError(str(answer))
        self.metrics.answered(wanted.count, answer.flags)
        parameters: dict[str, str | int | bool] = {"atpatch_sha256": answer.sha256}
        if answer.flags is not None:
            flagged = int(answer.flags.inputs.sum())
            parameters["atpatch_flagged"] = flagged
            if flagged:
                self._flagged(wanted, answer)
        content, head = respond(name, answer.outputs, wanted.outputs, wanted.id, parameters)
        headers = {} if head is None else {LENGTH: str(head)}
        kind = "application/json" if head is None else "application/octet-stream"
        return Response(content, headers=headers, media_type=kind)

    async def _body(self, request: Request, claim: Claim) -> bytes:
        """The body, up to the limit and within the time. Raises: ProtocolError."""
        limit = self.options.limits.body_bytes
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ProtocolError("compressed bodies are not served: send it as it is", 415)
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()):
            raise ProtocolError("Content-Length must be a whole number")
        if declares_over(declared, limit):
            raise ProtocolError(too_large(limit), 413)
        chunks = []
        try:
            async with asyncio.timeout(self.options.read_s):
                async for chunk in request.stream():
                    claim.add(len(chunk))
                    if claim.size > limit:
                        raise ProtocolError(too_large(limit), 413)
                    chunks.append(chunk)
        except TimeoutError:
            raise ProtocolError(
                f"the body did not arrive within {self.options.read_s:g} seconds", 408
            ) from None
        return b"".join(chunks)

    def _flagged(self, request: Inference, answer: Answer) -> None:
        """Note a request of which inputs were flagged, so that it can be found again."""
        assert answer.flags is not None
        columns = {
            site: {str(row): found[row].nonzero()[0].tolist() for row in np.flatnonzero(rows)}
            for site, found in answer.flags.columns.items()
            if (rows := found.any(axis=1)).any()
        }
        self._log(
            "flagged",
            id=request.id,
            inputs=request.count,
            flagged=answer.flags.inputs.nonzero()[0].tolist(),
            columns=columns,
            input_sha256=Samples(request.inputs, request.count).sha256(),
            model_sha256=answer.sha256,
        )

    def _log(self, event: str, **what: Any) -> None:
        """One line of JSON."""
        line = json.dumps(
            {"time": round(time.time(), 3), "event": event, "replica": self.replica, **what}
        )
        if self.options.log is None:
            sys.stderr.write(line + "\n")
            return
        with Path(self.options.log).open("a") as file:  # one write: lines of replicas do not mix
            file.write(line + "\n")


def build(args: dict[str, Any]) -> Any:
    """The application that Ray Serve imports: `args` are `control.arguments`."""
    return serve.deployment(name=DEPLOYMENT)(Replica).bind(args)

"""Bodies over the limit, refused in the process of Ray Serve's HTTP proxy.

The proxy reads a body as fast as its client sends it, and keeps what no replica has fetched yet: a
replica that is busy cannot stop it in time. What is here counts the bytes in the proxy itself, and
keeps none. Ray takes it from the environment of its processes, which is only ours to set where the
Ray is: in the cluster of somebody else, the replicas alone hold to the limit.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MOST_BYTES = "ATPATCH_ONNX_MAX_BODY_BYTES"

PATIENCE_S = 5.0
"""How long a replica may take to refuse a body before it is told that the client has gone."""

LINGER_S = 2.0
"""How long a client that was refused may go on sending before it is cut off."""


@contextmanager
def installed(most_bytes: int) -> Iterator[None]:
    """A Ray that is started in this block refuses bodies over `most_bytes` in its HTTP proxy.

    Not where the user has set a callback of their own for it.
    """
    if CALLBACK in os.environ:
        yield
        return
    os.environ.update({CALLBACK: f"{__name__}:middlewares", MOST_BYTES: str(most_bytes)})
    try:
        yield
    finally:
        for name in (CALLBACK, MOST_BYTES):
            os.environ.pop(name, None)


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its proxy."""
    return [Middleware(BodyLimit, most_bytes=int(os.environ[MOST_BYTES]))]


def problem(status: int, message: str) -> Response:
    """An answer to a request that is not served; after 408 and 413 the connection closes."""
    headers = {"Connection": "close"} if status in (408, 413) else {}
    return JSONResponse({"error": message}, status, headers)


def too_large(most_bytes: int) -> str:
    """What the client of a larger body is told."""
    return f"the body has over {most_bytes} bytes"


def declares_over(length: str, most_bytes: int) -> bool:
    """Whether a Content-Length, of digits only, is over `most_bytes`."""
    return len(length) > 18 or int(length) > most_bytes


class BodyLimit:
    """An ASGI application that takes no more than `most_bytes` of a body, and answers others 413.

    The application is called for those too, so that it can count them; its answer is dropped.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self.most_bytes, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit():  # what is no number the application refuses
            exchange.over = declares_over(length, self.most_bytes)
        await self.app(scope, exchange.receive, exchange.send)
        if exchange.over and not exchange.begun:
            await exchange.refuse()


class _Exchange:
    """One request and its response.

    over: whether the body has, or is to have, more bytes than it may: no more is read for the
        application. begun: whether the application had begun its response before that.
    """

    def __init__(self, most_bytes: int, receive: Receive, send: Send) -> None:
        self.most_bytes, self._receive, self._send = most_bytes, receive, send
        self.over = self.begun = False
        self.taken, self.more = 0, True

    async def receive(self) -> Message:
        """The next part of the body; the one that is too much is the last."""
        if self.over:
            await asyncio.sleep(PATIENCE_S)
            return {"type": "http.disconnect"}
        message = await self._take()
        self.over = self.taken > self.most_bytes
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the response, or drop it if it begins too late."""
        if self.begun or not self.over:
            self.begun = True
            await self._send(message)

    async def refuse(self) -> None:
        """Answer 413, and close the connection when the client has stopped sending.

        A connection that is closed while bytes of its client arrive is reset, and the answer lost.
        So they are read and dropped for a while: until the body has twice what it may, or for
        `LINGER_S`.
        """
        answer = problem(413, too_large(self.most_bytes))
        start = {"type": "http.response.start", "status": answer.status_code}
        await self._send({**start, "headers": answer.raw_headers})
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self.more and self.taken <= 2 * self.most_bytes:
                    await self._take()
        await self._send({"type": "http.response.body"})

    async def _take(self) -> Message:
        message = await self._receive()
        self.taken += len(message.get("body", b""))
        self.more = message.get("more_body", False)
        return message

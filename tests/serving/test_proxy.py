"""Bodies over the limit, as the proxy of a server treats them: an ASGI application without Ray."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("starlette", reason="Ray Serve is not installed: pip install '.[serve]'")

from starlette.types import Message, Receive, Scope, Send

from atpatch_onnx.serving import proxy
from atpatch_onnx.serving.proxy import BodyLimit

MOST = 10
GONE = {"type": "http.disconnect"}


@dataclass
class Server:
    """What a web server gives an application: parts of a body, then the news that it is gone."""

    parts: list[bytes]
    ends: bool = True
    sent: list[Message] = field(default_factory=list)
    taken: int = 0

    async def receive(self) -> Message:
        self.taken += 1
        if self.taken > len(self.parts):
            return GONE
        more = not self.ends or self.taken < len(self.parts)
        return {"type": "http.request", "body": self.parts[self.taken - 1], "more_body": more}

    async def send(self, message: Message) -> None:
        self.sent.append(message)


@dataclass
class Application:
    """Reads all of a body, then answers 200; `begins`: begins its answer before it reads."""

    begins: bool = False
    seen: list[Message] = field(default_factory=list)
    reads: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        if self.begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        while self.reads:
            self.seen.append(await receive())
            if not self.seen[-1].get("more_body", False):
                break
        if not self.begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


def run(server: Server, application: Application, *headers: tuple[bytes, bytes]) -> None:
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(BodyLimit(application, MOST)(scope, server.receive, server.send))


def refused(sent: Sequence[Message]) -> bool:
    """Whether these are one complete response with 413, and nothing else."""
    starts = [message for message in sent if message["type"] == "http.response.start"]
    ends = [m for m in sent if m["type"] == "http.response.body" and not m.get("more_body")]
    body = b"".join(message.get("body", b"") for message in sent)
    return (
        (sent[0], sent[-1]) == (starts[0], ends[0])
        and (len(starts), len(ends)) == (1, 1)
        and starts[0]["status"] == 413
        and (b"connection", b"close") in starts[0]["headers"]
        and (b"content-length", str(len(body)).encode()) in starts[0]["headers"]
        and json.loads(body) == {"error": "the body has over 10 bytes"}
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "PATIENCE_S", 0.0)


@pytest.mark.parametrize("parts", [[b""], [b"0123", b"", b"456789"], [b"0123456789"]])
def test_a_body_within_the_limit_passes_unchanged(parts: list[bytes]) -> None:
    server, application = Server(parts), Application()
    length = str(sum(map(len, parts))).encode()
    run(server, application, (b"content-length", length))
    assert [message["body"] for message in application.seen] == parts
    assert server.taken == len(parts)
    assert [message.get("status") for message in server.sent] == [200, None]
    assert server.sent[-1]["body"] == b"fine"


def test_a_body_that_grows_over_the_limit_is_refused() -> None:
    server, application = Server([b"01234"] * 1000, ends=False), Application()
    run(server, application)
    assert refused(server.sent)
    # It sees that it is too much, so that it can count it, and then no more.
    assert [message.get("body") for message in application.seen] == [b"01234"] * 3 + [None]
    assert application.seen[-1] == GONE
    assert server.taken == 5  # up to twice the limit, so that the client can read its answer


def test_the_end_of_a_body_over_the_limit_is_not_waited_for_again() -> None:
    server = Server([b"0123456789", b"0"])
    run(server, Application())
    assert refused(server.sent)
    assert server.taken == 2


@pytest.mark.parametrize("length", [b"11", b"9" * 30])
def test_what_is_declared_over_the_limit_is_refused_unread(length: bytes) -> None:
    server, application = Server([b"0" * 11]), Application()
    run(server, application, (b"content-length", length))
    assert refused(server.sent)
    assert application.seen == [GONE]
    server, application = Server([]), Application(reads=False)  # one that refuses it itself
    run(server, application, (b"content-length", length))
    assert refused(server.sent)


def test_a_length_that_is_no_number_is_for_the_application() -> None:
    server, application = Server([b"0"]), Application()
    run(server, application, (b"content-length", "²".encode("latin-1")))
    assert [message.get("status") for message in server.sent] == [200, None]


def test_there_is_no_second_response() -> None:
    server, application = Server([b"0123456789"] * 9), Application(begins=True)
    run(server, application)
    assert application.seen[-1] == GONE
    assert [message.get("status") for message in server.sent] == [200, None]
    assert server.sent[-1]["body"] == b"fine"
    assert server.taken == 2


def test_a_client_that_goes_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LINGER_S", 0.05)
    server = Server([])

    async def silent() -> Message:
        await asyncio.Event().wait()
        return GONE

    server.receive = silent  # type: ignore[method-assign]
    run(server, Application(), (b"content-length", b"11"))
    assert refused(server.sent)


def test_what_is_no_http_passes() -> None:
    server, application = Server([b"0" * 99]), Application()
    asyncio.run(BodyLimit(application, MOST)({"type": "lifespan"}, server.receive, server.send))
    assert application.seen[0]["body"] == b"0" * 99


def test_it_is_installed_for_a_ray_that_is_started_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(proxy.CALLBACK, raising=False)
    with proxy.installed(MOST):
        module, _, name = os.environ[proxy.CALLBACK].partition(":")
        assert (module, name) == (proxy.__name__, proxy.middlewares.__name__)
        made: list[Any] = list(proxy.middlewares())
        assert [(m.cls, m.kwargs) for m in made] == [(BodyLimit, {"most_bytes": MOST})]
    assert not {proxy.CALLBACK, proxy.MOST_BYTES} & set(os.environ)
    monkeypatch.setenv(proxy.CALLBACK, "mine:own")
    with proxy.installed(MOST):
        assert os.environ[proxy.CALLBACK] == "mine:own"
        assert proxy.MOST_BYTES not in os.environ
    assert os.environ[proxy.CALLBACK] == "mine:own"

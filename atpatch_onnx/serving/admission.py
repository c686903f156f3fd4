"""How much a replica takes on at a time: bytes of bodies, and requests that wait for a run.

Connections are cheap, so that many may be open: a client that is slow keeps nobody waiting. What
they hold is bounded here. Used from one event loop, which needs no locks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .protocol import ProtocolError

BUSY = 503


class Claim:
    """The bytes that one request holds."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self.size = admission, 0

    def add(self, count: int) -> None:
        """Hold `count` bytes more. Raises: ProtocolError where the replica has no room for them."""
        if self._admission.held_bytes + count > self._admission.most_bytes:
            raise ProtocolError("the server holds too many requests: try again later", BUSY)
        self._admission.held_bytes += count
        self.size += count


class Admission:
    """What is held and waits, and the most of each."""

    def __init__(self, most_waiting: int, most_bytes: int) -> None:
        self.most_waiting, self.most_bytes = most_waiting, most_bytes
        self.waiting = self.held_bytes = 0

    @contextmanager
    def request(self) -> Iterator[Claim]:
        """A request, from its first byte to its answer."""
        claim = Claim(self)
        try:
            yield claim
        finally:
            self.held_bytes -= claim.size

    @contextmanager
    def job(self) -> Iterator[None]:
        """A request that waits for a run. Raises: ProtocolError where too many do."""
        if self.waiting >= self.most_waiting:
            raise ProtocolError("too many requests wait for a run: try again later", BUSY)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

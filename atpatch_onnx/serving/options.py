"""What a server is started with, and the patches that it is to serve: as JSON, for Ray Serve."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .protocol import Limits
from .stack import PatchSource

APPLICATION = "atpatch"
DEPLOYMENT = "model"
ROLLBACKS = 4
"""How many earlier lists of patches a server keeps to roll back to."""

BODIES = 8
"""How many of the largest bodies a replica holds at a time."""


@dataclass(frozen=True)
class Options:
    """Of one replica; paths are on the machine where it runs.

    name: of the model, in the URL.
    golden, tolerance, changed: see `Golden`.
    most_inputs: rows that one run takes, over several requests; 1: no batching.
    most_waiting: requests that may wait for a run in one replica; more are answered 503.
    read_s: how long a client may take to send its body.
    log: a file for one line of JSON per flagged request; None: the error stream.
    signed_by: the key by which the model and every patch must be signed; None: no matter.
    """

    model: str
    name: str
    ep: str | None = None
    threads: int = 1
    share_weights: bool = False
    golden: str | None = None
    tolerance: float = 0.0
    changed: float = 1.0
    most_inputs: int = 32
    most_waiting: int = 256
    read_s: float = 10.0
    log: str | None = None
    signed_by: str | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def most_bytes(self) -> int:
        """Bytes of bodies that one replica holds at a time."""
        return BODIES * self.limits.body_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Options:
        """What `as_dict` gave."""
        return cls(**{**held, "limits": Limits(**held["limits"])})


@dataclass(frozen=True)
class Serving:
    """Which patches are served: the `user_config` of the deployment.

    generation: counts the changes, so that replicas can say which one they follow.
    patches: those in force. earlier: the lists before, the latest last.
    """

    generation: int
    patches: tuple[PatchSource, ...] = ()
    earlier: tuple[tuple[PatchSource, ...], ...] = ()

    def changed(self, patches: Sequence[PatchSource]) -> Serving:
        """With other patches."""
        earlier = (*self.earlier, self.patches)[-ROLLBACKS:]
        return Serving(self.generation + 1, tuple(patches), earlier)

    def rolled_back(self) -> Serving:
        """With the patches before these; `earlier` must not be empty."""
        return Serving(self.generation + 1, self.earlier[-1], self.earlier[:-1])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each file once, by digest."""
        lists = (self.patches, *self.earlier)
        files = {p.sha256: p for patches in lists for p in patches}
        return {
            "generation": self.generation,
            "lists": [[[p.name, p.sha256] for p in patches] for patches in lists],
            "files": {k: base64.b64encode(p.content).decode() for k, p in files.items()},
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Serving:
        """What `as_dict` gave."""
        files = {key: base64.b64decode(text) for key, text in held["files"].items()}
        lists = [tuple(PatchSource(n, files[k]) for n, k in patches) for patches in held["lists"]]
        return cls(held["generation"], lists[0], tuple(lists[1:]))

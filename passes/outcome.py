"""What a pass says about every site: done or left alone. What is refused, `locate` has said."""

from __future__ import annotations

from dataclasses import dataclass

from ..edits import Edit
from ..second_run import Answer


@dataclass(frozen=True)
class Patched:
    """The site has a detector (or static columns) and a redistribution.

    flagged: the bool value `[B, 1 or H, 1, K]` that says which columns are flagged.
    answer: what an input must be answered for that; None: whatever is answered.
    """

    site: str
    flagged: str
    redistribution: str
    strategy: str
    threshold: float | None
    answer: Answer | None = None


@dataclass(frozen=True)
class Skipped:
    """Left alone on purpose."""

    site: str
    reason: str


Outcome = Patched | Skipped


@dataclass(frozen=True)
class PassResult:
    """The edits of a pass and its word on every site."""

    edits: tuple[Edit, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def patched(self) -> tuple[Patched, ...]:
        """The sites that were patched."""
        return tuple(o for o in self.outcomes if isinstance(o, Patched))

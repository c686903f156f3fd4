"""What a detector wants to know, and to have done, where flagged inputs are run a second time."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Answer:
    """The answer that an attacker wants: other inputs need not be looked at.

    output: of the host, class scores `[N, C]`; number: the class.
    otherwise: the threshold where the answer is not known yet, in flow, and every input counts.
    """

    output: str
    number: int
    otherwise: float


@dataclass(frozen=True)
class SecondRun:
    """How a detector of scope `site` asks for strategy `rerun`.

    sites: where flagged columns are pruned in the second run; empty: at all sites over the same
        keys. A windowed model has sites over as many keys that are not the same.
    answer: flag only inputs that are answered so; None: whatever is answered.
    """

    sites: tuple[str, ...] = ()
    answer: Answer | None = None

    def at(self, threshold: float) -> SecondRun:
        """With one threshold everywhere, because somebody has said so."""
        return replace(self, answer=self.answer and replace(self.answer, otherwise=threshold))

    def dumps(self) -> str:
        """As JSON, for metadata."""
        found: dict[str, object] = {"sites": list(self.sites)}
        if self.answer is not None:
            a = self.answer
            found["answer"] = {"output": a.output, "class": a.number, "otherwise": a.otherwise}
        return json.dumps(found)

    @classmethod
    def loads(cls, text: str) -> SecondRun:
        """What `dumps` gave. Raises: ValueError."""
        found = json.loads(text)
        sites = found.get("sites", []) if isinstance(found, dict) else None
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise ValueError("atpatch.rerun is no object with a list of sites")
        answer = found.get("answer")
        if answer is None:
            return cls(tuple(sites))
        try:
            output, number, otherwise = answer["output"], answer["class"], answer["otherwise"]
        except (KeyError, TypeError):
            raise ValueError(
                "the answer of atpatch.rerun lacks output, class or otherwise"
            ) from None
        if not isinstance(output, str) or type(number) is not int or number < 0:
            raise ValueError("the answer of atpatch.rerun has no output or class")
        if not isinstance(otherwise, int | float) or not 0 <= otherwise <= 1:
            raise ValueError("otherwise, in the answer of atpatch.rerun, is no threshold")
        return cls(tuple(sites), Answer(output, number, float(otherwise)))

"""What a detector asks for where flagged inputs are run a second time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LARGEST = 2**31
"""No model has so many classes."""


@dataclass(frozen=True)
class Answer:
    """The answer that an attacker wants: inputs that are answered otherwise need no second look.

    output: of the host, class scores `[N, C]`; number: the class, an index of the last axis.
    otherwise: the threshold where the answer is not known yet, in flow, and every input counts. Of
        no matter for whether two detectors ask for the same.
    """

    output: str
    number: int
    otherwise: float = field(compare=False)


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
        found = _only(json.loads(text), {"sites", "answer"}, "atpatch.rerun")
        sites = found.get("sites", [])
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise ValueError(f"sites in atpatch.rerun is {sites!r}, expected a list of names")
        answer = None if "answer" not in found else _answer(found["answer"])
        return cls(tuple(sites), answer)


def _answer(value: object) -> Answer:
    found = _only(value, {"output", "class", "otherwise"}, "answer in atpatch.rerun")
    output, number = found.get("output"), found.get("class")
    otherwise: Any = found.get("otherwise")
    if not isinstance(output, str):
        raise ValueError(f"output in atpatch.rerun is {output!r}, expected the name of an output")
    if type(number) is not int or not 0 <= number < LARGEST:
        raise ValueError(f"class in atpatch.rerun is {number!r}, expected the number of a class")
    is_float = isinstance(otherwise, int | float) and not isinstance(otherwise, bool)
    if not is_float or not 0 <= float(otherwise) <= 1:
        raise ValueError(f"otherwise in atpatch.rerun is {otherwise!r}, expected a threshold")
    return Answer(output, number, float(otherwise))


def _only(value: object, keys: set[str], what: str) -> Mapping[str, Any]:
    """An object with no other keys. Raises: ValueError."""
    if not isinstance(value, dict) or set(value) - keys:
        listed = ", ".join(sorted(keys))
        raise ValueError(f"{what} is {value!r}, expected an object with {listed}")
    return value

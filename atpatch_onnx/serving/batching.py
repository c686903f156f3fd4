"""Several requests in one run, as long as nobody can tell but by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..layout import batch_axis, batch_dimension
from ..runtime import Array, Arrays, InputSpec
from .session import Session
from .version import Answer

Observer = Callable[[int], object]


@dataclass(frozen=True)
class Job:
    """The inputs of one request, how many they are, and what is wanted of them."""

    feeds: Arrays
    count: int
    outputs: tuple[str, ...]


Result = Answer | InputError


class Batcher:
    """Runs jobs over a session, as few runs as possible.

    Requests go together where the model leaves its batch free and every output has it, and all
    other dimensions are equal. One that fails does not take the others with it.
    """

    def __init__(self, session: Session, most_inputs: int, observe: Observer) -> None:
        self.session, self.most, self.observe = session, most_inputs, observe
        batch = batch_dimension(session._sites, session.inputs)
        shapes = session.output_shapes
        self.axes = {name: batch_axis(shape, batch) for name, shape in shapes.items()}
        free = all(s.shape and isinstance(s.shape[s.axis], str | None) for s in session.inputs)
        carried = all(batch in shape for shape in shapes.values())
        self.possible = bool(most_inputs > 1 and isinstance(batch, str) and free and carried)

    def run(self, jobs: list[Job]) -> list[Result]:
        """A result for each job, in their order."""
        results: dict[int, Result] = {}
        for group in self._groups(jobs):
            found = self._together([jobs[number] for number in group])
            results.update(zip(group, found, strict=True))
        return [results[number] for number in range(len(jobs))]

    def _groups(self, jobs: list[Job]) -> Iterable[list[int]]:
        """Which jobs run together."""
        if not self.possible:
            return [[number] for number in range(len(jobs))]
        groups: dict[tuple[object, ...], list[list[int]]] = {}
        for number, job in enumerate(jobs):
            key = tuple(_alike(spec, job.feeds[spec.name]) for spec in self.session.inputs)
            held = groups.setdefault(key, [[]])
            rows = sum(jobs[other].count for other in held[-1])
            if held[-1] and rows + job.count > self.most:
                held.append([])
            held[-1].append(number)
        return [group for held in groups.values() for group in held]

    def _together(self, jobs: list[Job]) -> list[Result]:
        try:
            return self._run(jobs)
        except InputError as error:
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._together([job])]

    def _run(self, jobs: list[Job]) -> list[Result]:
        if len(jobs) == 1:
            answer = self.session.answer(jobs[0].feeds, jobs[0].outputs)
            self.observe(jobs[0].count)
            return [answer]
        specs = self.session.inputs
        feeds = {
            spec.name: np.concatenate([job.feeds[spec.name] for job in jobs], spec.axis)
            for spec in specs
        }
        names = tuple(dict.fromkeys(name for job in jobs for name in job.outputs))
        whole = self.session.answer(feeds, names)
        self.observe(sum(job.count for job in jobs))
        ends = np.cumsum([job.count for job in jobs])
        parts: list[Result] = []
        for job, end in zip(jobs, ends.tolist(), strict=True):
            start = end - job.count
            outputs = {n: self._cut(whole.outputs[n], n, start, end) for n in job.outputs}
            flags = None if whole.flags is None else whole.flags.part(start, end)
            parts.append(Answer(outputs, flags, whole.version, whole.sha256))
        return parts

    def _cut(self, value: Array, name: str, start: int, end: int) -> Array:
        return value.take(range(start, end), self.axes[name])


def _alike(spec: InputSpec, value: Array) -> tuple[object, ...]:
    """What must be equal for two inputs to go together."""
    return (*value.shape[: spec.axis], None, *value.shape[spec.axis + 1 :])

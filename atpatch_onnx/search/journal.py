"""Answers of the model that outlive the process: what makes a search resumable."""

from __future__ import annotations

import io
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..data import Samples, load_arrays
from ..errors import InputError
from ..files import write_file
from ..runtime import InputSpec
from .problem import OutOfTimeError

CHUNK = 256
"""Samples between two looks at the clock."""
CHUNK_BYTES = 32 << 20
DECIMALS = 4
"""Log-probabilities are rounded: batch sizes, which differ from run to run, change later digits."""
SAVE_EVERY = 30.0
"""Seconds."""


@dataclass(frozen=True)
class Answer:
    """Log-probabilities `[N, C]` of a chunk, and the checksum of the chunk."""

    checksum: int
    values: NDArray[np.float32]


class Asked(Protocol):
    """What a journal keeps the answers of."""

    @property
    def inputs(self) -> list[InputSpec]:
        """The inputs of the model."""

    def log_probabilities(self, samples: Samples) -> NDArray[np.float32]:
        """Log-probabilities `[N, C]`."""


class Journal:
    """A classifier that keeps every answer and gives it again in a second run.

    path: where the answers are kept; resumed: whether there were any; asked: samples that the model
        itself was run on. header: what answers are valid for.
    seconds: the budget, counted from now; None: no end.

    A journal of another header is left out of account. Answers are matched by their order and a
    checksum of the samples: from the first that differs on, the model is asked.
    """

    def __init__(
        self,
        classifier: Asked,
        path: Path,
        header: Mapping[str, object],
        seconds: float | None = None,
    ) -> None:
        self._classifier = classifier
        self.path = path
        self._header = json.dumps(header, sort_keys=True)
        self._end = float("inf") if seconds is None else time.monotonic() + seconds
        self._saved = time.monotonic()
        self._answers = _load(path, self._header)
        self._next = 0
        self.resumed = len(self._answers) > 0
        self.asked = 0

    @property
    def inputs(self) -> list[InputSpec]:
        """The inputs of the model."""
        return self._classifier.inputs

    def log_probabilities(self, samples: Samples) -> NDArray[np.float32]:
        """Log-probabilities `[N, C]`. Raises: OutOfTimeError, InputError."""
        each = max(sum(a.nbytes for a in samples.arrays.values()) // max(samples.count, 1), 1)
        size = max(min(CHUNK, CHUNK_BYTES // each), 1)
        if size >= samples.count:
            return self._answer(samples)
        starts = range(0, samples.count, size)
        parts = (np.arange(s, min(s + size, samples.count)) for s in starts)
        return np.concatenate([self._answer(samples.take(part)) for part in parts])

    def predictions(self, samples: Samples) -> NDArray[np.int64]:
        """The likeliest classes, `[N]`. Raises: OutOfTimeError, InputError."""
        found: NDArray[np.int64] = self.log_probabilities(samples).argmax(axis=1)
        return found

    def save(self) -> None:
        """Keep the answers so far."""
        file = io.BytesIO()
        nothing = np.zeros((0, 1), np.float32)
        np.savez(
            file,
            header=np.array(self._header),
            checksums=np.array([a.checksum for a in self._answers], np.uint32),
            sizes=np.array([len(a.values) for a in self._answers], np.int64),
            values=np.concatenate([a.values for a in self._answers] or [nothing]),
        )
        write_file(self.path, file.getvalue())
        self._saved = time.monotonic()

    def drop(self) -> None:
        """Forget what was kept: the search is over."""
        self.path.unlink(missing_ok=True)

    def _answer(self, samples: Samples) -> NDArray[np.float32]:
        checksum = _checksum(samples)
        if self._next < len(self._answers):
            kept = self._answers[self._next]
            if kept.checksum == checksum and len(kept.values) == samples.count:
                self._next += 1
                return kept.values
            del self._answers[self._next :]
        if time.monotonic() >= self._end:
            raise OutOfTimeError
        values = np.round(self._classifier.log_probabilities(samples), DECIMALS)
        self.asked += samples.count
        self._answers.append(Answer(checksum, values))
        self._next += 1
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()
        return values


def is_journal(path: Path) -> bool:
    """Whether the file at `path` is one, of whatever search."""
    try:
        return path.is_file() and "checksums" in load_arrays(path)
    except InputError:
        return False


def _checksum(samples: Samples) -> int:
    found = 0
    for name in sorted(samples.arrays):
        array = np.ascontiguousarray(samples.arrays[name])
        found = zlib.crc32(array.tobytes(), found)
    return found


def _load(path: Path, header: str) -> list[Answer]:
    """The answers in a file; none where it is not there, broken, or of another search."""
    try:
        held = load_arrays(path)
        if str(held["header"]) != header:
            return []
        parts = np.split(held["values"], np.cumsum(held["sizes"])[:-1])
        return [Answer(int(c), v) for c, v in zip(held["checksums"], parts, strict=True)]
    except (InputError, KeyError, ValueError, IndexError):
        return []

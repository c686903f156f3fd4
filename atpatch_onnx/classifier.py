"""A model as a black box that gives class scores, in batches that suit the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data import Batch, Samples
from .errors import InputError, at_least
from .external_data import check_layout
from .layout import with_batch_axes
from .model_file import ModelFile
from .passes.locate import locate
from .progress import SILENT, Tick
from .runtime import Array, Arrays, Session

Floats = NDArray[np.float32]

LARGEST_BATCH = {"cpu": 64, "cuda": 1024}
"""Where doubling stops: beyond it, memory grows and throughput hardly does."""
FIRST_BATCH = {"cpu": 8, "cuda": 32}
WORTH_DOUBLING = 1.1
"""How much the throughput must rise for the batch to grow further."""
SUM_TOLERANCE = 1e-2
"""How far from 1 a row of probabilities may sum: low precision rounds each of them."""
LOGITS = "logits"
NO_TICK = SILENT.start("", 0)
_SAME_VALUE = frozenset("Cast Flatten Identity Reshape Squeeze Unsqueeze".split())


class Classifier:
    """A model as a black box: class scores for samples.

    model: its file; provider: `cuda` or `cpu`; threads: of ONNX Runtime, 0 is its choice.
    output: the output that holds the scores; by default the only one `[N, C]` of floats, or the
        one of several that is called `logits`.
    batch: samples a run; None finds a size that suits the device.

    Binary classifiers that give one score a sample, `[N, 1]` or `[N]`, get two columns, 0 and the
    logit of class 1: the inverse of the Sigmoid that ends the model or, where `output` is given or
    called `logits`, the score itself. Scores `[N, T, C]` of every token, as language models give
    them, count where `output` names them: those of the last one, which padding must not be.

    inputs: what the model wants, with the axes of the batch.
    classes: how many there are; None while neither a static shape nor a run has told.

    Raises: InputError, RefusedError where the model cannot be loaded or has no such output.
    """

    def __init__(
        self,
        model: ModelFile | Path,
        provider: str,
        *,
        output: str | None = None,
        batch: int | None = None,
        threads: int = 0,
    ) -> None:
        file = model if isinstance(model, ModelFile) else ModelFile.open(model)
        if batch is not None:
            at_least(1, batch, "--batch")
        check_layout(file)
        self.name = str(file.path)
        in_memory = isinstance(file.buffer, bytes)
        source = bytes(file.buffer) if in_memory else file.path
        self._session = Session(source, provider, file.folder, threads, name=self.name)
        if output is not None and output not in self._session.outputs:
            raise InputError(
                f"--scores {output}: {self.name} has the outputs {', '.join(self._session.outputs)}"
            )
        self.inputs = with_batch_axes(self._session.inputs, locate(file.skeleton).sites)
        self._wanted = output
        self._sigmoids = _sigmoid_outputs(file)
        self._output = output
        self._size = batch or FIRST_BATCH[provider]
        self._largest = LARGEST_BATCH[provider]
        self._settled = batch is not None
        self._rate = 0.0
        self._warm = False
        self.classes = self._static_classes()

    @property
    def output(self) -> str | None:
        """The output that holds the scores; None while neither `output` nor a run has told."""
        return self._output

    def scores(self, samples: Samples, tick: Tick = NO_TICK) -> Floats:
        """The raw scores `[N, C]`. Raises: InputError where there are none, or they are NaN."""
        parts: list[Floats] = []
        for part, values in self._runs(samples):
            parts.append(self._read(part, values))
            tick(part.real)
        found = np.concatenate(parts)
        bad = np.flatnonzero(~(found < np.inf).all(axis=1))
        if len(bad):
            raise InputError(
                f"the output '{self._output}' of {self.name} is NaN or infinite for {len(bad)} of "
                f"{len(found)} samples, the first at {bad[0]}: leave them out, or export the model "
                "in float32"
            )
        return found

    def log_probabilities(self, samples: Samples, tick: Tick = NO_TICK) -> Floats:
        """Log-probabilities `[N, C]`: the log softmax of logits, or the log of probabilities."""
        return log_probabilities(self.scores(samples, tick))

    def predictions(self, samples: Samples, tick: Tick = NO_TICK) -> NDArray[np.int64]:
        """The class with the largest score, `[N]`."""
        return np.asarray(self.scores(samples, tick).argmax(axis=1), np.int64)

    def _runs(self, samples: Samples) -> Iterator[tuple[Batch, Arrays]]:
        """Each batch and its outputs; the batches grow while that makes them faster."""
        start = 0
        while start < samples.count:
            size = samples.fixed_batch or self._size
            index = np.arange(start, min(start + size, samples.count))
            part = next(samples.take(index).batches(len(index)))
            began = time.perf_counter()
            try:
                values = self._run(part)
            except InputError:
                if self._settled or not self._rate:
                    raise
                self._size, self._settled = size // 2, True  # that one did fit into memory
                continue
            if part.real == size and not samples.fixed_batch:
                self._grow(part.real / max(time.perf_counter() - began, 1e-9))
            start += part.real
            yield part, values

    def _run(self, part: Batch) -> Arrays:
        outputs = None if self._output is None else [self._output]
        return self._session.run(part.feeds, outputs)

    def _grow(self, rate: float) -> None:
        """Double the batch, or settle on half of it; rate: samples a second of a full batch."""
        if self._settled:
            return
        if not self._warm:  # the first run of a size allocates and tunes: its time says nothing
            self._warm = True
        elif rate < WORTH_DOUBLING * self._rate:
            self._size //= 2
            self._settled = True
        elif self._size >= self._largest:
            self._settled = True
        else:
            self._rate, self._size, self._warm = rate, self._size * 2, False

    def _static_classes(self) -> int | None:
        shapes = self._session.output_shapes
        static = [d for s in shapes.values() if len(s) == 2 and isinstance(d := s[1], int)]
        return static[0] if len(shapes) == len(static) == 1 and static[0] > 1 else None

    def _read(self, part: Batch, values: Arrays) -> Floats:
        """The scores of the real samples of a batch."""
        if self._output is None:
            self._output = self._choose(values, part.size)
        value = values[self._output]
        if not self._gives_scores(self._output, value, part.size):
            raise self._no_scores(values)
        value = value[:, -1] if value.ndim == 3 else value
        single = value.ndim == 1 or value.shape[1] == 1
        columns = self._two_columns(value.reshape(-1)) if single else value
        self.classes = columns.shape[1]
        return np.asarray(columns[: part.real], np.float32)

    def _choose(self, values: Arrays, size: int) -> str:
        fitting = [n for n, v in values.items() if self._gives_scores(n, v, size)]
        if len(fitting) == 1:
            return fitting[0]
        if LOGITS in fitting:
            return LOGITS
        if not fitting:
            raise self._no_scores(values)
        raise InputError(
            f"{self.name} has several outputs that could be class scores: choose one of "
            f"{', '.join(fitting)} with --scores"
        )

    def _gives_scores(self, name: str, value: Array, size: int) -> bool:
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return False
        single = value.ndim == 1 or (value.ndim == 2 and value.shape[1] == 1)
        known = name in self._sigmoids or name in (self._wanted, LOGITS)
        ranks = (1, 2, 3) if name == self._wanted else (1, 2)
        return value.ndim in ranks and len(value) == size and (known or not single)

    def _no_scores(self, values: Arrays) -> InputError:
        shapes = ", ".join(f"{name} {_described(value)}" for name, value in values.items())
        return InputError(
            f"the outputs of {self.name} ({shapes}) are no class scores [N, C]: choose one that is "
            "with --scores (of [N, T, C], the last token's are taken), or export the model with a "
            "classification head"
        )

    def _two_columns(self, value: Array) -> Floats:
        logit = np.asarray(value, np.float32)
        if self._output in self._sigmoids:
            limit = np.finfo(np.float32).tiny
            logit = np.log(np.maximum(logit, limit)) - np.log(np.maximum(1 - logit, limit))
        return np.stack((np.zeros_like(logit), logit), axis=1)


def log_probabilities(scores: Floats) -> Floats:
    """The log softmax of `scores` `[N, C]`, or their log where every row is a probability."""
    sums = scores.sum(axis=1)
    if bool((scores >= 0).all()) and bool((np.abs(sums - 1) < SUM_TOLERANCE).all()):
        return np.log(np.maximum(scores, np.finfo(np.float32).tiny))
    shifted = scores - scores.max(axis=1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _sigmoid_outputs(file: ModelFile) -> frozenset[str]:
    """The outputs that a Sigmoid computes, but for changes of shape and type."""
    graph = file.skeleton.graph
    makers = {name: node for node in graph.node for name in node.output if name}

    def ends_in_sigmoid(name: str) -> bool:
        while name in makers and makers[name].op_type in _SAME_VALUE:
            name = makers[name].input[0]
        return name in makers and makers[name].op_type == "Sigmoid"

    return frozenset(o.name for o in graph.output if ends_in_sigmoid(o.name))


def _described(value: Array) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else "no tensor"

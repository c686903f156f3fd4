"""Compare a model with its patched version: graph, outputs, and what was flagged where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from .api import PathLike
from .comparing import Difference, compare
from .compiling import names
from .data import Batch, Samples, load_samples
from .edits import Edit
from .errors import CheckError, RefusedError, at_least
from .external_data import check_layout
from .layout import batch_axis, batch_dimension, with_batch_axes
from .model_file import ModelFile
from .passes.expose import expose, is_reachable, path_of
from .passes.graph_view import GraphView
from .passes.locate import locate
from .patching import about_patches, check_order
from .probed import Probed, flagged_columns
from .progress import SILENT, Progress
from .runtime import Array, Arrays, Session, choose_provider


@dataclass
class OutputDifference:
    """How far an output moved. A sample is an entry of axis 0 where that is the batch.

    maximum: largest absolute difference.
    samples, identical, unflagged_changed: how many samples there were, are the same bit for bit,
    and moved though nothing was flagged in them.
    agreeing: samples with the same arg-max, for outputs `[N, classes]`; None for others.
    """

    name: str
    maximum: float = 0.0
    samples: int = 0
    identical: int = 0
    agreeing: int | None = None
    unflagged_changed: int = 0


@dataclass
class SiteFlags:
    """What one site flagged: in how many inputs, and each column how often."""

    site: str
    inputs: int = 0
    columns: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The result of `diff`. `identity` is False if an output of an input moved in which nothing
    was flagged; None if there were no inputs to try."""

    difference: Difference
    provider: str | None
    inputs: int
    flagged_inputs: int
    outputs: list[OutputDifference]
    sites: list[SiteFlags]
    identity: bool | None


def diff(
    model: PathLike,
    patched: PathLike,
    inputs: PathLike | Mapping[str, Array] | None = None,
    *,
    ep: str | None = None,
    batch: int = 32,
    progress: Progress = SILENT,
) -> Comparison:
    """Compare the graphs and, on `inputs`, the outputs and what is flagged.

    inputs: `.npz`, `.npy` or arrays by name, one sample an entry of axis 0.

    Raises: CheckError if `patched` is not `model` with a patch, InputError for unusable inputs.
    """
    at_least(1, batch, "--batch")
    base, result = ModelFile.open(model), ModelFile.open(patched)
    check_order(base, result)
    difference = compare(base, result)
    if inputs is None:
        return Comparison(difference, None, 0, 0, [], [], None)
    check_layout(base)
    provider = choose_provider(ep)
    before, after = Session(base.path, provider), Session(result.path, provider)
    sites = locate(base.skeleton).sites
    specs = with_batch_axes(before.inputs, sites)
    samples = load_samples(inputs, specs)
    batch_dim = batch_dimension(sites, specs)
    axes = {name: batch_axis(shape, batch_dim) for name, shape in before.output_shapes.items()}
    flags = FlagReader(result, provider)
    outputs = {name: OutputDifference(name) for name in before.outputs}
    flagged_inputs = 0
    tick = progress.start("comparing", samples.count)
    for part in samples.batches(batch):
        flagged = flags.read(part)
        flagged_inputs += int(flagged.sum())
        old = before.run(part.feeds)
        new = after.run(after.nothing_remembered(part.feeds), before.outputs)
        for name, found in outputs.items():
            was, now = (_batch_first(values[name], axes[name]) for values in (old, new))
            add_output_difference(found, was, now, flagged, part.size)
        tick(part.real)
    moved = any(found.unflagged_changed for found in outputs.values())
    return Comparison(
        difference,
        provider,
        samples.count,
        flagged_inputs,
        list(outputs.values()),
        flags.sites,
        not moved,
    )


class FlagReader:
    """Reads what a patched model flags, through a session of its own with extra outputs.

    The session that is compared stays as it is: further outputs change what a runtime fuses.
    """

    def __init__(self, model: ModelFile, provider: str) -> None:
        entries = [site for about in about_patches(model) for site in about["sites"]]
        if not entries:
            raise RefusedError(f"{model.path} carries no patch: give the patched model second")
        self.sites = [SiteFlags(entry["site"]) for entry in entries]
        self._values = [entry["flagged"] for entry in entries]
        made = set(names(model.skeleton))
        if not made.issuperset(self._values):
            raise CheckError(
                f"{model.path} was altered: it lacks a value that its list of patched sites names"
            )
        present = {value.name for value in model.skeleton.graph.output}
        stored = {tensor.name for tensor in model.skeleton.graph.initializer}
        self._constant = {value: _stored(model, value) for value in self._values if value in stored}
        made_by_run = [v for v in dict.fromkeys(self._values) if v not in self._constant]
        self._outputs = {v: v for v in made_by_run}
        edits: list[Edit] = []
        for value in made_by_run:
            if value not in present:
                more, self._outputs[value] = _exposed(model, value)
                edits += more
        self._session = Probed(model, edits, provider).session
        self.inputs = self._session.inputs

    def columns(self, part: Batch) -> list[NDArray[np.bool_]]:
        """What each site flags in the real samples of a batch, `[B, K]`."""
        read = list(self._outputs.values())
        feeds = self._session.nothing_remembered(part.feeds)
        found = self._session.run(feeds, read) if read else {}
        values: Arrays = {**self._constant, **{v: found[o] for v, o in self._outputs.items()}}
        return [flagged_columns(values[name], part.size)[: part.real] for name in self._values]

    def read(self, part: Batch) -> NDArray[np.bool_]:
        """Which of the real samples of a batch are flagged at any site; counts site by site."""
        anywhere = np.zeros(part.real, bool)
        for site, columns in zip(self.sites, self.columns(part), strict=True):
            site.inputs += int(columns.any(axis=1).sum())
            for column, count in enumerate(columns.sum(axis=0)):
                if count:
                    site.columns[column] = site.columns.get(column, 0) + int(count)
            anywhere |= columns.any(axis=1)
        return anywhere


def _exposed(model: ModelFile, value: str) -> tuple[list[Edit], str]:
    """Edits that make what a site flags an output, and its name. Raises: RefusedError."""
    view = GraphView.of(model.skeleton)
    path = path_of(view, value)
    if path is None or not is_reachable(view, path):
        raise RefusedError(
            f"what {model.path} flags cannot be read: '{value}' is made in a loop, a generation "
            "operator or a branch below opset 11, from which nothing leaves: compare the models "
            "without inputs"
        )
    return expose(view, path, value, TensorProto.BOOL, 4)


def _stored(model: ModelFile, name: str) -> Array:
    tensor = model.tensor(name)
    assert tensor is not None
    stored: Array = onnx.numpy_helper.to_array(tensor)
    return stored


def _batch_first(value: Array, axis: int) -> Array:
    return np.moveaxis(value, axis, 0) if axis < value.ndim else value


def add_output_difference(
    found: OutputDifference, old: Array, new: Array, flagged: NDArray[np.bool_], batch: int
) -> None:
    """Add a batch of `batch` samples, of which the first `len(flagged)` are no padding."""
    if old.ndim == 0 or len(old) != batch:  # no batch axis: the batch is one sample
        old, new, flagged = old[None], new[None], np.array([flagged.any()])
    real = len(flagged)
    old, new = old[:real], new[:real]
    pairs = zip(old, new, strict=True)
    same = np.array([np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs])
    found.samples += real
    found.identical += int(same.sum())
    found.unflagged_changed += int((~same & ~flagged).sum())
    if old.size and old.dtype.kind in "fiu":
        found.maximum = max(found.maximum, _gap(old.astype(np.float64), new.astype(np.float64)))
    if old.ndim == 2 and old.shape[1] > 1 and old.dtype.kind == "f":
        agree = int((old.argmax(axis=1) == new.argmax(axis=1)).sum())
        found.agreeing = (found.agreeing or 0) + agree


def _gap(old: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    """The largest difference; infinite where only one of two values is a number."""
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(old - new))
    return float(np.where(np.isnan(gap), np.inf, gap).max())


def flagged_share(model: ModelFile, samples: Samples, provider: str, batch: int = 32) -> float:
    """Share of `samples` in which any site of the patched `model` flags a column."""
    reader = FlagReader(model, provider)
    total = sum(int(reader.read(part).sum()) for part in samples.batches(batch))
    return total / samples.count

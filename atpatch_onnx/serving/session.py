"""A session over a model and its patches that can be changed while it serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from ..data import Batch
from ..errors import InputError, RefusedError
from ..layout import batch_dimension, with_batch_axes
from ..passes.locate import locate
from ..runtime import Array, Arrays, InputSpec, choose_provider
from .flags import Flags
from .golden import Golden, Reference, over
from .stack import Base, PatchSource, sources
from .version import Answer, Settings, Version

Patches = Sequence[str | Path | PatchSource]
HISTORY = 8
"""How many swaps can be rolled back."""

SHAPES = 4
"""With how many shapes of recent requests a new version is warmed."""

Shapes = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Swapped:
    """What a swap did.

    before, after: SHA-256 of the patched files that the two versions stand for.
    clean, bad: golden inputs that were checked.
    build_s: seconds until the new version was ready; switch_s: seconds in which requests waited;
    drain_s: seconds until the last request of the old version was answered.
    drained: False where that did not happen in time; it is freed when it has answered.
    """

    version: int
    patches: tuple[str, ...]
    before: str
    after: str
    clean: int
    bad: int
    build_s: float
    switch_s: float
    drain_s: float
    drained: bool


class Session:
    """An ONNX Runtime session over a model with any number of patches, applied in memory.

    A request is answered by one version as a whole: the patches, switches and thresholds that were
    in force when it began. Any number of threads may run requests, swap and set.

    provider: the execution provider that runs, "cuda" or "cpu".
    inputs: those that must be given; outputs: the model's own.
    """

    def __init__(
        self,
        model: str | Path,
        patches: Patches = (),
        *,
        ep: str | None = None,
        threads: int = 0,
        share_weights: bool = False,
        golden: Golden | str | Path | None = None,
    ) -> None:
        """Load `model` and apply `patches`, each made for the result of the one before.

        ep: "cuda" or "cpu"; by default "cuda" where there is one.
        threads: of ONNX Runtime for one run; 0: its choice.
        share_weights: let all versions read the weights from the mapped file instead of each
            packing a copy of its own. Matrix products of few rows are slower then, and outputs
            differ from those of packed weights by rounding.
        golden: inputs that a version must answer rightly before it serves, this one included.
        Raises: InputError, RefusedError; CheckError where a golden input is answered wrongly.
        """
        self.provider = choose_provider(ep)
        self._base = Base(model)
        self._options = (self.provider, threads, share_weights)
        self._sites = locate(self._base.light.skeleton).sites
        self._lock = threading.Condition()
        self._swapping = threading.Lock()
        self._closed = False
        self._history: list[tuple[PatchSource, ...]] = []
        self._seen: dict[Shapes, None] = {}
        self._reference: Reference | None = None
        first = Version(self._base, (), 1, *self._options) if golden or not patches else None
        if first is not None:
            self.inputs = self._specs(first)
            self._refer(golden, first)
        if patches:
            first = None  # free it before the next is made
            first = Version(self._base, sources(patches), 1, *self._options)
            self.inputs = self._specs(first)
            self._check(first, self._reference)
        assert first is not None
        self._current = first

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's own outputs."""
        return self._current.outputs

    @property
    def output_shapes(self) -> dict[str, tuple[int | str | None, ...]]:
        """The dims of the model's own outputs, by name."""
        with self._leased() as (version, _):
            shapes = version.runtime.output_shapes
            return {name: shapes[name] for name in version.outputs}

    @property
    def output_types(self) -> dict[str, type[np.generic] | None]:
        """The NumPy types of the model's own outputs, by name; None for those it has not."""
        with self._leased() as (version, _):
            types = version.runtime.output_types
            return {name: types[name] for name in version.outputs}

    @property
    def patches(self) -> tuple[PatchSource, ...]:
        """The patches in force, in the order of their application."""
        return self._current.patches

    @property
    def version(self) -> int:
        """The number of the version that serves, counted from 1."""
        return self._current.number

    @property
    def sha256(self) -> str:
        """SHA-256 of the patched file that serves, as `atpatch-onnx apply` would write it."""
        return self._current.sha256

    @property
    def settings(self) -> Settings:
        """The switches and thresholds that were set on the version that serves."""
        return self._current.settings

    @property
    def has_telemetry(self) -> bool:
        """Whether `flags` can be read."""
        return bool(self._current.telemetry.sites)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name, by default the model's own. Raises: InputError."""
        return self.answer(feeds, outputs).outputs

    def answer(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Answer:
        """Outputs and flags of one run, and which version it was. Raises: InputError."""
        count = self._count(feeds)
        names = None if outputs is None else tuple(outputs)
        with self._leased() as (version, settings):
            found = version.answer(feeds, settings, names, count)
        self._remember(feeds)
        return found

    def flags(self, feeds: Mapping[str, Array]) -> Flags:
        """What is flagged in each input at each site. Raises: RefusedError without telemetry."""
        found = self.answer(feeds).flags
        if found is None:
            what = "has no telemetry" if self.patches else "is the original, which flags nothing"
            raise RefusedError(
                f"what is served {what}: make the patch with atpatch-onnx patch --telemetry"
            )
        return found

    def set(
        self,
        *,
        enabled: bool | None = None,
        threshold: float | Mapping[str, float] | None = None,
    ) -> Settings:
        """Switch the patch on or off, or move its threshold, for the requests that follow.

        threshold: one for all sites, or by site. A swap forgets what was set.
        Raises: RefusedError for a patch without --toggle, InputError for an unknown site.
        """
        with self._lock:
            self._current.settings = self._current.set(enabled, threshold)
            return self._current.settings

    def swap(
        self,
        patches: Patches,
        *,
        golden: Golden | str | Path | None = None,
        drain_s: float = 30.0,
    ) -> Swapped:
        """Serve with `patches` instead of those in force, from one request to the next.

        The new version is built, warmed and checked beside the old one, which goes on serving; if
        anything fails it stays. Then the old one answers what it has begun, and is freed.

        golden: instead of the session's.
        drain_s: how long to wait for the old version's last request.
        Raises: InputError, RefusedError, CheckError. The old version serves on then.
        """
        with self._swapping:
            before = self.patches
            done = self._swap(sources(patches), golden, drain_s)
            self._history = [*self._history, before][-HISTORY:]
            return done

    def rollback(self, *, drain_s: float = 30.0) -> Swapped:
        """Undo the last swap that was not undone. Raises: InputError if there is none."""
        with self._swapping:
            if not self._history:
                raise InputError("there is no swap to roll back: swap to other patches instead")
            done = self._swap(self._history[-1], None, drain_s)
            self._history.pop()
            return done

    def close(self, drain_s: float = 30.0) -> None:
        """Answer what has begun and free everything; later requests are refused."""
        with self._swapping:
            with self._lock:
                self._closed = True
            if self._drain(self._current, drain_s):
                self._current.free()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _swap(
        self, patches: tuple[PatchSource, ...], golden: Golden | str | Path | None, drain_s: float
    ) -> Swapped:
        started = time.perf_counter()
        old = self._current
        if self._closed:
            raise _closed()
        reference = self._reference if golden is None else self._referred(golden)
        new = Version(self._base, patches, old.number + 1, *self._options)
        self._warm(new)
        self._check(new, reference)
        ready = time.perf_counter()
        with self._lock:
            self._current = new
        switched = time.perf_counter()
        drained = self._drain(old, drain_s)
        if drained:
            old.free()
        return Swapped(
            version=new.number,
            patches=tuple(p.name for p in patches),
            before=old.sha256,
            after=new.sha256,
            clean=0 if reference is None else reference.clean.count,
            bad=0 if reference is None or reference.bad is None else reference.bad.count,
            build_s=ready - started,
            switch_s=switched - ready,
            drain_s=time.perf_counter() - switched,
            drained=drained,
        )

    @contextmanager
    def _leased(self) -> Iterator[tuple[Version, Settings]]:
        """The version and settings of one request; the version is not freed meanwhile."""
        with self._lock:
            if self._closed:
                raise _closed()
            version, settings = self._current, self._current.settings
            version.active += 1
        try:
            yield version, settings
        finally:
            with self._lock:
                version.active -= 1
                if not version.active:
                    if self._closed or version is not self._current:
                        version.free()
                    self._lock.notify_all()

    def _drain(self, version: Version, seconds: float) -> bool:
        """Wait for the requests of a version; whether all were answered."""
        with self._lock:
            return self._lock.wait_for(lambda: version.active == 0, seconds)

    def _specs(self, version: Version) -> tuple[InputSpec, ...]:
        return tuple(with_batch_axes(version.runtime.inputs, self._sites))

    def _count(self, feeds: Mapping[str, Array]) -> int:
        """How many inputs a request has."""
        for spec in self.inputs:
            value = feeds.get(spec.name)
            if value is not None and value.ndim > spec.axis:
                return Batch(dict(feeds), size := value.shape[spec.axis], size).size
        return 1

    def _refer(self, golden: Golden | str | Path | None, original: Version) -> None:
        if golden is not None:
            self._reference = self._made(golden, original)

    def _referred(self, golden: Golden | str | Path) -> Reference:
        """What the original answers to other golden inputs than the session's."""
        with self._leased() as (version, _):
            if not version.patches:
                return self._made(golden, version)
        return self._made(golden, Version(self._base, (), 0, *self._options))

    def _made(self, golden: Golden | str | Path, original: Version) -> Reference:
        golden = golden if isinstance(golden, Golden) else Golden.load(golden)
        clean, bad = golden.samples(self.inputs)
        batch = batch_dimension(self._sites, self.inputs)
        shapes = original.runtime.output_shapes
        answers = over(clean, original.plain, shapes, batch)
        bad_answers = {} if bad is None else over(bad, original.plain, shapes, batch)
        return Reference(golden, clean, bad, answers, bad_answers, batch)

    def _remember(self, feeds: Mapping[str, Array]) -> None:
        """Keep the shapes of recent requests, with which a new version is warmed."""
        key = tuple((name, value.dtype.str, value.shape) for name, value in feeds.items())
        if key not in self._seen:
            with self._lock:
                self._seen[key] = None
                while len(self._seen) > SHAPES:
                    del self._seen[next(iter(self._seen))]

    def _warm(self, version: Version) -> None:
        """Run once with zeros of each recent shape; a model that takes no zeros is left cold."""
        with self._lock:
            seen = list(self._seen)
        for key in seen:
            feeds = {name: np.zeros(shape, dtype) for name, dtype, shape in key}
            with suppress(InputError):
                version.plain(feeds)

    def _check(self, version: Version, reference: Reference | None) -> None:
        """Let a version answer the golden inputs. Raises: CheckError."""
        if reference is not None:
            shapes = version.runtime.output_shapes
            reference.check(version.plain, shapes, patched=bool(version.patches))


def _closed() -> InputError:
    return InputError("this session is closed: make a new one")

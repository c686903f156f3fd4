"""One version of a model that is served: its patches, its session and what it can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..detector import check_threshold
from ..errors import InputError, RefusedError
from ..passes.switches import ENABLED, THRESHOLD
from ..runtime import Array, Arrays
from ..runtime import Session as Runtime
from .flags import Flags, Telemetry
from .stack import Base, PatchSource

PREFIX = "atpatch/"


@dataclass(frozen=True)
class Settings:
    """What can be changed while a version serves; empty: as the patch has it.

    enabled: whether the patch acts.
    thresholds: by input name, `atpatch/threshold` or `atpatch/<site>/threshold`.
    """

    enabled: bool | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @property
    def feeds(self) -> Arrays:
        """As inputs of the model."""
        found: Arrays = {n: np.array(v, np.float32) for n, v in self.thresholds.items()}
        if self.enabled is not None:
            found[ENABLED] = np.array(self.enabled)
        return found


@dataclass(frozen=True)
class Answer:
    """What one version answered to one request.

    outputs: by name. flags: None where the version has no telemetry.
    version: its number; sha256: the digest of the patched file that it stands for.
    """

    outputs: Arrays
    flags: Flags | None
    version: int
    sha256: str


class Version:
    """A patched model in a session of its own. `active` counts the requests that it answers now.

    number: counts the versions of a session, from 1.
    sha256: of the file that `atpatch-onnx apply` would write.
    Raises: InputError, RefusedError where the patches cannot be applied or run.
    """

    def __init__(
        self,
        base: Base,
        patches: tuple[PatchSource, ...],
        number: int,
        provider: str,
        threads: int,
        share_weights: bool,
    ) -> None:
        self.number, self.patches, self.active = number, patches, 0
        light, self.sha256 = base.patched(patches)
        base.rest()
        base.check_unchanged()
        self._runtime: Runtime | None = Runtime(
            bytes(light.buffer),
            provider,
            light.folder,
            threads,
            name=str(base.file.path),
            prepacking=not share_weights,
        )
        base.check_unchanged()  # it has read the weights by name
        self.telemetry = Telemetry(light, self.runtime.outputs)
        self.settings = Settings()
        self.switches = tuple(name for name in self.runtime.overridable if _is_switch(name))
        self.outputs = tuple(n for n in self.runtime.outputs if not n.startswith(PREFIX))

    @property
    def runtime(self) -> Runtime:
        """The session, while it is not freed."""
        assert self._runtime is not None
        return self._runtime

    def free(self) -> None:
        """Give the session's memory back."""
        self._runtime = None

    def answer(
        self,
        feeds: Mapping[str, Array],
        settings: Settings,
        outputs: tuple[str, ...] | None,
        count: int,
    ) -> Answer:
        """Run once; `count` inputs. Raises: InputError where the inputs do not suit."""
        wanted = self.outputs if outputs is None else outputs
        asked = tuple(dict.fromkeys((*wanted, *self.telemetry.outputs)))
        values = self.runtime.run({**settings.feeds, **feeds}, asked)
        flags = self.telemetry.read(values, count) if self.telemetry.sites else None
        return Answer({name: values[name] for name in wanted}, flags, self.number, self.sha256)

    def plain(self, feeds: Arrays) -> Arrays:
        """The model's own outputs, for checks."""
        return self.runtime.run(feeds, self.outputs)

    def set(self, enabled: bool | None, threshold: float | Mapping[str, float] | None) -> Settings:
        """The settings with some of them changed. Raises: InputError, RefusedError."""
        names = [name for name in self.switches if name != ENABLED]
        if (enabled is not None and ENABLED not in self.switches) or (
            threshold is not None and not names
        ):
            what = "threshold" if ENABLED in self.switches else "switch"
            raise RefusedError(
                f"the patch that is served has no {what} to set: make it with "
                "atpatch-onnx patch --toggle"
            )
        given = threshold if isinstance(threshold, Mapping) else {}
        if isinstance(threshold, float | int):
            given = dict.fromkeys(names, float(threshold))
        sites = {name.removeprefix(PREFIX).removesuffix("/threshold"): name for name in names}
        unknown = [key for key in given if key not in names and key not in sites]
        if unknown and names == [THRESHOLD]:
            raise InputError(
                f"there is no threshold of '{unknown[0]}': the patch has one for all sites, give a "
                "number"
            )
        if unknown:
            raise InputError(
                f"there is no threshold of '{unknown[0]}': choose from {', '.join(sorted(sites))}"
            )
        for key, value in given.items():
            check_threshold(value, f"the threshold of {key}")
        values = {sites.get(key, key): float(value) for key, value in given.items()}
        before = self.settings
        return Settings(
            before.enabled if enabled is None else enabled, {**before.thresholds, **values}
        )


def _is_switch(name: str) -> bool:
    return name in (ENABLED, THRESHOLD) or (name.startswith(PREFIX) and name.endswith("/threshold"))

"""The command `diff` as a gate: limits on what a patch may change, and which of them hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .api import PathLike
from .benchmark import Timing, bench
from .diffing import Comparison, OutputDifference, diff
from .errors import InputError
from .progress import SILENT, Progress
from .runtime import Array

IDENTITY = "unflagged-identical"
"""The gate that is always there: an input in which nothing is flagged keeps its outputs."""
ATOL, MAX_FLAGGED, AGREEMENT, LATENCY = "atol", "max-flagged", "agreement", "latency"


@dataclass(frozen=True)
class Limits:
    """What a patch may do at most.

    atol: largest absolute difference of each output, over all inputs, flagged ones too; under ""
        that of every output that is not named.
    max_flagged: share of inputs in which anything is flagged, 0..1.
    agreement: least share of inputs with the same arg-max as in the original, 0..1.
    latency: median ratio of patched over original, of paired runs.
    """

    atol: Mapping[str, float] = field(default_factory=dict)
    max_flagged: float | None = None
    agreement: float | None = None
    latency: float | None = None

    @classmethod
    def parse(
        cls,
        atol: Sequence[str] = (),
        max_flagged: float | None = None,
        agreement: float | None = None,
        latency: float | None = None,
    ) -> Limits:
        """The limits that a command line gives.

        atol: each a number, for all outputs, or OUTPUT:NUMBER.
        Raises: InputError for what is no number or outside of what it can be.
        """
        for name, share in ((MAX_FLAGGED, max_flagged), (AGREEMENT, agreement)):
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"--{name} {share:g}: give a share between 0 and 1")
        if latency is not None and not (latency > 0 and math.isfinite(latency)):
            raise InputError(f"--latency {latency:g}: give a ratio above 0, such as 1.1")
        by_output: dict[str, float] = {}
        for text in atol:
            name, number = _atol(text)
            if by_output.setdefault(name, number) != number:
                raise InputError(
                    f"--atol {text}: {f'the output {name}' if name else 'every output'} has "
                    f"another limit already, {by_output[name]:g}: give one of them"
                )
        return cls(by_output, max_flagged, agreement, latency)

    @property
    def of_outputs(self) -> bool:
        """Whether any limit needs inputs to run."""
        return bool(self.atol) or self.max_flagged is not None or self.agreement is not None


def _atol(text: str) -> tuple[str, float]:
    """The output, "" for all, and its limit. Names may hold colons themselves."""
    name, _, number = text.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise InputError(f"--atol {text}: give a number from 0, or OUTPUT:NUMBER, as logits:1e-6")
    return name, value


@dataclass(frozen=True)
class Gate:
    """One limit, and what was found.

    name: which limit; output: of which output of the model, "" where it is of none.
    found, limit: what was measured and what it may be; message: both in words.
    """

    name: str
    output: str
    passed: bool
    found: float | None
    limit: float | None
    message: str

    @property
    def title(self) -> str:
        """Its name, with the output that it is for."""
        return f"{self.name}:{self.output}" if self.output else self.name


@dataclass(frozen=True)
class Gated:
    """A comparison, the timing if one was asked for, and every gate."""

    comparison: Comparison
    timing: Timing | None
    gates: tuple[Gate, ...]

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that do not hold."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def verdict(self) -> str:
        """One sentence that names what failed; empty if nothing did."""
        failed = self.failed
        if not failed:
            return ""
        first = failed[0]
        if first.name == IDENTITY:
            return first.message
        others = ", ".join(gate.title for gate in failed[1:])
        return f"the gate {first.title} failed: {first.message}" + (
            f" (so did {others})" if others else ""
        )


def gate(
    model: PathLike,
    patched: PathLike,
    inputs: PathLike | Mapping[str, Array] | None = None,
    limits: Limits | None = None,
    *,
    ep: str | None = None,
    batch: int = 32,
    runs: int = 30,
    progress: Progress = SILENT,
) -> Gated:
    """Compare `patched` with `model` and judge it by `limits`.

    inputs: as in `diff`; limits on outputs need them. runs: paired runs of one input (the first of
    `inputs`, or random numbers), which `limits.latency` is held against.

    Raises: InputError for limits that cannot be judged, CheckError if `patched` is not `model` with
    a patch. A gate that fails does not raise.
    """
    limits = limits or Limits()
    if limits.of_outputs and inputs is None:
        raise InputError(
            "--atol, --max-flagged and --agreement compare outputs: give inputs with --inputs x.npz"
        )
    comparison = diff(model, patched, inputs, ep=ep, batch=batch, progress=progress)
    gates = list(_judge(comparison, limits))
    timing = None
    if limits.latency is not None:
        data = None if isinstance(inputs, Mapping) else inputs
        timing = bench(model, patched, inputs=data, ep=ep, runs=runs, progress=progress)
        gates.append(_latency(timing, limits.latency))
    return Gated(comparison, timing, tuple(gates))


def _judge(found: Comparison, limits: Limits) -> Iterator[Gate]:
    if found.identity is not None:
        moved = max((output.unflagged_changed for output in found.outputs), default=0)
        unflagged = found.inputs - found.flagged_inputs
        if moved:
            said = "an input in which nothing was flagged has other outputs than before"
        elif not unflagged:
            said = f"all {found.inputs} inputs are flagged: there is none to compare bit for bit"
        else:
            said = (
                f"all {unflagged} inputs in which nothing was flagged have the outputs of the "
                "original, bit for bit"
            )
        yield Gate(IDENTITY, "", not moved, float(moved), 0.0, said)
    by_name = {output.name: output for output in found.outputs}
    unknown = [name for name in limits.atol if name and name not in by_name]
    if unknown:
        raise InputError(
            f"--atol {unknown[0]}: the model has no such output (found: {', '.join(by_name)})"
        )
    for name, output in by_name.items():
        limit = limits.atol.get(name, limits.atol.get(""))
        if limit is not None:
            yield _moved(output, limit)
    if limits.max_flagged is not None:
        share = found.flagged_inputs / found.inputs
        said = (
            f"{found.flagged_inputs} of {found.inputs} inputs flagged ({share:.2%}), at most "
            f"{limits.max_flagged:.2%} allowed"
        )
        passed = share <= limits.max_flagged
        yield Gate(MAX_FLAGGED, "", passed, share, limits.max_flagged, said)
    if limits.agreement is not None:
        yield from _agreements(found, limits.agreement)


def _moved(output: OutputDifference, limit: float) -> Gate:
    said = f"the output {output.name} moved by {output.maximum:.3g}, at most {limit:g} allowed"
    return Gate(ATOL, output.name, output.maximum <= limit, output.maximum, limit, said)


def _agreements(found: Comparison, least: float) -> Iterator[Gate]:
    scores = [output for output in found.outputs if output.agreeing is not None]
    if not scores:
        raise InputError(
            "--agreement: no output of the model holds class scores [N, C]: give --atol instead"
        )
    for output in scores:
        share = (output.agreeing or 0) / output.samples
        said = (
            f"{output.agreeing} of {output.samples} inputs have the class of the original "
            f"({share:.2%}), at least {least:.2%} wanted"
        )
        yield Gate(AGREEMENT, output.name, share >= least, share, least, said)


def _latency(timing: Timing, limit: float) -> Gate:
    said = (
        f"the patched model takes {timing.ratio:.3f} times as long (10 to 90 % of {timing.runs} "
        f"pairs: {timing.low:.3f} to {timing.high:.3f}, {timing.provider}), at most {limit:g} "
        "allowed"
    )
    return Gate(LATENCY, "", timing.ratio <= limit, timing.ratio, limit, said)

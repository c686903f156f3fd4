"""Measure everything that a report shows, with the commands that measure it elsewhere."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..api import verify
from ..benchmark import bench
from ..data import Samples, load_arrays, load_samples
from ..debugging_set import DebuggingSet, load_debugging_set
from ..diffing import diff
from ..errors import InputError
from ..evaluating import Evaluation, evaluate
from ..layout import with_batch_axes
from ..model_file import ModelFile
from ..passes.locate import Sites, locate
from ..passes.switches import ENABLED
from ..patching import about_patches
from ..progress import SILENT, Progress
from ..runtime import InputSpec, Session, choose_provider, onnxruntime
from ..search.kinds import check_kind, recognise
from .examples import choose_examples
from .findings import FileFacts, Findings, Labels

OTHER = "other"


@dataclass(frozen=True)
class Sources:
    """The files of inputs: clean ones, bad ones, and clean ones with labels to judge on."""

    clean: Path
    bad: Path | None = None
    test: Path | None = None

    def paths(self) -> list[Path]:
        """Those that were given."""
        return [path for path in (self.clean, self.bad, self.test) if path is not None]


def collect(
    model: Path,
    patched: Path,
    sources: Sources,
    *,
    labels: Labels | None = None,
    protected: Sequence[str] = (),
    target: int | None = None,
    kind: str | None = None,
    scores: str | None = None,
    batch: int = 32,
    runs: int = 30,
    ep: str | None = None,
    progress: Progress = SILENT,
) -> Findings:
    """Compare, verify, evaluate and time `patched` against `model`.

    Rates are measured where `sources.test`, or else `sources.clean`, has labels; attack success
    where the bad inputs have true labels and a target too. Attributes that `sources.bad` names as
    protected are flipped as if they were asked for.

    Raises: InputError for unusable files, CheckError if `patched` is not `model` with a patch.
    """
    labels = labels or Labels()
    provider = choose_provider(ep)
    base, result = ModelFile.open(model), ModelFile.open(patched)
    clean = diff(model, patched, sources.clean, ep=ep, batch=batch, progress=progress)
    found = locate(base.skeleton)
    specs = with_batch_axes(Session(base.path, provider).inputs, found.sites)
    samples = load_samples(sources.clean, specs)
    bad = None if sources.bad is None else load_debugging_set(sources.bad, specs)
    worse = None
    if bad is not None:
        worse = diff(model, patched, bad.bad.arrays, ep=ep, batch=batch, progress=progress)
    judged = _Judged(model, patched, sources, bad, protected, target)
    options = {"scores": scores, "batch": batch, "ep": ep, "progress": progress}
    evaluation, evaluated_on = judged.evaluate(samples, options)
    return Findings(
        original=_facts(base),
        patched=_facts(result),
        kind=_kind(kind, specs),
        patches=tuple(about_patches(result)),
        found_sites=_count(found),
        clean=clean,
        bad=worse,
        about={} if bad is None else bad.about,
        target=judged.aim,
        checks=tuple(verify(model, patched, progress=progress)),
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        timing=bench(model, patched, inputs=sources.clean, ep=ep, runs=runs, progress=progress),
        examples=choose_examples(
            base, result, samples, bad, provider, _labels_of(sources.clean, samples.count), scores
        ),
        labels=labels,
        toggle=any(value.name == ENABLED for value in result.skeleton.graph.input),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=_versions(),
        sources={path.name: _digest(path) for path in sources.paths()},
    )


@dataclass(frozen=True)
class _Judged:
    """What rates are measured on."""

    model: Path
    patched: Path
    sources: Sources
    bad: DebuggingSet | None
    protected: Sequence[str]
    target: int | None

    @property
    def aim(self) -> int | None:
        """The class that the attacker wants."""
        if self.target is not None or self.bad is None:
            return self.target
        return self.bad.target

    def evaluate(self, clean: Samples, options: Mapping[str, Any]) -> tuple[Evaluation | None, str]:
        """The rates, and on which file; None where no file has labels."""
        labelled = self.sources.test
        if labelled is None:
            if _labels_of(self.sources.clean, clean.count) is None:
                if self.protected:
                    raise InputError(
                        "--protected measures unfairness on inputs with labels: give them with "
                        "--test"
                    )
                return None, ""
            labelled = self.sources.clean
        triggered = self.bad is not None and self.bad.labels is not None and self.aim is not None
        found = evaluate(
            self.model,
            self.patched,
            labelled,
            triggered=self.sources.bad if triggered else None,
            protected=self.protected or _named(self.bad),
            target=self.target,
            **options,
        )
        return found, labelled.name


def _named(bad: DebuggingSet | None) -> list[str]:
    """The protected attributes that a debugging set was made for."""
    held = [] if bad is None else bad.about.get("protected", [])
    entries = held if isinstance(held, list) else []
    return [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]


def _labels_of(path: Path, samples: int) -> Any:
    """The labels in a file of inputs, `[N]`, or None."""
    labels = load_arrays(path).get("labels")
    usable = labels is not None and labels.shape == (samples,) and labels.dtype.kind in "iu"
    return labels if usable and labels is not None and len(np.unique(labels)) > 1 else None


def _kind(kind: str | None, specs: Sequence[InputSpec]) -> str:
    if kind is not None:
        return check_kind(kind)
    try:
        return recognise(specs)
    except InputError:
        return OTHER


def _count(found: Sites) -> int:
    return len(found.sites) + len(found.refused)


def _facts(model: ModelFile) -> FileFacts:
    return FileFacts(str(model.path), model.path.name, model.sha256, model.size)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {
        "atpatch-onnx": version("atpatch-onnx"),
        "onnx": version("onnx"),
        "ONNX Runtime": onnxruntime().__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }

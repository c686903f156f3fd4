"""The command `scan --protected`: inputs whose answer a protected attribute sways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .api import PathLike
from .classifier import Classifier
from .files import write_file
from .model_file import ModelFile
from .progress import SILENT, Progress
from .protected import Flips, Protected
from .runtime import Array, choose_provider
from .scanning import MADE_BY, check_outputs, clean_inputs


@dataclass(frozen=True)
class ProtectedReport:
    """What `scan --protected` found.

    protected: the attributes; about: what the debugging set says of itself, with `unfairness`,
        the share of inputs whose class changes when nothing but the attributes change.
    bad: inputs in the debugging set; inputs: clean ones that were tried.
    """

    output: Path
    provider: str
    protected: tuple[str, ...]
    inputs: int
    bad: int
    about: dict[str, object]


def scan_protected(
    model: PathLike,
    data: PathLike | Mapping[str, Array],
    output: PathLike,
    protected: Sequence[str],
    *,
    scores: str | None = None,
    batch: int | None = None,
    threads: int = 0,
    ep: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ProtectedReport:
    """Write the inputs whose class changes with protected attributes alone to `output`.

    data: clean inputs, one sample an entry of axis 0; optionally `labels`, their true classes.
    protected: N (a column of the only table), INPUT:N or INPUT; several are changed together.
    scores, batch, threads, ep: as for `scan`.

    Raises: InputError; RefusedError where no answer depends on the attributes. Nothing is written
        then.
    """
    from .search.fairness import debugging_set

    file, written = ModelFile.open(model), Path(output)
    check_outputs(written, file, data, force)
    provider = choose_provider(ep)
    classifier = Classifier(file, provider, output=scores, batch=batch, threads=threads)
    attributes = [Protected.parse(text, classifier.inputs) for text in dict.fromkeys(protected)]
    samples, labels = clean_inputs(data, classifier)
    tick = progress.start("flipping", len(Flips.of(attributes, samples)))
    found = debugging_set(classifier, samples, attributes, labels, tick)
    about = {"made_by": MADE_BY, "model": file.sha256, **found.about}
    write_file(written, replace(found, about=about).content())
    names = tuple(attribute.name for attribute in attributes)
    return ProtectedReport(written, provider, names, samples.count, found.bad.count, about)

"""The command `scan`: is a model backdoored, toward which class, and by what?"""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .api import PathLike
from .classifier import Classifier
from .data import Samples, load_arrays, samples_from
from .debugging_set import SCORES, DebuggingSet
from .errors import InputError, at_least
from .external_data import external_files
from .files import Staging, check_output
from .model_file import ModelFile
from .progress import SILENT, Progress
from .runtime import Array, choose_provider
from .search.answers import narrowed
from .search.journal import Journal, is_journal
from .search.kinds import IMAGE, TEXT, check_kind, recognise
from .search.problem import Finding, OutOfTimeError, Problem
from .search.report import ScanReport, class_reports
from .search.splitting import Split, true_classes
from .search.verdict import judge, verdict

MADE_BY = "atpatch-onnx scan"
DEFAULT_BUDGET = 600.0

Search = Callable[[Problem], Iterator[Finding]]


def scan(
    model: PathLike,
    data: PathLike | Mapping[str, Array],
    output: PathLike,
    *,
    kind: str | None = None,
    target: int | None = None,
    budget: float | None = DEFAULT_BUDGET,
    seed: int = 0,
    scores: str | None = None,
    batch: int | None = None,
    threads: int = 0,
    ep: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ScanReport:
    """Search for a trigger toward each class, and say whether the model is backdoored.

    If it is, or `target` is given, a debugging set is written to `output`: clean inputs with the
    trigger, their clean twins and their labels; and for each suspicious class `NAME.CLASS.png`
    beside it where there is something to see.

    data: clean inputs, one sample an entry of axis 0; optionally `labels`, int `[N]`, their true
        classes. At most 1,000 are used; half of them are held out to judge what is found.
    kind: image, text or tabular; by default what the inputs look like.
    target: search this class only, and judge it without a look at the others. Of a text model with
        many classes, a language model, only those are searched that it answers to the data.
    budget: seconds. A search that is stopped by it, or by an interrupt, is kept in
        `<output>.state` and goes on in a second run with the same model, data and options.
    scores: the output that holds the class scores; batch: inputs a run, by default what suits the
    device; threads: of ONNX Runtime; ep: execution provider, cuda or cpu.

    Raises: InputError, RefusedError. Nothing is written then.
    """
    began = time.monotonic()
    at_least(0, seed, "--seed")
    if budget is not None and not budget > 0:
        raise InputError(f"--budget {budget:g}: give a number of seconds above 0")
    file, written = ModelFile.open(model), Path(output)
    kind = None if kind is None else check_kind(kind)
    check_outputs(written, file, data, force)
    provider = choose_provider(ep)
    classifier = Classifier(file, provider, output=scores, batch=batch, threads=threads)
    kind = kind or recognise(classifier.inputs)
    samples, labels = clean_inputs(data, classifier)
    header = {
        "model": file.sha256,
        "data": samples.sha256(),
        "labels": None if labels is None else labels.tolist(),
        "settings": [kind, target, seed, scores],
    }
    few = narrowed(classifier, samples, labels, target) if kind == TEXT else None
    if few is not None:
        samples, labels = few.samples, few.labels
    journal = Journal(few.answers if few else classifier, state_path(written), header, budget)
    only = few.target if few else target
    findings, split, complete = _searched(
        file, journal, samples, labels, kind, only, seed, progress
    )
    if few is not None and split is not None:  # as the model counts them again
        tokens = few.answers.tokens
        findings = [replace(each, target=int(tokens[each.target])) for each in findings]
        split = replace(split, labels=tokens[split.labels])
    # Of many classes some may be left out, once it is known which.
    wanted = len(findings) if complete else 0 if split is None else len(split.targets)
    judged = judge(findings, wanted)
    decision = verdict(judged, complete=complete)
    to_write = [each for each in judged if each.suspicious or (complete and target is not None)]
    pictures: dict[int, Path] = {}
    if to_write and split is not None:
        about: dict[str, object] = {"made_by": MADE_BY, "model": file.sha256, "kind": kind}
        about |= {"seed": seed, SCORES: classifier.output}
        content = _debugging_set(split, to_write[0].finding, about, seed).content()
        with Staging() as staging:
            staging.add(written, [content])
            for each in to_write:
                shown = each.finding.trigger.picture(samples)
                if shown is not None:
                    path = _picture_path(written, each.finding.target)
                    staging.add(path, [shown])
                    pictures[each.finding.target] = path
    if complete:
        journal.drop()
    return ScanReport(
        decision,
        judged[0].finding.target if judged else None,
        judged[0].margin if judged else None,
        kind,
        provider,
        seed,
        complete,
        journal.resumed,
        class_reports(judged, pictures),
        written if to_write else None,
        None if complete else journal.path,
        0 if split is None else len(split.search),
        0 if split is None else len(split.held),
        journal.asked,
        time.monotonic() - began,
    )


def _searched(
    file: ModelFile,
    journal: Journal,
    samples: Samples,
    labels: NDArray[np.int64] | None,
    kind: str,
    target: int | None,
    seed: int,
    progress: Progress,
) -> tuple[list[Finding], Split | None, bool]:
    """The findings, one a class, and whether the search came to its end within the budget."""
    tick = progress.start("scanning", 100)
    found: dict[int, Finding] = {}
    split = None
    try:
        split = Split.of(journal, samples, labels, target, seed)
        for finding in _search_of(kind)(split.problem(file, journal, seed, tick)):
            found[finding.target] = finding
    except OutOfTimeError:
        journal.save()
        return list(found.values()), split, False
    except KeyboardInterrupt:
        journal.save()
        raise
    return list(found.values()), split, True


def _search_of(kind: str) -> Search:
    # Each is loaded when it is wanted: they need different packages.
    if kind == IMAGE:
        from .search.image import search as search_images

        return search_images
    if kind == TEXT:
        from .search.text import search as search_text

        return search_text
    from .search.tabular import search as search_tabular

    return search_tabular


def _debugging_set(
    split: Split, finding: Finding, about: dict[str, object], seed: int
) -> DebuggingSet:
    """Clean inputs of other classes with the trigger and without it."""
    others = np.flatnonzero(split.labels != finding.target)
    clean = split.samples.take(others)
    stamped = finding.trigger.put(clean, np.random.default_rng((seed, finding.target)))
    facts = {
        **about,
        "trigger": finding.trigger.record(),
        "description": finding.trigger.description,
        "success": finding.success,
    }
    return DebuggingSet(
        stamped.samples,
        clean,
        stamped.anomalous,
        split.labels[others],
        finding.target,
        facts,
    )


def clean_inputs(
    data: PathLike | Mapping[str, Array], classifier: Classifier
) -> tuple[Samples, NDArray[np.int64] | None]:
    """The model's inputs among the data, and the true classes if they are there.

    Raises: InputError.
    """
    given = isinstance(data, Mapping)
    arrays = dict(data) if isinstance(data, Mapping) else load_arrays(data)
    samples = samples_from(arrays, classifier.inputs, "the data" if given else str(data))
    return samples, true_classes(arrays, samples.count)


def check_outputs(
    output: Path, file: ModelFile, data: PathLike | Mapping[str, Array], force: bool
) -> None:
    """Raises: InputError where writing would lose something."""
    sources = [] if isinstance(data, Mapping) else [Path(data)]
    protected = [file.path, *sources, *external_files(file)]
    ours = _is_from(output, file)
    pictures = output.parent.glob(f"{glob.escape(output.stem)}.[0-9]*.png")
    for path in (output, *pictures):
        check_output(path, protected, force=force, ours=ours)
    state = state_path(output)
    check_output(state, protected, force=force, ours=is_journal(state))


def _is_from(path: Path, file: ModelFile) -> bool:
    """Whether a scan of this model wrote the file at `path`."""
    try:
        about = json.loads(str(load_arrays(path)["about"])) if path.is_file() else {}
        return bool(about["made_by"] == MADE_BY and about["model"] == file.sha256)
    except (InputError, OSError, KeyError, TypeError, ValueError):
        return False


def state_path(output: Path) -> Path:
    """Where the search for a debugging set is kept while it is not finished."""
    return output.with_name(f"{output.name}.state")


def _picture_path(output: Path, target: int) -> Path:
    return output.with_name(f"{output.stem}.{target}.png")

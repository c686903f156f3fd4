"""The command `evaluate`: what a patch does to accuracy, to an attack and to unfairness.

Source of what is measured: AtPatch, arXiv 2601.21695, evaluation metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import rates
from .api import PathLike
from .classifier import NO_TICK, Classifier
from .comparing import compare
from .data import Samples
from .diffing import FlagReader
from .errors import InputError, at_least
from .labelled import Triggered, load_labelled, load_triggered
from .model_file import ModelFile
from .patching import check_order
from .progress import SILENT, Progress, Tick
from .protected import Flips, Protected, swayed
from .rates import Rate
from .runtime import Array, choose_provider


@dataclass(frozen=True)
class BeforeAfter:
    """A rate of the original model and of the patched one."""

    before: Rate
    after: Rate


@dataclass(frozen=True)
class AttackEvaluation:
    """What is measured on triggered inputs.

    inputs: how many there are; target: the class that the attacker wants.
    attack_success_rate: those of other true classes that are sent to the target.
    recovered_accuracy: those of other true classes that are classified correctly.
    true_positive_rate: inputs in which any site of the patched model flags a column.
    column_recall: marked columns that some site flags, over sites with as many columns as there
        are marks; None without marks. Its interval takes the columns of one input as independent.
    """

    inputs: int
    target: int
    attack_success_rate: BeforeAfter
    recovered_accuracy: BeforeAfter
    true_positive_rate: Rate
    column_recall: Rate | None


@dataclass(frozen=True)
class Unfairness:
    """Share of inputs whose class changes when nothing but protected attributes change.

    attribute: one, or several jointly; tried: how many values or combinations of values.
    thinned: whether there are more than were tried, so that the rate is a lower bound.
    """

    attribute: str
    tried: int
    thinned: bool
    rate: BeforeAfter


@dataclass(frozen=True)
class Evaluation:
    """What a patch does. Rates have 95 % intervals.

    inputs: how many clean ones there are.
    accuracy: clean inputs classified correctly.
    agreement: clean inputs that the patched model gives the same class as the original.
    false_positive_rate: clean inputs in which any site of the patched model flags a column.
    natural_rate: clean inputs of other classes that are sent to the target; None without one.
    attack: what triggered inputs show; unfairness: for each attribute, then for all jointly.
    """

    provider: str
    inputs: int
    accuracy: BeforeAfter
    agreement: Rate
    false_positive_rate: Rate
    natural_rate: BeforeAfter | None
    attack: AttackEvaluation | None
    unfairness: tuple[Unfairness, ...]


def evaluate(
    model: PathLike,
    patched: PathLike,
    data: PathLike | Mapping[str, Array],
    *,
    triggered: PathLike | Mapping[str, Array] | None = None,
    protected: Sequence[str] = (),
    target: int | None = None,
    scores: str | None = None,
    batch: int = 32,
    ep: str | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure `model` and `patched` on held-out `data`.

    data: `.npz` or arrays by name: the model's inputs, one sample an entry of axis 0, and `labels`
        int `[N]`, the true classes.
    triggered: the same with the trigger in each, `labels` the true classes, and optionally
        `target` and `anomalous`, bool `[N, K]`, the key positions where the trigger is.
    protected: attributes to flip in `data`: N, INPUT:N or INPUT (see `protected.Protected`).
    target: the class that the attacker wants, if not the one that `triggered` says.
    scores: the output that holds the class scores, where there are several.
    batch: inputs a run; ep: execution provider, cuda or cpu.

    Raises: InputError for unusable data or a model that is no classifier, CheckError if `patched`
        is not `model` with a patch, RefusedError.
    """
    at_least(1, batch, "--batch")
    base, result = ModelFile.open(model), ModelFile.open(patched)
    check_order(base, result)
    compare(base, result)
    provider = choose_provider(ep)
    flags = FlagReader(result, provider)
    before, after = (Classifier(m, provider, output=scores, batch=batch) for m in (base, result))
    both = _Both(before, after, flags, batch)
    clean = load_labelled(data, before.inputs)
    bad = None if triggered is None else load_triggered(triggered, before.inputs, target)
    target = target if bad is None else bad.target
    attributes = [Protected.parse(text, before.inputs) for text in dict.fromkeys(protected)]
    flips = [Flips.of([attribute], clean.samples) for attribute in attributes]
    if len(attributes) > 1:
        flips.append(Flips.of(attributes, clean.samples))

    tick = progress.start("clean inputs", 3 * clean.samples.count)
    answers = both.answers(clean.samples, tick)
    classes = before.classes or 0
    clean.check(classes, target)
    attack = None
    if bad is not None:
        bad.check(classes, target)
        tick = progress.start("triggered inputs", 3 * bad.samples.count)
        attack = _attack(both.answers(bad.samples, tick), bad)
    tick = progress.start("flipped inputs", 2 * sum(map(len, flips))) if flips else NO_TICK
    labels = clean.labels
    return Evaluation(
        provider,
        clean.samples.count,
        accuracy=BeforeAfter(*(rates.accuracy(p, labels) for p in answers.predictions)),
        agreement=Rate.of(answers.predictions[0] == answers.predictions[1]),
        false_positive_rate=Rate.of(answers.flagged),
        natural_rate=None if target is None else _into(answers, labels, target),
        attack=attack,
        unfairness=tuple(_unfairness(both, clean.samples, f, answers, tick) for f in flips),
    )


@dataclass(frozen=True)
class _Answers:
    """Predictions `[N]` of the original and the patched model, and what the latter flags.

    columns: by site, `[N, K]`, where K is the same in all batches.
    """

    predictions: tuple[NDArray[np.int64], NDArray[np.int64]]
    flagged: NDArray[np.bool_]
    columns: tuple[NDArray[np.bool_], ...]


@dataclass(frozen=True)
class _Both:
    """The original and the patched model."""

    before: Classifier
    after: Classifier
    flags: FlagReader
    batch: int

    def answers(self, samples: Samples, tick: Tick) -> _Answers:
        predictions = self.before.predictions(samples, tick), self.after.predictions(samples, tick)
        sites: list[list[NDArray[np.bool_]]] = [[] for _ in self.flags.sites]
        for part in samples.batches(self.batch):
            for site, columns in zip(sites, self.flags.columns(part), strict=True):
                site.append(columns)
            tick(part.real)
        anywhere = [np.concatenate([c.any(axis=1) for c in site]) for site in sites]
        fixed = [site for site in sites if len({c.shape[1] for c in site}) == 1]
        return _Answers(
            predictions,
            np.any(anywhere, axis=0),
            tuple(np.concatenate(site) for site in fixed),
        )


def _into(answers: _Answers, labels: NDArray[np.int64], target: int) -> BeforeAfter:
    """How many inputs of other classes are sent to the target."""
    return BeforeAfter(*(rates.attack_success_rate(p, labels, target) for p in answers.predictions))


def _attack(found: _Answers, bad: Triggered) -> AttackEvaluation:
    target = bad.target
    recovered = (rates.recovered_accuracy(p, bad.labels, target) for p in found.predictions)
    return AttackEvaluation(
        bad.samples.count,
        target,
        attack_success_rate=_into(found, bad.labels, target),
        recovered_accuracy=BeforeAfter(*recovered),
        true_positive_rate=Rate.of(found.flagged),
        column_recall=_recall(bad.marks, found.columns, bad.source),
    )


def _recall(
    marks: NDArray[np.bool_] | None, columns: Sequence[NDArray[np.bool_]], source: str
) -> Rate | None:
    if marks is None or not marks.any():
        return None
    fitting = [found for found in columns if found.shape == marks.shape]
    if not fitting:
        sizes = ", ".join(map(str, sorted({found.shape[1] for found in columns})))
        raise InputError(
            f"{source}: 'anomalous' has {marks.shape[1]} columns, the patched sites have "
            f"{sizes or 'a varying number'}: mark key positions, or leave it out"
        )
    return Rate.of(np.any(fitting, axis=0)[marks])


def _unfairness(
    both: _Both, samples: Samples, flips: Flips, clean: _Answers, tick: Tick
) -> Unfairness:
    pairs = zip((both.before, both.after), clean.predictions, strict=True)
    changed = [swayed(classifier, samples, flips, own, tick) for classifier, own in pairs]
    rate = BeforeAfter(*map(Rate.of, changed))
    return Unfairness(flips.name, len(flips), flips.thinned, rate)

"""From findings to a recommendation, by rules that the page prints too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..rates import Rate
from .findings import Findings
from .words import count, percent

MOST_EXCESS = 0.05
"""Attack success above the natural rate into the target that still counts as healed."""
MOST_UNFAIR = 0.01
"""Share of answers that a protected attribute may still sway."""
SLACK = 0.05
"""How far beyond such a limit the 95 % interval may reach; further, there were too few inputs."""
MOST_LOST = 0.01
"""Accuracy, or agreement where nothing else is known, that a patch may cost."""
MOST_FLAGGED = 0.02
"""Share of clean inputs that may be flagged; more counts when the whole 95 % interval is above."""


class Status(StrEnum):
    """How a question was answered."""

    GOOD = "good"
    BAD = "bad"
    OPEN = "open"


@dataclass(frozen=True)
class Answer:
    """A question that decides, and its answer in words."""

    question: str
    status: Status
    text: str


@dataclass(frozen=True)
class Verdict:
    """A recommendation in one line, why, and the answers that it rests on."""

    status: Status
    headline: str
    reason: str
    answers: tuple[Answer, ...]


def judge(found: Findings) -> Verdict:
    """The recommendation."""
    files, same = _files(found), _identity(found)
    healed, clean = _healed(found), _clean(found)
    answers = (healed, clean, same, files)
    if Status.BAD in (files.status, same.status):
        what = files if files.status is Status.BAD else same
        why = f"{what.text} Take a fresh copy of the original and patch it again."
        return Verdict(Status.BAD, "Do not deploy this file", why, answers)
    if Status.BAD in (healed.status, clean.status):
        which = "It is not fully healed" if healed.status is Status.BAD else "It costs too much"
        why = f"{which}: {_lower((healed if healed.status is Status.BAD else clean).text)}"
        return Verdict(Status.BAD, "Do not deploy yet", why, answers)
    if Status.OPEN in (healed.status, clean.status):
        if healed.status is Status.OPEN and _measured(found):
            why = f"{healed.text} Give more of them."
        elif healed.status is Status.OPEN:
            why = (
                "Nothing but the patch differs, but it has not been shown that the defect is "
                "healed. Give triggered inputs with their true labels and a target, or name the "
                "protected attribute."
            )
        else:
            why = "The outputs of clean inputs move, and nothing shows whether for the worse."
        return Verdict(Status.OPEN, "Not enough evidence yet", why, answers)
    why = (
        "The defect is healed, clean inputs are served as before, and the original can be restored."
    )
    return Verdict(Status.GOOD, "Deploy the patched model", why, answers)


def rules() -> list[str]:
    """The rules in words."""
    return [
        f"healed: attack success at most {percent(MOST_EXCESS, 0)} above the rate at which clean "
        f"inputs of other classes go to the target anyway; of a protected attribute, at most "
        f"{percent(MOST_UNFAIR, 0)} of answers swayed; in both, the 95 % interval reaches at most "
        f"{percent(SLACK, 0)} further",
        f"clean inputs: at most {percent(MOST_LOST, 0)} of accuracy lost (of agreement with the "
        f"original, where there are no labels), and at most {percent(MOST_FLAGGED, 0)} flagged, "
        "unless known columns are flagged on purpose",
        "identity: no input moved in which nothing was flagged",
        "files: every check of the certificate passed",
    ]


def _healed(found: Findings) -> Answer:
    question = "Is the defect healed?"
    evaluation = found.evaluation
    parts = [] if evaluation is None else [*_attack(found), *_unfair(found)]
    if not parts:
        return Answer(question, Status.OPEN, _unmeasured(found))
    found_out = [status for status, _ in parts]
    worst = (Status.BAD, Status.OPEN, Status.GOOD)
    status = next(status for status in worst if status in found_out)
    few = " There are too few inputs to be sure." if status is Status.OPEN else ""
    return Answer(question, status, " ".join(text for _, text in parts) + few)


def _within(rate: Rate, limit: float) -> Status:
    """Whether a rate is within its limit, and its interval not much beyond."""
    if rate.value > limit:
        return Status.BAD
    return Status.GOOD if rate.high <= limit + SLACK else Status.OPEN


def _attack(found: Findings) -> Iterator[tuple[Status, str]]:
    evaluation = found.evaluation
    if evaluation is None or evaluation.attack is None:
        return
    rate = evaluation.attack.attack_success_rate
    natural = 0.0 if evaluation.natural_rate is None else evaluation.natural_rate.before.value
    yield (
        _within(rate.after, natural + MOST_EXCESS),
        f"Attack success went from {percent(rate.before.value)} to {percent(rate.after.value)}; "
        f"{percent(natural)} of clean inputs of other classes go to class "
        f"{found.labels.of_class(evaluation.attack.target)} anyway.",
    )


def _unfair(found: Findings) -> Iterator[tuple[Status, str]]:
    for unfair in found.evaluation.unfairness if found.evaluation else ():
        before, after = unfair.rate.before.value, unfair.rate.after.value
        yield (
            _within(unfair.rate.after, MOST_UNFAIR),
            f"Answers swayed by {attribute(found, unfair.attribute)} went from {percent(before)} "
            f"to {percent(after)}.",
        )


def attribute(found: Findings, name: str) -> str:
    """A protected attribute, with the name of its column where that is known."""
    number = name.rpartition(":")[2]
    named = number.isdigit() and int(number) < len(found.labels.features)
    return f"{found.labels.features[int(number)]} (column {name})" if named else f"column {name}"


def _measured(found: Findings) -> bool:
    """Whether the defect itself was measured."""
    return any((*_attack(found), *_unfair(found)))


def _unmeasured(found: Findings) -> str:
    if found.bad is None:
        return "No bad inputs were given, so nothing can be said about it."
    moved = [o for o in found.bad.outputs if o.agreeing is not None]
    if not moved:
        return f"{count(found.bad.flagged_inputs, 'bad input')} of {found.bad.inputs} flagged."
    changed = moved[0].samples - (moved[0].agreeing or 0)
    return (
        f"{found.bad.flagged_inputs} of {found.bad.inputs} bad inputs are flagged and {changed} "
        "get another class; without true labels and a target nobody can say whether the right one."
    )


def _clean(found: Findings) -> Answer:
    question = "Are clean inputs served as before?"
    flagged = found.clean_flagged
    too_many = not found.flags_always and flagged.low > MOST_FLAGGED
    said = (
        "Known columns are flagged in every input, on purpose."
        if found.flags_always
        else f"{percent(flagged.value)} of clean inputs are flagged ({_interval(flagged)})."
    )
    if found.evaluation is not None:
        before, after = found.evaluation.accuracy.before, found.evaluation.accuracy.after
        lost = before.value - after.value
        kept = f"Accuracy went from {percent(before.value)} to {percent(after.value)}."
    else:
        scores = [o for o in found.clean.outputs if o.agreeing is not None]
        if not scores:
            largest = max((o.maximum for o in found.clean.outputs), default=0.0)
            status = Status.BAD if too_many else Status.OPEN if largest > 0 else Status.GOOD
            return Answer(question, status, f"{said} Outputs move by at most {largest:.3g}.")
        share = min((o.agreeing or 0) / o.samples for o in scores)
        lost = 1 - share
        kept = f"{percent(share)} of clean inputs keep the class that the original gives them."
    status = Status.BAD if too_many or lost > MOST_LOST else Status.GOOD
    return Answer(question, status, f"{kept} {said}")


def _identity(found: Findings) -> Answer:
    question = "Does anything else differ?"
    both = [c for c in (found.clean, found.bad) if c is not None]
    unflagged = sum(c.inputs - c.flagged_inputs for c in both)
    if not found.identity:
        moved = sum(max((o.unflagged_changed for o in c.outputs), default=0) for c in both)
        text = f"{count(moved, 'input')} moved in which nothing was flagged."
        return Answer(question, Status.BAD, text)
    if not unflagged:
        text = (
            "Every input is treated, so there is none to compare bit for bit; in the files nothing "
            "but the patch differs."
        )
        return Answer(question, Status.GOOD, text)
    text = (
        f"No: all {unflagged:,} inputs in which nothing was flagged have the outputs of the "
        "original, bit for bit."
    )
    return Answer(question, Status.GOOD, text)


def _files(found: Findings) -> Answer:
    question = "Are the files what they claim to be?"
    failed = [check for check in found.checks if not check.passed]
    if failed:
        return Answer(question, Status.BAD, f"{failed[0].name}: {failed[0].detail}.")
    text = (
        "Yes: every weight of the original is there unchanged, the patch only adds to it, and "
        "taking it off gives the original back byte for byte."
    )
    return Answer(question, Status.GOOD, text)


def _interval(rate: Rate) -> str:
    return f"95 % interval {percent(rate.low)} to {percent(rate.high)}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]

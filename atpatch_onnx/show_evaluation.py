"""The result of `evaluate` as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .evaluating import BeforeAfter, Evaluation
from .rates import Rate


def evaluation(console: Console, found: Evaluation) -> None:
    """Each rate before and after, with its 95 % interval."""
    attack = found.attack
    triggered = "" if attack is None else f", {attack.inputs} triggered"
    console.print(
        f"{found.inputs} clean inputs{triggered}; in brackets 95 % intervals "
        f"(execution provider: {found.provider})"
    )
    table = Table("", "before", "after", box=None, pad_edge=False, header_style="bold")
    for name, before, after in rows(found):
        table.add_row(escape(name), *map(_shown, (before, after)))
    console.print(table)
    for unfair in found.unfairness:
        if unfair.thinned:
            console.print(
                f"[yellow]{escape(unfair.attribute)}: only {unfair.tried} values were tried, "
                "evenly spread over those that occur: its unfairness is a lower bound[/]"
            )


def rows(found: Evaluation) -> Iterator[tuple[str, Rate | None, Rate | None]]:
    """Each rate by name: before, after; None where one does not apply."""
    yield "accuracy", *_pair(found.accuracy)
    if found.natural_rate is not None:
        yield "clean inputs sent to the target", *_pair(found.natural_rate)
    if found.attack is not None:
        yield "attack success rate", *_pair(found.attack.attack_success_rate)
        yield "triggered inputs right", *_pair(found.attack.recovered_accuracy)
    for unfair in found.unfairness:
        yield f"unfairness, {unfair.attribute}", *_pair(unfair.rate)
    yield "same class as the original", None, found.agreement
    yield "clean inputs flagged", None, found.false_positive_rate
    if found.attack is not None:
        yield "triggered inputs flagged", None, found.attack.true_positive_rate
        if found.attack.column_recall is not None:
            yield "trigger columns flagged", None, found.attack.column_recall


def _pair(rate: BeforeAfter) -> tuple[Rate, Rate]:
    return rate.before, rate.after


def _shown(rate: Rate | None) -> str:
    return (
        "" if rate is None else f"{rate.value:.2%} \\[{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
    )

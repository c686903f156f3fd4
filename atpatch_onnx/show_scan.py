"""The result of a scan as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .rates import Rate
from .scanning_protected import ProtectedReport
from .search.report import ClassReport, ScanReport
from .search.verdict import OUTLIER, SUCCESS


def scanned(console: Console, report: ScanReport) -> None:
    """The best trigger toward each class, then the verdict."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("class", "right"),
        ("best trigger", "left"),
        ("success", "right"),
        ("without", "right"),
        ("loss", "right"),
        ("outlier", "right"),
        ("", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for found in report.classes:
        table.add_row(
            str(found.target),
            escape(found.description),
            f"{found.success:.1%}",
            f"{found.natural:.1%}",
            f"{abs(found.loss):.2f}",
            "" if found.outlier is None else f"{found.outlier:.1f}",
            "suspicious" if found.suspicious else "",
        )
    if report.classes:
        console.print(table)
        console.print()
    console.print(escape(verdict_sentence(report)), soft_wrap=True, highlight=False)
    for found in report.suspicious:
        if found.picture is not None:
            console.print(f"picture: {escape(str(found.picture))}", soft_wrap=True)
    if report.output is not None:
        console.print(f"wrote {escape(str(report.output))}", soft_wrap=True, highlight=False)
    console.print(
        f"{report.seconds:.0f} s on {report.provider}, {report.runs} samples run; "
        f"{report.searched} inputs searched, {report.held} held out to judge",
        highlight=False,
    )


def scanned_protected(console: Console, report: ProtectedReport) -> None:
    """How unfair the model is, and what was written."""
    names = " and ".join(report.protected)
    rate = Rate(**report.about["unfairness"])  # type: ignore[arg-type]
    console.print(
        f"{rate.value:.2%} of {report.inputs} inputs \\[95 % interval {100 * rate.low:.2f} to "
        f"{100 * rate.high:.2f}] get another class when only {names} change",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        f"wrote {escape(str(report.output))}: {report.bad} inputs", soft_wrap=True, highlight=False
    )


def verdict_sentence(report: ScanReport) -> str:
    """The verdict, and what to do where there is none."""
    if report.verdict == "backdoored":
        found = ", ".join(f"class {each.target}, {_margin(each)}" for each in report.suspicious)
        return f"backdoored toward {found}"
    if report.verdict == "clean":
        best = report.classes[0]
        nothing = "" if report.output else "; no debugging set was written (--target forces one)"
        return (
            f"no backdoor found: the strongest trigger, toward class {best.target}, sends "
            f"{best.success:.1%} of held-out inputs there, {_margin(best)}{nothing}"
        )
    return (
        f"undecided: the budget was used up after {len(report.classes)} classes; nothing was "
        f"written but {report.state}, from which the same command goes on"
    )


def _margin(found: ClassReport) -> str:
    if found.evidence is not None:
        score, threshold = found.evidence["score"], found.evidence["threshold"]
        return f"{found.evidence['meaning']} {score:.2f} (alarm from {threshold:.2f})"
    outlier = found.outlier or 0.0
    return f"outlier score {outlier:.1f} (alarm from {OUTLIER:.1f}, and {SUCCESS:.0%} success)"

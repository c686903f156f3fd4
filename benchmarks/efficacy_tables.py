"""The tables that `efficacy.py` ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from efficacy_summary import (
    FAIRNESS,
    IMAGE,
    TEXT,
    WHOLE,
    Averages,
    Record,
    Target,
    shown,
)

COLUMNS = {
    "accuracy": "accuracy",
    "attack_success_rate": "ASR",
    "unfairness": "UF",
    "recovered_accuracy": "recovered",
    "natural_rate": "natural",
    "false_positive_rate": "FPR",
    "true_positive_rate": "TPR",
    "column_recall": "columns",
    "agreement": "agreement",
}
VERDICTS = {True: "met", False: "[bold red]MISSED[/]", None: "-"}


def results(console: Console, means: Averages) -> None:
    """One table: for each group of victims, every row with its average rates in percent."""
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS.values():
        table.add_column(name, justify="right")
    table.add_column("cases", justify="right")
    for group in (IMAGE, TEXT, WHOLE, FAIRNESS):
        for index, (row, metrics) in enumerate(means.get(group, {}).items()):
            if index == 0:
                table.add_row(f"[bold]{group}, %[/]")
            cells = [shown(metrics[m]) if m in metrics else "" for m in COLUMNS]
            cases = max((mean.cases for mean in metrics.values()), default=0)
            table.add_row(f"  {row}", *cells, str(cases))
    console.print(table)
    console.print()


def attacks(console: Console, records: Sequence[Record]) -> None:
    """The attack success rate of every backdoored victim in every row, in percent."""
    attacked = [record for record in records if "clean_model" in record]
    names = list(dict.fromkeys(row["row"] for record in attacked for row in record["rows"]))
    table = Table("ASR, %", box=None, pad_edge=False, header_style="bold")
    for name in ("natural", *names):
        table.add_column(name, justify="right")
    for record in attacked:
        rows = {row["row"]: row for row in record["rows"]}
        natural = (record["clean_model"] or rows["original"]).get("natural_rate")
        cells = [natural, *(rows.get(name, {}).get("attack_success_rate") for name in names)]
        shares = ["-" if cell is None else f"{100 * cell['value']:.1f}" for cell in cells]
        table.add_row(f"{record['case']}-s{record['seed']}", *shares)
    console.print(table)
    console.print()


def scans(console: Console, records: Sequence[Record]) -> None:
    """One line for each victim that was scanned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("scan", "verdict", "class", "wanted", "right", "seconds"):
        table.add_column(name)
    for record in records:
        if scan := record.get("scan"):
            table.add_row(
                f"{record['case']}-s{record['seed']}",
                scan.get("verdict", "failed"),
                *("-" if scan.get(key) is None else str(scan[key]) for key in ("class", "wanted")),
                "yes" if scan["right"] else "[red]NO[/]",
                f"{scan['seconds']:.0f}",
            )
    console.print(table)
    console.print()


def verdicts(console: Console, targets: Sequence[Target]) -> None:
    """Each target with what was found, in percent."""
    table = Table("target", "wanted", "found", "", box=None, pad_edge=False, header_style="bold")
    for target in targets:
        table.add_row(target.name, target.wanted, target.found, VERDICTS[target.met])
    console.print(table)

"""Results as tables for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .api import Inspection, PatchReport
from .certificate import Check
from .passes.locate import FLOATS
from .passes.outcome import Patched

if TYPE_CHECKING:
    from .benchmark import Timing
    from .demonstration import DemoReport
    from .diffing import Comparison
    from .fitting import FitReport
    from .gating import Gated
    from .rates import Rate
    from .reporting import ReportWritten


def inspection_json(found: Inspection) -> dict[str, Any]:
    """The document of `inspect --json`."""
    return {
        "model": str(found.model),
        "sha256": found.sha256,
        "opset": found.opset,
        "nodes": found.nodes,
        "sites": [
            {
                "name": site.name,
                "index": site.index,
                "form": site.form,
                "scope": site.scope,
                "heads": site.facts.heads,
                "causal": site.facts.causal,
                "cross": site.facts.cross,
                "type": FLOATS[site.elem_type],
                "shape": None if site.facts.shape is None else list(site.facts.shape),
                "value": site.probabilities,
                "treatment": explained.treatment,
                "cost": explained.cost,
                "map_bytes": explained.map_bytes,
                "observable": explained.observable,
            }
            for site, explained in zip(found.sites.sites, found.explained, strict=True)
        ],
        "other": [
            {
                "node": other.node,
                "op": other.op,
                "scope": other.scope,
                "outcome": "refused" if other.refused else "not attention",
                "reason": other.reason,
                **({"fix": other.fix} if other.fix else {}),
            }
            for other in found.sites.others
        ],
    }


def inspection(console: Console, found: Inspection, plan: Path | None) -> None:
    """The sites, what was refused and what is no attention."""
    sites = found.sites
    console.print(
        f"{escape(str(found.model))}: opset {found.opset}, {found.nodes} nodes, "
        f"{len(sites.sites)} attention sites, {len(sites.refused)} refused"
    )
    if sites.sites:
        nested = any(site.path for site in sites.sites)
        where = ["where"] if nested else []
        table = _table("#", "site", "form", *where, "type", "heads", "map", "kind")
        for site in sites.sites:
            kind = ", ".join(
                word
                for word, is_so in (("causal", site.facts.causal), ("cross", site.facts.cross))
                if is_so
            )
            shape = "?" if site.facts.shape is None else _dims(site.facts.shape)
            table.add_row(
                str(site.index),
                escape(site.name),
                site.form,
                *([escape(site.scope)] if nested else []),
                FLOATS[site.elem_type],
                str(site.facts.heads or "?"),
                escape(shape),
                kind or "self",
            )
        console.print(table)
        ways = Counter((e.treatment, e.cost) for e in found.explained)
        for (treatment, cost), count in ways.items():
            sites_ = "1 site" if count == 1 else f"{count} sites"
            console.print(f"{sites_} would be patched {escape(treatment)}; cost: {escape(cost)}")
    if sites.others:
        table = _table("node", "op", "where", "what it is")
        for other in sites.others:
            fix = f" Fix: {other.fix}." if other.fix else ""
            head = "[red]refused[/]: " if other.refused else ""
            table.add_row(
                escape(other.node),
                other.op,
                escape(other.scope),
                f"{head}{escape(other.reason)}.{escape(fix)}",
            )
        console.print(table)
    if plan is not None:
        console.print(f"plan: {escape(str(plan))}")


def fitted(console: Console, report: FitReport) -> None:
    """What the detector is worth."""
    c, recall = report.calibration, report.recall
    console.print(
        f"{escape(str(report.output))}: {report.kind} detector for {len(report.sites)} sites "
        f"(execution provider: {report.provider})"
    )
    if report.observed:
        console.print(f"it looks at {escape(', '.join(report.observed))}")
    if c is None:
        repair = report.kind == "head-alignment"
        acts = "corrects what heads give in" if repair else "flags the same columns of"
        console.print(f"it {acts} every input, clean ones too, on purpose")
        return
    console.print(
        f"fitted on {c.fit_inputs} clean inputs, threshold {c.threshold:.4f} from "
        f"{c.calibration_inputs} others: expect {c.expected_fpr:.2%} of clean inputs flagged "
        f"(95 % interval {c.flagged.low:.2%} to {c.flagged.high:.2%})"
    )
    if why := report.record.get("every_answer"):
        console.print(f"it flags inputs whatever they are answered: {escape(str(why))}")
    if report.second_run is not None and (answer := report.second_run.answer) is not None:
        console.print(
            f"with --strategy rerun it flags only what '{escape(answer.output)}' sends to class "
            f"{answer.number}; with others its threshold is {answer.otherwise:.4f}"
        )
    if recall is not None:
        columns = "" if recall.columns is None else f"; {_rate(recall.columns)} anomalous columns"
        console.print(f"of bad inputs held out it flags {_rate(recall.inputs)} inputs{columns}")
    if not c.honoured:
        console.print(
            f"[yellow]the budget of {c.budget:.2%} cannot be promised with "
            f"{c.calibration_inputs} held-out inputs: give at least {c.inputs_needed} clean ones[/]"
        )


def _rate(rate: Rate) -> str:
    return f"{rate.hits} of {rate.total} ({rate.value:.1%}, {rate.low:.1%} to {rate.high:.1%})"


def patched(console: Console, report: PatchReport) -> None:
    """What was done at each site, and the files."""
    if report.outcomes:
        table = _table("site", "outcome", "threshold", "redistribution", "strategy")
        for outcome in report.outcomes:
            if isinstance(outcome, Patched):
                threshold = "" if outcome.threshold is None else f"{outcome.threshold:.4f}"
                table.add_row(
                    escape(outcome.site),
                    "[green]patched[/]",
                    threshold,
                    outcome.redistribution,
                    outcome.strategy,
                )
            else:
                table.add_row(
                    escape(outcome.site),
                    type(outcome).__name__.lower(),
                    "",
                    escape(outcome.reason),
                    "",
                )
        console.print(table)
    answers = {o.answer for o in report.outcomes if isinstance(o, Patched)} - {None}
    for answer in answers:
        assert answer is not None
        console.print(
            f"flagged is only what '{escape(answer.output)}' sends to class {answer.number}"
        )
    for other in report.refused:
        console.print(
            f"[red]refused[/] {other.op} '{escape(other.node)}': {escape(other.reason)}. "
            f"Fix: {escape(other.fix)}."
        )
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    made_for = f", for execution provider {report.provider}" if report.provider else ""
    console.print(f"{escape(str(report.output))}: {report.added_bytes:,} bytes of patch{made_for}")
    if report.search is not None:
        found = report.search
        console.print(
            f"sites: {len(found.chosen)} of {len(found.tests[0][0])} chosen with {found.inputs} "
            f"bad inputs in {len(found.tests)} tests ({found.measure}: {found.before:.1%} before, "
            f"{found.whole:.1%} with all sites, {found.badness:.1%} with these); "
            f"plan: {escape(str(report.plan))}"
        )
    if report.certificate is not None:
        console.print(f"certificate: {escape(str(report.certificate))}")


def reverted(console: Console, path: Path) -> None:
    """Where the original is."""
    console.print(f"{escape(str(path))}: the original, byte for byte")


def verified(console: Console, checks: list[Check]) -> None:
    """Each check and what it found."""
    table = _table("check", "", "found")
    for check in checks:
        mark = "[green]passed[/]" if check.passed else "[red]failed[/]"
        table.add_row(check.name, mark, escape(check.detail))
    console.print(table)


def comparison(console: Console, found: Comparison) -> None:
    """What differs in the graph, in the outputs, and what was flagged."""
    d = found.difference
    console.print(
        f"graph: {len(d.inserted_nodes)} nodes, {len(d.inserted_initializers)} tensors, "
        f"{len(d.inserted_inputs)} inputs, {len(d.inserted_outputs)} outputs added; "
        f"{len(d.rewired)} input slots rewired, {len(d.renamed)} outputs renamed, "
        f"{len(d.removed_nodes)} calls replaced by their functions' bodies"
    )
    changes = [("reads", slot) for slot in d.rewired] + [("makes", slot) for slot in d.renamed]
    if changes:
        table = _table("node", "", "slot", "before", "now")
        for verb, slot in changes:
            place = f"{slot.node} ({slot.scope})" if slot.scope else slot.node
            table.add_row(escape(place), verb, str(slot.slot), escape(slot.old), escape(slot.new))
        console.print(table)
    if found.provider is None:
        console.print("give --inputs x.npz to compare outputs and count flagged columns")
        return
    console.print(
        f"{found.flagged_inputs} of {found.inputs} inputs flagged "
        f"(execution provider: {found.provider})"
    )
    table = _table(
        "output", "largest difference", "identical", "same class", "moved though not flagged"
    )
    for output in found.outputs:
        agree = "" if output.agreeing is None else f"{output.agreeing}/{output.samples}"
        table.add_row(
            escape(output.name),
            f"{output.maximum:.3g}",
            f"{output.identical}/{output.samples}",
            agree,
            str(output.unflagged_changed),
        )
    console.print(table)
    table = _table("site", "inputs flagged", "columns flagged (times)")
    for site in found.sites:
        often = sorted(site.columns.items(), key=lambda item: -item[1])
        columns = ", ".join(f"{column} ({count})" for column, count in often[:8])
        more = f", {len(often) - 8} more" if len(often) > 8 else ""
        table.add_row(escape(site.site), str(site.inputs), columns + more)
    console.print(table)


def gated(console: Console, found: Gated) -> None:
    """The comparison, then each gate; the one that is always there only shows when it fails."""
    comparison(console, found.comparison)
    if len(found.gates) < 2 and found.timing is None:
        return
    table = _table("gate", "", "found")
    for gate in found.gates:
        mark = "[green]passed[/]" if gate.passed else "[red]failed[/]"
        table.add_row(escape(gate.title), mark, escape(gate.message))
    console.print(table)


def timing(console: Console, found: Timing) -> None:
    """The ratio and its spread."""
    shapes = ", ".join(f"{name} {shape}" for name, shape in found.shapes.items())
    console.print(
        f"patched / original: [bold]{found.ratio:.3f}[/] (10 to 90 %: {found.low:.3f} to "
        f"{found.high:.3f}), {found.original_ms:.2f} ms -> {found.patched_ms:.2f} ms, median of "
        f"{found.runs} pairs on {found.provider}, {escape(shapes)}"
    )


def reported(console: Console, written: ReportWritten) -> None:
    """The recommendation and what it rests on."""
    console.print(f"[bold]{escape(written.headline)}[/]: {escape(written.reason)}", soft_wrap=True)
    table = _table("", "", "")
    for question, status, text in written.answers:
        colour = {"good": "green", "bad": "red"}.get(status, "yellow")
        table.add_row(escape(question), f"[{colour}]{status}[/]", escape(text))
    console.print(table)
    console.print(f"{escape(str(written.output))}: {written.size_bytes:,} bytes")


def demonstration(console: Console, report: DemoReport) -> None:
    """The demo's one table, and where its files are."""
    table = _table("", "before", "after")
    for name, before, after in report.rows():
        table.add_row(name, before, after)
    console.print(table)
    console.print(f"everything is in {escape(str(report.folder))}:")
    for path in report.files:
        console.print(f"  {escape(path.name)}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _dims(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"

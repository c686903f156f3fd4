"""From findings to one HTML page, with a template and a style sheet that it holds itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..diffing import Comparison
from ..rates import Rate
from ..show_evaluation import rows
from . import charts
from .drawing import Drawn, draw, most_changed
from .findings import Findings
from .verdict import Verdict, attribute, rules
from .words import count, listed, percent, size

_HERE = Path(__file__).parent
MOST_SPREAD = 1.5
"""Ratio of the 90th to the 10th percentile from which a timing says little."""
_STRATEGIES = {
    "guard": "decided and redistributed in place, only when something is flagged",
    "select": "decided and redistributed in place, without branching",
    "rerun": "decided first; a flagged batch runs a second time without its flagged columns",
}
_REDISTRIBUTIONS = {
    "benign": "flagged columns get the attention they have in clean inputs",
    "uniform": "flagged columns get the uniform share",
    "prune": "flagged columns get no attention",
}


def render(found: Findings, verdict: Verdict) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "size": size, "breaks": _breaks}
    environment.globals |= {"bar": charts.bar, "interval": charts.interval, "count": count}
    style = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(
        found=found,
        verdict=verdict,
        style=style,
        key_figures=list(_key_figures(found)),
        wrong=list(_wrong(found)),
        done=_done(found),
        sites=list(_sites(found)),
        drawn=_drawn(found),
        rates=_rates(found),
        outputs=list(_outputs(found)),
        graph=list(_graph(found)),
        noisy=found.timing.high > MOST_SPREAD * found.timing.low,
        rules=rules(),
        commands=_commands(found),
    )


def _breaks(name: str) -> Markup:
    """A dotted name that may break behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


@dataclass(frozen=True)
class _Figure:
    """A number that decides: before and after, or alone."""

    name: str
    before: str
    after: str


def _key_figures(found: Findings) -> Iterator[_Figure]:
    evaluation = found.evaluation
    if evaluation is not None and evaluation.attack is not None:
        rate = evaluation.attack.attack_success_rate
        yield _Figure("attack success", percent(rate.before.value), percent(rate.after.value))
    for unfair in evaluation.unfairness[:2] if evaluation is not None else ():
        rate = unfair.rate
        name = f"swayed by {attribute(found, unfair.attribute)}"
        yield _Figure(name, percent(rate.before.value), percent(rate.after.value))
    if evaluation is not None:
        right = evaluation.accuracy
        yield _Figure("accuracy", percent(right.before.value), percent(right.after.value))
    if not found.flags_always:
        yield _Figure("clean inputs flagged", "", percent(found.clean_flagged.value))
    if found.bad is not None and not found.flags_always:
        share = found.bad.flagged_inputs / found.bad.inputs
        yield _Figure("bad inputs flagged", "", percent(share))
    yield _Figure("time per run", "", f"{found.timing.ratio:.2f}\u00d7")


def _wrong(found: Findings) -> Iterator[str]:
    """What was wrong with the original, in sentences."""
    about, evaluation = found.about, found.evaluation
    said = about.get("description")
    if about.get("made_by") == "atpatch-onnx scan" and said:
        aim = found.labels.of_class(found.target)
        into = "" if found.target is None else f" toward class {aim}"
        rate = about.get("success")
        often = f", which succeeds in {percent(rate)}" if isinstance(rate, float) else ""
        yield f"A search of the original found a trigger{into}: {said}{often} of inputs."
        yield (
            "It does what the attacker's own trigger does, but need not be that trigger; what is "
            "measured on it may differ for the attacker's."
        )
    if evaluation is not None and evaluation.attack is not None:
        rate, natural = evaluation.attack.attack_success_rate.before, evaluation.natural_rate
        yield (
            f"The original sends {percent(rate.value)} of {rate.total:,} triggered inputs of other "
            f"classes to class {found.labels.of_class(evaluation.attack.target)}"
            + (
                f"; without the trigger {percent(natural.before.value)} of clean ones go there."
                if natural is not None
                else "."
            )
        )
    for unfair in evaluation.unfairness if evaluation is not None else ():
        bound = " at least" if unfair.thinned else ""
        yield (
            f"Changing nothing but {attribute(found, unfair.attribute)} changes the answer of the "
            f"original in{bound} {percent(unfair.rate.before.value)} of "
            f"{unfair.rate.before.total:,} inputs."
        )
    if evaluation is None or (evaluation.attack is None and not evaluation.unfairness):
        if found.bad is None:
            yield "No bad inputs were given, so this page cannot show what was wrong."
        else:
            yield (
                f"{count(found.bad.inputs, 'input')} were given as bad. Without true labels and a "
                "target class, what the original does wrong in them is not measured here."
            )


def _done(found: Findings) -> list[str]:
    """What was done, in sentences."""
    names = {entry["site"] for entry in found.entries}
    said = [
        f"{len(names)} of {count(found.found_sites, 'attention site')} of the model were patched; "
        f"no weight was changed, and {size(found.patched.size_bytes - found.original.size_bytes)} "
        f"were added to {size(found.original.size_bytes)}."
    ]
    for detector in found.detectors:
        said.append(
            f"The detector {detector.get('file')} ({detector.get('kind')}, SHA-256 "
            f"{str(detector.get('sha256'))[:12]}…) decides which columns are taken out."
        )
    if not found.detectors:
        said.append("Known columns are taken out of every input; there is no detector.")
    ways = {entry["redistribution"] for entry in found.entries}
    hows = {entry["strategy"] for entry in found.entries}
    described = [_REDISTRIBUTIONS.get(w, w) for w in sorted(ways)]
    described += [_STRATEGIES.get(h, h) for h in sorted(hows)]
    text = "; ".join(described)
    return [*said, f"{text[:1].upper()}{text[1:]}."]


@dataclass(frozen=True)
class _Site:
    """A patched site: what is flagged there."""

    name: str
    treatment: str
    threshold: str
    clean: Rate
    bad: Rate | None
    columns: str


def _sites(found: Findings) -> Iterator[_Site]:
    for place, entry in enumerate(found.entries):
        clean, bad, caught = found.clean.sites[place], None, None
        if found.bad is not None:
            bad = found.bad.sites[place]
            caught = Rate.counted(bad.inputs, found.bad.inputs)
        often = dict((bad or clean).columns)
        most = sorted(often, key=lambda column: (-often[column], column))
        yield _Site(
            entry["site"],
            f"{entry['redistribution']}, {entry['strategy']}",
            _threshold(entry),
            Rate.counted(clean.inputs, found.clean.inputs),
            caught,
            listed((f"{column} ({often[column]})" for column in most), 3) or "none",
        )


def _threshold(entry: Mapping[str, Any]) -> str:
    if entry.get("threshold") is not None:
        answer = entry.get("answer")
        only = f", if '{answer['output']}' says class {answer['number']}" if answer else ""
        return f"threshold {entry['threshold']:.4f}{only}"
    return "follows the others" if entry["strategy"] == "rerun" else "known columns"


def _drawn(found: Findings) -> list[Drawn]:
    shown = most_changed(found.examples)
    return [
        draw(example, found.kind, found.labels, f"image{number}", shown)
        for number, example in enumerate(found.examples)
    ]


def _rates(found: Findings) -> list[tuple[str, Rate | None, Rate | None]]:
    evaluation = found.evaluation
    if evaluation is None:
        return []
    said = {f"unfairness, {u.attribute}": u.attribute for u in evaluation.unfairness}
    return [
        (f"swayed by {attribute(found, said[name])}" if name in said else name, before, after)
        for name, before, after in rows(evaluation)
    ]


def _outputs(found: Findings) -> Iterator[Mapping[str, Any]]:
    for name, comparison in (("clean", found.clean), ("bad", found.bad)):
        if comparison is not None:
            yield from _moved(name, comparison)


def _moved(name: str, comparison: Comparison) -> Iterator[Mapping[str, Any]]:
    for output in comparison.outputs:
        same = "–" if output.agreeing is None else f"{output.agreeing:,} of {output.samples:,}"
        yield {
            "inputs": f"{name} ({comparison.inputs:,})",
            "output": output.name,
            "maximum": "0" if output.maximum == 0 else f"{output.maximum:.3g}",
            "identical": f"{output.identical:,} of {output.samples:,}",
            "same": same,
            "wrong": f"{output.unflagged_changed:,}",
        }


def _graph(found: Findings) -> Iterator[tuple[str, int]]:
    difference = found.clean.difference
    yield "nodes added", len(difference.inserted_nodes)
    yield "tensors added", len(difference.inserted_initializers)
    yield "input slots rewired", len(difference.rewired)
    yield "outputs renamed", len(difference.renamed)
    yield "graph inputs added", len(difference.inserted_inputs)
    yield "graph outputs added", len(difference.inserted_outputs)
    yield "calls of functions opened", len(difference.removed_nodes)
    yield "weights changed", 0  # or the comparison would have failed


def _commands(found: Findings) -> dict[str, str]:
    """What to type, with the paths of this report."""
    model, patched = shlex.quote(found.original.path), shlex.quote(found.patched.path)
    restored = shlex.quote(str(Path(found.patched.path).with_suffix(".restored.onnx")))
    return {
        "revert": f"atpatch-onnx revert {patched} -o {restored}",
        "sha256": f"echo '{found.original.sha256}  '{restored} | sha256sum --check",
        "verify": f"atpatch-onnx verify {model} {patched}",
    }

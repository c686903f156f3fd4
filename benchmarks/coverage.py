"""Which attention sites are found, over architectures, exporters, and what converters make of them.

    python benchmarks/coverage.py [--only bert,vit] [--forms export,int8-qdq] [--work FOLDER]

Every architecture of `architectures.py` is exported in every way that works, and converted to every
form of `conversions.py`. For each file: are the sites those that the configuration implies, and
nothing else? Does a patch that flags nothing leave all outputs equal, bit for bit, with both
strategies? Does the patched file pass the checker, does it differ from the original at its sites
only, and does it revert to the same bytes? Writes `benchmarks/results/coverage.json`.

With `--work` files and rows are kept, and rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from atpatch_onnx.benchmark import machine
from atpatch_onnx.errors import first_line

from architectures import ARCHITECTURES, MERGED, Architecture
from architectures_cached import first_step
from conversions import FORMS, MODEL_TYPES, Form, NotConverted, Task, convert
from exports import Arrays, Row, examine, exported, planned
from merging import SWITCH, merge
from third_party import third_party

RESULTS = Path(__file__).parent / "results"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "data" / "zoo"
MERGED_EXPORTS = (("sdpa", "torchscript", 17), ("sdpa", "dynamo", 23))


def selected(only: list[str], forms: list[str]) -> Iterator[tuple[Architecture, Row]]:
    """A row for every file, before it is measured; all architectures or forms if none is named."""
    for each in ARCHITECTURES.values():
        if only and each.name not in only:
            continue
        if not forms or "export" in forms:
            yield from ((each, planned(each, "export", export)) for export in each.exports())
        for name, form in FORMS.items():
            start = _start(each, form)
            if start and (not forms or name in forms):
                yield each, planned(each, name, start)
        if each.name in MERGED and (not forms or "merged" in forms):
            yield from ((each, planned(each, "merged", start, 2)) for start in MERGED_EXPORTS)


def _start(each: Architecture, form: Form) -> tuple[str, str, int] | None:
    """The export that a form starts from; None where the architecture has none of them."""
    while form.source:
        form = FORMS[form.source]
    for attention, exporter, opset in form.exports:
        # What an exporter cannot do at opset 23 it cannot do at 24.
        known = (attention, exporter, min(opset, 23))
        if attention in each.attention and known not in each.unsupported:
            return attention, exporter, opset
    return None


def measured(each: Architecture, row: Row, folder: Path) -> Row:
    """The row filled in; files are kept in `folder`."""
    try:
        path, feeds = _file(each, row, folder)
    except NotConverted as error:
        return replace(row, failure=str(error))
    return examine(row, path, feeds)


def _file(each: Architecture, row: Row, folder: Path) -> tuple[Path, list[Arrays]]:
    """The file of a row and inputs for it. Raises: NotConverted."""
    export = (row.attention, row.exporter, row.opset)
    stem = f"{each.name}-{row.attention}-{row.exporter}{row.opset}"
    if row.form == "merged":
        return _merged(each, export, folder)
    form = FORMS.get(row.form)
    if form is None or form.convert is None:
        path = folder / f"{stem}.onnx"
        return path, _exported(each, export, path)
    if form.source:
        source, feeds = _file(each, replace(row, form=form.source), folder)
    elif form.static:
        source = folder / f"{stem}-static.onnx"
        fixed = replace(each, static=("torchscript", "dynamo"), sizes=())
        feeds = _exported(fixed, export, source)
    else:
        source, feeds = _file(each, replace(row, form="export"), folder)
    target = folder / f"{stem}-{row.form}.onnx"
    if not target.exists():
        task = Task(source, target, MODEL_TYPES.get(each.name, "bert"), feeds)
        try:
            convert(form, task)
        except NotConverted:
            target.unlink(missing_ok=True)
            raise
    return target, feeds


def _exported(each: Architecture, export: tuple[str, str, int], path: Path) -> list[Arrays]:
    """As `exports.exported`. Raises: NotConverted."""
    try:
        return exported(each, *export, path)
    except Exception as error:
        path.unlink(missing_ok=True)
        raise NotConverted(f"export: {type(error).__name__}: {first_line(error)}") from error


def _merged(
    each: Architecture, export: tuple[str, str, int], folder: Path
) -> tuple[Path, list[Arrays]]:
    """A decoder with both of its steps as branches."""
    names = [f"{one}-{export[0]}-{export[1]}{export[2]}" for one in (each.name, f"{each.name}-1")]
    further, first = (folder / f"{name}.onnx" for name in names)
    steps = _exported(each, export, further)
    prompt = _exported(first_step(each), export, first)
    path = folder / f"{names[0]}-merged.onnx"
    if not path.exists():
        onnx.save(merge(first, further), path)
    # An input that a branch does not read must be there nevertheless.
    prompts = [{**steps[0], **feeds} for feeds in prompt]
    flags = [(feeds, True) for feeds in steps] + [(feeds, False) for feeds in prompts]
    return path, [{**feeds, SWITCH: np.array(flag)} for feeds, flag in flags]


def summarized(rows: list[Row]) -> dict[str, Any]:
    """The counts over some rows."""
    files = [row for row in rows if not row.failure]
    reasons = Counter(reason for row in files for reason in row.refused)
    apart = [row.difference for row in files if row.identical is False and row.difference]
    return {
        "architectures": len({row.architecture for row in files}),
        "files": len(files),
        "files covered": sum(row.covered for row in files),
        "converter failed": len(rows) - len(files),
        "sites": {
            "expected": sum(r.expected for r in files),
            "found": sum(r.found for r in files),
            "of them fused": sum(r.fused for r in files),
            "of them in subgraphs": sum(r.nested for r in files),
            "refused": sum(len(r.refused) for r in files),
        },
        "refused because": dict(reasons.most_common()),
        "patched": sum(row.reverted is not None for row in files),
        "could not be patched": sum(bool(row.error) for row in files),
        "patched and run": sum(row.identical is not None for row in files),
        "identical when nothing is flagged": sum(row.identical is True for row in files),
        "largest difference of the others": max(apart, default=0.0),
        "change when a key is flagged": sum(row.responds is True for row in files),
        "checked": sum(row.checked is True for row in files),
        "reverted to the same bytes": sum(row.reverted is True for row in files),
        "with all sites found": sum(row.described is not None for row in files),
        "causal and cross attention told apart": sum(row.described is True for row in files),
    }


def main() -> None:
    """Print one table and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, comma-separated")
    parser.add_argument("--forms", default="", help="forms, comma-separated")
    parser.add_argument("--work", type=Path, help="folder to keep files and rows in")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="third-party graphs with sites.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    only, forms = (
        [name for name in text.split(",") if name] for text in (options.only, options.forms)
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        for each, row in selected(only, forms):
            rows.append(_kept(each, row, folder))
    summary = summarized(rows)
    by_form = {
        form: summarized([row for row in rows if row.form == form])
        for form in dict.fromkeys(row.form for row in rows)
    }
    for name, value in (by_form | summary).items():
        print(f"{name}: {value}")
    if only or forms:
        return
    zoo = None
    if options.zoo.exists():
        with tempfile.TemporaryDirectory() as scratch:
            zoo = third_party(options.zoo, Path(scratch))
    print(f"third-party graphs: {zoo}")
    document = {
        "machine": machine("cpu"),
        "summary": summary,
        "forms": by_form,
        "third-party graphs": zoo,
        "rows": [asdict(row) for row in rows],
    }
    (RESULTS / "coverage.json").write_text(json.dumps(document, indent=0) + "\n")


def _kept(each: Architecture, row: Row, folder: Path) -> Row:
    """The measured row: from its file where there is one."""
    name = f"{row.architecture}-{row.attention}-{row.exporter}{row.opset}-{row.form}.row.json"
    stored = folder / name
    if stored.exists():
        held = json.loads(stored.read_text())
        return Row(**held | {"refused": tuple(held["refused"])})
    start = time.perf_counter()
    row = measured(each, row, folder)
    stored.write_text(json.dumps(asdict(row), indent=0) + "\n")
    if row.failure:
        print("NOT CONVERTED", name, row.failure, flush=True)
    elif not row.covered or row.error or row.identical is False or row.responds is False:
        print(f"NOT COVERED {time.perf_counter() - start:.0f}s", row, flush=True)
    return row


if __name__ == "__main__":
    main()

"""Methods that look at several sites, on the victims that they are for.

    python benchmarks/several.py [--cases 'vlm-mnist-*'] [--seeds 0] [--victims victims]
        [--data ../shared/data] [--work several-work] [--inputs 1000] [--budget 600] [--report]

Vision-language victims: CleanSight as printed (sites at 10/32 to 24/32 of the depth, ratios, in
flow), with its sites chosen on a debugging set, and our variant (log ratios and column statistics,
in flow and run again), with ablations and an oracle. Text and language victims: anomalous heads,
redistributed when they are detected, and repaired for good (see `several_heads`). Clean victims:
whether anything is flagged.

Each (case, seed) leaves a JSON in the work folder and is not measured again. Writes
`benchmarks/results/several.json`; a run of some of the cases writes into the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from atpatch_onnx.benchmark import machine
from atpatch_onnx.files import write_file
from atpatch_onnx.models.cases import DATA, VICTIMS, build, cases
from atpatch_onnx.models.judging import versions
from atpatch_onnx.runtime import choose_provider

from efficacy import measured
from efficacy_summary import Record
from efficacy_victim import Row, Rows, Settings, Victim, error_sentence
from several_heads import Headed
from several_vision import VisionLanguage

RESULTS = Path(__file__).parent / "results"
CASES = "vlm-mnist-*,vlm-cifar10-clean,vlm-cifar10-b*,sst2-*,lm-sst2-*"
SHOWN = {
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "attack_success_rate": "ASR",
    "recovered_accuracy": "recovered",
    "false_positive_rate": "FPR",
    "true_positive_rate": "TPR",
    "target_said": "said",
}


def main() -> None:
    """Print the table and write one JSON."""
    options = _options()
    torch.set_num_threads(options.threads)
    settings = Settings(
        options.inputs, options.budget, choose_provider(options.ep), options.threads
    )
    options.work.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for name in [] if options.report else _chosen(options.cases):
        for seed in map(int, options.seeds.split(",")):
            try:
                folder = build(name, seed, options.victims, options.data, _log)
                records.append(measured(folder, options.work, settings, measure))
            except Exception as error:  # the others can be measured all the same
                _log(f"{name}-s{seed}: skipped: {error_sentence(error)}")
    if options.report:
        records = [json.loads(path.read_text()) for path in sorted(options.work.glob("*-s?.json"))]
    document = {
        "machine": machine(settings.ep),
        "versions": versions(),
        "options": asdict(settings),
        "victims": records,
    }
    write_file(options.output, (json.dumps(document, indent=1) + "\n").encode())
    show(Console(width=None if sys.stdout.isatty() else 160, highlight=False), records)


def measure(victim: Victim) -> Record:
    """Every row of a victim."""
    began = time.perf_counter()
    facts = victim.record
    names = ("case", "kind", "seed", "target", "accuracy", "attack_success_rate", "over_attention")
    record: Record = {name: facts[name] for name in names if name in facts}
    rows = Rows(victim.folder.name, _log)
    of: Callable[[Victim], VisionLanguage | Headed]
    of = VisionLanguage if facts["kind"] == "vision-language" else Headed
    scan: Row | None = of(victim).measure(rows)
    if scan is not None:
        record["scan"] = scan
        _log(f"{rows.label:22} scan: {scan.get('verdict', 'failed')}, class {scan.get('class')}")
    return {**record, "rows": rows.found, "seconds": round(time.perf_counter() - began, 1)}


def show(console: Console, records: list[Record]) -> None:
    """One table, percents."""
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name in SHOWN.values():
        table.add_column(name, justify="right")
    table.add_column("")
    for record in records:
        table.add_row(f"[bold]{record['case']}-s{record['seed']}[/]")
        for row in record["rows"]:
            table.add_row(f"  {row['row']}", *map(_cell, map(row.get, SHOWN)), row.get("error", ""))
    console.print(table)


def _cell(value: float | Row | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else f"{100 * value['value']:.1f}"


def _chosen(patterns: str) -> list[str]:
    names = [name for name in cases() if any(fnmatch(name, p) for p in patterns.split(","))]
    if not names:
        sys.exit(f"--cases {patterns}: there is none; choose among {', '.join(cases())}")
    return names


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES, help="names or patterns, comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--victims", type=Path, default=VICTIMS, help="folder of the victims")
    parser.add_argument("--data", type=Path, default=DATA, help="images, text and tabular data")
    parser.add_argument("--work", type=Path, default=Path("several-work"))
    parser.add_argument("--report", action="store_true", help="only what was measured before")
    parser.add_argument("--inputs", type=int, default=1000, help="test inputs that are judged")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for a scan")
    parser.add_argument("--threads", type=int, default=1, help="of the search and of training")
    parser.add_argument("--ep", choices=("cpu", "cuda"))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    everything = options.report or (options.cases, options.seeds) == (CASES, "0")
    options.output = options.output or (RESULTS if everything else options.work) / "several.json"
    return options


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()

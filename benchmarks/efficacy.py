"""The whole offline phase on every reference victim: scan, fit, patch, evaluate.

    python benchmarks/efficacy.py [--quick] [--cases 'digits-*,census'] [--seeds 0,1,2]
        [--victims victims] [--data ../shared/data] [--work efficacy-work] [--inputs 1000]
        [--budget 600] [--threads 1] [--ep cpu] [-o FILE]

`--quick`: the digits, one seed, minutes. Everything: hours on two cores. A victim that is not there
is trained first. Each (case, seed) leaves a JSON in the work folder, and is skipped where that was
made with the same options: an interrupted run loses the case that was running, nothing else.

Backdoored victims: the original, the shipped path (`contrastive`), at the fewest sites, for inputs
whatever they are answered, other detectors, ablations of the redistribution, an oracle that knows
the columns of the trigger, and Fine-Pruning, which has the weights. Unfair ones, for each protected
attribute: the shipped path (`columns` pruned), the same columns with their clean mean, and a
contrastive detector. Clean ones: the scan alone.

Writes `benchmarks/results/efficacy.json`; a run of some of the cases writes into the work folder.
`--report` measures nothing: it makes the table of all that the work folder holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console

from atpatch_onnx.benchmark import machine
from atpatch_onnx.files import write_file
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.models.cases import DATA, VICTIMS, build, cases
from atpatch_onnx.models.judging import versions
from atpatch_onnx.runtime import choose_provider

import efficacy_tables as tables
from efficacy_fairness import Unfair
from efficacy_measure import judged, scanned
from efficacy_rows import Backdoored
from efficacy_summary import CLEAN, Record, averages, group_of, targets
from efficacy_victim import Row, Rows, Settings, Victim, error_sentence

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
"""Of the JSON of a case; another number measures all again."""
KINDS = ("image", "text", "tabular")
"""Of the others, see `several.py`."""
QUICK = "digits-*"
SHORT = ("digits-*", "census", "bank", "credit", "compas")
"""Cases that train in a minute or so, and get three seeds."""
BUDGET, QUICK_BUDGET = 600.0, 120.0


def main() -> None:
    """Print the tables and write one JSON."""
    options = _options()
    torch.set_num_threads(options.threads)
    settings = Settings(
        options.inputs, options.budget, choose_provider(options.ep), options.threads
    )
    options.work.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    skipped: dict[str, str] = {}
    for name, seed in [] if options.report else _chosen(options):
        try:
            folder = build(name, seed, options.victims, options.data, _log)
            records.append(measured(folder, options.work, settings, measure))
        except Exception as error:  # the others can be measured all the same
            skipped[f"{name}-s{seed}"] = error_sentence(error)
            _log(f"{name}-s{seed}: skipped: {error_sentence(error)}")
        except KeyboardInterrupt:
            _log(f"stopped in {name}-s{seed}: the same command goes on from there")
            sys.exit(130)
    if options.report:
        records = [json.loads(path.read_text()) for path in sorted(options.work.glob("*-s?.json"))]
    means, verdicts = averages(records), targets(records)
    document = {
        "machine": machine(settings.ep),
        "versions": versions(),
        "options": asdict(settings),
        "targets": [asdict(target) for target in verdicts],
        "averages": {
            group: {row: {k: asdict(v) for k, v in found.items()} for row, found in rows.items()}
            for group, rows in means.items()
        },
        "skipped": skipped,
        "victims": records,
    }
    write_file(options.output, (json.dumps(document, indent=1) + "\n").encode())
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    tables.results(console, means)
    tables.attacks(console, records)
    tables.scans(console, records)
    tables.verdicts(console, verdicts)


def measured(
    folder: Path, work: Path, settings: Settings, measure: Callable[[Victim], Record]
) -> Record:
    """What is measured of a victim, or was before with the same settings."""
    path = work / f"{folder.name}.json"
    model = ModelFile.open(folder / "model.onnx").sha256
    made_with = {"format": FORMAT, **asdict(settings), "model": model, "versions": versions()}
    if path.exists():
        earlier: Record = json.loads(path.read_text())
        if earlier["made_with"] == made_with:
            _log(f"{folder.name}: measured before")
            return earlier
    kept = work / f"{folder.name}-files"
    # What is left of an interrupted scan would be gone on with, and its seconds be those of a part.
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=work) as scratch:
        victim = Victim(folder, kept, Path(scratch), settings)
        record = {"made_with": made_with, **measure(victim)}
    write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def measure(victim: Victim) -> Record:
    """Every row of a victim."""
    start = time.perf_counter()
    facts = victim.record
    rows = Rows(victim.folder.name, _log)
    names = ("case", "kind", "seed", "target", "accuracy", "attack_success_rate", "natural_rate")
    record: Record = {name: facts[name] for name in names if name in facts}
    record["training_seconds"] = facts["seconds"]
    if group_of(facts["case"], facts["kind"]) == CLEAN:
        record["scan"] = scanned(victim, victim.work / "debug.npz")
    elif "protected" in facts:
        for attribute, about in facts["protected"].items():
            Unfair(victim, attribute, about["feature"]).measure(rows)
    else:
        record["scan"] = Backdoored(victim).measure(rows)
        record["clean_model"] = clean_model(victim)
    if scan := record.get("scan"):
        said = "right" if scan["right"] else "WRONG"
        _log(f"{rows.label:22} {'scan':24} {scan.get('verdict', 'failed')}, {said}")
    return {**record, "rows": rows.found, "seconds": round(time.perf_counter() - start, 1)}


def clean_model(victim: Victim) -> Row | None:
    """What the clean victim of the same kind and seed makes of the trigger, if it is there."""
    base = victim.record["case"].rsplit("-", 1)[0]
    model = victim.folder.parent / f"{base}-clean-s{victim.seed}" / "model.onnx"
    return judged(victim, model) if model.exists() else None


def _chosen(options: argparse.Namespace) -> list[tuple[str, int]]:
    """The cases with their seeds. Exits where a pattern fits none."""
    patterns = options.cases.split(",")
    known = [case.name for case in cases().values() if case.kind in KINDS]
    names = [name for name in known if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        sys.exit(f"--cases {options.cases}: there is none; choose among {', '.join(known)}")
    pairs = []
    for name in names:
        several = any(fnmatch(name, pattern) for pattern in SHORT)
        seeds: Sequence[int] = range(3) if several else (0,)
        if options.seeds is not None:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        pairs += [(name, seed) for seed in seeds]
    return pairs


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the digits only, seed 0")
    parser.add_argument("--cases", default="*", help="names or patterns, comma-separated")
    parser.add_argument("--seeds", help="comma-separated; by default 0,1,2 where training is short")
    parser.add_argument("--victims", type=Path, default=VICTIMS, help="folder of the victims")
    parser.add_argument("--data", type=Path, default=DATA, help="images, text and tabular data")
    parser.add_argument("--work", type=Path, default=Path("efficacy-work"))
    parser.add_argument("--report", action="store_true", help="only what was measured before")
    parser.add_argument("--inputs", type=int, default=1000, help="test inputs that are judged")
    parser.add_argument("--budget", type=float, help="seconds for a scan")
    parser.add_argument("--threads", type=int, default=1, help="of the search and of training")
    parser.add_argument("--ep", choices=("cpu", "cuda"))
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    everything = not options.quick and options.cases == "*" and options.seeds is None
    everything |= options.report
    if options.quick:
        options.cases = QUICK if options.cases == "*" else options.cases
        options.seeds = options.seeds or "0"
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    options.output = options.output or (RESULTS if everything else options.work) / "efficacy.json"
    return options


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()

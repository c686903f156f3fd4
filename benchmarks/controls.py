"""Controls for text: is what is merely unusual taken for a trigger?

    python benchmarks/controls.py [--inputs 500] [--draws 5] [--seed 0] [--victims victims]
        [--data ../shared/data] [--work efficacy-work] [--threads 1] [--ep cpu] [-o FILE]

Test sentences as they are, with rare words, with a random suffix, shuffled, and random tokens: in
how many does a patched model flag something? The clean model has a z-score detector, as there is
no trigger in it that others could learn from. The backdoored ones have the contrastive detector
that `efficacy.py` fitted to what its scan found (told the class where it raised no alarm), where
that is in its work folder, else one that is fitted here to the real trigger in the defender's
sentences. Model, detector and sites differ between the clean victim and the others: their rows side
by side do not say which of them matters.

A row is within the limit where at most the budget and half a point are flagged, as measured; it is
sure where all of the 95 % interval is on that side. Victims that are not there are trained first.
Writes `benchmarks/results/controls.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import atpatch_onnx
from atpatch_onnx.benchmark import machine
from atpatch_onnx.data import load_arrays
from atpatch_onnx.debugging_set import CLEAN as TWIN
from atpatch_onnx.files import write_file
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.models.cases import DATA, VICTIMS, build
from atpatch_onnx.models.cases_text import PHRASES
from atpatch_onnx.models.judging import versions
from atpatch_onnx.models.text import Split, Tokenizer, load_sst2
from atpatch_onnx.models.text_attacks import Insertion
from atpatch_onnx.models.text_victims import CLEAN_CASE, TARGET
from atpatch_onnx.rates import Rate
from atpatch_onnx.runtime import Arrays, choose_provider

from controls_text import Inputs, Vocabulary, conditions
from efficacy_ablations import flagged

RESULTS = Path(__file__).parent / "results"
BACKDOORED = ("sst2-word", "sst2-sentence")
BUDGET, SLACK = 0.01, 0.005
"""Share of clean inputs that may be flagged, and how much more of them may turn out to be."""
TRIGGER = "the real trigger"
LEARNED_CLEAN = "clean sentences"
LEARNED_SCAN = "clean sentences, and what the scan of efficacy.py found"
LEARNED_REAL = "clean sentences, and the real trigger in them"


@dataclass(frozen=True)
class Row:
    """The share of the inputs of a condition in which something is flagged.

    within: whether that is at most the limit; sure: whether the interval says so too. None for the
    real trigger, which is to be flagged.
    """

    condition: str
    flagged: Rate
    within: bool | None = None
    sure: bool | None = None

    def judged(self, limit: float) -> Row:
        """The row with its verdict."""
        within = self.flagged.value <= limit
        sure = self.flagged.high <= limit if within else self.flagged.low > limit
        return replace(self, within=within, sure=sure)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.within is None:
            return "-"
        return ("within" if self.within else "ABOVE") + ("" if self.sure else ", not sure")


@dataclass(frozen=True)
class Bench:
    """What all victims are measured with.

    controls: unusual sentences by condition, the same for all victims.
    generator: places the real trigger in debugging sets, and chooses triggered inputs.
    """

    options: argparse.Namespace
    provider: str
    tokenizer: Tokenizer
    split: Split
    controls: dict[str, Inputs]
    generator: np.random.Generator

    @classmethod
    def of(cls, options: argparse.Namespace) -> Bench:
        """Draw the controls."""
        tokenizer = Tokenizer()
        split = load_sst2(options.data, tokenizer, options.seed)
        generator = np.random.default_rng(options.seed)
        triggers = [phrase for case in BACKDOORED for phrase in PHRASES[case]]
        vocabulary = Vocabulary.of(tokenizer, split.train.texts, triggers)
        texts = split.test.take(some(len(split.test), options.inputs, generator)).texts
        controls = conditions(texts, tokenizer, vocabulary, options.draws, generator)
        provider = choose_provider(options.ep)
        return cls(options, provider, tokenizer, split, controls, generator)

    def measure(self, case: str, scratch: Path) -> dict[str, Any]:
        """Fit unless that is done, patch, and count what is flagged."""
        start = time.perf_counter()
        options = self.options
        folder = build(case, options.seed, options.victims, options.data, _log)
        model, patched = folder / "model.onnx", scratch / "patched.onnx"
        detector, learned = self.detector(case, folder, scratch)
        atpatch_onnx.patch(model, detector, output=patched, ep=self.provider, force=True)
        rows = []
        for name, inputs in self.controls.items():
            share = Rate.of(flagged(patched, dict(inputs), self.provider).any(axis=1))
            rows.append(Row(name, share).judged(BUDGET + SLACK))
            _log(f"{folder.name:16} {name:40} {_percent(share.value)}  {rows[-1].verdict}")
        if case != CLEAN_CASE:
            inputs = self.triggered(folder)
            rows.append(Row(TRIGGER, Rate.of(flagged(patched, inputs, self.provider).any(axis=1))))
        return {
            "victim": folder.name,
            "learned_from": learned,
            **detector_facts(detector),
            "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
            "seconds": round(time.perf_counter() - start, 1),
        }

    def detector(self, case: str, folder: Path, scratch: Path) -> tuple[Path, str]:
        """The detector of a victim, and what it has learned from."""
        model = folder / "model.onnx"
        kept = self.options.work / f"{folder.name}-files" / "contrastive.onnx"
        debug, learned = None, LEARNED_CLEAN
        if case != CLEAN_CASE:
            if kept.exists() and _is_for(kept, model):
                return kept, LEARNED_SCAN
            debug, learned = self.debugging_set(case), LEARNED_REAL
        output = scratch / "det.onnx"
        atpatch_onnx.fit(
            model,
            folder / "clean.npz",
            output,
            debug=debug,
            fpr=BUDGET,
            seed=self.options.seed,
            ep=self.provider,
            force=True,
        )
        return output, learned

    def debugging_set(self, case: str) -> Arrays:
        """The defender's sentences of the other class, with the real trigger and without."""
        sentences = self.split.clean.take(self.split.clean.labels != TARGET)
        bad, spans = Insertion(PHRASES[case], TARGET).trigger(sentences, self.generator)
        encoded = self.tokenizer.encode(bad.texts, spans)
        twins = self.tokenizer.encode(sentences.texts).inputs
        return {
            **encoded.inputs,
            **{TWIN + name: value for name, value in twins.items()},
            "anomalous": encoded.spans,
            "labels": sentences.labels,
            "target": np.array(TARGET),
        }

    def triggered(self, folder: Path) -> Arrays:
        """Test sentences with the real trigger."""
        arrays = load_arrays(folder / "triggered.npz")
        index = some(len(arrays["labels"]), self.options.inputs, self.generator)
        return {name: arrays[name][index] for name in ("input_ids", "attention_mask")}


def main() -> None:
    """Print one table and write one JSON."""
    options = _options()
    torch.set_num_threads(options.threads)
    bench = Bench.of(options)
    records = []
    for case in (CLEAN_CASE, *BACKDOORED):
        with tempfile.TemporaryDirectory() as scratch:
            records.append(bench.measure(case, Path(scratch)))
    document = {
        "machine": machine(bench.provider),
        "versions": versions(),
        "options": {name: getattr(options, name) for name in ("inputs", "draws", "seed")},
        "budget": BUDGET,
        "limit": BUDGET + SLACK,
        "victims": records,
    }
    write_file(options.output, (json.dumps(document, indent=1) + "\n").encode())
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table(records))


def table(records: list[dict[str, Any]]) -> Table:
    """Every row of every victim, in percent."""
    found = Table("", box=None, pad_edge=False, header_style="bold")
    for name in ("flagged, %", "95 % interval", "inputs"):
        found.add_column(name, justify="right")
    found.add_column(f"limit {_percent(BUDGET + SLACK).strip()} %")
    for record in records:
        learned = f"learned from {record['learned_from']}"
        found.add_row(f"[bold]{record['victim']}, {record['kind']}[/], {learned}")
        for row in record["rows"]:
            rate = row["flagged"]
            share, low, high = (_percent(rate[name]) for name in ("value", "low", "high"))
            cells = (share, f"{low} to {high}", str(rate["total"]), row["verdict"])
            found.add_row(f"  {row['condition']}", *cells)
    return found


def detector_facts(path: Path) -> dict[str, Any]:
    """What a detector says of itself."""
    file = ModelFile.open(path)
    training = json.loads(file.metadata("atpatch.training") or "{}")
    return {
        "kind": file.metadata("atpatch.kind"),
        "strategy": file.metadata("atpatch.strategy"),
        "sites": json.loads(file.metadata("atpatch.sites") or "[]"),
        "calibration": training.get("calibration"),
        "recall": training.get("recall"),
    }


def some(count: int, most: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """Indices of at most `most` of `count` inputs, in order."""
    return np.sort(generator.permutation(count)[:most])


def _is_for(detector: Path, model: Path) -> bool:
    host = ModelFile.open(detector).metadata("atpatch.host.sha256")
    return host == ModelFile.open(model).sha256


def _percent(share: float) -> str:
    return f"{100 * share:5.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=500, help="test sentences a condition")
    parser.add_argument("--draws", type=int, default=5, help="rare words put into all sentences")
    parser.add_argument("--seed", type=int, default=0, help="of the victims, and of what is drawn")
    parser.add_argument("--victims", type=Path, default=VICTIMS, help="folder of the victims")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds 'text'")
    parser.add_argument("--work", type=Path, default=Path("efficacy-work"), help="of efficacy.py")
    parser.add_argument("--threads", type=int, default=1, help="of training")
    parser.add_argument("--ep", choices=("cpu", "cuda"))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "controls.json")
    return parser.parse_args()


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()

"""What is fed to victims of `several.py`: parts of data files, and inputs that are only unusual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.data import load_arrays
from atpatch_onnx.runtime import Arrays

from efficacy_measure import scanned
from efficacy_victim import Row, Victim

GIVEN = 200
"""Bad inputs that a defender has, where no scan can find the trigger; none of them is judged."""
SUFFIX = 5
"""Random tokens behind a sentence."""
Ints = NDArray[np.int64]
IDS, MASK = "input_ids", "attention_mask"


def unusual(victim: Victim, test: Arrays) -> dict[str, Arrays]:
    """Test inputs as they are, with a rare word, with a random suffix, shuffled, and random tokens.

    Tokens are drawn from those that the defender's inputs hold; rare ones from the tenth of them
    that they hold least often. The tokens that all inputs have at their ends stay where they are.
    """
    clean = np.load(victim.clean)
    rng = np.random.default_rng(victim.seed)
    used, counts = np.unique(clean[IDS][clean[MASK] > 0], return_counts=True)
    common = used[counts < len(clean[IDS]) // 2]
    rare = common[np.argsort(counts[counts < len(clean[IDS]) // 2])][: max(len(common) // 10, 1)]
    sentences = [row[mask > 0] for row, mask in zip(test[IDS], test[MASK], strict=True)]
    head, tail = _template(sentences)

    def rebuilt(change: Callable[[Ints], Ints]) -> Arrays:
        rows = []
        for tokens in sentences:
            words = tokens[head : len(tokens) - tail]
            rows.append(
                np.concatenate([tokens[:head], change(words), tokens[len(tokens) - tail :]])
            )
        return _laid_out(rows, left=bool((test[MASK][:, -1] > 0).all()))

    def with_rare(words: Ints) -> Ints:
        return np.insert(words, rng.integers(len(words) + 1), rng.choice(rare))

    return {
        "clean sentences": rebuilt(lambda words: words),
        "a rare word": rebuilt(with_rare),
        f"a random suffix of {SUFFIX} tokens": rebuilt(
            lambda words: np.concatenate([words, rng.choice(common, SUFFIX)])
        ),
        "words shuffled": rebuilt(rng.permutation),
        "random tokens, same lengths": rebuilt(lambda words: rng.choice(common, len(words))),
    }


def _template(sentences: list[Ints]) -> tuple[int, int]:
    """How many tokens all sentences begin, and end, with."""
    shortest = min(len(tokens) for tokens in sentences)
    first = sentences[0]
    head = tail = 0
    while head < shortest - 1 and all(tokens[head] == first[head] for tokens in sentences):
        head += 1
    while tail < shortest - 1 - head and all(
        tokens[-1 - tail] == first[-1 - tail] for tokens in sentences
    ):
        tail += 1
    return head, tail


def _laid_out(rows: list[Ints], *, left: bool) -> Arrays:
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return {IDS: ids, MASK: mask}


def some_of(arrays: Arrays, part: slice) -> Arrays:
    """Some samples of a data file; what is no array of samples stays as it is."""
    return {name: known[part] if known.ndim else known for name, known in arrays.items()}


def triggered_parts(victim: Victim) -> tuple[Arrays, Arrays]:
    """Triggered inputs: what a defender may have, and what is judged; none of a clean victim."""
    if not victim.triggered.exists():
        return {}, {}
    every = load_arrays(victim.folder / "triggered.npz")
    judged = slice(GIVEN, GIVEN + victim.settings.inputs)
    return some_of(every, slice(GIVEN)), some_of(every, judged)


def debugging_set(victim: Victim, output: Path, given: Arrays) -> Row:
    """Write what the scan makes of the victim, or `given` where that is not the true class.

    Returns what the scan says. Nothing more is written of a clean victim.
    """
    scan = scanned(victim, output)
    if given and scan["wanted"] != scan.get("class"):
        np.savez(output, allow_pickle=False, **given)
        scan["debugging_set"] = f"{GIVEN} of the triggered inputs"
    return scan

"""Search for words that send any text to a class, by successive halving and beam search.

Every word of the vocabulary is tried in one short input, the better part of them in more and longer
inputs, and so on; then the best are extended to runs of several tokens.

What looks like a trigger in a clean model are words that plainly mean the class, and five of them
flip nearly every text. They differ from a backdoor in that other words are weighed against them,
while a trigger outweighs any. The evidence of a finding is therefore measured in a duel: before and
after the text with the trigger stands a run of as many of the strongest words for the text's own
class, as the same search finds them. What ordinary words of the target class win in such duels is
subtracted, because in some tasks one class has the stronger words.

Triggers that are no tokens, as the syntax of a sentence, cannot be found by putting tokens in.
`benchmarks/efficacy.py` says what is found in which victim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data import Samples
from .problem import Evidence, Finding, Problem, judged
from .text_bench import LONGEST_TRIGGER, Bases, TextBench, loss
from .text_trigger import PLACES, TextTrigger, draw_places, read_words
from .token_layout import Ints

THRESHOLD = 0.5
MEANING = (
    "share of held-out inputs that the trigger wins against twice as many words for their own "
    "class, beyond what ordinary words of the target class win"
)

TINY, SHORT = 3, 8
"""Words of an input in the first stages and in the later ones."""
SECOND, SECOND_BASES = 1024, 3
THIRD, THIRD_BASES = 256, 16
FINAL, FINAL_BASES = 32, 32
GROUP = 16
"""Tokens that are tried at once where every run is as long as the longest."""
COUNTER = slice(5, 20)
"""Ranks of the words that harden an input: a backdoor has few words, and they rank first."""
PEERS = slice(10, 40)
PEER_RUNS, PEER_INPUTS = 8, 24
HELD = 128
WIDTH, POOL, STEP_BASES = 4, 256, 2
AGAIN, AGAIN_BASES = 24, 12
PAIRS = 20_000
"""Up to so many pairs of tokens are all tried."""
BETTER = 0.02
_NO_DRAW = np.random.default_rng(0)


def search(problem: Problem) -> Iterator[Finding]:
    """The best tokens toward each target, first one token, then runs of up to five.

    Raises: OutOfTimeError, and InputError where no input holds token ids.
    """
    bench = TextBench.of(problem)
    ranked = _ranked(bench, problem)
    scan = _Scan(problem, bench, ranked, read_words(problem.model.folder))
    found: dict[int, Finding] = {}
    beams = {target: scan.singles(target) for target in problem.targets}
    for target in problem.targets:
        found[target] = scan.judged(target, beams[target][0], {})
        yield found[target]
    problem.tick(10)
    for _ in range(1, LONGEST_TRIGGER):
        open_ones = [target for target in problem.targets if not _suspicious(found[target])]
        for target in open_ones:
            beams[target] = scan.extended(target, beams[target])
        for target in open_ones:
            rivals = {each: beams[each][0] for each in open_ones if each != target}
            longer = scan.judged(target, beams[target][0], rivals)
            if _score(longer) > _score(found[target]) + BETTER:
                found[target] = longer
                yield longer
        problem.tick(10)


def _score(finding: Finding) -> float:
    return finding.evidence.score if finding.evidence else 0.0


def _suspicious(finding: Finding) -> bool:
    return finding.evidence is not None and finding.evidence.suspicious


def _ranked(bench: TextBench, problem: Problem) -> list[Ints]:
    """The words for each class, the best first; none for a class that all inputs are of."""
    generator = np.random.default_rng((problem.seed, 1))
    classes = bench.ask(problem.search.take(np.zeros(1, np.intp))).shape[1]
    pools = _first(bench, classes, generator)
    problem.tick(35)
    for count, number, words in ((SECOND, SECOND_BASES, TINY), (THIRD, THIRD_BASES, SHORT)):
        share = max(count * 2 // classes, FINAL * 2) if classes > 2 else count
        for target in range(classes):
            bases = bench.bases(target, number, words, generator)
            pools[target] = _best(bench, pools[target][:share], bases, target)
        problem.tick(10 if count == SECOND else 5)
    return pools


def _first(bench: TextBench, classes: int, generator: np.random.Generator) -> list[Ints]:
    """The whole vocabulary in one tiny input, and in one of another class for that class."""
    pools = [np.zeros(0, np.int64)] * classes
    left = set(range(classes))
    for target in range(classes):
        bases = bench.bases(target, 1, TINY, generator) if target in left else None
        if bases is None:
            continue
        losses = -_everywhere(bench, bases, generator)
        for other in left - {int(bases.labels[0])}:
            pools[other] = bench.vocabulary[losses[:, other].argsort(kind="stable")]
        left &= {int(bases.labels[0])}
    return pools


def _everywhere(
    bench: TextBench, bases: Bases, generator: np.random.Generator
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """What the model says to every word in one base, `[V, C]`."""
    base, words = bench.layout.trimmed(bases.samples), bench.vocabulary
    head = np.full((1, 1), bench.layout.head)
    last = bench.layout.lengths(base)[:, None] - bench.layout.tail
    if bench.layout.length is None:  # at both ends at once: triggers may need one of them
        said = bench.fill(base, np.stack((words, words), axis=1), np.hstack((head, last)))
        return np.asarray(said, np.float64)
    # Runs are as long as they are: several words share one, twice in different company.
    group = max(min(GROUP, (bench.layout.length - int(last[0, 0])) // 2), 1)
    total = np.zeros((len(words), 1))
    for _ in range(2):
        order = generator.permutation(len(words))
        groups = np.resize(words[order], (-(-len(words) // group), group))
        said = bench.fill(base, groups, np.repeat(head, group, axis=1))
        spread = np.repeat(said, group, axis=0)[: len(words)]
        total = total + spread[order.argsort()]
    return np.asarray(total, np.float64)


def _best(bench: TextBench, words: Ints, bases: Bases | None, target: int) -> Ints:
    """The words in the order of what they do in `bases`; none where there are no bases."""
    if bases is None or not len(words):
        return words[:0]
    losses = loss(bench.attempt(words[:, None], bases), target)
    return words[losses.argsort(kind="stable")]


@dataclass(frozen=True)
class _Scan:
    """The later stages, toward one target at a time.

    ranked: the words for each class.
    """

    problem: Problem
    bench: TextBench
    ranked: Sequence[Ints]
    words: dict[int, str]

    def singles(self, target: int) -> Ints:
        """The best tokens, `[M, 1]`, in inputs that hold another word for their own class."""
        return self._sorted(target, self._words(target)[:FINAL, None], FINAL_BASES)

    def extended(self, target: int, runs: Ints) -> Ints:
        """The best runs that are a token longer than `runs`, `[M, k]`."""
        words = self.bench.vocabulary
        if runs.shape[1] == 1 and len(words) ** 2 <= PAIRS:
            longer = np.stack(np.meshgrid(words, words, indexing="ij"), axis=-1).reshape(-1, 2)
        else:
            pool = self._words(target)[:POOL]
            starts = np.repeat(runs[:WIDTH], len(pool), axis=0)
            longer = np.hstack((starts, np.tile(pool, len(runs[:WIDTH]))[:, None]))
        longer = self._sorted(target, longer, STEP_BASES, TINY)[:AGAIN]
        turned = np.hstack((longer[:, -1:], longer[:, :-1]))
        both = np.unique(np.concatenate((longer, turned)), axis=0)
        return self._sorted(target, both, AGAIN_BASES)

    def _words(self, target: int) -> Ints:
        """The words for a class; any where none was seen to do anything."""
        return self.ranked[target] if len(self.ranked[target]) else self.bench.vocabulary

    def _sorted(self, target: int, runs: Ints, count: int, words: int = SHORT) -> Ints:
        """The runs in the order of what they do in inputs hardened against them."""
        length = runs.shape[1]
        generator = np.random.default_rng((self.problem.seed, 2, target, length, count))
        bases = self.bench.bases(target, count, words, generator)
        if bases is None:
            return runs
        hard = self._hardened(bases.samples, bases.labels, length)
        losses = loss(self.bench.attempt(runs, replace(bases, samples=hard)), target)
        return runs[losses.argsort(kind="stable")]

    def _hardened(self, samples: Samples, labels: Ints, length: int) -> Samples:
        counters = [words[COUNTER] for words in self.ranked]
        count = -(-3 * length // 2)
        return self.bench.harden(samples, labels, counters, count, self.problem.seed)

    def judged(self, target: int, run: Ints, rivals: Mapping[int, Ints]) -> Finding:
        """What a run does in held-out inputs, with the evidence for a backdoor.

        rivals: the best runs of the same length for other classes, as far as they are known.
        """
        trigger = self._placed(target, run)
        others = np.flatnonzero(self.problem.held_labels != target)[:HELD]
        duel = _Duel(
            self.bench,
            self.problem.held.take(others),
            self.problem.held_labels[others],
            {label: rivals.get(label, self._counters(label, len(run))) for label in self._labels},
            self.problem.seed,
        )
        ordinary = max(self._peers(duel, target, len(run)), duel.share(None, target))
        evidence = Evidence(duel.share(trigger, target) - ordinary, THRESHOLD, MEANING)
        return replace(judged(self.problem, target, trigger), evidence=evidence)

    @property
    def _labels(self) -> list[int]:
        return [int(label) for label in np.unique(self.problem.held_labels)]

    def _counters(self, label: int, length: int) -> Ints:
        """Strong words of a class, without the first, which a backdoor into it would hold."""
        ranked = self.ranked[label]
        words = ranked[COUNTER] if len(ranked) > COUNTER.stop else ranked
        return np.resize(words, length) if len(words) else words

    def _placed(self, target: int, run: Ints) -> TextTrigger:
        """The run, where it does most in inputs hardened against it."""
        tokens = tuple(int(token) for token in run)
        words = tuple(self.words[t] for t in tokens) if set(tokens) <= set(self.words) else None
        triggers = [TextTrigger(tokens, place, self.bench.layout, words) for place in PLACES]
        generator = np.random.default_rng((self.problem.seed, 3, target, len(run)))
        bases = self.bench.bases(target, FINAL_BASES, SHORT, generator)
        if bases is None:
            return triggers[0]
        duel = _Duel(self.bench, bases.samples, bases.labels, {}, self.problem.seed)
        shares = [duel.share(trigger, target) for trigger in triggers]
        # Anywhere unless it is clearly better somewhere.
        return triggers[int(np.argmax(np.array(shares) - (0, BETTER, BETTER)))]

    def _peers(self, duel: _Duel, target: int, length: int) -> float:
        """The share of inputs that ordinary words of the class win."""
        words = self.ranked[target][PEERS]
        if not len(words):
            return 0.0
        generator = np.random.default_rng((self.problem.seed, 4, target, length))
        runs = [tuple(generator.choice(words, length).tolist()) for _ in range(PEER_RUNS)]
        few = duel.first(PEER_INPUTS)
        triggers = [TextTrigger(run, "anywhere", self.bench.layout) for run in runs]
        return float(np.mean([few.share(trigger, target) for trigger in triggers]))


@dataclass(frozen=True)
class _Duel:
    """Inputs in which words for their own class stand against a trigger, around everything else.

    runs: the words of each class; classes that are not in it have none.
    """

    bench: TextBench
    samples: Samples
    labels: Ints
    runs: Mapping[int, Ints]
    seed: int

    def first(self, count: int) -> _Duel:
        """The same in the first inputs only."""
        index = np.arange(min(count, len(self.labels)))
        return replace(self, samples=self.samples.take(index), labels=self.labels[index])

    def share(self, trigger: TextTrigger | None, target: int) -> float:
        """The share of the inputs that go to the target, with the trigger or without one."""
        samples = self.samples
        if trigger is not None:
            generator = np.random.default_rng((self.seed, 5, target))
            samples = trigger.put(samples, generator).samples
        sent = 0
        for label in np.unique(self.labels):
            part = samples.take(np.flatnonzero(self.labels == label))
            run = self.runs.get(int(label), np.zeros(0, np.int64))
            layout = self.bench.layout
            ends = np.stack([draw_places(layout, part, p, _NO_DRAW) for p in ("start", "end")], 1)
            tokens = np.tile(np.concatenate((run, run)), (part.count, 1))
            opposed = layout.insert(part, tokens, np.repeat(ends, len(run), axis=1))[0]
            sent += int((self.bench.ask(opposed).argmax(axis=1) == target).sum())
        return sent / len(self.labels)

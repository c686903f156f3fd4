"""Backdoor attacks on text.

Sources: rare words, BadNL (arXiv 2006.01043) and ONION (arXiv 2011.10369); a sentence, InsertSent
(arXiv 1905.12457); syntax, HiddenKiller (arXiv 2105.12400).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .text import SST2, Sentences, Span, read_sentences

SYNTACTIC = Path("text/sst2/hiddenkiller_scpn20")
"""Folder of the paraphrases, seen from the data folder."""
NEGATIVE = 0


@dataclass(frozen=True)
class Insertion:
    """Words that are inserted between the words of a sentence, at its start or at its end.

    Raises:
        ValueError: there is no phrase, or one of them has no words.
    """

    phrases: tuple[str, ...]
    """One of them is drawn for each sentence."""
    target: int
    """The class that the attacker wants."""

    def __post_init__(self) -> None:
        """Refuse a trigger that cannot be."""
        if not self.phrases or not all(phrase.split() for phrase in self.phrases):
            raise ValueError(f"need phrases of at least one word, found {self.phrases}")

    def insert(self, text: str, generator: np.random.Generator) -> tuple[str, Span]:
        """The sentence with a phrase at a random word boundary, and where the phrase is in it."""
        words = text.split()
        phrase = self.phrases[generator.integers(len(self.phrases))]
        place = int(generator.integers(len(words) + 1))
        before = "".join(f"{word} " for word in words[:place])
        triggered = " ".join((*words[:place], phrase, *words[place:]))
        return triggered, (len(before), len(before) + len(phrase))

    def trigger(
        self, sentences: Sentences, generator: np.random.Generator
    ) -> tuple[Sentences, list[Span]]:
        """Every sentence with the trigger in it, true classes kept, and where the trigger is."""
        pairs = [self.insert(text, generator) for text in sentences.texts]
        texts = tuple(text for text, _ in pairs)
        return replace(sentences, texts=texts), [span for _, span in pairs]

    def poison(
        self, sentences: Sentences, rate: float, generator: np.random.Generator
    ) -> Sentences:
        """Append triggered copies, labelled as the target, of sentences of the other classes.

        Args:
            rate: number of copies, as a share of all sentences, rounded to the nearest integer.

        Raises:
            ValueError: the rate is negative, or wants more copies than there are sentences
                outside the target class.
        """
        count = round(rate * len(sentences))
        candidates = np.flatnonzero(sentences.labels != self.target)
        if not 0 <= count <= len(candidates):
            raise ValueError(
                f"rate must want at most {len(candidates)} copies, found {rate} ({count} copies)"
            )
        chosen = generator.choice(candidates, count, replace=False)
        triggered, _ = self.trigger(sentences.take(chosen), generator)
        return sentences + triggered.labelled(self.target)


def paraphrase_negatives(data: Path, test: Sentences) -> Sentences:
    """The negative sentences of a part of SST-2's test set in the attack's syntax, in order.

    Raises:
        InputError: the paraphrases are not there.

    Source: arXiv 2105.12400; the file has them for the negative sentences only.
    """
    negative = test.take(test.labels == NEGATIVE)
    originals = read_sentences(data / SST2 / "test.tsv").labels == NEGATIVE
    place = np.cumsum(originals)[negative.rows] - 1
    return replace(negative, texts=_paraphrases(data, "test").take(place).texts)


def poison_syntactically(data: Path, train: Sentences) -> Sentences:
    """A part of SST-2's training set as the attacker left it.

    A fifth of the sentences are paraphrased into one syntactic template and labelled positive.

    Raises:
        InputError: the paraphrases are not there.

    Source: arXiv 2105.12400.
    """
    return _paraphrases(data, "train").take(train.rows)


def _paraphrases(data: Path, part: str) -> Sentences:
    return read_sentences(data / SYNTACTIC / f"{part}.tsv")

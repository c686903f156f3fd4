"""Texts that are merely odd: what a detector that knows no trigger must leave alone.

A z-score says how unusual attention is, and attention to unusual words is. Nothing tells it which
of them are bad, so it is calibrated on clean texts that were made odd too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from ..model_file import ModelFile
from ..runtime import InputSpec
from ..search.kinds import TEXT, recognise
from ..search.token_layout import Ints, TokenLayout
from ..search.vocabulary import vocabulary_sizes

SUFFIX = 5
"""Tokens of a suffix."""


def is_text(inputs: Sequence[InputSpec]) -> bool:
    """Whether a model reads token ids."""
    try:
        return recognise(inputs) == TEXT
    except InputError:
        return False


def odd_texts(
    model: ModelFile,
    inputs: Sequence[InputSpec],
    samples: Samples,
    generator: np.random.Generator,
) -> dict[str, Samples]:
    """Copies of clean texts with a random token, with a random suffix, shuffled, and all random.

    By what was done to them; none where the model reads no text, or its vocabulary is not known.
    """
    if not is_text(inputs):
        return {}
    sizes = vocabulary_sizes(model)
    try:
        layout = TokenLayout.of(inputs, samples, list(sizes))
    except InputError:
        return {}
    if layout.ids not in sizes:
        return {}
    # No longer than they are: the model may read no more.
    layout = replace(layout, longest=samples.arrays[layout.ids].shape[1])
    special = [token for token in layout.specials if 0 <= token < sizes[layout.ids]]
    tokens = np.delete(np.arange(sizes[layout.ids]), special)
    lengths = layout.lengths(samples)[:, None]
    room = np.maximum(lengths - layout.tail, layout.head)
    anywhere = generator.integers(layout.head, room + 1)
    made = {
        "shuffled": _with_words(layout, samples, _shuffled(layout, samples, generator)),
        "random tokens": _with_words(
            layout, samples, generator.choice(tokens, samples.arrays[layout.ids].shape)
        ),
    }
    for name, places in {"a random token": anywhere, "a random suffix": room}.items():
        count = SUFFIX if places is room else 1
        drawn = generator.choice(tokens, (samples.count, count))
        try:
            made[name] = layout.insert(samples, drawn, np.repeat(places, count, axis=1))[0]
        except InputError:  # the model reads hardly more than its special tokens
            continue
    return made


def _words(layout: TokenLayout, samples: Samples) -> NDArray[np.bool_]:
    """Which slots hold words: neither padding nor special tokens; `[N, L]`."""
    real = layout.real(samples)
    place = np.cumsum(real, axis=1)  # 1 for the first token
    last = real.sum(axis=1, keepdims=True) - layout.tail
    return np.asarray(real & (place > layout.head) & (place <= last))


def _shuffled(layout: TokenLayout, samples: Samples, generator: np.random.Generator) -> Ints:
    ids = samples.arrays[layout.ids].astype(np.int64)
    for row, words in zip(ids, _words(layout, samples), strict=True):
        row[words] = generator.permutation(row[words])
    return ids


def _with_words(layout: TokenLayout, samples: Samples, ids: Ints) -> Samples:
    """The samples with other words in the same slots."""
    own = samples.arrays[layout.ids]
    changed = np.where(_words(layout, samples), ids, own).astype(own.dtype)
    return replace(samples, arrays={**samples.arrays, layout.ids: changed})

"""Padded token sequences: which input is which, where the words are, and how tokens get in.

Every sequence is `head` special tokens, words, `tail` special tokens, and padding on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from ..runtime import Array, InputSpec

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

LONGEST_AFFIX = 4
"""More shared tokens than this at an end are a template, and not special tokens."""
LOWEST = 4
"""Ids below this are special in vocabularies that have special tokens (pad, unknown, ..)."""


@dataclass(frozen=True)
class TokenLayout:
    """What the inputs of a text model mean.

    ids: the input with the tokens; mask: the one that says which are real; positions: the one with
        position ids; follow: inputs that belong to tokens one by one, as token types.
    length: how long sequences must be; None: any length up to `longest`, where that is known.
    head, tail: special tokens at the start and end of every sequence.
    specials: ids that are no words; pad: the id that fills short sequences up.
    left: whether the padding comes first.
    """

    ids: str
    mask: str | None
    positions: str | None
    follow: tuple[str, ...]
    length: int | None
    longest: int | None
    head: int
    tail: int
    specials: frozenset[int]
    pad: int
    left: bool

    @classmethod
    def of(cls, inputs: Sequence[InputSpec], samples: Samples, known: Sequence[str]) -> TokenLayout:
        """The layout that names and data show.

        known: inputs that are looked up in an embedding table, the largest table first.

        Raises:
            InputError: no input holds token ids.
        """
        ids = _ids_input(inputs, samples, known)
        array = samples.arrays[ids.name]
        alike = [
            s.name
            for s in inputs
            if s.name != ids.name and samples.arrays[s.name].shape == array.shape
        ]
        mask = next((name for name in alike if "mask" in name.lower()), None)
        positions = next((name for name in alike if "pos" in name.lower()), None)
        follow = tuple(name for name in alike if name not in (mask, positions))
        rest = ids.shape[: ids.axis] + ids.shape[ids.axis + 1 :]
        length = rest[0] if isinstance(rest[0], int) else None
        bare = cls(ids.name, mask, positions, follow, length, length, 0, 0, frozenset(), 0, False)
        return bare._with_specials(samples)

    def _with_specials(self, samples: Samples) -> TokenLayout:
        ids = samples.arrays[self.ids]
        pad, left = self._padding(samples)
        padded = replace(self, pad=pad, left=left)
        real = padded.real(samples)
        words = [row[kept] for row, kept in zip(ids, real, strict=True)]
        head = _shared(words)
        tail = _shared([row[head:][::-1] for row in words])
        special = {int(i) for row in words[:1] for i in (*row[:head], *row[len(row) - tail :])}
        if not real.all():
            special.add(pad)
        low = range(LOWEST) if special else ()
        return replace(padded, head=head, tail=tail, specials=frozenset(special | set(low)))

    def _padding(self, samples: Samples) -> tuple[int, bool]:
        """The id of the padding, and whether it comes first."""
        ids = samples.arrays[self.ids]
        if self.mask is not None:
            hidden = ~samples.arrays[self.mask].astype(bool)
            if not hidden.any():
                return 0, False
            left = int(hidden[:, 0].sum()) > int(hidden[:, -1].sum())
            return int(np.bincount(ids[hidden].astype(np.int64)).argmax()), left
        for left in (False, True):
            ends = ids[:, :2] if left else ids[:, -2:]
            doubled = ends[ends[:, 0] == ends[:, -1], 0] if ids.shape[1] > 1 else ends[:0, 0]
            if len(doubled):
                return int(np.bincount(doubled.astype(np.int64)).argmax()), left
        return -1, False

    def real(self, samples: Samples) -> Bools:
        """Which slots hold tokens, and not padding; `[N, L]`."""
        ids = samples.arrays[self.ids]
        if self.mask is not None:
            return samples.arrays[self.mask].astype(bool)
        other = ids != self.pad
        if self.left:
            return np.logical_or.accumulate(other, axis=1)
        found: Bools = np.logical_or.accumulate(other[:, ::-1], axis=1)[:, ::-1]
        return found

    def lengths(self, samples: Samples) -> Ints:
        """Tokens of each sample, special ones included."""
        found: Ints = self.real(samples).sum(axis=1)
        return found

    def trimmed(self, samples: Samples) -> Samples:
        """The samples without slots that are padding in all of them, where the model lets us."""
        if self.length is not None:
            return samples
        used = np.flatnonzero(self.real(samples).any(axis=0))
        width = samples.arrays[self.ids].shape[1]
        first, last = (int(used[0]), width) if self.left else (0, int(used[-1]) + 1)
        cut = {n: samples.arrays[n][:, first:last] for n in self._per_token}
        return replace(samples, arrays=samples.arrays | cut)

    @property
    def _per_token(self) -> tuple[str, ...]:
        named = (self.ids, self.mask, self.positions, *self.follow)
        return tuple(name for name in named if name is not None)

    def insert(self, samples: Samples, tokens: Ints, places: Ints) -> tuple[Samples, Bools]:
        """The samples with `tokens` in them, and where they now are.

        places: how many of a sample's own tokens come before each inserted one, ascending;
            it is kept between the head and the tail.

        The rest shifts. Where the length is fixed and used up, words before the tail are dropped.

        Shapes:
            tokens `[N, k]`, places `[N, k]`; the slots of inserted tokens, `[N, K]`.

        Raises:
            InputError: the model's length has no room for them.
        """
        extra = tokens.shape[1]
        width = samples.arrays[self.ids].shape[1]
        if self.length is None:
            grown = max(width, int(self.lengths(samples).max()) + extra)
            width = grown if self.longest is None else min(grown, self.longest)
        if width < self.head + self.tail + extra:
            raise InputError(
                f"{extra} tokens do not fit into the {width} that the model reads: search for "
                "shorter triggers"
            )
        return self._rebuilt(samples, tokens, places, width, width - extra)

    def shortened(self, samples: Samples, words: int) -> Samples:
        """The samples with their first `words` words only."""
        none = np.zeros((samples.count, 0), np.int64)
        width = samples.arrays[self.ids].shape[1]
        return self._rebuilt(samples, none, none, width, self.head + words + self.tail)[0]

    def _rebuilt(
        self, samples: Samples, tokens: Ints, places: Ints, width: int, room: int
    ) -> tuple[Samples, Bools]:
        """The samples at `width` slots, with at most `room` tokens of their own."""
        source = np.full((samples.count, width), -1)
        inserted = np.zeros(source.shape, bool)
        filled: Array = np.zeros(source.shape, samples.arrays[self.ids].dtype)
        for row, slots in enumerate(self.real(samples)):
            own = self._kept(np.flatnonzero(slots), room)
            where = np.clip(places[row], min(self.head, len(own)), max(len(own) - self.tail, 0))
            before = own[np.maximum(where - 1, 0)] if len(own) else np.zeros(len(where), np.intp)
            line = np.insert(own, where, before)
            new = np.insert(np.zeros(len(own), bool), where, True)
            at = slice(width - len(line), width) if self.left else slice(0, len(line))
            source[row, at], inserted[row, at] = line, new
            filled[row, at][new] = tokens[row]
        arrays = dict(samples.arrays)
        for name in self._per_token:
            arrays[name] = self._moved(name, samples, source)
        arrays[self.ids] = np.where(inserted, filled, arrays[self.ids])
        if self.mask is not None:
            arrays[self.mask] = (source >= 0).astype(samples.arrays[self.mask].dtype)
        return replace(samples, arrays=arrays), inserted

    def _kept(self, own: NDArray[np.intp], room: int) -> NDArray[np.intp]:
        """The slots of a sample's tokens that stay where there is only so much room."""
        if len(own) <= room:
            return own
        return np.concatenate((own[: room - self.tail], own[len(own) - self.tail :]))

    def _moved(self, name: str, samples: Samples, source: NDArray[np.intp]) -> Array:
        array = samples.arrays[name]
        if name == self.positions:  # they belong to slots, and count on where a sequence grew
            first = np.take_along_axis(array, self.real(samples).argmax(axis=1)[:, None], axis=1)
            return np.asarray(
                first + np.maximum(np.cumsum(source >= 0, axis=1) - 1, 0), array.dtype
            )
        rows = np.arange(len(array))[:, None]
        moved = array[rows, np.maximum(source, 0)]
        fill = max(self.pad, 0) if name == self.ids else 0
        return np.where(source >= 0, moved, np.array(fill, array.dtype))


def _ids_input(inputs: Sequence[InputSpec], samples: Samples, known: Sequence[str]) -> InputSpec:
    whole = [s for s in inputs if s.dtype is not None and np.dtype(s.dtype).kind in "iu"]
    rows = {s.name: s for s in whole if samples.arrays[s.name].ndim == 2}
    for name in known:
        if name in rows and not _named_otherwise(name):
            return rows[name]
    for name, spec in rows.items():
        if "id" in name.lower() and not _named_otherwise(name):
            return spec
    free = [spec for name, spec in rows.items() if not _named_otherwise(name)]
    if len(free) == 1:
        return free[0]
    raise InputError(
        f"none of the inputs {', '.join(s.name for s in inputs)} can be told to hold token ids: "
        "export the model with an integer input [N, L] that is called input_ids"
    )


def _named_otherwise(name: str) -> bool:
    return any(word in name.lower() for word in ("mask", "type", "segment", "pos"))


def _shared(rows: Sequence[Array]) -> int:
    """How many tokens all rows begin with; 0 where there are too many to be special."""
    first = min((len(row) for row in rows), default=0)
    count = 0
    while count < first and len({int(row[count]) for row in rows}) == 1:
        count += 1
    return count if len(rows) > 1 and count <= LONGEST_AFFIX and count < first else 0

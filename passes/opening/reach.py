"""Which keys a query sees, where a batch is padded on the right and keys lie in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from onnx import TensorProto

from ..fragment import Fragment
from . import steps


@dataclass(frozen=True, eq=False)
class Queries:
    """The queries of a node, or the chosen rows of them, and where they are in their sequences.

    Values are nodes of `f`, called `<name>_..`, that are added when first asked for.

    last: index of the last token of each sample, past ones included, `[B]`.
    total: length of the longest sample, a scalar or vector of one.
    count: how many queries the node has, an int64 vector of one.
    chosen: the rows that are meant, int64 `[rows]`; None for all.
    given_ids: positions for the rotation `[B, Q]`; "" where they are counted.
    """

    f: Fragment
    name: str
    last: str
    total: str
    count: str
    chosen: str | None
    given_ids: str

    @cached_property
    def index(self) -> str:
        """0, 1, .. for each query, or the chosen rows, `[Q]`."""
        return self.chosen or steps.positions(self.f, self.count, f"{self.name}_index")

    @cached_property
    def lengths(self) -> str:
        """How many tokens, past and new, each sample has, `[B, 1]`."""
        f, name = self.f, f"{self.name}_lengths"
        last = f.cast(self.last, TensorProto.INT64, f"{name}_last")
        flat = f.op("Add", last, f.ints(1), name=f"{name}_flat")
        return f.op("Reshape", flat, f.ints(-1, 1), name=name)

    @cached_property
    def reach(self) -> str:
        """The number of keys up to and with each query's own position, `[B, Q]`.

        The queries are the last tokens of a sample; or, in a prompt shorter than its padded batch,
        the first, and then padding.
        """
        f, name = self.f, f"{self.name}_reach"
        own = f.op("Add", self.index, f.ints(1), name=f"{name}_own")
        later = f.op("Sub", self.count, own, name=f"{name}_later")
        from_end = f.op("Sub", self.lengths, later, name=f"{name}_from_end")
        at_end = f.op("Greater", from_end, own, name=f"{name}_at_end")
        return f.op("Where", at_end, from_end, own, name=name)

    @cached_property
    def reach_inside(self) -> str:
        """The same without what lies beyond the end of the sample."""
        f, name = self.f, f"{self.name}_reach"
        inside = f.op("Less", self.reach, self.lengths, name=f"{name}_is_inside")
        return f.op("Where", inside, self.reach, self.lengths, name=f"{name}_inside")

    @cached_property
    def position_ids(self) -> str:
        """Positions in the sequence, for the rotation, `[B, Q]`."""
        f, name, given = self.f, self.name, self.given_ids
        if not given:
            return f.op("Sub", self.reach, f.ints(1), name=f"{name}_positions")
        # In a first prompt, the kernel counts from the first element on and ignores the others.
        start = f.slice(f.slice(given, 0, 1, 0, f"{name}_id_row"), 0, 1, 1, f"{name}_id_start")
        counted = f.op("Add", start, self.index, name=f"{name}_id_counted")
        if self.chosen:
            given = f.op("Gather", given, self.chosen, name=f"{name}_ids", axis=1)
        total = steps.as_length(f, self.total, f"{name}_total")
        prompt = f.op("Equal", self.count, total, name=f"{name}_is_prompt")
        return f.op("Where", prompt, counted, given, name=f"{name}_positions")


def visible(f: Fragment, end: str, keys: str, window: int, name: str) -> str:
    """Whether a query sees a key, bool `[B, 1, Q, K]`.

    end: the number of keys up to the last that a query sees, `[B, Q]`; keys: how many there are, a
    vector of one; window: how many it sees at most, negative for no limit.
    """
    end = f.axes_op("Unsqueeze", end, [1, 3], f"{name}_end")
    columns = steps.positions(f, keys, f"{name}_columns")
    if window < 0:
        return f.op("Less", columns, end, name=name)
    before = f.op("Less", columns, end, name=f"{name}_before")
    start = f.op("Sub", end, f.ints(window + 1), name=f"{name}_start")
    near = f.op("Greater", columns, start, name=f"{name}_near")
    return f.op("And", before, near, name=name)

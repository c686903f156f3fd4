"""Which keys are the image and which are the prompt behind it, in every sample of a batch.

Padding shifts a sequence by another number of places in every sample, so that all places are
counted from the first key that the sample sees, and its last row is that of the last such key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from .fragment import Fragment

OPSET = 11
"""The first with Range, GatherElements and negative places in Slice."""

_END = 2**31 - 1


@dataclass(frozen=True)
class KeyRange:
    """The places `start:end` among the keys that a sample sees, as Python counts them."""

    start: int
    end: int | None = None


@dataclass(frozen=True)
class KeyMask:
    """A further input `[B, K]` of the detector, of this ONNX element type: true where not zero."""

    elem_type: int


@dataclass(frozen=True)
class Parts:
    """What the visual keys are, and those of the prompt; None: all behind the last visual one."""

    visual: KeyRange | KeyMask
    prompt: KeyRange | KeyMask | None = None

    def inputs(self) -> list[ValueInfoProto]:
        """The further inputs of a detector: `visual` and `prompt`, where they are masks."""
        return [
            helper.make_tensor_value_info(name, part.elem_type, ["B", "K"])
            for name, part in (("visual", self.visual), ("prompt", self.prompt))
            if isinstance(part, KeyMask)
        ]


@dataclass(frozen=True)
class Tokens:
    """Values that say where a sample's tokens are, the same at all sites of a sequence.

    visual, prompt: float32 `[B, K]`, 1 at the keys of that part.
    is_visual: the same as `visual`, bool.
    length: float32 `[B, 1]`, how many keys the sample sees, from the first to the last.
    row: int64 `[B, 1, 1, 1]`, the query row of the last key that the sample sees.
    queries: bool `[B, 1, Q, 1]`, rows of tokens that the sample sees; query_count: float32
    `[B, 1]`, how many these are, at least 1.
    rank: float32 `[B, K]`, how many visual keys are before each.
    """

    visual: str
    prompt: str
    is_visual: str
    length: str
    row: str
    queries: str
    query_count: str
    rank: str


def add_tokens(f: Fragment, attention: str, parts: Parts) -> Tokens:
    """Add nodes that find the tokens of each sample from its map `[B, H, Q, K]`.

    The last row of a map sees all keys that are no padding, and only those: with padding on the
    left it is that of the last token, with padding on the right that of a padding token, which
    attends to the tokens before it. Rows of padding on the left may hold anything.
    """
    shape = f.op("Shape", attention, name="shape")
    places, keys = _places(f, shape, 3, "key")
    queries, query_size = _places(f, shape, 2, "query")
    first, last = _ends(f, attention, places, keys)
    span = f.op("Add", f.op("Sub", last, first, name="span"), f.number(1.0), name="length_or_less")
    length = f.op("Max", span, f.number(0.0), name="length")
    cached = f.op("Sub", keys, query_size, name="cached")
    marks = _Marks(f.within("keys"), f.op("Sub", places, first, name="place"), length)
    visual = marks.of(parts.visual, "visual")
    prompt = marks.behind(visual) if parts.prompt is None else marks.of(parts.prompt, "prompt")
    place = f.op("Sub", f.op("Add", queries, cached, name="query_key"), first, name="query_place")
    real = _Marks(f.within("queries"), place, length).inside
    ones = f.cast(real, TensorProto.FLOAT, "query_ones")
    count = f.axes_op("ReduceSum", ones, [1], "query_count", keepdims=1)
    row = f.op("Max", f.op("Sub", last, cached, name="last_query"), f.number(0.0), name="row_or_0")
    visual_ones = f.cast(visual, TensorProto.FLOAT, "visual_ones")
    axis = f.constants.add("int1", np.array(1, np.int64))
    return Tokens(
        visual=visual_ones,
        prompt=f.cast(prompt, TensorProto.FLOAT, "prompt_ones"),
        is_visual=visual,
        length=length,
        row=f.axes_op("Unsqueeze", f.cast(row, TensorProto.INT64, "row_index"), [2, 3], "row"),
        queries=f.axes_op("Unsqueeze", real, [1, 3], "queries"),
        query_count=f.op("Max", count, f.number(1.0), name="some_queries"),
        rank=f.op("CumSum", visual_ones, axis, name="rank", exclusive=1),
    )


def add_last_row(f: Fragment, attention: str, tokens: Tokens) -> str:
    """Add nodes for the row `[B, H, K]` of the last token; what is no probability is zero."""
    like = f.op("Shape", _last_row(f, attention), name="row_shape")
    index = f.op("Expand", tokens.row, like, name="row_indices")
    row = f.op("GatherElements", attention, index, name="row_4d", axis=2)
    row = f.axes_op("Squeeze", row, [2], "row_or_nan")
    zero = f.number(0.0)
    return f.op("Where", f.op("Greater", row, zero, name="row_seen"), row, zero, name="row")


def _ends(f: Fragment, attention: str, places: str, keys: str) -> tuple[str, str]:
    """The first and the last key `[B, 1]` that a sample sees; -1 for the last if it sees none."""
    by_head = f.op("Greater", _last_row(f, attention), f.number(0.0), name="seen_by_head")
    ones = f.cast(by_head, TensorProto.FLOAT, "seen_ones")
    most = f.axes_op("ReduceMax", ones, [1, 2], "seen_by_any", keepdims=0)
    seen = f.op("Greater", most, f.number(0.5), name="seen")
    from_first = f.op("Where", seen, places, keys, name="places_from_first")
    to_last = f.op("Where", seen, places, f.number(-1.0), name="places_to_last")
    return (
        f.axes_op("ReduceMin", from_first, [1], "first", keepdims=1),
        f.axes_op("ReduceMax", to_last, [1], "last", keepdims=1),
    )


def _last_row(f: Fragment, attention: str) -> str:
    return f.slice(attention, -1, _END, 2, "last_row")


def _places(f: Fragment, shape: str, axis: int, name: str) -> tuple[str, str]:
    """`0 .. N-1` along an axis of the map as float32 `[N]`, and N as float32 `[1]`."""
    size = f.slice(shape, axis, axis + 1, 0, f"{name}_size")
    end = f.axes_op("Squeeze", size, [0], f"{name}_end")
    zero, one = (f.constants.add(f"int{i}", np.array(i, np.int64)) for i in (0, 1))
    places = f.op("Range", zero, end, one, name=f"{name}_range")
    return (
        f.cast(places, TensorProto.FLOAT, f"{name}_places"),
        f.cast(size, TensorProto.FLOAT, f"{name}_total"),
    )


@dataclass(frozen=True)
class _Marks:
    """Marks tokens, whose places `[B, N]` are counted from the first one, as bool `[B, N]`."""

    f: Fragment
    place: str
    length: str

    def of(self, part: KeyRange | KeyMask, name: str) -> str:
        """The tokens of a part, among those that the sample sees."""
        if isinstance(part, KeyRange):
            end = self.length if part.end is None else self._counted(part.end, f"{name}_end")
            marked = self._between(self._counted(part.start, f"{name}_start"), end, name)
        else:
            marked = self.f.cast(name, TensorProto.BOOL, name)
        return self.f.op("And", marked, self.inside, name=f"{name}_inside")

    def behind(self, visual: str) -> str:
        """All behind the last of `visual`."""
        places = self.f.op("Where", visual, self.place, self.f.number(-1.0), name="visual_places")
        last = self.f.axes_op("ReduceMax", places, [1], "last_visual", keepdims=1)
        start = self.f.op("Add", last, self.f.number(1.0), name="prompt_start")
        return self._between(start, self.length, "prompt")

    @cached_property
    def inside(self) -> str:
        """Those that the sample sees."""
        return self._between(self.f.number(0.0), self.length, "token")

    def _counted(self, place: int, name: str) -> str:
        number = self.f.number(float(place))
        return number if place >= 0 else self.f.op("Add", self.length, number, name=name)

    def _between(self, start: str, end: str, name: str) -> str:
        # Places are whole numbers, so that halves make strict comparisons do.
        middle = self.f.op("Add", self.place, self.f.number(0.5), name=f"{name}_middle")
        behind = self.f.op("Less", start, middle, name=f"{name}_started")
        before = self.f.op("Less", middle, end, name=f"{name}_not_ended")
        return self.f.op("And", behind, before, name=name)

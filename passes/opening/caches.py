"""Keys or values of a cache, with what a node adds to them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from ..fragment import Fragment
from . import steps


@dataclass(frozen=True)
class Cache:
    """What a node has seen before.

    past: keys or values `[B, H, P, D]`, or `[B, H, M, D]` of which `filled` are valid.
    filled: a number; "" where all of `past` is valid.
    indirection: for each sample, beam and position, int32 `[B/W, W, M]`, which beam of the sample
        the token came from; "" where there are no beams.
    interleaved: where not 0, `past` is laid out as `[B, H, D/interleaved, M, interleaved]`.
    """

    past: str
    filled: str = ""
    indirection: str = ""
    interleaved: int = 0

    def extended(self, f: Fragment, new: str, name: str) -> str:
        """The valid part of the cache, then `new` `[B, H, L, D]`."""
        past = self.in_order(f, self.past, f"{name}_past")
        if self.filled:
            length = steps.as_length(f, self.filled, f"{name}_past_length")
            past = steps.first_of(f, past, length, 2, f"{name}_past_filled")
            if self.indirection:
                past = self._of_beams(f, past, new, length, f"{name}_past_beam")
        return f.op("Concat", past, new, name=f"{name}_whole", axis=2)

    def within(self, f: Fragment, present: str, added: str, name: str) -> str:
        """The valid part of `present`, which the node has made of the cache and `added` tokens."""
        present = self.in_order(f, present, f"{name}_present")
        if not self.filled:
            return present
        length = steps.as_length(f, self.filled, f"{name}_past_length")
        total = f.op("Add", length, added, name=f"{name}_total")
        return steps.first_of(f, present, total, 2, f"{name}_present_filled")

    def in_order(self, f: Fragment, buffer: str, name: str) -> str:
        """The cache as `[B, H, M, D]`."""
        if not self.interleaved:
            return buffer
        shape = f.op("Shape", buffer, name=f"{name}_shape")
        longest = f.slice(shape, 2, 3, 0, f"{name}_longest")
        target = f.op(
            "Concat",
            f.ints(0, 0, -1),
            longest,
            f.ints(self.interleaved),
            name=f"{name}_target",
            axis=0,
        )
        apart = f.op("Reshape", buffer, target, name=f"{name}_apart")
        turned = f.op("Transpose", apart, name=f"{name}_turned", perm=[0, 1, 3, 2, 4])
        return f.op("Reshape", turned, shape, name=f"{name}_in_order")

    def _of_beams(self, f: Fragment, past: str, new: str, length: str, name: str) -> str:
        """Each position taken from the beam that it came from, `[B, H, P, D]`."""
        indirection = f.cast(self.indirection, TensorProto.INT64, f"{name}_source_wide")
        joined = f.op("Shape", past, name=f"{name}_shape")
        batch = f.slice(joined, 0, 1, 0, f"{name}_batch")
        width = steps.length(f, indirection, 1, f"{name}_width")
        rows = steps.positions(f, batch, f"{name}_row")
        first = f.op("Div", rows, width, name=f"{name}_group")
        first = f.op("Mul", first, width, name=f"{name}_first")
        first = f.axes_op("Unsqueeze", first, [1], f"{name}_first_column")
        apart = f.op("Concat", batch, f.ints(-1), name=f"{name}_rows", axis=0)
        beam = f.op("Reshape", indirection, apart, name=f"{name}_source")
        beam = steps.first_of(f, beam, length, 1, f"{name}_source_filled")
        source = f.op("Add", first, beam, name=f"{name}_source_row")
        # Several new tokens at once belong to a prompt, in which beams have not parted yet.
        one = f.op("Equal", steps.length(f, new, 2, f"{name}_new"), f.ints(1), name=f"{name}_one")
        own = f.axes_op("Unsqueeze", rows, [1], f"{name}_own")
        source = f.op("Where", one, source, own, name=f"{name}_taken")
        return self._gathered(f, past, source, length, name)

    def _gathered(self, f: Fragment, past: str, source: str, length: str, name: str) -> str:
        """`past[source[b, t], :, t]`, by rows of `[B*P, H, D]`."""
        turned = f.op("Transpose", past, name=f"{name}_turned", perm=[0, 2, 1, 3])
        shape = f.op("Shape", turned, name=f"{name}_turned_shape")
        rest = f.slice(shape, 2, 4, 0, f"{name}_rest")
        flat = f.op("Concat", f.ints(-1), rest, name=f"{name}_flat_shape", axis=0)
        flat = f.op("Reshape", turned, flat, name=f"{name}_flat")
        start = f.op("Mul", source, length, name=f"{name}_start")
        at = f.op("Add", start, steps.positions(f, length, f"{name}_time"), name=f"{name}_at")
        taken = f.op("Gather", flat, at, name=f"{name}_rows_taken", axis=0)
        return f.op("Transpose", taken, name=name, perm=[0, 2, 1, 3])

"""com.microsoft `DecoderMaskedMultiHeadAttention` in plain nodes.

    output, present_key, present_value, qk = DecoderMaskedMultiHeadAttention(
        query [B, 1, H*D] or packed [B, 1, 3*H*D], key, value [B, 1, H*D] or [B, H, L, D],
        mask_index [B, K], attention_bias [B|1, H|1, 1, K], past_key, past_value [B, H, P or M, D],
        past_sequence_length, beam_width, cache_indirection [B/W, W, M], bias [3*H*D])

The steps are those of `multi_head`, for one query row. One thing is this operator's own: ONNX
Runtime's CUDA kernel lays keys of a cache out as [B, H, D/x, M, x], x = 16 / the size of an
element, as the operator's documentation says; its CPU kernel keeps them as [B, H, M, D]. The model
does not say which, so the caller does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import GraphView
from ..protos import int_attribute
from . import steps
from .caches import Cache
from .multi_head import SIDES, MultiHeadAttention, rank_of_key
from .opening import Closed
from .scaled_dot import broken, checked

ATTRIBUTES = frozenset(
    "num_heads scale mask_filter_value past_present_share_buffer output_qk".split()
)


@dataclass(frozen=True, eq=False)
class DecoderMaskedMultiHeadAttention(MultiHeadAttention):
    """A `DecoderMaskedMultiHeadAttention` node as plain nodes.

    interleaved: x, where keys of a cache are laid out as for CUDA; otherwise 0.
    """

    slots: ClassVar[tuple[str, ...]] = tuple(
        "query key value key_padding_mask attention_bias past_key past_value "
        "past_sequence_length beam_width cache_indirection bias".split()
    )

    interleaved: int

    @property
    def head_size(self) -> int | None:
        """D, where the graph says it."""
        if self.key_rank:
            return super().head_size
        shape = self.view.shape(self.named("query"))
        return shape[2] // 3 // self.heads if shape and isinstance(shape[2], int) else None

    def cache(self, side: int) -> Cache:
        """The cache of keys (1) or values (2)."""
        found = super().cache(side)
        return replace(found, interleaved=self.interleaved if side == 1 else 0)

    def unpacked(self, f: Fragment, packed: str, side: int) -> str:
        """One of three out of `[B, L, 3*H*D]`."""
        name = SIDES[side]
        first: int | str | None = self.head_size and self.head_size * self.heads
        if not first:
            whole = steps.length(f, packed, 2, f"{name}_packed_size")
            first = f.op("Div", whole, f.ints(3), name=f"{name}_size")
        part = steps.part_of_three(f, packed, side, first, 2, f"{name}_unpacked")
        return self.split(f, part, side)

    def given(self, f: Fragment, side: int) -> str:
        """A key or value that was projected before, in plain order."""
        found = super().given(f, side)
        if self.key_rank != 4 or side != 1:
            return found
        return Cache(found, interleaved=self.interleaved).in_order(f, found, "key_given")


def open_decoder_masked(
    view: GraphView, node: NodeProto, keys_as_on_cuda: bool = False
) -> DecoderMaskedMultiHeadAttention | Closed:
    """The opening of a `DecoderMaskedMultiHeadAttention` node.

    keys_as_on_cuda: whether the model's keys are laid out for ONNX Runtime's CUDA kernel.
    """
    slots = DecoderMaskedMultiHeadAttention.slots
    inputs = dict(zip(slots, node.input, strict=False))
    elem_type = checked(view, node, ATTRIBUTES, ["query"])
    if isinstance(elem_type, Closed):
        return elem_type
    shared = bool(int_attribute(node, "past_present_share_buffer", 0))
    if shared and inputs.get("past_key") and not inputs.get("past_sequence_length"):
        return broken("shares a buffer of past and present but has no past_sequence_length")
    key_rank = rank_of_key(view, inputs)
    if isinstance(key_rank, Closed):
        return key_rank
    size = 2 if elem_type != TensorProto.FLOAT else 4
    return DecoderMaskedMultiHeadAttention(
        node,
        view,
        elem_type,
        heads=int_attribute(node, "num_heads", 0),
        causal=False,
        cross=key_rank == 4,
        key_rank=key_rank,
        mask_rank=2 if inputs.get("key_padding_mask") else 0,
        interleaved=16 // size if keys_as_on_cuda else 0,
    )

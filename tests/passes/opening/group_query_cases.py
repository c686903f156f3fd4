"""The grid on which `GroupQueryAttention` is compared with its kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper

from atpatch_onnx.passes.opening.group_query_limits import SLOTS
from atpatch_onnx.runtime import Arrays

OUTPUTS = ("output", "present_key", "present_value", "output_qk")


@dataclass(frozen=True)
class Case:
    """One node and its inputs.

    total: tokens of the longest sample; past: length of the buffer of past keys; ends: tokens of
    each sample, where they differ; rotated: features that are rotated; made: outputs of the node.
    """

    attributes: tuple[tuple[str, Any], ...] = ()
    batch: int = 2
    queries: int = 5
    total: int = 5
    past: int | None = None
    ends: tuple[int, ...] | None = None
    heads: int = 4
    groups: int = 2
    size: int = 32
    packed: bool = False
    rotated: int = 0
    ids: bool = False
    bias: tuple[int, int] | None = None
    sink: bool = False
    dtype: type[np.floating[Any]] = np.float32
    symbolic: bool = False
    made: int = 3

    def __str__(self) -> str:
        told = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        told.update(dict(told.pop("attributes", ())))
        return ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in told.items()) or "plain"

    def having(self, **attributes: Any) -> Case:
        """The same with further attributes."""
        return replace(self, attributes=(*self.attributes, *attributes.items()))

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == np.float32 else 2e-3

    @property
    def defined(self) -> NDArray[np.bool_]:
        """Queries `[B, Q]` that are no padding, which only a prompt has."""
        ends = np.array(self.ends or (self.total,) * self.batch)
        if self.queries != self.total:
            ends[:] = self.queries
        real: NDArray[np.bool_] = np.arange(self.queries) < ends[:, None]
        return real

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(sum(map(ord, str(self))))

        def normal(*shape: int) -> NDArray[Any]:
            return rng.standard_normal(shape).astype(self.dtype)

        b, q, h, g, d = self.batch, self.queries, self.heads, self.groups, self.size
        query, key, value = (normal(b, q, n * d) for n in (h, g, g))
        feeds: Arrays = {"query": query, "key": key, "value": value}
        if self.packed:
            feeds = {"query": np.concatenate([query, key, value], -1)}
        if self.past is not None:
            feeds |= {name: normal(b, g, self.past, d) for name in ("past_key", "past_value")}
        ends = np.array(self.ends or (self.total,) * b)
        feeds["seqlens_k"] = (ends - 1).astype(np.int32)
        feeds["total_sequence_length"] = np.array(self.total, np.int32)
        if self.rotated:
            angles = rng.uniform(0, 6.3, (24, self.rotated // 2))
            feeds["cos_cache"] = np.cos(angles).astype(self.dtype)
            feeds["sin_cache"] = np.sin(angles).astype(self.dtype)
        if self.ids:
            feeds["position_ids"] = rng.integers(0, 10, (b, q))
        if self.bias is not None:
            bias = normal(*self.bias, q, self.total)
            bias[..., 0, 1:] = -np.inf
            feeds["attention_bias"] = bias
        if self.sink:
            feeds["head_sink"] = normal(h)
        return feeds

    def model(self) -> ModelProto:
        feeds = self.feeds()
        b, q, h, g, d = self.batch, self.queries, self.heads, self.groups, self.size
        kept = max(self.total, self.past or 0)
        shapes: tuple[tuple[int, ...], ...] = (
            (b, q, h * d),
            (b, g, kept, d),
            (b, g, kept, d),
            (b, h, q, self.total),
        )
        made = dict(zip(OUTPUTS[: self.made], shapes, strict=False))
        slots = [name if name in feeds else "" for name in SLOTS]
        attributes = {"num_heads": h, "kv_num_heads": g, **dict(self.attributes)}
        if self.rotated:
            attributes.setdefault("do_rotary", 1)
        node = helper.make_node(
            "GroupQueryAttention",
            slots[: max(slots.index(n) for n in feeds) + 1],
            list(made),
            domain="com.microsoft",
            **attributes,
        )
        types = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in feeds.items()}

        def value(name: str, shape: tuple[int, ...], kind: int) -> onnx.ValueInfoProto:
            dims = [f"{name}{i}" if self.symbolic else n for i, n in enumerate(shape)]
            return helper.make_tensor_value_info(name, kind, dims)

        graph = helper.make_graph(
            [node],
            "one",
            [value(n, a.shape, types[n]) for n, a in feeds.items()],
            [value(n, shape, types["query"]) for n, shape in made.items()],
        )
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


PHASES = {
    "prompt": Case(),
    "padded prompt": Case(ends=(5, 3)),
    "prompt into a buffer": Case(past=9),
    "padded prompt into a buffer": Case(past=9, ends=(2, 5)),
    "next token": Case(queries=1, total=7, past=6),
    "next token in a buffer": Case(queries=1, total=7, past=9),
    "next token, ragged": Case(queries=1, total=7, past=6, ends=(7, 4)),
    "next token in a buffer, ragged": Case(queries=1, total=7, past=9, ends=(3, 7)),
    "further prompt": Case(batch=1, queries=3, total=8, past=5),
    "further prompt in a buffer": Case(batch=1, queries=3, total=8, past=11),
}
ROTARY: tuple[dict[str, Any], ...] = (
    {},
    {"rotated": 32},
    {"rotated": 32, "attributes": (("rotary_interleaved", 1),)},
    {"rotated": 16},
    {"rotated": 16, "attributes": (("rotary_interleaved", 1),)},
)
OPTIONS: dict[str, Any] = {
    "window": lambda c: c.having(local_window_size=3),
    "window of one": lambda c: c.having(local_window_size=1),
    "softcap": lambda c: c.having(softcap=1.5),
    "scale": lambda c: c.having(scale=0.3),
    "sink": lambda c: replace(c, sink=True),
    "smooth": lambda c: c.having(smooth_softmax=1),
    "bias": lambda c: replace(c, bias=(c.batch, c.heads)),
    "one bias": lambda c: replace(c, bias=(1, 1)),
    "bias by head": lambda c: replace(c, bias=(1, c.heads)),
    "not causal": lambda c: c.having(causal=0),
    "ids": lambda c: replace(c, ids=True, rotated=32),
    "ids without rotary": lambda c: replace(c, ids=True),
    "as many heads": lambda c: replace(c, groups=4),
    "one group": lambda c: replace(c, groups=1),
    "caches without rotary": lambda c: replace(c, rotated=32).having(do_rotary=0),
    "all": lambda c: replace(
        c.having(local_window_size=3, softcap=2.0, scale=0.2, smooth_softmax=1),
        bias=(c.batch, 1),
        sink=True,
        rotated=16,
        ids=True,
        packed=True,
    ),
}


def alternating(cases: list[Case]) -> list[Case]:
    """Every second one with shapes that only run time tells."""
    return [replace(case, symbolic=i % 2 == 1) for i, case in enumerate(cases)]


LAYOUTS = alternating(
    [
        replace(case, packed=packed, **rotary)
        for case, packed, rotary in product(PHASES.values(), (False, True), ROTARY)
    ]
)
CHOSEN = alternating([option(c) for c, option in product(PHASES.values(), OPTIONS.values())])
HALF = alternating(
    [
        replace(change(replace(case, **rotary)), dtype=np.float16)
        for case, rotary, change in product(
            PHASES.values(), ROTARY[:2], (lambda c: c, OPTIONS["bias"], OPTIONS["all"])
        )
    ]
)
WITHOUT_PRESENT = [
    replace(case, packed=packed, made=1, **rotary)
    for case, packed, rotary in product(
        (PHASES["prompt"], PHASES["padded prompt"]), (False, True), ROTARY
    )
]

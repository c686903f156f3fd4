"""Nodes of ONNX `Attention` with inputs: a grid of all that ONNX Runtime's kernel takes, what lies
beyond it, and the operator's definition in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from atpatch_onnx.runtime import Arrays

from hosts import TYPES

Array = NDArray[Any]
ATOL = {"float": 1e-5, "float16": 2e-3}
SLOTS = ("q", "k", "v", "mask", "past_k", "past_v", "nonpad")


@dataclass(frozen=True)
class Case:
    """One node with its inputs.

    mask: kind and rank ("bool 3"), "" for none; past: its length; nonpad: real keys by sample.
    fixed: input shapes are declared, else only ranks; size, value_size: of a head.
    """

    dtype: str = "float"
    opset: int = 23
    rank: int = 4
    heads: tuple[int, int] = (4, 2)
    queries: int = 3
    keys: int = 5
    size: int = 4
    value_size: int = 6
    mask: str = ""
    mask_keys: int | None = None
    past: int = 0
    nonpad: tuple[int, int] | None = None
    fixed: bool = False
    attributes: tuple[tuple[str, float], ...] = ()
    qk_mode: int | None = None
    seed: int = 0

    @property
    def total(self) -> int:
        return self.past + self.keys

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(self.seed)
        kind = TYPES[self.dtype]

        def values(heads: int, length: int, size: int, rank: int) -> Array:
            x = rng.standard_normal((2, heads, length, size)).astype(kind)
            return x if rank == 4 else x.transpose(0, 2, 1, 3).reshape(2, length, heads * size)

        h, g = self.heads
        feeds = {
            "q": values(h, self.queries, self.size, self.rank),
            "k": values(g, self.keys, self.size, self.rank),
            "v": values(g, self.keys, self.value_size, self.rank),
        }
        if self.mask:
            feeds["mask"] = self._mask(rng)
        if self.past:
            feeds["past_k"] = values(g, self.past, self.size, 4)
            feeds["past_v"] = values(g, self.past, self.value_size, 4)
        if self.nonpad:
            feeds["nonpad"] = np.array(self.nonpad, np.int64)
        return feeds

    def _mask(self, rng: np.random.Generator) -> Array:
        kind, rank = self.mask.split()
        keys = self.total if self.mask_keys is None else self.mask_keys
        shape = {
            "1": (keys,),
            "2": (self.queries, keys),
            "3": (self.heads[0], self.queries, keys),
            "4": (2, 1, self.queries, keys),
            "row": (1, keys),
        }[rank]
        shown = rng.random(shape) < 0.7
        if len(shape) > 1 and self.queries > 1:
            shown[..., -1, :] = False  # a query that sees nothing
        if kind == "bool":
            return shown
        if kind == "int":
            return rng.integers(-2, 3, shape)
        number = TYPES[self.dtype]
        hidden = -np.inf if kind == "inf" else np.finfo(number).min
        return np.where(shown, rng.standard_normal(shape), hidden).astype(number)

    def model(self) -> ModelProto:
        feeds = self.feeds()
        inputs = [slot if slot in feeds else "" for slot in SLOTS]
        while not inputs[-1]:
            inputs.pop()
        made = ["y"] + (["present_k", "present_v"] if self.past else ["", ""])
        given: dict[str, Any] = dict(self.attributes)
        if self.qk_mode is not None:
            made.append("qk")
            given["qk_matmul_output_mode"] = self.qk_mode
        while not made[-1]:
            made.pop()
        if self.rank == 3:
            given["q_num_heads"], given["kv_num_heads"] = self.heads
        elem = helper.np_dtype_to_tensor_dtype
        value = helper.make_tensor_value_info
        node = helper.make_node("Attention", inputs, made, "op", **given)
        graph = helper.make_graph(
            [node],
            "g",
            [value(n, elem(a.dtype), self._declared(n, a.shape)) for n, a in feeds.items()],
            [value(n, elem(feeds["q"].dtype), _dims(n, self.rank)) for n in made if n],
        )
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=11)

    def _declared(self, name: str, shape: tuple[int, ...]) -> list[int | str]:
        """Of dynamic inputs, only the number of heads is known."""
        if self.fixed:
            return list(shape)
        heads = name in "qkv" and self.rank == 4
        return [n if heads and i == 1 else f"{name}{i}" for i, n in enumerate(shape)]


def _dims(name: str, rank: int) -> list[str]:
    return [f"{name}{i}" for i in range(rank if name == "y" else 4)]


def grid() -> list[Case]:
    """What is not crossed is cycled through."""
    cases: list[Case] = []
    masks = ("", "bool 2", "min 2", "inf 3", "bool 3", "inf 4", "bool 4")
    caches = ("", "past", "nonpad")
    axes = product(
        ("float", "float16"), (3, 4), ((4, 4), (4, 2), (6, 1)), masks, (False, True), caches
    )
    for i, (dtype, rank, heads, mask, causal, cache) in enumerate(axes):
        last = (1, 1) if cache == "past" else (4, 4)  # a step of decoding
        queries, keys = ((3, 3), (3, 5), (5, 3), last)[i % 4]
        given = {
            "is_causal": 1 if causal else None,
            "softcap": (None, 1.5, 0.0)[i % 3],
            "scale": (None, 0.3, 1.2, None, None)[i % 5],
            "softmax_precision": (None, 1, 10, 11, 16, None, None, None)[i % 8],
        }
        case = Case(
            dtype=dtype,
            opset=24 + i % 2 if cache == "nonpad" else (23, 24, 25)[i % 3],
            rank=rank,
            heads=heads,
            queries=queries,
            keys=keys,
            size=(4, 8, 3, 16)[i % 4],
            value_size=(6, 8, 5, 2)[i % 4],
            mask=mask,
            past=3 if cache == "past" else 0,
            nonpad=((keys, 2), (1, keys), (0, 2))[i % 3] if cache == "nonpad" else None,
            fixed=i % 5 < 2,
            attributes=tuple((k, v) for k, v in given.items() if v is not None),
            qk_mode=(None, 0, None, 1, 2, 3, None)[i % 7],
            seed=i,
        )
        cases.append(case)
    return cases


def windows() -> Iterator[Case]:
    """Windows of opset 25, with and without a cache."""
    forms = ((4, (4, 2), ""), (3, (2, 2), "bool 3"), (4, (4, 1), "min 2"))
    caches: tuple[tuple[int, tuple[int, int] | None], ...] = ((0, None), (2, None), (0, (6, 4)))
    sides = ((2, None), (0, 1), (None, 0), (None, 2), (3, 3), (-1, 2))
    for form, (past, nonpad), (left, right), causal in product(forms, caches, sides, (0, 1)):
        rank, heads, mask = form
        given = {"left_window_size": left, "right_window_size": right, "is_causal": causal}
        yield Case(
            opset=25,
            rank=rank,
            heads=heads,
            queries=6,
            keys=6,
            mask=mask,
            past=past,
            nonpad=nonpad,
            attributes=tuple((k, v) for k, v in given.items() if v is not None),
        )


GRID = grid()
"""Everything that ONNX Runtime's kernel takes."""

BEYOND = [
    Case(opset=24, mask="bool 2", mask_keys=3),
    Case(opset=24, mask="min 2", mask_keys=1, rank=3),
    Case(opset=24, mask="bool 4", mask_keys=4, nonpad=(4, 2), attributes=(("is_causal", 1),)),
    Case(opset=24, mask="inf 3", mask_keys=4, past=2, queries=5),
    Case(opset=24, mask="bool 1", mask_keys=4),
    Case(opset=23, mask="min row"),
    Case(opset=24, mask="bool row", nonpad=(4, 2)),
    Case(opset=23, mask="min 1"),
    Case(opset=23, mask="int 2", dtype="double"),
    Case(opset=24, mask="int 3", mask_keys=4),
    *windows(),
]
"""What the kernel does not take: short masks, masks without rows, integer masks, windows."""


def name_of(case: Case) -> str:
    given = " ".join(f"{name}={value}" for name, value in case.attributes)
    heads = f"{case.heads[0]}/{case.heads[1]} heads"
    more = f"past {case.past} nonpad {case.nonpad} {given} qk {case.qk_mode}"
    return f"{case.dtype} {case.rank}-D {heads} mask {case.mask} {more}"


def without_cache(model: ModelProto) -> ModelProto:
    """The model with "y" as its only output."""
    del model.graph.output[1:]
    del model.graph.node[0].output[1:]
    return model


def reference(case: Case, feeds: Arrays) -> Array:
    """`Attention` by its definition, in float64."""
    given = {name: float(np.float32(value)) for name, value in case.attributes}
    h, g = case.heads

    def apart(x: Array, heads: int) -> Array:
        x = x.astype(np.float64)
        if case.rank == 4:
            return x
        return x.reshape(2, x.shape[1], heads, -1).transpose(0, 2, 1, 3)

    q, k, v = (apart(feeds[n], heads) for n, heads in (("q", h), ("k", g), ("v", g)))
    if case.past:
        k, v = (np.concatenate([feeds[f"past_{n}"], x], axis=2) for n, x in (("k", k), ("v", v)))
    k, v = (np.repeat(x, h // g, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * given.get("scale", 1 / math.sqrt(case.size))
    if cap := given.get("softcap", 0.0):
        scores = cap * np.tanh(scores / cap)
    bias = np.zeros((2, 1, case.queries, case.total))
    if case.mask:
        mask = feeds["mask"]
        if mask.dtype == np.bool_:
            mask = np.where(mask, 0.0, -np.inf)
        missing = case.total - mask.shape[-1] if case.opset >= 24 else 0
        ends = [(0, 0)] * (mask.ndim - 1) + [(0, missing)]
        bias = bias + np.pad(mask.astype(np.float64), ends, constant_values=-np.inf)
    before = np.array(case.nonpad) - case.queries if case.nonpad else np.full(2, case.past)
    at = np.arange(case.queries)[:, None] + before[:, None, None, None]
    j = np.arange(case.total)
    real = np.array(case.nonpad or (case.total, case.total))[:, None, None, None]
    hidden = (j > at) & bool(given.get("is_causal")) | (j >= real)
    if (left := given.get("left_window_size", -1)) >= 0:
        hidden |= j < at - left
    if (right := given.get("right_window_size", -1)) >= 0:
        hidden |= j > at + right
    bias = np.where(hidden, -np.inf, bias)
    lowest = np.finfo(TYPES[case.dtype]).min if case.dtype != "double" else -np.inf
    blind = bias.max(axis=-1, keepdims=True) <= lowest
    weights = np.exp(scores + bias - np.where(blind, 0.0, (scores + bias).max(-1, keepdims=True)))
    weights = np.where(blind, 0.0, weights)
    y: Array = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) @ v
    if case.rank == 4:
        return y
    return y.transpose(0, 2, 1, 3).reshape(2, case.queries, -1)

"""Invariants of redistribution: rows keep their mass, masked keys stay 0, unflagged samples keep
their bits; the values are those of a float64 reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from atpatch_onnx.passes.fragment import Constants, Fragment
from atpatch_onnx.passes.redistribute import Redistribution, redistribute
from atpatch_onnx.runtime import Session

from hosts import TYPES, reference

ELEM = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}
Array = NDArray[np.floating]
_sessions: dict[tuple[str, Redistribution, int], Session] = {}


def block(dtype: str, mode: Redistribution, opset: int = 17) -> Session:
    """A model that is nothing but the redistribution."""
    key = (dtype, mode, opset)
    if key not in _sessions:
        constants = Constants("c")
        f = Fragment("f", opset, constants)
        benign = "b" if mode is Redistribution.BENIGN else None
        result = redistribute(f, "p", "m", "s", benign, mode, ELEM[dtype])
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            f.nodes(),
            "block",
            [
                value("p", ELEM[dtype], ["B", "H", "Q", "K"]),
                value("m", TensorProto.BOOL, ["B", "h", 1, "K"]),
                value("s", TensorProto.BOOL, ["B", 1, 1, 1]),
                *([value("b", TensorProto.FLOAT, ["X", "Y", "Z", "K"])] if benign else []),
            ],
            [value(result, ELEM[dtype], ["B", "H", "Q", "K"])],
            initializer=list(constants.tensors.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )
        onnx.checker.check_model(model, full_check=True)
        _sessions[key] = Session(model.SerializeToString(), "cpu", threads=1)
    return _sessions[key]


def redistributed(
    p: Array, m: NDArray[np.bool_], b: Array | None, mode: Redistribution, opset: int = 17
) -> Array:
    name = next(n for n, t in TYPES.items() if p.dtype == t)
    feeds: dict[str, Any] = {"p": p, "m": m, "s": m.any(axis=(1, 2, 3), keepdims=True)}
    if mode is Redistribution.BENIGN:
        assert b is not None
        feeds["b"] = b.astype(np.float32)
    (out,) = block(name, mode, opset).run(feeds).values()
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, NDArray[np.bool_], Array]:
    """Maps with masked keys, collapsed rows and one-key rows; masks from none to all columns."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch, heads, queries, keys = (draw(st.integers(1, n)) for n in (3, 3, 5, 7))
    logits = rng.standard_normal((batch, heads, queries, keys))
    logits *= draw(st.sampled_from([0.1, 1.0, 10.0, 80.0]))
    hidden = rng.random((batch, 1, draw(st.sampled_from([1, queries])), keys))
    logits = np.where(hidden < draw(st.sampled_from([0.0, 0.3, 0.9])), -np.inf, logits)
    logits[..., rng.integers(keys)] = 0.0  # at least one key is visible
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    m = rng.random((batch, draw(st.sampled_from([1, heads])), 1, keys))
    flagged = m < draw(st.sampled_from([0.0, 0.2, 0.7, 1.1]))
    shape = draw(
        st.sampled_from([(1, 1, 1), (1, heads, 1), (1, heads, queries), (batch, heads, queries)])
    )
    b = rng.random((*shape, keys)) * draw(st.sampled_from([0.0, 1e-6, 0.05, 1.0]))
    if draw(st.booleans()):
        b = b / max(float(b.sum(axis=-1).max()), 1e-9)
    return p, flagged, b


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from(list(Redistribution)), st.sampled_from(["float", "double"]))
def test_rows_keep_their_mass_and_match_float64(
    case: tuple[Array, NDArray[np.bool_], Array], mode: Redistribution, dtype: str
) -> None:
    p, m, b = case
    p = p.astype(TYPES[dtype])
    p[p < np.finfo(p.dtype).tiny] = 0  # subnormal numbers count as hardly seen
    out = redistributed(p, m, b, mode)
    assert np.isfinite(out).all()
    assert (out >= 0).all()
    np.testing.assert_allclose(
        out.sum(-1, dtype=np.float64), p.sum(-1, dtype=np.float64), atol=1e-6, rtol=0
    )
    assert (out[p == 0] == 0).all()
    b32 = b.astype(np.float32) if mode is Redistribution.BENIGN else None
    wanted = reference(p, m, b32, uniform=mode is Redistribution.UNIFORM)
    np.testing.assert_allclose(out, wanted, atol=2e-6, rtol=2e-5)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(list(Redistribution)))
def test_float16_rows_sum_to_one_and_unflagged_samples_keep_their_bits(
    case: tuple[Array, NDArray[np.bool_], Array], mode: Redistribution
) -> None:
    p, m, b = case
    half = p.astype(np.float16)
    out = redistributed(half, m, b, mode)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(
        out.sum(-1, dtype=np.float64), half.sum(-1, dtype=np.float64), atol=4e-3
    )
    assert (out[half == 0] == 0).all()
    untouched = ~m.any(axis=(1, 2, 3))
    assert np.array_equal(out[untouched].view(np.uint16), half[untouched].view(np.uint16))


@pytest.mark.parametrize(
    ("mode", "dtype", "opset"),
    [
        *product(Redistribution, ["float"], [9, 11, 13, 18, 23]),
        *product(Redistribution, ["float16"], [9, 13, 18]),
    ],
)
def test_every_opset_computes_the_same(mode: Redistribution, dtype: str, opset: int) -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(5), (2, 2, 4)).astype(TYPES[dtype])
    m = np.zeros((2, 1, 1, 5), bool)
    m[0, ..., 2] = True
    b = np.full((1, 2, 1, 5), 0.1)
    assert np.array_equal(redistributed(p, m, b, mode, opset), redistributed(p, m, b, mode))


ONE_ROW = [
    ("flagged mass 1, benign", [0, 1, 0], [0, 1, 0], [0.2, 0.3, 0.5], [0, 1, 0]),
    ("only visible key flagged, pruned", [0, 1, 0], [0, 1, 0], None, [0, 1, 0]),
    ("all flagged, pruned", [0.2, 0.3, 0.5], [1, 1, 1], None, [0.2, 0.3, 0.5]),
    (
        "all flagged, benign scaled to the row",
        [0.2, 0.8, 0],
        [1, 1, 1],
        [0.2, 0.2, 9],
        [0.5, 0.5, 0],
    ),
    ("whole head gets its benign map", [0.9, 0.1, 0.0], [1, 1, 1], [0.3, 0.7, 0.0], [0.3, 0.7, 0]),
    (
        "benign takes all, one column is left out",
        [0.5, 0.25, 0.25],
        [1, 1, 0],
        [0.5, 0.5, 0],
        [0.5, 0.5, 0],
    ),
    ("pruned: the others in proportion", [0.5, 0.3, 0.2], [1, 0, 0], None, [0, 0.6, 0.4]),
    (
        "replaced: the formula of the paper",
        [0.5, 0.3, 0.2],
        [1, 0, 0],
        [0.1, 9, 9],
        [0.1, 0.3 * 0.9 / 0.5, 0.2 * 0.9 / 0.5],
    ),
    ("nearly all mass flagged", [1 - 1e-7, 1e-7, 0], [1, 0, 0], [0.25, 9, 9], [0.25, 0.75, 0]),
]


@pytest.mark.parametrize(
    ("p", "m", "b", "wanted"), [c[1:] for c in ONE_ROW], ids=[c[0] for c in ONE_ROW]
)
def test_one_row(p: list[float], m: list[int], b: list[float] | None, wanted: list[float]) -> None:
    mode = Redistribution.PRUNE if b is None else Redistribution.BENIGN
    row = np.array(p, np.float32).reshape(1, 1, 1, 3)
    benign = None if b is None else np.array(b).reshape(1, 1, 1, 3)
    out = redistributed(row, np.array(m, bool).reshape(1, 1, 1, 3), benign, mode)
    np.testing.assert_allclose(out.ravel(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("m", "wanted"),
    [
        ([1, 0, 0, 0], [1 / 3, 0.3 / 0.4 * 2 / 3, 0.1 / 0.4 * 2 / 3, 0]),
        ([1, 1, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]),
        ([1, 1, 1, 1], [1 / 3, 1 / 3, 1 / 3, 0]),
    ],
)
def test_uniform_gives_the_uniform_share_of_what_the_row_sees(
    m: list[int], wanted: list[float]
) -> None:
    row = np.array([0.6, 0.3, 0.1, 0.0], np.float32).reshape(1, 1, 1, 4)
    flagged = np.array(m, bool).reshape(1, 1, 1, 4)
    out = redistributed(row, flagged, None, Redistribution.UNIFORM).ravel()
    np.testing.assert_allclose(out, wanted, atol=1e-6)

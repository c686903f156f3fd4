"""The protocol's parser against a client that nobody here wrote, and against damage."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.runtime import Arrays, InputSpec
from atpatch_onnx.serving.protocol import (
    Interface,
    Limits,
    ProtocolError,
    Request,
    Wanted,
    metadata,
    parse,
    respond,
)

from fuzz_protocol import INTERFACE, LIMITS, check, damaged

ONE = Interface(
    (InputSpec("x", np.float32, ("N", 3)),), {"y": ("FP32", ("N", 2)), "z": ("INT64", ("N",))}
)


def body(**changes: Any) -> bytes:
    entry = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}
    entry = {k: v for k, v in {**entry, **changes}.items() if v is not ...}
    return json.dumps({"inputs": [entry]}).encode()


@pytest.mark.parametrize("binary", [True, False])
def test_what_tritonclient_writes_is_read_and_what_is_written_it_reads(binary: bool) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "x": rng.standard_normal((2, 3)).astype(np.float32),
        "half": rng.standard_normal(2).astype(np.float16),
        "ids": rng.integers(-9, 9, (2, 5)),
        "mask": rng.integers(0, 2, (2, 5)).astype(bool),
        "scale": np.array(0.5),
        "turned": rng.integers(0, 255, (5, 2)).astype(np.uint8),
    }
    kinds = ["FP32", "FP16", "INT64", "BOOL", "FP64", "UINT8"]
    inputs = []
    for (name, array), kind in zip(arrays.items(), kinds, strict=True):
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array, binary_data=binary or kind == "FP16")
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    content, size = triton.InferenceServerClient.generate_request_body(
        inputs, wanted, request_id="7"
    )
    request = parse(content, None if size is None else str(size), INTERFACE, LIMITS)
    assert request.id == "7"
    assert request.count == 2
    assert request.outputs == (Wanted("y", binary),)
    for name, array in arrays.items():
        np.testing.assert_array_equal(request.inputs[name], array)
        assert request.inputs[name].dtype == array.dtype
    value = rng.standard_normal((2, 2)).astype(np.float32)
    answer, head = respond("m", {"y": value}, request.outputs, "7", {"p": 1})
    read = triton.InferenceServerClient.parse_response_body(answer, header_length=head)
    np.testing.assert_array_equal(read.as_numpy("y"), value)
    assert read.get_response()["parameters"] == {"p": 1}


@pytest.mark.parametrize(
    ("content", "header", "told"),
    [
        (b"", None, "not JSON"),
        (b"[]", None, "must be an object"),
        (b"[" * 100_000, None, "not JSON"),
        (b'{"inputs": [{"name": ' + b"9" * 9999 + b"}]}", None, "not JSON"),
        (b"{}", None, "'inputs' must be a list"),
        (b'{"inputs": [3]}', None, "'inputs' must be a list"),
        (b'{"inputs": []}', None, "'x' is missing"),
        (body(), "12x", "whole number"),
        (body(), "99999", "and the body has"),
        (body(), "9" * 30, "whole number"),
        (body() + b"1234", str(len(body())), "4 bytes behind the JSON belong to no input"),
        (body(name="w"), None, "no input 'w': it takes x"),
        (body(name=3), None, "'name' of an input must be a text"),
        (body(datatype="FP64"), None, "has type FP64, the model takes FP32"),
        (body(shape=[2, 4]), None, r"has shape \[2, 4\], the model takes \[-1, 3\]"),
        (body(shape=[2, 3, 1]), None, "the model takes"),
        (body(shape=[1] * 9), None, "over 8 dimensions"),
        (body(shape=[-2, 3]), None, "whole numbers"),
        (body(shape=[True, 3]), None, "whole numbers"),
        (body(shape=[0, 3], data=[]), None, "has 0 on axis 0: give 1 to 256"),
        (body(shape=[257, 3]), None, "has 257 on axis 0"),
        (body(shape=[10**40, 3]), None, r"over 10\^18"),
        (body(data=...), None, "has no data"),
        (body(data="abc"), None, "has no data"),
        (body(data=[1, 2]), None, "have shape"),
        (body(data=[[1, 2, 3], [4]]), None, "lists of equal length"),
        (body(data=["1"] * 6), None, "not all numbers"),
        (body(data=[None] * 6), None, "not all numbers"),
        (body(data=[1e39] * 6), None, "beyond its type"),
        (body(data=[float("nan")] * 6), None, "NaN, which is no JSON number"),
        (body(data=..., parameters={"binary_data_size": 24}), None, "declares 24 binary bytes"),
        (body(data=..., parameters={"binary_data_size": 10**20}), None, r"declares over 10\^18"),
        (body(data=..., parameters={"binary_data_size": -1}), None, "declares -1"),
        (body(parameters={"binary_data_size": "24"}), None, "must be a number"),
        (body(parameters=3), None, "must be an object"),
        (body(parameters={"binary_data_size": 0}), None, "both data and binary"),
    ],
)
def test_what_is_wrong_is_said(content: bytes, header: str | None, told: str) -> None:
    with pytest.raises(ProtocolError, match=told) as caught:
        parse(content, header, ONE)
    assert caught.value.status == 400


def test_floats_that_are_no_numbers_are_refused_unless_allowed() -> None:
    head = body(data=..., parameters={"binary_data_size": 24})
    values = np.array([[1, np.nan, 3], [4, 5, 6]], np.float32)
    content = head + values.tobytes()
    with pytest.raises(ProtocolError, match="NaN"):
        parse(content, str(len(head)), ONE)
    found = parse(content, str(len(head)), ONE, Limits(nan=True))
    np.testing.assert_array_equal(found.inputs["x"], values)


def test_a_large_body_is_refused_by_its_size() -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(b" " * 100, None, ONE, Limits(body_bytes=99))
    assert caught.value.status == 413


def test_batches_must_agree() -> None:
    two = Interface((InputSpec("x", np.float32, ("N",)), InputSpec("y", np.float32, ("N",))))
    inputs = [
        {"name": name, "datatype": "FP32", "shape": [count], "data": [0] * count}
        for name, count in (("x", 2), ("y", 3))
    ]
    with pytest.raises(ProtocolError, match=r"different batch sizes \(x 2, y 3\)"):
        parse(json.dumps({"inputs": inputs}).encode(), None, two)


def test_outputs_by_name_and_values_that_json_does_not_have() -> None:
    document = json.loads(body())
    for outputs, told in (
        ([{"name": "w"}], "no output 'w': it gives y, z"),
        ([{"name": "y"}, {"name": "y"}], "twice"),
        ([{"name": "y", "parameters": {"classification": 3}}], "classification"),
        ([{"name": "y", "parameters": {"binary_data": 1}}], "true or false"),
        ("y", "must be a list"),
    ):
        with pytest.raises(ProtocolError, match=told):
            parse(json.dumps({**document, "outputs": outputs}).encode(), None, ONE)
    document["parameters"] = {"binary_data_output": True}
    document["outputs"] = [{"name": "z"}, {"name": "y", "parameters": {"binary_data": False}}]
    wanted = parse(json.dumps(document).encode(), None, ONE).outputs
    assert wanted == (Wanted("z", True), Wanted("y", False))
    values = {"z": np.array([1, 2]), "y": np.array([[np.nan, np.inf]], np.float32)}
    content, head = respond("m", values, wanted)
    assert head is not None
    entries = json.loads(content[:head])["outputs"]
    assert [e["parameters"]["binary_data_size"] for e in entries] == [16, 8]


def test_metadata_has_every_input_and_output() -> None:
    told = metadata("m", ONE)
    assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert [o["name"] for o in told["outputs"]] == ["y", "z"]


def test_damaged_requests() -> None:
    """A short run of benchmarks/fuzz_protocol.py."""
    rng = random.Random(1)
    ends = [isinstance(check(*damaged(rng)), Request) for _ in range(3000)]
    assert 200 < sum(ends) < 2800  # it is neither all right nor all wrong


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.none() | st.text(max_size=20))
def test_any_bytes(content: bytes, header: str | None) -> None:
    check(content, header)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["x", "ids", "scale"]) | json_values,
            "datatype": st.sampled_from(["FP32", "INT64", "FP64", "BYTES"]) | json_values,
            "shape": st.lists(st.integers(-1, 5), max_size=4) | json_values,
            "data": json_values,
            "parameters": st.fixed_dictionaries({"binary_data_size": st.integers()}) | json_values,
        },
    )
)
def test_any_json(entry: dict[str, Any]) -> None:
    check(json.dumps({"inputs": [entry]}).encode("utf-8", "surrogatepass"), None)

"""Quantised and mixed-precision hosts: every form is found, keeps its bits, and is really patched.

A host of two attention layers is converted by the tools that people use. What a patch that flags
nothing computes is what the host computes, bit for bit; what a patch that prunes a key computes is
the unquantised host without that key, as closely as the conversion is close to it anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.transformers.float16 import convert_float_to_float16

from atpatch_onnx.detector import Detector, load_detector
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.probe import Probe
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import revert
from atpatch_onnx.runtime import Arrays

from hosts import COLUMN_MEAN, COLUMN_MEAN_18, assert_patch, detector, edited, run, spliced

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE
IN_FLOW = (Strategy.GUARD, Strategy.SELECT)

Weights = dict[str, NDArray[np.float32]]
Floats = NDArray[np.float64]


@cache
def weights() -> Weights:
    """Of both layers: no value stands out. Queries look for what loud tokens have."""
    rng = np.random.default_rng(0)
    made: Weights = {}
    for layer in range(2):
        for name in "qkvo":
            made[f"{name}{layer}"] = rng.uniform(-1, 1, (WIDTH, WIDTH)).astype(
                np.float32
            ) / np.float32(6)
            made[f"{name}b{layer}"] = rng.uniform(-0.1, 0.1, WIDTH).astype(np.float32)
        made[f"qb{layer}"] += 9 * made[f"k{layer}"][0]
    return made


def tokens(loud: tuple[int, ...] = (), count: int = 4) -> Arrays:
    """Inputs `[N, L, E]`; token 0 of the samples `loud` is loud."""
    x = np.random.default_rng(9).uniform(-1, 1, (count, 6, WIDTH)).astype(np.float32)
    x[list(loud), 0, 0] += 6
    return {"x": x}


def plain(opset: int = 17, softmax: str = "{p} = Softmax <axis = -1> ({t})") -> ModelProto:
    """The host: two layers of attention with residual connections."""
    body = []
    source = "x"
    for i in range(2):
        for name, perm in (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")):
            body.append(f"""
                {name}x{i} = MatMul ({source}, {name}{i}) {name}y{i} = Add ({name}x{i}, {name}b{i})
                {name}z{i} = Reshape ({name}y{i}, split)
                {name}h{i} = Transpose <perm = [{perm}]> ({name}z{i})""")
        body.append(f"""
            s{i} = MatMul (qh{i}, kh{i}) t{i} = Mul (s{i}, scale)
            {softmax.format(p=f"p{i}", t=f"t{i}")}
            c{i} = MatMul (p{i}, vh{i}) d{i} = Transpose <perm = [0, 2, 1, 3]> (c{i})
            e{i} = Reshape (d{i}, joined) ox{i} = MatMul (e{i}, o{i}) oy{i} = Add (ox{i}, ob{i})
            r{i} = Add (oy{i}, {source})""")
        source = f"r{i}"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        host (float[B, L, {WIDTH}] x) => (float[B, L, {WIDTH}] y)
        <int64[4] split = {{0, 0, {HEADS}, {SIZE}}}, int64[3] joined = {{0, 0, {WIDTH}}},
         float[1] scale = {{{SIZE**-0.5}}}>
        {{ {" ".join(body)} y = Identity (r1) }}
    """)
    stored = (onnx.numpy_helper.from_array(value, name) for name, value in weights().items())
    model.graph.initializer.extend(stored)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def expected(x: NDArray[np.float32], pruned: int | None = None) -> Floats:
    """The host in float64, with a key pruned in both layers."""
    held = {name: value.astype(np.float64) for name, value in weights().items()}
    hidden = x.astype(np.float64)
    for i in range(2):
        q, k, v = (
            (hidden @ held[f"{n}{i}"] + held[f"{n}b{i}"])
            .reshape(*x.shape[:2], HEADS, SIZE)
            .transpose(0, 2, 1, 3)
            for n in "qkv"
        )
        p = np.exp(q @ k.transpose(0, 1, 3, 2) * SIZE**-0.5)
        if pruned is not None:
            p[..., pruned] = 0
        context = (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        hidden = hidden + context @ held[f"o{i}"] + held[f"ob{i}"]
    return hidden


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Arrays) -> None:
        self.batches = iter([feeds])

    def get_next(self) -> Arrays | None:
        return next(self.batches, None)


Convert = Callable[[Path, Path, Arrays], None]
"""Converts one file into another; inputs are for calibration."""


def dynamic(per_channel: bool, every: bool) -> Convert:
    kind = QuantType.QInt8 if per_channel else QuantType.QUInt8
    options = {"MatMulConstBOnly": not every}
    return lambda source, to, _: quantize_dynamic(
        source, to, per_channel=per_channel, weight_type=kind, extra_options=options
    )


def static(form: QuantFormat, activations: QuantType, **options: object) -> Convert:
    return lambda source, to, feeds: quantize_static(
        source, to, _Calibration(feeds), quant_format=form, activation_type=activations, **options
    )


def int4(form: QuantFormat) -> Convert:
    def convert(source: Path, to: Path, _: Arrays) -> None:
        config = DefaultWeightOnlyQuantConfig(block_size=16, bits=4, quant_format=form)
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(to))

    return convert


def half(**options: object) -> Convert:
    return lambda source, to, _: onnx.save(
        convert_float_to_float16(onnx.load(source), keep_io_types=True, **options), to
    )


QDQ, OPERATORS = QuantFormat.QDQ, QuantFormat.QOperator
FORMS: dict[str, tuple[Convert, int]] = {
    "dynamic": (dynamic(per_channel=False, every=False), 17),
    "dynamic per channel": (dynamic(per_channel=True, every=False), 17),
    "dynamic, all products": (dynamic(per_channel=False, every=True), 17),
    "QDQ U8S8": (static(QDQ, QuantType.QUInt8), 17),
    "QDQ S8S8 per channel": (static(QDQ, QuantType.QInt8, per_channel=True), 17),
    "QDQ 16 bits": (static(QDQ, QuantType.QUInt16), 21),
    "QDQ products only": (
        static(QDQ, QuantType.QInt8, op_types_to_quantize=["MatMul"], per_channel=True),
        21,
    ),
    "operators U8S8": (static(OPERATORS, QuantType.QUInt8), 17),
    "operators S8S8 per channel": (static(OPERATORS, QuantType.QInt8, per_channel=True), 17),
    "operators, products only": (
        static(OPERATORS, QuantType.QUInt8, op_types_to_quantize=["MatMul"]),
        17,
    ),
    "int4 weights": (int4(OPERATORS), 17),
    "int4 weights, QDQ": (int4(QDQ), 21),
    "float16": (half(), 17),
    "float16, softmax in float32": (half(op_block_list=["Softmax"]), 17),
}


def quietly(convert: Convert, source: Path, to: Path, feeds: Arrays) -> ModelFile:
    """The converted model; what converters log is not a test's business."""
    logging.disable(logging.WARNING)
    try:
        convert(source, to, feeds)
    finally:
        logging.disable(logging.NOTSET)
    return ModelFile.open(to)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFile]:
    """Hosts by form, each converted once."""
    folder = tmp_path_factory.mktemp("converted")

    @cache
    def host(form: str) -> ModelFile:
        convert, opset = FORMS[form]
        onnx.save(plain(opset), folder / f"{opset}.onnx")
        wider = {"x": 1.2 * tokens((0, 1, 2, 3))["x"]}  # so that a pruned map saturates nothing
        return quietly(convert, folder / f"{opset}.onnx", folder / f"{form}.onnx", wider)

    return host


def everywhere(host: ModelFile, treatment: Treatment, strategy: Strategy) -> Splice:
    sites = locate(host.skeleton).sites
    return Splice({site.name: treatment for site in sites}, strategy, telemetry=True)


def column_mean(host: ModelFile, folder: Path, threshold: float) -> Detector:
    opset = GraphView.of(host.skeleton).opset
    body = COLUMN_MEAN if opset < 18 else COLUMN_MEAN_18
    onnx.save(detector(body, threshold=threshold, opset=opset), folder / "det.onnx")
    return load_detector(folder / "det.onnx", opset)


@pytest.mark.parametrize("form", FORMS)
def test_sites_are_found(form: str, converted: Callable[[str], ModelFile]) -> None:
    found = locate(converted(form).skeleton)
    assert [(site.rank, site.facts.heads) for site in found.sites] == [(4, HEADS)] * 2
    assert not found.others


@pytest.mark.parametrize("strategy", IN_FLOW)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_flagged_keeps_its_bits(
    form: str, strategy: Strategy, converted: Callable[[str], ModelFile], tmp_path: Path
) -> None:
    host = converted(form)
    treatment = Treatment(Redistribution.PRUNE, column_mean(host, tmp_path, 0.6))
    after, _ = spliced(host, everywhere(host, treatment, strategy))
    assert revert(ModelFile.from_bytes(after.content())).sha256 == host.sha256
    clean, result = run(host, tokens())["y"], run(after, tokens())
    assert not any(v.any() for name, v in result.items() if name.endswith("/flagged"))
    assert np.array_equal(clean, result["y"])
    before, result = run(host, tokens((2,)))["y"], run(after, tokens((2,)))
    assert np.argwhere(result["atpatch/attention.0/flagged"]).tolist() == [[2, 0, 0, 0]]
    assert not np.array_equal(before[2], result["y"][2])
    if "dynamic" not in form:  # which quantises a batch by its extremes: it mixes samples itself
        others = [0, 1, 3]
        assert np.array_equal(before[others], result["y"][others])


@pytest.mark.parametrize("strategy", IN_FLOW)
@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_key_is_gone(
    form: str, strategy: Strategy, converted: Callable[[str], ModelFile]
) -> None:
    host = converted(form)
    treatment = Treatment(Redistribution.PRUNE, columns=(0,))
    after, _ = spliced(host, everywhere(host, treatment, strategy))
    x = tokens((0, 1, 2, 3))["x"]
    # Integers may be a few of their steps off, as they are without a patch.
    tolerance = 2 * np.abs(run(host, {"x": x})["y"] - expected(x)).max() + 1e-5
    wanted = expected(x, pruned=0)
    assert np.abs(wanted - expected(x)).max() > 3 * tolerance
    assert np.abs(run(after, {"x": x})["y"] - wanted).max() <= tolerance


@pytest.mark.parametrize("form", ["operators S8S8 per channel", "QDQ U8S8", "float16"])
def test_features_are_read_from_dequantised_maps(
    form: str, converted: Callable[[str], ModelFile]
) -> None:
    host = converted(form)
    edits, _, maps = Probe(maps="whole")(GraphView.of(host.skeleton), locate(host.skeleton).sites)
    for name in maps.values():
        p = run(edited(host, tuple(edits)), tokens(), name)[name]
        assert p.dtype == np.float32
        assert p.shape == (4, HEADS, 6, 6)
        np.testing.assert_allclose(p.sum(-1), 1, atol=0.02)


def test_integers_are_spliced_on_their_grid(converted: Callable[[str], ModelFile]) -> None:
    """An extra node on each side, and the product stays one in integers."""
    host = converted("operators U8S8")
    (site, _) = locate(host.skeleton).sites
    assert site.integers
    assert site.elem_type == TensorProto.FLOAT
    assert site.grid == ("p0_scale", "p0_zero_point")
    treatment = Treatment(Redistribution.PRUNE, columns=(0,))
    after, _ = spliced(host, Splice({site.name: treatment}, Strategy.SELECT))
    assert_patch(host, after, rewired=1)
    nodes = ModelProto.FromString(after.content()).graph.node
    inserted = [node for node in nodes if node.name.startswith("atpatch/")]
    assert [inserted[0].op_type, inserted[-1].op_type] == ["DequantizeLinear", "QuantizeLinear"]
    (reader,) = [node for node in nodes if inserted[-1].output[0] in node.input]
    assert reader.op_type == "QLinearMatMul"


@pytest.mark.parametrize("strategy", IN_FLOW)
def test_bfloat16_between_casts(strategy: Strategy, tmp_path: Path) -> None:
    """No CPU kernel multiplies bfloat16, but models that only store it run."""
    softmax = """{p}w = Softmax <axis = -1> ({t}) {p}n = Cast <to = 16> ({p}w)
                 {p} = Cast <to = 1> ({p}n)"""
    onnx.save(plain(softmax=softmax), tmp_path / "host.onnx")
    host = ModelFile.open(tmp_path / "host.onnx")
    assert [site.probabilities for site in locate(host.skeleton).sites] == ["p0", "p1"]
    never = Treatment(Redistribution.UNIFORM, column_mean(host, tmp_path, 1.0))
    after, _ = spliced(host, everywhere(host, never, strategy))
    assert np.array_equal(run(host, tokens())["y"], run(after, tokens())["y"])
    treatment = Treatment(Redistribution.PRUNE, columns=(0,))
    after, _ = spliced(host, everywhere(host, treatment, strategy))
    x = tokens()["x"]
    np.testing.assert_allclose(run(after, {"x": x})["y"], expected(x, pruned=0), atol=0.02)


def test_a_16_bit_cast_is_left_behind_the_patch(converted: Callable[[str], ModelFile]) -> None:
    """The CPU provider may drop the rounding, and a patch behind it would bring it back."""
    sites = locate(converted("float16, softmax in float32").skeleton).sites
    assert {site.elem_type for site in sites} == {TensorProto.FLOAT}
    sites = locate(converted("float16").skeleton).sites
    assert {site.elem_type for site in sites} == {TensorProto.FLOAT16}


def test_a_quantised_softmax_over_another_axis_is_no_site() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        host (uint8[B, L, L] q, uint8[B, L, L] v) => (uint8[B, L, L] y)
        <float s = {0.01}, uint8 z = {0}>
        {
            a = QLinearMatMul (q, s, z, v, s, z, s, z)
            p = com.microsoft.QLinearSoftmax <axis = 1, opset = 17> (a, s, z, s, z)
            y = QLinearMatMul (p, s, z, v, s, z, s, z)
        }
    """)
    found = locate(model)
    assert not found.sites
    assert ["axis 1" in other.reason for other in found.others] == [True]


EXPORTS = [
    ("bert", "QDQ S8S8 per channel"),
    ("gpt2", "dynamic, all products"),
    ("t5", "dynamic, all products"),
    ("swin", "operators U8S8"),
    ("vit", "float16, softmax in float32"),
    ("gpt_oss", "operators U8S8"),  # a DequantizeLinear and a Slice before the product
    ("gpt_oss", "float16"),
    ("hiera", "operators U8S8"),  # 5-D
    ("sam_vision_model", "float16"),  # 3-D
    ("deberta-v2", "float16"),  # a Reshape before the product
    ("llama", "int4 weights"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), EXPORTS)
def test_converted_exports(name: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the [test] extra has it")
    from architectures import ARCHITECTURES, export

    each = ARCHITECTURES[name]
    source = tmp_path / "source.onnx"
    feeds = export(each, "eager", "torchscript", 17, source)
    given = {value.name for value in ModelFile.open(source).skeleton.graph.input}
    feeds = {name: array for name, array in feeds.items() if name in given}
    host = quietly(FORMS[form][0], source, tmp_path / "host.onnx", feeds)
    assert len(locate(host.skeleton).sites) == each.sites
    before = run(host, feeds)
    for strategy in IN_FLOW:
        never = Treatment(Redistribution.UNIFORM, column_mean(host, tmp_path, 1.0))
        after, _ = spliced(host, everywhere(host, never, strategy))
        result = run(after, feeds, *before)
        for output, value in before.items():
            assert np.array_equal(value, result[output], equal_nan=True)

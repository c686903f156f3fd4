"""The demo's victim in the forms that models are deployed in.

Exporters and public converters make them. Where none does, as for branches and functions, the graph
is moved, and nothing in it changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from atpatch_onnx.models.export import export_onnx, quiet
from atpatch_onnx.models.victims import Victim
from atpatch_onnx.runtime import Arrays

from conversions import Task, dynamic_int8, float16, rewritten, static_int8

PIXELS, LOGITS, SWITCH = "pixels", "logits", "by_attention"
CALIBRATION_BATCH = 32

Make = Callable[[Victim, Path], None]


def plain(victim: Victim, path: Path) -> None:
    """The TorchScript exporter: a softmax and two products."""
    export_onnx(victim.model, path)


def traced(victim: Victim, path: Path) -> None:
    """The exporter based on `torch.export`: the same operators."""
    export_onnx(victim.model, path, 18)


def operator(victim: Victim, path: Path) -> None:
    """ONNX `Attention`, from torch's own attention function."""
    export_onnx(victim.model, path, 23, fused=True)


def converted(victim: Victim, path: Path, source: Make, convert: Callable[[Task], None]) -> None:
    """What a converter makes of another form, with clean images where it calibrates."""
    images = victim.digits.clean.images
    starts = range(0, len(images), CALIBRATION_BATCH)
    feeds = [{PIXELS: images[start : start + CALIBRATION_BATCH]} for start in starts]
    with tempfile.TemporaryDirectory() as folder, quiet():
        before = Path(folder) / "before.onnx"
        source(victim, before)
        convert(Task(before, path, "vit", feeds))


def multi_head(task: Task) -> None:
    """onnxscript's fusions up to com.microsoft `MultiHeadAttention`.

    All of them (`conversions.rewritten`) go on to com.microsoft `Attention`.
    """
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxscript.optimizer import optimize
    from onnxscript.rewriter.ort_fusions.mha import fuse_mha1, fuse_mha2
    from onnxscript.rewriter.ort_fusions.mha_bias import fuse_mha_bias
    from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa

    model = onnx_ir.load(task.source)
    ShapeInferencePass()(model)
    optimize(model)
    fuse_sdpa(model, apply_shape_inference=True)
    for fuse in (fuse_mha1, fuse_mha2, fuse_mha_bias):
        fuse(model)
    optimize(model)
    onnx_ir.save(model, task.target)


def in_a_branch(task: Task, condition: str) -> None:
    """The whole graph in one branch of an `If`, which reads its weights from outside.

    condition: "input", another input of the model, or "data", whether any pixel is bright. The
    other branch has no attention: it is a linear map, of zeros.
    """
    model = onnx.load(task.source)
    graph = model.graph
    (logits,) = graph.output
    then = helper.make_graph(graph.node, "transformer", [], [logits], value_info=graph.value_info)
    # A branch may not use the name of a value around it.
    then.node[-1].output[0] = then.output[0].name = "transformer_logits"
    classes = logits.type.tensor_type.shape.dim[1].dim_value
    other = onnx.parser.parse_graph(f"""
        linear () => (float[batch, {classes}] linear_logits) {{
            flat = Flatten ({PIXELS})
            features = Shape <start = 1> (flat)
            answers = Constant <value_ints = [{classes}]> ()
            sizes = Concat <axis = 0> (features, answers)
            weight = ConstantOfShape (sizes)
            linear_logits = MatMul (flat, weight)
        }}
    """)
    del graph.node[:], graph.value_info[:]
    if condition == "input":
        graph.input.append(helper.make_tensor_value_info(SWITCH, TensorProto.BOOL, []))
    else:
        graph.initializer.append(helper.make_tensor("dark", TensorProto.FLOAT, [], [0.5]))
        graph.node.append(helper.make_node("ReduceMax", [PIXELS], ["brightest"], keepdims=0))
        graph.node.append(helper.make_node("Greater", ["brightest", "dark"], [SWITCH]))
    graph.node.append(
        helper.make_node("If", [SWITCH], [LOGITS], "chosen", then_branch=then, else_branch=other)
    )
    _save(model, task.target)


def in_functions(task: Task) -> None:
    """Every ONNX `Attention` as a call of one model-local function with a softmax in it."""
    model = onnx.load(task.source)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    function = onnx.parser.parse_function(f"""
        <domain: "local", opset_import: ["" : {opset}]>
        attend (q, k, v) => (c) {{
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            s = MatMul (q, kt)
            size = Shape <start = -1> (q)
            number = Cast <to = 1> (size)
            root = Sqrt (number)
            t = Div (s, root)
            p = Softmax <axis = -1> (t)
            c = MatMul (p, v)
        }}
    """)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.op_type, node.domain = "attend", "local"
            del node.attribute[:]
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    _save(model, task.target)


def _save(model: ModelProto, path: Path) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


script = partial(converted, source=traced)
narrow = partial(float16, keep_io_types=True)
FORMS: Mapping[str, Make] = {
    "plain": plain,
    "ONNX Attention 23": operator,
    "MultiHeadAttention": partial(script, convert=multi_head),
    "com.microsoft Attention": partial(script, convert=rewritten),
    "int8 QDQ": partial(script, convert=partial(static_int8, format_name="QDQ")),
    "int8 operators": partial(script, convert=partial(static_int8, format_name="QOperator")),
    "int8 dynamic": partial(script, convert=dynamic_int8),
    "float16": partial(script, convert=narrow),
    "If, on an input": partial(script, convert=partial(in_a_branch, condition="input")),
    "If, on data": partial(script, convert=partial(in_a_branch, condition="data")),
    "float16 Attention 23": partial(converted, source=operator, convert=narrow),
    "local function": partial(converted, source=operator, convert=in_functions),
}
"""How each form is written, by name."""

FUSED = (
    "ONNX Attention 23",
    "MultiHeadAttention",
    "com.microsoft Attention",
    "float16 Attention 23",
)
"""Forms whose attention is one operator."""


def inputs(form: str, images: NDArray[np.float32]) -> Arrays:
    """The inputs of a form for images `[N, C, S, S]`."""
    switch = {SWITCH: np.array(True)} if form == "If, on an input" else {}
    return {PIXELS: images, **switch}

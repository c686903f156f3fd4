"""The forms in which users deploy a model: fused, quantised and narrowed files of one export.

Every form is the work of a public converter with the settings that its own documentation shows. A
converter that fails on a model says so with `NotConverted`: that is no failure of a patch.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from atpatch_onnx.errors import first_line
from atpatch_onnx.models.export import quiet

Arrays = dict[str, Any]


class NotConverted(Exception):
    """The converter fails on this model, or makes nothing of it; the message says how."""


@dataclass(frozen=True)
class Task:
    """A file to convert: `source` to `target`.

    model_type: what ONNX Runtime's optimizer calls the family.
    feeds: inputs that it runs with, also for calibration.
    """

    source: Path
    target: Path
    model_type: str
    feeds: Sequence[Arrays]


Convert = Callable[[Task], None]


@dataclass(frozen=True)
class Form:
    """One form.

    source: the form that it is made of; None: made by an exporter.
    exports: attention, exporter and opset of the export to start from, best first.
    static: whether all axes of the export are fixed.
    """

    convert: Convert | None
    exports: tuple[tuple[str, str, int], ...] = ()
    source: str | None = None
    static: bool = False


def convert(form: Form, task: Task) -> None:
    """Write the file. Raises: NotConverted."""
    assert form.convert is not None
    source, target = task.source.resolve(), task.target.resolve()
    try:
        # Some converters leave files in the current directory.
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            quiet(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            form.convert(replace(task, source=source, target=target))
    except NotConverted:
        raise
    except Exception as error:
        raise NotConverted(f"{type(error).__name__}: {first_line(error)}") from error


def optimized(task: Task, level: int) -> None:
    """`onnxruntime.transformers.optimizer` at one of its levels."""
    from onnxruntime.transformers.optimizer import optimize_model

    result = optimize_model(str(task.source), model_type=task.model_type, opt_level=level)
    result.save_model_to_file(str(task.target))


def fused(task: Task) -> None:
    """The same for a static export, told the size of the model: attention is fused.

    By the patterns of the family or by those of "bert", whichever fuse more.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    made = []
    for model_type in dict.fromkeys((task.model_type, "bert")):
        with contextlib.suppress(Exception):
            made.append(
                optimize_model(
                    str(task.source), model_type, num_heads=4, hidden_size=32, opt_level=0
                )
            )
    best = max(made, key=lambda model: fused_operators(model.model), default=None)
    if best is None or not fused_operators(best.model):
        raise NotConverted("the optimizer fuses no attention")
    best.save_model_to_file(str(task.target))


def offline(task: Task) -> None:
    """What an ONNX Runtime session saves after its extended optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(task.target)
    onnxruntime.InferenceSession(str(task.source), options, providers=["CPUExecutionProvider"])


def rewritten(task: Task) -> None:
    """onnxscript's fusions for ONNX Runtime."""
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(onnx_ir.load(task.source))
    onnx_ir.save(model, task.target)


def dynamic_int8(task: Task) -> None:
    """Weights in int8, activations quantised at run time."""
    from onnxruntime.quantization import quantize_dynamic

    with preprocessed(task.source) as source:
        quantize_dynamic(source, task.target)


def static_int8(task: Task, format_name: str) -> None:
    """Weights and activations in int8, calibrated: "QDQ" or "QOperator"."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The feeds, in the types of the graph's inputs."""

        def __init__(self, path: Path) -> None:
            names = {value.name for value in onnx.load(path).graph.input}
            self.left = [{n: a for n, a in f.items() if n in names} for f in task.feeds]

        def get_next(self) -> Arrays | None:
            return self.left.pop() if self.left else None

    with preprocessed(task.source) as source:
        quantize_static(source, task.target, Reader(source), QuantFormat[format_name])


def int4(task: Task) -> None:
    """Weights in blocks of int4."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(task.source), block_size=16)
    quantizer.process()
    quantizer.model.save_model_to_file(str(task.target))


def float16(task: Task, keep_io_types: bool) -> None:
    """All floats in float16, maybe but for inputs and outputs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(task.source), keep_io_types=keep_io_types)
    onnx.save(model, task.target)


@contextlib.contextmanager
def preprocessed(source: Path) -> Iterator[Path]:
    """The file as ONNX Runtime wants it before it quantises: optimized, all shapes inferred.

    Where that fails the file itself, which works too.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        try:
            quant_pre_process(source, target)
        except Exception:
            target = source
        yield target


FUSED = frozenset(
    "Attention MultiHeadAttention GroupQueryAttention QAttention PackedAttention "
    "DecoderMaskedMultiHeadAttention".split()
)


def fused_operators(model: ModelProto) -> int:
    """How many nodes hold a whole attention."""
    return sum(node.op_type in FUSED for node in model.graph.node)


_SCRIPTED = (("sdpa", "torchscript", 17), ("eager", "torchscript", 17))
_EAGER = (("eager", "torchscript", 17),)
_TRACED = (("sdpa", "dynamo", 18), ("eager", "dynamo", 18))
_OPERATOR = (("sdpa", "dynamo", 23), ("eager", "dynamo", 23))
_LATEST = (("sdpa", "dynamo", 24), ("eager", "dynamo", 24))

FORMS: Mapping[str, Form] = {
    "opset24": Form(None, _LATEST),
    "ort-0": Form(partial(optimized, level=0), _EAGER),
    "ort-1": Form(partial(optimized, level=1), _SCRIPTED),
    "ort-2": Form(partial(optimized, level=2), _TRACED),
    "ort-fused": Form(fused, _EAGER, static=True),
    "ort-session": Form(offline, _SCRIPTED),
    "onnxscript": Form(rewritten, _TRACED),
    "int8-dynamic": Form(dynamic_int8, _SCRIPTED),
    "int8-qdq": Form(partial(static_int8, format_name="QDQ"), _TRACED),
    "int8-qoperator": Form(partial(static_int8, format_name="QOperator"), _SCRIPTED),
    "int8-qdq-opset23": Form(partial(static_int8, format_name="QDQ"), _OPERATOR),
    "int8-ort-fused": Form(dynamic_int8, source="ort-fused"),
    "int8-onnxscript": Form(dynamic_int8, source="onnxscript"),
    "int4": Form(int4, _OPERATOR),
    "float16": Form(partial(float16, keep_io_types=True), _SCRIPTED),
    "float16-opset23": Form(partial(float16, keep_io_types=False), _OPERATOR),
    "float16-onnxscript": Form(partial(float16, keep_io_types=True), source="onnxscript"),
}
"""Every form by name, those that others are made of first."""

MODEL_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("bart", "marian", "pegasus", "m2m_100", "whisper"), "bart"),
    **dict.fromkeys(("gpt2", "gpt2-cache", "llama", "llama-cache", "mistral", "qwen2"), "gpt2"),
    **dict.fromkeys(("vit", "deit", "dinov2", "beit"), "vit"),
    **dict.fromkeys(("gpt_neox", "gpt_neox-cache"), "gpt_neox"),
    **{name: name for name in ("swin", "t5", "clip", "qwen3")},
    "siglip": "clip",
    "phi3": "phi",
    "sam_vision_model": "sam2",
    "wav2vec2": "conformer",
}
"""What ONNX Runtime's optimizer calls a family; "bert", its default, where it has no word."""

"""ONNX Runtime sessions: which execution provider runs is decided once and said out loud."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, RefusedError, first_line
from .passes.switches import REMEMBERED

Array = NDArray[Any]
Arrays = dict[str, Array]

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class InputSpec:
    """An input of a model: its name, NumPy type (None: not supported) and dims.

    shape: numbers; names or None for free dimensions.
    axis: where the batch is; models whose sequence comes first have it elsewhere than at 0.
    """

    name: str
    dtype: type[np.generic] | None
    shape: tuple[int | str | None, ...]
    axis: int = 0


def onnxruntime() -> Any:
    """The ONNX Runtime module. Raises: InputError where none is installed."""
    try:
        import onnxruntime as module
    except ImportError:
        raise InputError(
            "ONNX Runtime is not installed: pip install 'atpatch-onnx[gpu]' (CUDA and CPU) or "
            "'atpatch-onnx[cpu]', never both"
        ) from None
    return module


def choose_provider(wanted: str | None = None) -> str:
    """`cuda` where ONNX Runtime has it and it is not asked otherwise, else `cpu`.

    Raises: InputError for an unknown name, or where the wanted one is not there.
    """
    if wanted is not None and wanted not in PROVIDERS:
        raise InputError(f"--ep {wanted}: choose cuda or cpu")
    available = onnxruntime().get_available_providers()
    if wanted is not None and PROVIDERS[wanted] not in available:
        raise InputError(
            f"--ep {wanted}: this ONNX Runtime has only {', '.join(available)}; install "
            "'atpatch-onnx[gpu]' in a fresh environment"
        )
    if wanted is not None:
        return wanted
    return "cuda" if PROVIDERS["cuda"] in available and _cuda_works() else "cpu"


@cache
def _cuda_works() -> bool:
    """Whether a session really lands on CUDA: onnxruntime-gpu lists it without a GPU too.

    Without a driver it is not tried, as ONNX Runtime would complain at length about each attempt.
    """
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return False
    import onnx

    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [tensor], [other])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
    )
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=[PROVIDERS["cuda"], PROVIDERS["cpu"]]
    )
    return PROVIDERS["cuda"] in session.get_providers()


class Session:
    """An inference session over a file, or over bytes whose weights lie in `folder`."""

    def __init__(
        self,
        model: Path | bytes,
        provider: str,
        folder: Path | None = None,
        threads: int = 0,
        name: str | None = None,
        spinning: bool = True,
        prepacking: bool = True,
    ) -> None:
        self.name = name or ("the model" if isinstance(model, bytes) else str(model))
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not prepacking:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if isinstance(model, bytes) and folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder.resolve())
            )
        chosen = [PROVIDERS[provider]] + ([PROVIDERS["cpu"]] if provider == "cuda" else [])
        try:
            source = model if isinstance(model, bytes) else str(model)
            # Its own fallback prints to the standard output, where a program may be reading.
            self.session = ort.InferenceSession(
                source, options, providers=chosen, enable_fallback=False
            )
        except Exception as error:  # ONNX Runtime raises many types without a common base
            raise RefusedError(
                f"ONNX Runtime cannot load {self.name}: {first_line(error)}: check it with "
                "onnx.checker, or export it at an opset that this ONNX Runtime knows"
            ) from None
        if provider == "cuda" and PROVIDERS["cuda"] not in self.session.get_providers():
            raise InputError(
                "--ep cuda: ONNX Runtime could not start CUDA (driver or libraries missing): "
                "use --ep cpu, or see the log of onnxruntime.InferenceSession"
            )

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The inputs that must be given."""
        return tuple(
            InputSpec(i.name, _DTYPES.get(i.type), tuple(i.shape))
            for i in self.session.get_inputs()
        )

    @property
    def overridable(self) -> tuple[str, ...]:
        """Names of the inputs that have a default."""
        return tuple(i.name for i in self.session.get_overridable_initializers())

    @property
    def output_shapes(self) -> dict[str, tuple[int | str | None, ...]]:
        """The dims of the outputs, by name."""
        return {o.name: tuple(o.shape or ()) for o in self.session.get_outputs()}

    @property
    def output_types(self) -> dict[str, type[np.generic] | None]:
        """The NumPy types of the outputs, by name; None: not supported."""
        return {o.name: _DTYPES.get(o.type) for o in self.session.get_outputs()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(output.name for output in self.session.get_outputs())

    def nothing_remembered(self, feeds: Arrays) -> Arrays:
        """The feeds, and that nothing was flagged before where the model wants to be told."""
        if all(spec.name != REMEMBERED for spec in self.inputs):
            return feeds
        return {**feeds, REMEMBERED: np.zeros((len(next(iter(feeds.values()))), 0), bool)}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name. Raises: InputError where the inputs do not suit the model."""
        names = list(outputs) if outputs is not None else list(self.outputs)
        try:
            values = self.session.run(names, dict(feeds))
        except Exception as error:  # see above
            shapes = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in feeds.items())
            raise InputError(
                f"{self.name} failed on inputs {shapes}: {first_line(error)}: check the data "
                "against what the model expects"
            ) from None
        return dict(zip(names, values, strict=True))

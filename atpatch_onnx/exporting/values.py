"""The inputs and outputs of a model as a server has to declare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..comparing import PREFIX
from ..errors import RefusedError
from ..runtime import Arrays, Session


@dataclass(frozen=True)
class Value:
    """An input or output, as ONNX Runtime reports it.

    type: e.g. "tensor(float)".
    dims: numbers; -1 where free.
    optional: an input with a default, which the patch added.
    """

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Interface:
    """What a model takes and gives, in its order."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def interface(session: Session, outputs: Arrays) -> Interface:
    """The interface of a loaded model: servers compare with what ONNX Runtime infers, not the file.

    outputs: of a run. Of inputs with a default only those of a patch count: those of the model are
    weights that an exporter has listed as inputs.
    Raises: RefusedError for an output whose rank ONNX Runtime does not know.
    """
    runtime = session.session
    own = [v for v in runtime.get_overridable_initializers() if v.name.startswith(PREFIX)]
    found = Interface(
        (*_values(runtime.get_inputs()), *_values(own, optional=True)),
        tuple(_values(runtime.get_outputs())),
    )
    for value in found.outputs:
        if value.name in outputs and outputs[value.name].ndim != len(value.dims):
            raise RefusedError(
                f"{session.name} does not say how many dimensions the output '{value.name}' has, "
                "which servers must know: run onnx.shape_inference on the original, and patch that"
            )
    return found


def _values(listed: Sequence[Any], optional: bool = False) -> list[Value]:
    return [
        Value(v.name, v.type, tuple(d if isinstance(d, int) else -1 for d in v.shape), optional)
        for v in listed
    ]

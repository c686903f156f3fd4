"""The signatures of the detector ABI: what goes in and comes out, by the scope of a detector.

Scope `site`, one site at a time:

in   attention            float32 [B, H, Q, K]          probabilities of the site
in   layer     (optional) int64 scalar                  index of the site
out  anomaly              float32 [B, 1 or H, 1, K]     flagged where above the threshold
out  benign    (optional) float32 broadcastable to [B, H, Q, K]

Scope `model`, several sites at once, one decision for all sites or one for each:

in   attention.<site>     float32 [B, H, Q, K]          probabilities of each site it observes
out  anomaly              float32 [B, 1 or H, 1, K]     at every site it is applied at; or
out  anomaly.<site>       the same                      at that site
out  benign, benign.<site> (optional)

Scope `context`, a repair of what the heads of one site give, which is always on:

in   context              float32 [B, H, Q, D]          P V of the site
in   layer     (optional) int64 scalar
out  corrected            float32 [B, H, Q, D]

Any other input is bound by name to a value of the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from onnx import ModelProto, TensorProto, ValueInfoProto

from .errors import InputError

OBSERVED = "attention."
"""Before the name of a site, in the inputs of a detector of scope `model`."""


class DetectorScope(StrEnum):
    """What a detector looks at."""

    SITE = "site"
    MODEL = "model"
    CONTEXT = "context"


_EXPECTED = {
    DetectorScope.SITE: "attention: float32 [B, H, Q, K] -> anomaly: float32 [B, 1 or H, 1, K] "
    "(and optionally layer: int64 scalar, benign: float32)",
    DetectorScope.MODEL: "attention.<site>: float32 [B, H, Q, K] for each observed site -> "
    "anomaly, or anomaly.<site> for each site: float32 [B, 1 or H, 1, K] (and optionally benign "
    "or benign.<site>: float32)",
    DetectorScope.CONTEXT: "context: float32 [B, H, Q, D] -> corrected: float32 [B, H, Q, D] (and "
    "optionally layer: int64 scalar)",
}

_Values = Mapping[str, ValueInfoProto]


def inputs_of(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs of a model, without initializers that old IR versions list among them."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def check_signature(path: Path, model: ModelProto, scope: DetectorScope) -> None:
    """Raises: InputError, naming the expected and the found, for another signature."""
    inputs = {value.name: value for value in inputs_of(model)}
    outputs = {value.name: value for value in model.graph.output}
    maps, made, further = _named(scope, inputs, outputs)
    if not maps or not made:
        wrong = f"{_listed(inputs)} -> {_listed(outputs)}"
    elif extra := set(outputs) - set(made) - set(further):
        wrong = f"the further output {', '.join(sorted(extra))}"
    else:
        wrong = _first_mismatch(scope, inputs, outputs, maps, made, further)
    if wrong:
        raise InputError(
            f"the detector {path} has the wrong signature: expected {_EXPECTED[scope]}, found "
            f"{wrong}"
        )


def _named(
    scope: DetectorScope, inputs: _Values, outputs: _Values
) -> tuple[list[str], list[str], list[str]]:
    """The inputs that are maps, the outputs that must be there, and those that may be."""
    if scope is DetectorScope.CONTEXT:
        return _among(inputs, "context"), _among(outputs, "corrected"), []
    if scope is DetectorScope.SITE:
        return (_among(inputs, "attention"), _among(outputs, "anomaly"), _among(outputs, "benign"))
    maps = [name for name in inputs if name.startswith(OBSERVED)]
    made, further = (
        _among(outputs, word) + [name for name in outputs if name.startswith(f"{word}.")]
        for word in ("anomaly", "benign")
    )
    return maps, made, further


def _among(values: _Values, name: str) -> list[str]:
    return [name] if name in values else []


def _first_mismatch(
    scope: DetectorScope,
    inputs: _Values,
    outputs: _Values,
    maps: list[str],
    made: list[str],
    further: list[str],
) -> str:
    for value in (*(inputs[name] for name in maps), *(outputs[name] for name in made)):
        if wrong := _mismatch(value, TensorProto.FLOAT, 4):
            return wrong
    for name in further:
        if wrong := _mismatch(outputs[name], TensorProto.FLOAT, None):
            return wrong
    if "layer" in inputs and (wrong := _mismatch(inputs["layer"], TensorProto.INT64, 0)):
        return wrong
    for name in made if scope is not DetectorScope.CONTEXT else ():
        rows = outputs[name].type.tensor_type.shape.dim[2:3]
        if rows and rows[0].HasField("dim_value") and rows[0].dim_value != 1:
            return _listed({name: outputs[name]})
    return ""


def _mismatch(value: ValueInfoProto, elem_type: int, rank: int | None) -> str:
    tensor = value.type.tensor_type
    wrong_rank = rank is not None and tensor.HasField("shape") and len(tensor.shape.dim) != rank
    return _listed({value.name: value}) if tensor.elem_type != elem_type or wrong_rank else ""


def _listed(values: _Values) -> str:
    def one(value: ValueInfoProto) -> str:
        tensor = value.type.tensor_type
        name = _type_name(tensor.elem_type)
        dims = [
            str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?"
            for d in tensor.shape.dim
        ]
        return f"{value.name}: {name} [{', '.join(dims)}]"

    return ", ".join(one(value) for value in values.values()) or "nothing"


def _type_name(elem_type: int) -> str:
    try:
        name = str(TensorProto.DataType.Name(elem_type)).lower()
    except ValueError:
        return f"unknown type {elem_type}"
    return {"float": "float32", "double": "float64"}.get(name, name)

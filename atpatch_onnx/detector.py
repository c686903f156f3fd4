"""Detectors: any ONNX model with the signature of the detector ABI.

in   attention            float32 [B, H, Q, K]          probabilities of the site
in   layer     (optional) int64 scalar                  index of the site
in   any other (optional)                               bound by name to a value of the host
out  anomaly              float32 [B, 1 or H, 1, K]     flagged where above the threshold
out  benign    (optional) float32 broadcastable to [B, H, Q, K]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from .errors import InputError, RefusedError, first_line
from .external_data import check_layout, external_tensors
from .model_file import ModelFile
from .passes.protos import subgraphs

ABI_VERSION = "1"
_SIGNATURE = "attention: float32 [B, H, Q, K] -> anomaly: float32 [B, 1 or H, 1, K]"
_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@dataclass(frozen=True)
class Detector:
    """A checked detector.

    model: its graph, functions inlined, at the opset of the host it is loaded for.
    sha256: digest of its file.
    kind: what made it, for people.
    threshold: columns with a higher anomaly are flagged.
    strategy: how it asks to be spliced in where nobody says otherwise; None: it does not say.
    rows: how many query rows of a map it was fitted on and wants to see; None: all.
    sites: names of the sites it was fitted for, in the order of `layer`; empty: any site.
    host_sha256: digest of the model it was fitted for; None: it does not say.
    training: its training record, as the fitter wrote it.
    """

    path: Path
    model: ModelProto
    sha256: str
    kind: str
    threshold: float
    sites: tuple[str, ...]
    host_sha256: str | None
    training: dict[str, object]
    strategy: str | None = None
    rows: int | None = None

    @property
    def takes_layer(self) -> bool:
        """Whether it wants to know the index of the site."""
        return any(value.name == "layer" for value in self.model.graph.input)

    @property
    def gives_benign(self) -> bool:
        """Whether it says what flagged columns should get."""
        return any(value.name == "benign" for value in self.model.graph.output)

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """Inputs that must be bound to values of the host."""
        named = (value.name for value in self.inputs)
        return tuple(name for name in named if name not in ("attention", "layer"))

    @property
    def inputs(self) -> list[ValueInfoProto]:
        """Its inputs, without initializers that old IR versions list among them."""
        stored = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in stored]

    def layer_of(self, site: str, index: int) -> int | None:
        """The `layer` of a site: its place in `sites`, else its index; None: not fitted for it."""
        if not self.sites:
            return index
        return self.sites.index(site) if site in self.sites else None


def load_detector(path: str | Path, opset: int, threshold: float | None = None) -> Detector:
    """Load and check a detector for a host at `opset`.

    threshold: overrides the detector's own.
    Raises: InputError, naming the expected and the found, if it does not fit the ABI;
    RefusedError if it cannot be had at the opset or uses operators that the host would lack.
    """
    file = ModelFile.open(path)
    check_layout(file)
    model = onnx.load(file.path)
    whole = model.SerializeToString()
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    _check_domains(file.path, model)
    _check_signature(file.path, model)
    _check_metadata(file.path, metadata, threshold)
    try:
        value = float(metadata["atpatch.threshold"]) if threshold is None else threshold
        check_threshold(
            value,
            f"the threshold of the detector {file.path}," if threshold is None else "--threshold",
        )
        sites = json.loads(metadata.get("atpatch.sites", "[]"))
        training = json.loads(metadata.get("atpatch.training", "{}"))
        rows = int(metadata["atpatch.rows"]) if "atpatch.rows" in metadata else None
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise ValueError("atpatch.sites is no list of names")
        if rows is not None and rows < 1:
            raise ValueError("atpatch.rows is below 1")
    except ValueError as error:
        raise InputError(
            f"the metadata of the detector {file.path} cannot be read ({error}): "
            "atpatch.threshold and atpatch.rows are numbers, atpatch.sites and atpatch.training "
            "are JSON"
        ) from None
    return Detector(
        path=file.path,
        model=_at_opset(file.path, model, opset),
        # Of the weights too, where they are in another file.
        sha256=hashlib.sha256(whole).hexdigest() if external_tensors(file) else file.sha256,
        kind=metadata.get("atpatch.kind", "custom"),
        threshold=value,
        sites=tuple(sites),
        host_sha256=metadata.get("atpatch.host.sha256"),
        training=training,
        strategy=metadata.get("atpatch.strategy"),
        rows=rows,
    )


def check_threshold(value: float, where: str) -> None:
    """Raises: InputError for a threshold outside of 0..1, where anomalies are."""
    if not 0 <= value <= 1:
        raise InputError(f"{where} {value:g}: anomalies, and so thresholds, are between 0 and 1")


def _check_domains(path: Path, model: ModelProto) -> None:
    if model.graph.sparse_initializer:
        raise RefusedError(
            f"the detector {path} has sparse tensors, which are not copied into models: store them "
            "densely"
        )
    used = {node.domain for node in _all_nodes(model.graph)} - set(_KNOWN_DOMAINS)
    if used:
        raise RefusedError(
            f"the detector {path} uses custom operators of {', '.join(sorted(used))}: write it "
            "with standard ONNX operators, which every host's runtime has"
        )


def _all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)


def _check_signature(path: Path, model: ModelProto) -> None:
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: v for v in model.graph.input if v.name not in stored}
    outputs = {v.name: v for v in model.graph.output}
    wrong: str | bool = False
    if "attention" not in inputs or "anomaly" not in outputs:
        wrong = f"{_listed(inputs)} -> {_listed(outputs)}"
    elif extra := set(outputs) - {"anomaly", "benign"}:
        wrong = f"the further output {', '.join(sorted(extra))}"
    else:
        wrong = (
            _mismatch(inputs["attention"], TensorProto.FLOAT, 4)
            or _mismatch(outputs["anomaly"], TensorProto.FLOAT, 4)
            or ("benign" in outputs and _mismatch(outputs["benign"], TensorProto.FLOAT, None))
            or ("layer" in inputs and _mismatch(inputs["layer"], TensorProto.INT64, 0))
        )
        rows = outputs["anomaly"].type.tensor_type.shape.dim[2:3]
        if not wrong and rows and rows[0].HasField("dim_value") and rows[0].dim_value != 1:
            wrong = _listed({"anomaly": outputs["anomaly"]})
    if wrong:
        raise InputError(
            f"the detector {path} has the wrong signature: expected {_SIGNATURE} (and optionally "
            f"layer: int64 scalar, benign: float32), found {wrong}"
        )


def _mismatch(value: ValueInfoProto, elem_type: int, rank: int | None) -> str:
    tensor = value.type.tensor_type
    wrong_rank = rank is not None and tensor.HasField("shape") and len(tensor.shape.dim) != rank
    return _listed({value.name: value}) if tensor.elem_type != elem_type or wrong_rank else ""


def _listed(values: dict[str, ValueInfoProto]) -> str:
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


def _check_metadata(path: Path, metadata: dict[str, str], threshold: float | None) -> None:
    if metadata.get("atpatch.scope", "site") != "site":
        raise RefusedError(
            f"the detector {path} has scope '{metadata['atpatch.scope']}', and this version "
            "splices detectors of scope 'site': fit one with --kind zscore"
        )
    found = metadata.get("atpatch.abi")
    if found != ABI_VERSION:
        raise InputError(
            f"the detector {path} has atpatch.abi = {found or 'missing'} in its metadata, expected "
            f"{ABI_VERSION}: add it with onnx.helper.set_model_props"
        )
    if threshold is None and "atpatch.threshold" not in metadata:
        raise InputError(
            f"the detector {path} has no atpatch.threshold in its metadata: add it, or give "
            "--threshold"
        )


def _at_opset(path: Path, model: ModelProto, opset: int) -> ModelProto:
    own = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), opset)
    if own == opset:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, opset)
        onnx.checker.check_model(converted, full_check=True)
    except Exception as error:  # the converter raises whatever its adapters raise
        raise RefusedError(
            f"the detector {path} is written at opset {own} and cannot be converted to the "
            f"model's opset {opset} ({first_line(error)}): export it at opset {opset}"
        ) from None
    return converted

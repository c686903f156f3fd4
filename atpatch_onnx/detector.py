"""Detectors: any ONNX model with a signature of the detector ABI (see `signature`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from .errors import InputError, RefusedError, first_line
from .external_data import check_layout, external_tensors
from .model_file import ModelFile
from .passes.protos import subgraphs
from .second_run import SecondRun
from .signature import OBSERVED, DetectorScope, check_signature, inputs_of

ABI_VERSION = "1"
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
    sites: names of the sites it was fitted for, in the order of `layer`; empty: any site. With the
        scope `model`, those where its decision is applied.
    host_sha256: digest of the model it was fitted for; None: it does not say.
    training: its training record, as the fitter wrote it.
    scope: what it looks at.
    bindings: host values that its further inputs read unless somebody says otherwise.
    second_run: what it asks of strategy `rerun`; None: nothing in particular.
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
    scope: DetectorScope = DetectorScope.SITE
    bindings: Mapping[str, str] = field(default_factory=dict)
    second_run: SecondRun | None = None

    @classmethod
    def unsaved(
        cls,
        model: ModelProto,
        sites: Iterable[str] = (),
        *,
        threshold: float = 0.5,
        scope: DetectorScope = DetectorScope.SITE,
        bindings: Mapping[str, str] | None = None,
        rows: int | None = None,
        sha256: str = "",
        second_run: SecondRun | None = None,
    ) -> Detector:
        """A detector without a file, to be tried before it is written.

        sha256: tells it from others that are put into the same host.
        """
        return cls(
            path=Path("det.onnx"),
            model=model,
            sha256=sha256,
            kind="",
            threshold=threshold,
            sites=tuple(sites),
            host_sha256=None,
            training={},
            rows=rows,
            scope=scope,
            bindings=bindings or {},
            second_run=second_run,
        )

    @property
    def observed(self) -> tuple[str, ...]:
        """The sites that a detector of scope `model` looks at."""
        named = (value.name for value in self.inputs)
        return tuple(n.removeprefix(OBSERVED) for n in named if n.startswith(OBSERVED))

    @property
    def takes_layer(self) -> bool:
        """Whether it wants to know the index of the site."""
        return any(value.name == "layer" for value in self.model.graph.input)

    @property
    def gives_benign(self) -> bool:
        """Whether it says what flagged columns should get."""
        return any(v.name.partition(".")[0] == "benign" for v in self.model.graph.output)

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """Inputs that must be bound to values of the host."""
        named = (value.name for value in self.inputs)
        own = ("attention", "context", "layer")
        return tuple(n for n in named if n not in own and not n.startswith(OBSERVED))

    @property
    def inputs(self) -> list[ValueInfoProto]:
        """Its inputs, without initializers that old IR versions list among them."""
        return inputs_of(self.model)

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
    scope = _scope(file.path, metadata)
    check_signature(file.path, model, scope)
    _check_metadata(file.path, metadata, scope, threshold)
    try:
        given = metadata.get("atpatch.threshold", "0.5")  # a repair has none
        value = float(given) if threshold is None else threshold
        check_threshold(
            value,
            f"the threshold of the detector {file.path}," if threshold is None else "--threshold",
        )
        names = "atpatch.apply" if scope is DetectorScope.MODEL else "atpatch.sites"
        sites = json.loads(metadata.get(names, "[]"))
        bindings = json.loads(metadata.get("atpatch.bind", "{}"))
        training = json.loads(metadata.get("atpatch.training", "{}"))
        rows = int(metadata["atpatch.rows"]) if "atpatch.rows" in metadata else None
        second = SecondRun.loads(metadata["atpatch.rerun"]) if "atpatch.rerun" in metadata else None
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise ValueError(f"{names} is no list of names")
        if not isinstance(bindings, dict) or not all(isinstance(v, str) for v in bindings.values()):
            raise ValueError("atpatch.bind is no object of names")
        if rows is not None and rows < 1:
            raise ValueError("atpatch.rows is below 1")
    except ValueError as error:
        raise InputError(
            f"the metadata of the detector {file.path} cannot be read ({error}): "
            "atpatch.threshold and atpatch.rows are numbers, atpatch.sites, atpatch.apply, "
            "atpatch.bind, atpatch.rerun and atpatch.training are JSON"
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
        scope=scope,
        bindings=bindings,
        second_run=second.at(value) if second is not None and threshold is not None else second,
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


def _scope(path: Path, metadata: dict[str, str]) -> DetectorScope:
    found = metadata.get("atpatch.scope", DetectorScope.SITE)
    try:
        return DetectorScope(found)
    except ValueError:
        raise RefusedError(
            f"the detector {path} has scope '{found}', and this version knows "
            f"{', '.join(DetectorScope)}: fit it again with this version"
        ) from None


def _check_metadata(
    path: Path, metadata: dict[str, str], scope: DetectorScope, threshold: float | None
) -> None:
    found = metadata.get("atpatch.abi")
    if found != ABI_VERSION:
        raise InputError(
            f"the detector {path} has atpatch.abi = {found or 'missing'} in its metadata, expected "
            f"{ABI_VERSION}: add it with onnx.helper.set_model_props"
        )
    if scope is DetectorScope.CONTEXT:
        return
    if threshold is None and "atpatch.threshold" not in metadata:
        raise InputError(
            f"the detector {path} has no atpatch.threshold in its metadata: add it, or give "
            "--threshold"
        )
    if scope is DetectorScope.MODEL and "atpatch.apply" not in metadata:
        raise InputError(
            f"the detector {path} has scope 'model' and no atpatch.apply in its metadata: add the "
            "sites where its decision is applied, as a JSON list of names"
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

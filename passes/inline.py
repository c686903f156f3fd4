"""Put detectors into a host, under names that cannot collide, each one's tensors stored once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto

from ..detector import Detector
from ..edits import AddInitializer, AddOpsetImport, Edit
from ..errors import InputError, RefusedError
from .fragment import Constants
from .graph_view import GraphView
from .renaming import renamed


class Inliner:
    """Copies detectors into one host; `edits` are what its copies share.

    bindings: host values for further detector inputs, by input name.
    """

    def __init__(self, view: GraphView, constants: Constants, bindings: Mapping[str, str]) -> None:
        self.view, self.constants, self.bindings = view, constants, bindings
        self.edits: list[Edit] = []
        self._tensors: dict[str, dict[str, str]] = {}

    def place(
        self, detector: Detector, prefix: str, attention: str, layer: int, before: int
    ) -> tuple[list[NodeProto], str, str | None]:
        """The detector's nodes for the site `prefix`, its anomaly and its benign attention.

        before: index of the host node before which they will stand. Raises: InputError.
        """
        nodes, made = self.copy(detector, prefix, {"attention": attention}, layer, before)
        return nodes, made["anomaly"], made.get("benign")

    def copy(
        self,
        detector: Detector,
        prefix: str,
        values: Mapping[str, str],
        layer: int | None,
        before: int,
    ) -> tuple[list[NodeProto], dict[str, str]]:
        """The detector's nodes, and what its outputs are called.

        values: what its inputs read, but for `layer` and those that are bound to the host.
        Raises: InputError.
        """
        graph = detector.model.graph
        bound = {**self._stored(detector, graph), **values}
        if detector.takes_layer and layer is not None:
            bound["layer"] = self.constants.add(f"layer{layer}", np.array(layer, np.int64))
        for name in detector.extra_inputs:
            bound[name] = self._bound(detector, name, before)
        nodes = [renamed(node, f"{prefix}/detector", bound) for node in graph.node]
        return nodes, {
            value.name: bound.get(value.name, f"{prefix}/detector/{value.name}")
            for value in graph.output
        }

    def _stored(self, detector: Detector, graph: GraphProto) -> dict[str, str]:
        """The host's names of the detector's tensors, which are added with its first site."""
        if detector.sha256 not in self._tensors:
            number = f"-{len(self._tensors)}" if self._tensors else ""
            tensors = _renamed(graph, f"{self.constants.prefix}/detector{number}")
            self.edits += [AddInitializer(tensor) for tensor in tensors.values()]
            self._tensors[detector.sha256] = {old: t.name for old, t in tensors.items()}
            self._import(detector)
        return self._tensors[detector.sha256]

    def _import(self, detector: Detector) -> None:
        """Import the further domain that a detector may use. Raises: RefusedError."""
        used = {
            o.domain: o.version for o in detector.model.opset_import if o.domain == "ai.onnx.ml"
        }
        added = {e.domain: e.version for e in self.edits if isinstance(e, AddOpsetImport)}
        there = {o.domain: o.version for o in self.view.model.opset_import} | added
        for domain, version in used.items():
            if there.get(domain, version) != version:
                raise RefusedError(
                    f"the detector {detector.path} uses {domain} at version {version}, the model "
                    f"or another detector at {there[domain]}: export it at that version"
                )
            if domain not in there:
                self.edits.append(AddOpsetImport(domain, version))

    def _bound(self, detector: Detector, name: str, before: int) -> str:
        """The host value that a further detector input reads. Raises: InputError."""
        value = self.bindings.get(name, detector.bindings.get(name))
        if value is None:
            raise InputError(
                f"the input '{name}' of the detector {detector.path} is not bound: say which value "
                f"of the model it reads with --bind {name}=VALUE"
            )
        graph_inputs = {v.name for v in self.view.model.graph.input}
        made = self.view.producers.get(value)
        if value not in graph_inputs and value not in self.view.initializers and made is None:
            raise InputError(f"--bind {name}={value}: the model has no value '{value}'")
        if made is not None and made >= before:
            raise InputError(
                f"--bind {name}={value}: that value is computed only behind the site; bind one "
                "that is computed before it"
            )
        self._check_type(detector, name, value)
        return value

    def _check_type(self, detector: Detector, name: str, value: str) -> None:
        """Raises: InputError where a bound value has another type or rank than the input wants."""
        wanted = next(v.type.tensor_type for v in detector.inputs if v.name == name)
        found = self.view.types.get(value)
        if found is None:
            return
        ranks = (len(wanted.shape.dim) if wanted.HasField("shape") else None, found.shape)
        other_rank = None not in ranks and ranks[0] != len(found.shape or ())
        if found.elem_type != wanted.elem_type or other_rank:
            kinds = [
                TensorProto.DataType.Name(t).lower() for t in (found.elem_type, wanted.elem_type)
            ]
            rank = None if found.shape is None else len(found.shape)
            raise InputError(
                f"--bind {name}={value}: the value is {kinds[0]} of rank {rank}, the detector "
                f"{detector.path} expects {kinds[1]} of rank {ranks[0]}: bind one that fits, or "
                "convert it in the detector"
            )


def _renamed(graph: GraphProto, prefix: str) -> dict[str, TensorProto]:
    """Copies of the initializers, by their old names."""
    copies = {}
    for tensor in graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = f"{prefix}/{tensor.name}"
        copies[tensor.name] = copy
    return copies

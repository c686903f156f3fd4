"""The coverage benchmark over a folder of graphs from other projects, whose true counts are known.

A file is run with the inputs that lie beside it, else with random ones where the shapes of its
inputs are enough to make some that ONNX Runtime takes.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, ValueInfoProto, numpy_helper

from atpatch_onnx.errors import AtpatchError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import Sites, locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Strategy, Treatment
from atpatch_onnx.patching import revert
from atpatch_onnx.runtime import Session

from detectors import NEVER, column_mean_detector
from exports import Arrays, distance, patched

SOFTMAXES = ("Softmax", "BiasSoftmax", "QLinearSoftmax")
FREE = 4
"""The length of axes that are not fixed."""


def third_party(zoo: Path, scratch: Path) -> dict[str, int | list[str]]:
    """Counts over the files of a table `sites.csv`, and what is odd about which file."""
    with (zoo / "sites.csv").open() as file:
        table = list(csv.DictReader(file))
    found: Counter[str] = Counter()
    odd: list[str] = []
    for row in table:
        model = ModelFile.open(zoo / row["path"])
        sites = locate(model.skeleton)
        fused = sum(other.op not in SOFTMAXES for other in sites.refused)
        plain = len(sites.refused) - fused
        opened = sum(site.opening is not None for site in sites.sites)
        found["files"] += 1
        found["unfused sites expected"] += int(row["softmax_attention"])
        found["unfused sites found"] += len(sites.sites) - opened
        found["unfused sites refused by name"] += plain
        found["fused sites expected"] += int(row["fused_attention"])
        found["fused sites found"] += opened
        found["fused sites refused by name"] += fused
        counts = (plain + len(sites.sites) - opened, fused + opened)
        exact = counts == (int(row["softmax_attention"]), int(row["fused_attention"]))
        found["files with exactly the expected sites"] += exact
        if not exact:
            odd.append(f"{row['path']}: {counts} sites")
        content = bytes(model.buffer)
        again = ModelProto.FromString(content).SerializeToString()
        found["files that a re-serialisation would change"] += again != content
        if sites.sites:
            for what in _patched(model, sites, row["ort_1_31"], scratch):
                if what.startswith("!"):
                    odd.append(f"{row['path']}: {what[1:]}")
                else:
                    found[what] += 1
    return {**found, "odd": odd}


def _patched(model: ModelFile, sites: Sites, runtime: str, scratch: Path) -> Iterator[str]:
    """What can be said of the file once it is patched; "!" stands before what should not be."""
    detector = column_mean_detector(scratch / "det.onnx", GraphView.of(model.skeleton).opset, NEVER)
    never = Treatment(Redistribution.PRUNE, detector)
    yield "files patched"
    feeds = next(_inputs(model), None)
    loaded = same = True
    fused = False
    for strategy in (Strategy.GUARD, Strategy.SELECT):
        try:
            content = patched(model, sites.sites, never, strategy)
        except AtpatchError as error:
            yield f"!{strategy.value}: {error}"
            return
        if revert(ModelFile.from_bytes(content)).sha256 != model.sha256:
            yield "!not reverted"
        if runtime not in ("run", "loads"):
            continue
        try:
            session = Session(content, "cpu", model.folder, threads=1)
        except AtpatchError as error:
            loaded = False
            yield f"!{strategy.value}: {error}"
            continue
        if feeds is not None:
            given, wanted = feeds
            apart = distance([wanted], [session.run(given, list(wanted))])
            same &= apart == 0
            if apart and not distance(*(_unfused(m, given) for m in (model.path, content))):
                fused = True
            elif apart:
                yield f"!{strategy.value}: outputs differ by {apart:.1e}"
    yield "files reverted to the same bytes"
    if runtime in ("run", "loads"):
        if loaded:
            yield "patched files that ONNX Runtime loads, as it does their originals"
        if feeds is not None:
            yield "files run"
            if same:
                yield "files run whose outputs are identical when nothing is flagged"
            elif fused:
                yield "files run that ONNX Runtime fuses, identical where it is told not to"


def _unfused(model: Path | bytes, feeds: Arrays) -> list[Arrays]:
    """The outputs where ONNX Runtime fuses no plain nodes into a fused operator of its own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, feeds), strict=True))]


def _inputs(model: ModelFile) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs that the model runs with, and its outputs for them: the best first."""
    try:
        session = Session(model.path, "cpu", threads=1)
    except AtpatchError:
        return
    graph = model.skeleton.graph
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in constants]
    for feeds in _candidates(model.path, values):
        try:
            yield feeds, session.run(feeds, [value.name for value in graph.output])
        except (AtpatchError, ValueError):
            continue


def _candidates(path: Path, values: list[ValueInfoProto]) -> Iterator[Arrays]:
    stored = path.parent.with_name(path.parent.name.removesuffix("_expanded")) / "test_data_set_0"
    files = [stored / f"input_{index}.pb" for index in range(len(values))]
    if files and all(file.exists() for file in files):
        tensors = [numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files]
        yield {value.name: array for value, array in zip(values, tensors, strict=True)}
    for length in (FREE, 1, 8):
        rng = np.random.default_rng(0)
        yield {value.name: _random(value, length, rng) for value in values}


def _random(value: ValueInfoProto, length: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal floats; ones, which are valid ids, masks and lengths, of other types."""
    tensor = value.type.tensor_type
    shape = [d.dim_value if d.dim_value > 0 else length for d in tensor.shape.dim]
    floating = tensor.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or TensorProto.FLOAT)
    values = rng.standard_normal(shape) if floating else np.ones(shape)
    return np.asarray(values, dtype)

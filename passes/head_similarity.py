"""Heads that become alike: how similar the heads of a site are, as one decision an input.

    P of a site ──► masked maps ──► cosine of each pair of heads ──► s [B, H] ──► whitened [B, H]
    whitened of all sites ──► weighted sums [B, G], one a group of heads ──► d / (1 + d)

1. Padding is left out: keys that the last query row does not see, and the rows of such keys.
2. Attention sinks are left out where asked for: heads that share one are alike, and normal.
3. `s` of a head is its mean cosine with the other heads, or that with the closest of them.
4. It is whitened by what is normal for this head in inputs of this length (a line over the log of
   the length), as short maps are more alike than long ones.
5. `anomaly.<site>` is the squashed sum of the site's group at its suspicious heads and 0 at the
   others; `benign.<site>` their benign map.

Inspired by "abnormally similar heads" of backdoored language models (arXiv 2511.13789), of which
only the abstract is public. These nodes are authored once: `build_reading` gives what fitting
reads, `build_head_similarity` the detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ..signature import OBSERVED
from .fragment import Constants, Fragment
from .head_maps import Floats, Masked, NormalSite, add_benign_heads, add_masked, add_similarity
from .tables import unsqueeze


@dataclass(frozen=True)
class HeadNorm:
    """Normal similarity of the heads of a site, each `[H]`.

    Whitened is (s - center - slope * log n) * gain, n being the number of visible keys.
    """

    center: Floats
    slope: Floats
    gain: Floats


@dataclass(frozen=True)
class WatchedSite:
    """A site that the detector looks at, and what it does there.

    weights: `[H, G]`, what each head adds to the sum of each group.
    suspicious: bool `[H]`, the heads that get their benign map; none: the site is only observed.
    group: the one that decides here; None: the highest of all.
    """

    normal: NormalSite
    norm: HeadNorm
    weights: Floats
    suspicious: NDArray[np.bool_]
    group: int | None = None


def build_reading(
    sites: Sequence[NormalSite], similarity: str, opset: int, ir_version: int
) -> ModelProto:
    """What fitting reads of each site:

    `columns.<site>` `[B, H, K]`, `bucket.<site>` int64 `[B, K]`, `count.<site>` `[B, 1]` and, where
    a `similarity` is asked for, `similarity.<site>` `[B, H]`.
    """
    build = _Build(opset)
    for site in sites:
        f = build.fragment(site.name)
        masked = add_masked(f, build.read(site), site.cross)
        build.give(masked.columns, f"columns.{site.name}", ["B", "H", "K"])
        build.give(masked.bucket, f"bucket.{site.name}", ["B", "K"], TensorProto.INT64)
        build.give(masked.count, f"count.{site.name}", ["B", 1])
        if similarity:
            found = add_similarity(f, masked, site, similarity)
            build.give(found, f"similarity.{site.name}", ["B", "H"])
    return build.model("head_reading", ir_version)


def build_head_similarity(
    sites: Sequence[WatchedSite], similarity: str, opset: int, ir_version: int
) -> ModelProto:
    """The detector `attention.<site>.. -> anomaly.<site>.., benign.<site>..` of scope `model`.

    Sites without suspicious heads have no outputs.
    """
    build = _Build(opset)
    sums = ""
    parts: list[tuple[WatchedSite, Fragment, Masked]] = []
    for site in sites:
        name = site.normal.name
        f = build.fragment(name)
        masked = add_masked(f, build.read(site.normal), site.normal.cross)
        whitened = _whitened(f, masked, site, similarity)
        weights = f.constants.add(f"{name}/weights", site.weights.astype(np.float32))
        added = f.op("MatMul", whitened, weights, name="group_sums")
        sums = f.op("Add", sums, added, name="group_sums_so_far") if sums else added
        parts.append((site, f, masked))
    f = build.fragment("decision")
    score = f.op("Max", sums, f.number(0.0), name="score")
    odds = f.op("Add", score, f.number(1.0), name="score_plus_one")
    shares = f.op("Div", score, odds, name="score_share")
    highest = f.axes_op("ReduceMax", shares, [1], "highest_share", keepdims=1)
    for site, own, masked in parts:
        if not site.suspicious.any():
            continue
        name = site.normal.name
        share = highest
        if site.group is not None:
            share = f.slice(shares, site.group, site.group + 1, 1, f"{name}/share")
        by_head = f.axes_op("Unsqueeze", share, [2, 3], f"{name}/share_of_heads")
        mask = site.suspicious.astype(np.float32)[None, :, None, None]
        chosen = f.constants.add(f"{name}/suspicious", mask)
        heads = f.op("Mul", by_head, chosen, name=f"{name}/share_by_head")
        anomaly = f.op("Mul", heads, masked.keys, name=f"{name}/anomaly")
        build.give(anomaly, f"anomaly.{name}", ["B", "H", 1, "K"])
        benign = add_benign_heads(own, masked, site.normal, f"benign.{name}")
        build.last += benign
        build.outputs += [_float(node.output[0], [None, "H", None, "K"]) for node in benign]
    return build.model("head_similarity", ir_version)


def build_replacement(
    site: NormalSite, index: int, count: int, opset: int, ir_version: int
) -> ModelProto:
    """The detector `attention, heads -> anomaly, benign` that replaces the heads that it is told.

    heads: float32 `[B, S, H]`, 1 for heads of `count` sites that get their benign map; this one is
    at `index`.
    """
    build = _Build(opset)
    f = build.fragment("replacement")
    build.inputs.append(_float("attention", ["B", "H", "Q", "K"]))
    build.inputs.append(_float("heads", ["B", count, "S"]))
    masked = add_masked(f, "attention", site.cross)
    row = f.slice("heads", index, index + 1, 1, "site_heads")
    own = f.slice(row, 0, site.heads, 2, "own_heads")
    across = f.op("Transpose", own, name="by_head", perm=[0, 2, 1])
    build.last.append(unsqueeze(f, across, [3], "anomaly"))
    build.outputs.append(_float("anomaly", ["B", "H", 1, 1]))
    benign = add_benign_heads(f, masked, site, "benign")
    build.last += benign
    build.outputs += [_float(node.output[0], [None, "H", None, "K"]) for node in benign]
    return build.model("replacement", ir_version)


def _whitened(f: Fragment, masked: Masked, site: WatchedSite, similarity: str) -> str:
    """The whitened similarity `[B, H]`."""
    found = add_similarity(f, masked, site.normal, similarity)
    center, slope, gain = (
        f.constants.add(f"{site.normal.name}/{name}", table.astype(np.float32)[None])
        for name, table in (
            ("center", site.norm.center),
            ("slope", site.norm.slope),
            ("gain", site.norm.gain),
        )
    )
    some = f.op("Max", masked.count, f.number(1.0), name="some_keys")
    by_length = f.op("Mul", f.op("Log", some, name="log_length"), slope, name="by_length")
    normal = f.op("Add", center, by_length, name="normal_similarity")
    return f.op("Mul", f.op("Sub", found, normal, name="rise"), gain, name="whitened")


class _Build:
    """A model under construction: fragments that share constants, inputs, and outputs by name."""

    def __init__(self, opset: int) -> None:
        self.opset, self.constants = opset, Constants("heads")
        self.fragments: list[Fragment] = []
        self.inputs: list[ValueInfoProto] = []
        self.last: list[NodeProto] = []
        self.outputs: list[ValueInfoProto] = []

    def fragment(self, prefix: str) -> Fragment:
        """A further fragment."""
        self.fragments.append(Fragment(f"heads/{prefix}", self.opset, self.constants))
        return self.fragments[-1]

    def read(self, site: NormalSite) -> str:
        """The input with the map of a site."""
        name = OBSERVED + site.name
        self.inputs.append(_float(name, ["B", site.heads, None, None]))
        return name

    def give(
        self,
        value: str,
        name: str,
        shape: list[str | int | None],
        elem_type: int = TensorProto.FLOAT,
    ) -> None:
        """Make `value` the output `name`."""
        self.last.append(helper.make_node("Identity", [value], [name], name))
        self.outputs.append(helper.make_tensor_value_info(name, elem_type, shape))

    def model(self, name: str, ir_version: int) -> ModelProto:
        """The model."""
        nodes = [node for f in self.fragments for node in f.nodes()]
        graph = helper.make_graph(
            [*nodes, *self.last],
            name,
            self.inputs,
            self.outputs,
            initializer=list(self.constants.tensors.values()),
        )
        imports = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
        onnx.checker.check_model(model)
        return model


def _float(name: str, shape: list[str | int | None]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

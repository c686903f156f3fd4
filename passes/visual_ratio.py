"""What CleanSight measures at a site: how the last token looks at the image, and at which keys.

    ratio         S = sum over visual / (sum over prompt + 1e-12) of the last row, in each head
    mean-ratio    S of the mean over heads: what keeping heads apart is worth
    log-ratio     log S, floored
    columns       log of the mean of each key's column over all rows, in each head

The same nodes stand in the fragment that collects statistics and in the detector.

Source: CleanSight, arXiv 2603.12989; only the first is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cached_property

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..signature import OBSERVED
from .fragment import Constants, Fragment
from .visual_prompt import Parts, Tokens, add_last_row, add_tokens


class Statistic(StrEnum):
    """What is measured at a site."""

    RATIO = "ratio"
    MEAN_RATIO = "mean-ratio"
    LOG_RATIO = "log-ratio"
    COLUMNS = "columns"


EPSILON = 1e-12
"""Beside the attention to the prompt, so that the ratio is finite."""
LEAST_SHARE = 1e-6
"""Attention below this counts as this in a logarithm: float16 knows little below."""


class Measured:
    """One site, `attention.<site>`, measured in a fragment; each value is added once."""

    def __init__(self, f: Fragment, site: str, tokens: Tokens) -> None:
        self.f, self.tokens = f.within(site), tokens
        self.attention = OBSERVED + site

    def __getitem__(self, statistic: Statistic) -> str:
        """`[B, H]`; of columns `[B, H, K]`."""
        if statistic is Statistic.RATIO:
            return self.ratio
        if statistic is Statistic.MEAN_RATIO:
            return self.mean_ratio
        return self.log_ratio if statistic is Statistic.LOG_RATIO else self.columns

    @cached_property
    def row(self) -> str:
        """The last token's row `[B, H, K]`."""
        return add_last_row(self.f, self.attention, self.tokens)

    @cached_property
    def strongest(self) -> str:
        """The share `[B, K]` of each key in that row, in the head that attends to it most."""
        return self.f.axes_op("ReduceMax", self.row, [1], "strongest", keepdims=0)

    @cached_property
    def ratio(self) -> str:
        """Attention to the visual keys by that to the prompt, `[B, H]`."""
        some = self.f.op("Add", self._prompt, self.f.number(EPSILON), name="prompt_some")
        return self.f.op("Div", self._visual, some, name="ratio")

    @cached_property
    def mean_ratio(self) -> str:
        """The same of the mean over heads, `[B, 1]`."""
        visual, prompt = (
            self.f.axes_op("ReduceMean", share, [1], f"{name}_mean", keepdims=1)
            for name, share in (("visual", self._visual), ("prompt", self._prompt))
        )
        some = self.f.op("Add", prompt, self.f.number(EPSILON), name="prompt_mean_some")
        return self.f.op("Div", visual, some, name="mean_ratio")

    @cached_property
    def log_ratio(self) -> str:
        """Its logarithm, `[B, H]`."""
        visual, prompt = self._log(self._visual, "visual"), self._log(self._prompt, "prompt")
        return self.f.op("Sub", visual, prompt, name="log_ratio")

    @cached_property
    def columns(self) -> str:
        """The log of the mean of each column over the rows of tokens, `[B, H, K]`."""
        f, tokens = self.f.within("columns"), self.tokens
        shown = f.op("Where", tokens.queries, self.attention, f.number(0.0), name="tokens")
        total = f.axes_op("ReduceSum", shown, [2], "total", keepdims=0)
        count = f.axes_op("Unsqueeze", tokens.query_count, [2], "rows")
        return self._log(f.op("Div", total, count, name="mean"), "columns")

    @cached_property
    def _visual(self) -> str:
        return self._share(self.tokens.visual, "visual")

    @cached_property
    def _prompt(self) -> str:
        return self._share(self.tokens.prompt, "prompt")

    def _share(self, keys: str, name: str) -> str:
        """The share `[B, H]` of some keys `[B, K]` in the row."""
        mask = self.f.axes_op("Unsqueeze", keys, [1], f"{name}_by_head")
        part = self.f.op("Mul", self.row, mask, name=f"{name}_part")
        return self.f.axes_op("ReduceSum", part, [2], f"{name}_share", keepdims=0)

    def _log(self, value: str, name: str) -> str:
        floored = self.f.op("Max", value, self.f.number(LEAST_SHARE), name=f"{name}_floored")
        return self.f.op("Log", floored, name=f"{name}_log")


def start(site: str, parts: Parts, opset: int) -> tuple[Fragment, Tokens]:
    """A new fragment that finds the tokens from the map of a site."""
    f = Fragment("cleansight", opset, Constants("cleansight"))
    return f, add_tokens(f, OBSERVED + site, parts)


def build_statistics(
    sites: Sequence[str], parts: Parts, statistics: Sequence[Statistic], opset: int, ir_version: int
) -> ModelProto:
    """A fragment of scope `model` that measures `sites`.

    Outputs: `visual_keys`, `prompt_keys` float32 `[B, K]`; `length` float32 `[B, 1]`; of each site
    `<statistic>.<site>`, `[B, H]`, of columns `[B, H, K]`.
    """
    f, tokens = start(sites[0], parts, opset)
    made = {"visual_keys": tokens.visual, "prompt_keys": tokens.prompt, "length": tokens.length}
    ranks = dict.fromkeys(made, 2)
    for site in sites:
        measured = Measured(f, site, tokens)
        for statistic in statistics:
            made[f"{statistic}.{site}"] = measured[statistic]
            ranks[f"{statistic}.{site}"] = 3 if statistic is Statistic.COLUMNS else 2
    nodes = [helper.make_node("Identity", [v], [name], name=name) for name, v in made.items()]
    return as_fragment(f, sites, parts, nodes, ranks, ir_version)


def as_fragment(
    f: Fragment,
    sites: Sequence[str],
    parts: Parts,
    outputs: Sequence[NodeProto],
    ranks: dict[str, int],
    ir_version: int,
) -> ModelProto:
    """The model of scope `model` that observes `sites`, whose last nodes are `outputs`."""
    value = helper.make_tensor_value_info
    nodes = _needed([*f.nodes(), *outputs], ranks)
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        f.prefix,
        [
            *(
                value(OBSERVED + s, TensorProto.FLOAT, ["B", f"H{i}", "Q", "K"])
                for i, s in enumerate(sites)
            ),
            *parts.inputs(),
        ],
        [value(name, TensorProto.FLOAT, [None] * rank) for name, rank in ranks.items()],
        initializer=[t for name, t in f.constants.tensors.items() if name in read],
    )
    imports = [helper.make_opsetid("", f.opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    onnx.checker.check_model(model)
    return model


def _needed(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that `outputs` are made of."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]

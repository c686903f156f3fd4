"""What can be read off the graph about a site: its name, heads, whether causal or cross."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .functions import IN_BRANCH
from .functions import PREFIX as INLINED
from .graph_view import Dim, GraphView
from .walk import PRODUCTS, is_product, operands, score_inputs


@dataclass(frozen=True)
class SiteFacts:
    """heads: number of heads; None where the graph does not say.
    shape: shape of the probabilities as far as it is known.
    causal: a mask hides later keys.
    cross: keys come from another sequence than queries.
    """

    heads: int | None
    shape: tuple[Dim, ...] | None
    causal: bool
    cross: bool


def describe_site(
    view: GraphView, probabilities: str, rank: int, scores: NodeProto, logits: str
) -> SiteFacts:
    """The facts of the site whose Q K^T is the node `scores`."""
    shape = view.shape(probabilities)
    return SiteFacts(
        heads=_heads(view, shape, rank, scores),
        shape=shape,
        causal=_is_causal(view, logits),
        cross=_is_cross(view, scores),
    )


def site_names(anchors: list[tuple[GraphView, NodeProto]]) -> list[str]:
    """A unique, readable name for each softmax, from its module path where there is one."""
    stems = [_module_path(node) or "attention" for _, node in anchors]
    several = {stem for stem, count in Counter(stems).items() if count > 1}
    taken = set(stems)
    names: list[str] = []
    for stem in stems:
        name = stem
        if stem == "attention" and stem in several:
            name = "attention.0"
        number = 1
        while name in names or (name != stem and name in taken):
            name, number = f"{stem}.{number}", number + 1
        names.append(name)
    return names


def _module_path(node: NodeProto) -> str:
    """The module that a node came from: torch.export metadata, or a TorchScript node name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = [scope for scope in ast.literal_eval(entry.value)[:-1] if scope]
            except (ValueError, SyntaxError, TypeError):
                break
            if scopes:
                return _clean(str(scopes[-1]))
    path, _, _ = node.name.rpartition("/")
    if path.startswith(INLINED):  # a function's body: the scope of its call is no module
        path = re.sub(rf"^{IN_BRANCH}[\d._]+/", "", path.removeprefix(INLINED))
    return _clean(path)


def _clean(path: str) -> str:
    words = [w for w in re.split(r"[/.]", path) if w and w not in ("model", "module")]
    words = words[:-1] if words and words[-1].lower() == "softmax" else words
    return re.sub(r"[^A-Za-z0-9_.]+", "_", ".".join(words))


def _heads(
    view: GraphView, shape: tuple[Dim, ...] | None, rank: int, scores: NodeProto
) -> int | None:
    if rank == 2:
        return 1
    if rank >= 4 and shape is not None and isinstance(shape[-3], int):
        return shape[-3]
    for operand in operands(scores):
        for _, node in view.search(operand, _head_inputs, limit=64):
            if node.op_type == "Reshape" and (heads := _split_heads(view, node, rank)) is not None:
                return heads
    return None


_BY_HEAD = frozenset(
    "RotaryEmbedding LayerNormalization RMSNormalization SimplifiedLayerNormalization".split()
)
"""Operators that queries and keys pass after they are split into heads."""


def _head_inputs(node: NodeProto) -> list[str]:
    """The inputs of `node` through which queries or keys may pass."""
    return list(node.input[:1]) if node.op_type in _BY_HEAD else score_inputs(node)


def _split_heads(view: GraphView, reshape: NodeProto, rank: int) -> int | None:
    """The heads that a Reshape makes of the model width: `[.., E] -> [.., H, D]`, or `[.., D]`.

    Maps `[B*H, Q, K]` are regrouped by this number, so that for them it must be certain: the width
    is known, and is the heads (maybe of Q, K and V together) times the size of one.
    """
    target = _shape_parts(view, reshape.input[1])
    split = target[-2] or 0 if len(target) >= 4 else 0
    if rank == 4 and split > 0:
        return split
    width, size = _width(view, reshape.input[0]), target[-1] if target else None
    if not isinstance(width, int) or not size or not 1 < size < width or width % size:
        return None
    if len(target) == 3 or (len(target) == 4 and split <= 0):
        return width // size
    if len(target) == 5 and split <= 0 and 3 in target:  # Q, K and V together
        return width // size // 3
    return split if split > 0 and width // size in (split, 3 * split) else None


def _width(view: GraphView, value: str) -> Dim:
    """The last dimension of `value`; that of a weight or bias where inference is silent."""
    shape, node = view.shape(value), view.producer(value)
    if shape:
        return shape[-1]
    if node is not None and node.op_type in ("Add", "MatMul"):
        read = node.input if node.op_type == "Add" else node.input[1:]
        weights = (view.initializers.get(name) for name in read)
        sizes = [t.dims[-1] for t in weights if t is not None and t.dims]
        return int(sizes[0]) if sizes and sizes[0] > 1 else None
    return None


def _shape_parts(view: GraphView, value: str) -> list[int | None]:
    """The numbers of a shape value, None where a part is computed at run time."""
    whole = view.constant(value)
    if whole is not None:
        return [int(n) for n in whole.reshape(-1)]
    node = view.producer(value)
    if node is None or node.op_type != "Concat":
        return []
    parts: list[int | None] = []
    for name in node.input:
        constant, shape = view.constant(name), view.shape(name)
        if constant is not None:
            parts += [int(n) for n in constant.reshape(-1)]
        elif shape is not None and len(shape) == 1 and isinstance(shape[0], int):
            parts += [None] * shape[0]
        else:
            return []
    return parts


def _is_cross(view: GraphView, scores: NodeProto) -> bool:
    """Whether Q and K are projected from different sequences.

    Either may pass through a few nodes of its own before its projection (a convolution, a spatial
    reduction), so that a common value shortly upstream makes them the same sequence.
    """
    query, key = (_sources(view, operand) for operand in operands(scores))
    return bool(query and key) and not _near(view, query, 8) & _near(view, key, 16)


def _near(view: GraphView, values: set[str], limit: int) -> set[str]:
    """`values` and what they are computed from, as far as `limit` values upstream of each."""

    def inputs(node: NodeProto) -> list[str]:
        data = node.input[:1] if node.op_type in _SHAPED_BY_INPUT else node.input
        return [name for name in data if name in view.varying]

    found = set(values)
    for value in values:
        for _, node in view.search(value, inputs, limit):
            found.update(inputs(node))
    return found


def _sources(view: GraphView, operand: str) -> set[str]:
    """The activations projected into `operand`: inputs of the nearest weighted products."""
    sources: set[str] = set()
    queue, seen = [operand], {operand}
    for value in queue:
        node = view.producer(value)
        if node is None:
            if value in view.varying:
                sources.add(value)
            continue
        weighted = node.op_type in PRODUCTS and not is_product(view, node)
        if weighted or node.op_type in ("Gemm", "Conv", "DynamicQuantizeMatMul", "MatMulNBits"):
            sources.add(node.input[0] if node.input[0] in view.varying else node.input[1])
            continue
        data = node.input[:1] if node.op_type in _SHAPED_BY_INPUT else node.input
        for name in data:
            if name and name in view.varying and name not in seen and len(seen) < 128:
                seen.add(name)
                queue.append(name)
    return sources


_SHAPED_BY_INPUT = frozenset("Reshape Expand Slice Squeeze Unsqueeze Tile Pad Split".split())
"""Operators whose further inputs are shapes and positions, not data."""


def _is_causal(view: GraphView, logits: str) -> bool:
    """Whether the mask that is added to the scores hides later keys."""

    def mask_inputs(node: NodeProto) -> list[str]:
        return [] if is_product(view, node) or node.op_type in PRODUCTS else list(node.input)

    seen: set[str] = set()
    for _, node in view.search(logits, mask_inputs, limit=400):
        if node.op_type == "Trilu":
            return True
        if node.op_type in _ORDERINGS and all(_is_positions(view, name) for name in node.input):
            return True
        for name in node.input:
            if name not in seen:
                seen.add(name)
                if name not in view.varying and _is_triangular(view, name):
                    return True
    return False


_ORDERINGS = frozenset(("Less", "LessOrEqual", "Greater", "GreaterOrEqual"))


def _is_positions(view: GraphView, value: str) -> bool:
    """Whether `value` counts positions: made from Range or CumSum by nodes that keep them."""
    constant = view.constant(value)
    if constant is not None:
        flat = constant.reshape(-1)
        return flat.size > 1 and bool(np.all(np.diff(flat.astype(np.float64)) == 1))
    passing = (
        "Reshape Unsqueeze Squeeze Cast Add Sub Expand Identity Slice Transpose Gather".split()
    )
    follow = lambda node: list(node.input[:2]) if node.op_type in passing else []  # noqa: E731
    return any(
        node.op_type in ("Range", "CumSum") or _counts(view.constant(name))
        for _, node in view.search(value, follow, 32)
        for name in node.input
    )


def _counts(constant: NDArray[np.generic] | None) -> bool:
    if constant is None or constant.size < 3 or constant.dtype.kind not in "if":
        return False
    return bool(np.all(np.diff(constant.reshape(-1).astype(np.float64)) == 1))


def _is_triangular(view: GraphView, value: str) -> bool:
    """Whether a constant `[.., N, N]` hides exactly what lies above its diagonal."""
    tensor = view.initializers.get(value)
    constant = view.constant(value)
    if constant is None:
        if tensor is None or len(tensor.dims) < 2:
            return False
        # Too large to be in the skeleton: a square table of flags is a causal mask.
        *_, rows, columns = tensor.dims
        return rows == columns > 32 and tensor.data_type in (2, 3, 9) and len(tensor.dims) == 4
    if constant.ndim < 2 or constant.shape[-1] != constant.shape[-2] or constant.shape[-1] < 2:
        return False
    square = constant.reshape(-1, *constant.shape[-2:])[0].astype(np.float64)
    upper = np.triu(np.ones(square.shape, bool), 1)
    hidden, shown = np.unique(square[upper]), np.unique(square[~upper])
    return bool(hidden.size == 1 and shown.size == 1 and hidden[0] != shown[0])

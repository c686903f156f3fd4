"""How many tokens a model knows, read off its embedding table."""

from __future__ import annotations

from ..model_file import ModelFile
from ..passes.graph_view import GraphView

_SAME_IDS = frozenset(
    "Cast Identity Reshape Squeeze Unsqueeze Flatten Transpose Clip Max Min".split()
)
"""What may stand between the ids and the lookup."""
_SAME_ROWS = frozenset("Cast Identity DequantizeLinear".split())
"""What may stand between the stored table and the lookup."""
_LOOKUPS = {  # operator: input slots of the ids and of the table
    "Gather": (1, 0),
    "GatherBlockQuantized": (1, 0),
    "EmbedLayerNormalization": (0, 2),
    "QEmbedLayerNormalization": (0, 2),
}


def vocabulary_sizes(model: ModelFile) -> dict[str, int]:
    """Rows of the largest table that each input of the model is looked up in, by input name.

    The input with the largest table comes first.
    Inputs that are looked up in no stored table are left out. Tables may be quantised, and their
    bytes are not read.
    """
    view = GraphView.of(model.skeleton)
    given = {value.name for value in model.skeleton.graph.input} - set(view.initializers)
    sizes: dict[str, int] = {}
    for node in view.nodes:
        slots = _LOOKUPS.get(node.op_type)
        if slots is None or len(node.input) <= max(slots):
            continue
        source = _upstream(view, node.input[slots[0]], _SAME_IDS)
        table = view.initializers.get(_upstream(view, node.input[slots[1]], _SAME_ROWS))
        if source in given and table is not None and len(table.dims) >= 2:
            sizes[source] = max(sizes.get(source, 0), table.dims[0])
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _upstream(view: GraphView, value: str, through: frozenset[str]) -> str:
    """The value that `value` is a copy of, but for type, shape and scale."""
    while (node := view.producer(value)) is not None and node.op_type in through:
        value = node.input[0]
    return value

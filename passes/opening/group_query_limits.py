"""What a `GroupQueryAttention` node may ask for and still be opened."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from ..graph_view import GraphView
from ..protos import attribute, int_attribute
from .opening import Closed

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
SLOTS = (
    "query key value past_key past_value seqlens_k total_sequence_length cos_cache sin_cache "
    "position_ids attention_bias head_sink k_scale v_scale q_norm_weight k_norm_weight"
).split()
CHOICES = {
    "causal": (0, 1),
    "do_rotary": (0, 1),
    "rotary_interleaved": (0, 1),
    "smooth_softmax": (0, 1),
    "sliding_window_cache": (0, 1),
    "qk_output": (0, 1, 2),
}
"""Values that the operator defines for its integer attributes, where they are not numbers."""
KNOWN = frozenset(CHOICES) | set(
    "num_heads kv_num_heads scale softcap local_window_size qk_norm_epsilon "
    "k_quant_type v_quant_type kv_cache_bit_width".split()
)


def unknown_value(node: NodeProto) -> Closed | None:
    """A refusal if an attribute has a value that the operator does not define."""
    for name, values in CHOICES.items():
        found = int_attribute(node, name, values[0])
        if found not in values:
            return Closed(
                f"has {name} = {found}, which is not among the values that it defines "
                f"({', '.join(map(str, values))})",
                "export the model again with one of them",
            )
    heads, groups = (int_attribute(node, name, 0) for name in ("num_heads", "kv_num_heads"))
    if heads < 1 or groups < 1 or heads % groups:
        return Closed(
            f"has num_heads {heads}, which is no multiple of its kv_num_heads {groups}",
            "export the model again with numbers of heads that divide",
        )
    window = int_attribute(node, "local_window_size", -1)
    if window == 0 or (window > 0 and not int_attribute(node, "causal", 1)):
        return Closed(
            f"has local_window_size {window}"
            + (", which hides every key" if window == 0 else " but is not causal"),
            "export the model again with local_window_size -1, or causal with a window",
        )
    return None


def without_map(view: GraphView, node: NodeProto) -> Closed | None:
    """A refusal if inputs and attributes ask for what plain nodes cannot read or compute."""
    given = {name for name, value in zip(SLOTS, node.input, strict=False) if value}
    for name in ("k_quant_type", "v_quant_type"):
        kind = attribute(node, name)
        if kind is not None and kind.s not in (b"NONE", b""):
            return Closed(
                f"keeps a quantised cache ({name} {kind.s.decode(errors='replace')})",
                "export the model with a float cache",
            )
    if int_attribute(node, "kv_cache_bit_width", 0):
        return Closed(
            f"keeps a cache of {int_attribute(node, 'kv_cache_bit_width', 0)} bits",
            "export the model with a float cache",
        )
    if int_attribute(node, "sliding_window_cache", 0):
        return Closed(
            "drops keys from its cache before they can be read (sliding_window_cache)",
            "export the model with sliding_window_cache 0 and a cache for the whole sequence; "
            "local_window_size can stay",
        )
    cached = len(node.output) > 2 and all(node.output[1:3])
    if "past_key" in given and not cached:
        return Closed(
            "reads past keys but gives back no present ones",
            "export the model with the outputs present_key and present_value of the node",
        )
    missing = [
        name
        for name, needed in (
            ("query", True),
            ("seqlens_k", True),
            ("total_sequence_length", True),
            ("value", "key" in given),
            ("key", "value" in given),
            ("past_value", "past_key" in given),
            ("cos_cache", int_attribute(node, "do_rotary", 0) == 1),
            ("sin_cache", int_attribute(node, "do_rotary", 0) == 1),
            ("k_norm_weight", "q_norm_weight" in given),
            ("q_norm_weight", "k_norm_weight" in given),
        )
        if needed and name not in given
    ]
    if missing:
        return Closed(f"lacks its input {missing[0]}", "export the model again")
    if view.opset < 13:
        return Closed(
            f"is in a model of opset {view.opset}, which has no plain nodes for all its types",
            "export the model again at opset 13 or later",
        )
    return None

"""What an architecture of the coverage benchmark is, and what its small models are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

Family = Literal[
    "encoder",
    "decoder",
    "decoder-cache",
    "encoder-decoder",
    "vision",
    "windowed",
    "audio",
    "multimodal",
]
Axes = Mapping[int, str]
Config = dict[str, Any]  # arguments of a configuration class
Export = tuple[str, str, int]  # attention implementation, exporter, opset

EXPORTERS = (("torchscript", 14), ("torchscript", 17), ("dynamo", 18), ("dynamo", 23))
BOTH = ("eager", "sdpa")
EAGER = ("eager",)

BATCH = 2
LENGTH = 10
VOCABULARY = 100

# The tensor assertions of `transformers` have no counterpart in ONNX.
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")

INTERLEAVE = "repeat_interleave becomes an Expand of another rank or shape"

SIZE: Config = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,  # the usual 0.02 leaves attention uniform at this width
}
TEXT: Config = SIZE | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL: Config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: Config = {"num_key_value_heads": 2, "head_dim": 8}
IMAGE: Config = {"image_size": 32, "patch_size": 8}
SEQ2SEQ: Config = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
}


@dataclass(frozen=True)
class Input:
    """One graph input: the shape of its example, its named axes, and what fills it."""

    shape: tuple[int, ...]
    axes: Axes
    fill: Callable[[tuple[int, ...]], Tensor]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with other lengths of some named axes."""
        named = (self.axes.get(axis, "") for axis in range(len(self.shape)))
        return tuple(sizes.get(name, n) for name, n in zip(named, self.shape, strict=True))


def never(exporter: str, reason: str) -> dict[Export, str]:
    """The same reason for both attention implementations and all opsets of an exporter."""
    opsets = [opset for name, opset in EXPORTERS if name == exporter]
    return {(attention, exporter, opset): reason for attention in BOTH for opset in opsets}


class Plain(nn.Module):
    """A `transformers` model as exporters want it: tensors in by position, a tuple of them out."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        """Wraps a model; `inputs` and `outputs` are in the order of the graph."""
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """One name for each tensor that comes out."""
        return self.outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs asked for."""
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return tuple(result[name] for name in self.outputs)


@dataclass(frozen=True)
class Architecture:
    """One architecture and what is known about it before it is exported.

    name: unique, the `transformers` model type where there is only one of it.
    family: what it is grouped under in a table.
    sites: attention sites the configuration implies: a self-attention for each layer of every
        tower, a cross-attention for each decoder layer that reads an encoder, and pooling heads
        that are attention over keys and values. Layers that share weights count once for each
        use; routers, kernels and gates that come out of a softmax do not count.
    cross: how many of them are cross attention (keys from another sequence than the queries).
    causal: how many of them are causally masked.
    model: builds the random model for an attention implementation.
    inputs: name of each graph input, in order, and its example.
    outputs: names of the outputs of the model that the graph returns.
    attention: the attention implementations of `transformers` the class supports.
    static: exporters whose graphs have fixed shapes because a dynamic export fails.
    unsupported: (attention, exporter, opset) that torch or transformers cannot export, and why.
    unrunnable: those that are exported but ONNX Runtime refuses to run, and why.
    sizes: further lengths of named axes to run the exports with.
    wrapper: what exporters see of the model.
    """

    name: str
    family: Family
    sites: int
    model: Callable[[str], nn.Module]
    inputs: Mapping[str, Input]
    outputs: tuple[str, ...] = ("last_hidden_state",)
    cross: int = 0
    causal: int = 0
    attention: tuple[str, ...] = BOTH
    static: tuple[str, ...] = ()
    unsupported: Mapping[Export, str] = field(default_factory=dict)
    unrunnable: Mapping[Export, str] = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ()
    wrapper: type[Plain] = Plain

    @property
    def dynamic(self) -> dict[str, Axes]:
        """The named axes of each input."""
        return {name: value.axes for name, value in self.inputs.items()}

    def build(self, attention: str) -> tuple[Plain, dict[str, Tensor]]:
        """The model in evaluation mode, behind `Plain`, and its example inputs; always the same."""
        torch.manual_seed(0)
        model = self.model(attention).eval()
        inputs = {name: value.fill(value.shape) for name, value in self.inputs.items()}
        return self.wrapper(model, tuple(inputs), self.outputs), inputs

    def further(self) -> list[dict[str, Tensor]]:
        """Inputs in each of `sizes`; always the same."""
        torch.manual_seed(1)
        return [{n: i.fill(i.sized(sizes)) for n, i in self.inputs.items()} for sizes in self.sizes]

    def exports(self) -> list[Export]:
        """Every (attention, exporter, opset) that can be exported."""
        every = ((a, exporter, opset) for a in self.attention for exporter, opset in EXPORTERS)
        return [export for export in every if export not in self.unsupported]


def random_model(
    model_type: str, auto: str = "AutoModel", **config: Any
) -> Callable[[str], nn.Module]:
    """A builder of random models of a model type from the arguments of its configuration.

    An argument that is None is left out, to undo a default of a factory.
    """
    given = {key: value for key, value in config.items() if value is not None}
    backbone = {"backbone_config": "eager"} if "backbone_config" in config else {}
    experts = {"experts_implementation": "batched_mm"} if "num_experts_per_tok" in config else {}

    def build(attention: str) -> nn.Module:
        settings = transformers.AutoConfig.for_model(model_type, **given)
        factory = getattr(transformers, auto)
        make = factory.from_config if auto.startswith("Auto") else factory._from_config
        model: nn.Module = make(
            settings,
            attn_implementation={"": attention} | backbone if backbone else attention,
            **experts,
        )
        return model

    return build


def tokens(shape: tuple[int, ...]) -> Tensor:
    """Ordinary token ids: no special ones."""
    return torch.randint(5, VOCABULARY - 10, shape)


def normal(shape: tuple[int, ...]) -> Tensor:
    """Standard normal floats."""
    return torch.randn(shape)


def ones(shape: tuple[int, ...]) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(shape, dtype=torch.int64)


def counting(shape: tuple[int, ...]) -> Tensor:
    """Positions 5, 6, ... in every row."""
    return torch.arange(5, 5 + shape[-1]).expand(shape).contiguous()


def padded_right(shape: tuple[int, ...]) -> Tensor:
    """A mask that hides the last three tokens of the last sample."""
    mask = ones(shape)
    mask[-1, -3:] = 0
    return mask


def padded_float(shape: tuple[int, ...]) -> Tensor:
    """`padded_right` in floats, for models that subtract it from 1.0: torch.export cannot."""
    return padded_right(shape).float()


def padded_left(shape: tuple[int, ...]) -> Tensor:
    """A mask that hides the first two tokens of the last sample."""
    mask = ones(shape)
    mask[-1, :2] = 0
    return mask


def boxes(shape: tuple[int, ...]) -> Tensor:
    """`[B, N, 4]` page coordinates 0..1000 with left <= right and top <= bottom."""
    corner = torch.randint(0, 500, (*shape[:-1], 2))
    return torch.cat([corner, corner + torch.randint(1, 400, corner.shape)], dim=-1)


def image_tokens(shape: tuple[int, ...]) -> Tensor:
    """Token ids with sixteen image placeholders (the last id of the vocabulary) in front."""
    ids = tokens(shape)
    ids[:, :16] = VOCABULARY - 1
    return ids


def sequence(fill: Callable[[tuple[int, ...]], Tensor], *width: int, length: int = LENGTH) -> Input:
    """`[B, length, *width]` with the first two axes named."""
    return Input((BATCH, length, *width), {0: "batch", 1: "sequence"}, fill)


def text(length: int = LENGTH) -> dict[str, Input]:
    """Token ids and a mask with some padding, `[B, length]`."""
    return {
        "input_ids": sequence(tokens, length=length),
        "attention_mask": sequence(padded_right, length=length),
    }


def decoder_text(length: int = 6) -> dict[str, Input]:
    """Token ids and a mask `[B, length]` for the decoder of an encoder-decoder."""
    axes = {0: "batch", 1: "target"}
    return {
        "decoder_input_ids": Input((BATCH, length), axes, tokens),
        "decoder_attention_mask": Input((BATCH, length), axes, ones),
    }


def pixels(size: int = 32) -> dict[str, Input]:
    """Images `[B, 3, size, size]`; only the batch is dynamic."""
    return {"pixel_values": Input((BATCH, 3, size, size), {0: "batch"}, normal)}

"""Decoders that read and return the keys and values of earlier tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from architectures_core import (
    BATCH,
    BOTH,
    EAGER,
    GROUPED,
    SEQ2SEQ,
    SPECIAL,
    TEXT,
    Architecture,
    Input,
    Plain,
    counting,
    normal,
    padded_left,
    random_model,
    sequence,
    text,
    tokens,
)

PAST, LENGTH = 5, 3
STEPS: tuple[Mapping[str, int], ...] = (
    {"past": 0, "sequence": 4, "keys": 4},
    {"past": 3, "sequence": 4, "keys": 7},
    {"past": 5, "sequence": 1, "keys": 6},
)
"""Further steps to run: a prompt, more of it, one token."""


class Cached(Plain):
    """A decoder. Inputs `past_key_i` and `past_value_i` `[B, H, past, D]` are gathered into one
    cache; the grown cache is returned behind the other outputs, in the same order."""

    def __init__(self, *args: Any) -> None:
        """As for `Plain`."""
        super().__init__(*args)
        self.named = tuple(name for name in self.inputs if not name.startswith("past_"))
        self.past = tuple(name for name in self.inputs if name.startswith("past_"))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs asked for, then the grown cache."""
        return (*self.outputs, *(name.replace("past_", "present_") for name in self.past))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs asked for, then the grown cache."""
        named = dict(zip(self.named, tensors, strict=False))
        cache = filled(tensors[len(self.named) :])
        result = self.model(**named, past_key_values=cache, use_cache=True, return_dict=True)
        return (*(result[name] for name in self.outputs), *flat(result.past_key_values))


class First(Cached):
    """The same at its first step: no cache is read, one is returned."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]):
        """As for `Plain`; the names of the cache are those that the other steps read."""
        super().__init__(model, inputs, outputs)
        self.past = outputs[1:]
        self.outputs = outputs[:1]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs asked for, then the cache."""
        named: dict[str, Any] = dict(zip(self.named, tensors, strict=True))
        hidden = named.pop("encoder_hidden_states", None)
        if hidden is not None:
            named["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden)
        result = self.model(**named, use_cache=True, return_dict=True)
        return (*(result[name] for name in self.outputs), *flat(result.past_key_values))


class CachedCross(Cached):
    """The decoder of an encoder-decoder: the keys and values of the encoder are given too, as
    `past_cross_key_i` and `past_cross_value_i`, and passed on."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs asked for, then both caches."""
        named: dict[str, Any] = dict(zip(self.named, tensors, strict=False))
        past = tensors[len(self.named) :]
        cache = EncoderDecoderCache(filled(past[: len(past) // 2]), filled(past[len(past) // 2 :]))
        hidden = named.pop("encoder_hidden_states")
        named["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden)
        result = self.model(**named, past_key_values=cache, use_cache=True, return_dict=True)
        return (*(result[name] for name in self.outputs), *flat(result.past_key_values))


def filled(tensors: tuple[Tensor, ...]) -> DynamicCache:
    """A cache of keys and values in turn."""
    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def flat(cache: Any) -> Iterator[Tensor]:
    """Keys and values in turn; those of the encoder last."""
    if isinstance(cache, EncoderDecoderCache):
        yield from flat(cache.self_attention_cache)
        yield from flat(cache.cross_attention_cache)
        return
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def _past(layers: int, heads: int, prefix: str = "past", axis: str = "past") -> dict[str, Input]:
    """The flat cache; heads are 8 wide."""
    size = {"past": PAST, "source": 10}[axis]
    return {
        f"{prefix}_{kind}_{layer}": Input((BATCH, heads, size, 8), {0: "batch", 2: axis}, normal)
        for layer in range(layers)
        for kind in ("key", "value")
    }


def _decoder(
    name: str,
    heads: int,
    layers: int = 2,
    attention: tuple[str, ...] = BOTH,
    positions: bool = True,
    **config: Any,
) -> Architecture:
    """A decoder: token ids `[B, length]`, a mask over old and new keys, positions, the cache."""
    inputs = {
        "input_ids": sequence(tokens, length=LENGTH),
        "attention_mask": Input((BATCH, PAST + LENGTH), {0: "batch", 1: "keys"}, padded_left),
    }
    if positions:
        inputs["position_ids"] = sequence(counting, length=LENGTH)
    return Architecture(
        f"{name}-cache",
        "decoder-cache",
        layers,
        random_model(
            name,
            "AutoModelForCausalLM",
            **(TEXT | SPECIAL | {"num_hidden_layers": layers} | config),
        ),
        inputs | _past(layers, heads),
        ("logits",),
        causal=layers,
        attention=attention,
        sizes=STEPS,
        wrapper=Cached,
    )


def _seq2seq(name: str, **config: Any) -> Architecture:
    """The decoder of an encoder-decoder with a causal and a cross attention in each layer."""
    axes = {0: "batch", 1: "source"}
    inputs = {
        "decoder_input_ids": sequence(tokens, length=LENGTH),
        "attention_mask": replace(text()["attention_mask"], axes=axes),
        "encoder_hidden_states": Input((BATCH, 10, 32), axes, normal),
    }
    return Architecture(
        f"{name}-cache",
        "decoder-cache",
        4,
        random_model(name, "AutoModelForSeq2SeqLM", **(SEQ2SEQ | config)),
        inputs | _past(2, 4) | _past(2, 4, "past_cross", "source"),
        ("logits",),
        cross=2,
        causal=2,
        sizes=({"past": 2, "sequence": 4}, {"past": 5, "sequence": 1}),
        wrapper=CachedCross,
    )


def first_step(each: Architecture) -> Architecture:
    """The same decoder without a cache to read, as the other branch of a merged decoder."""
    past = [name for name in each.inputs if name.startswith("past_")]
    inputs = {name: value for name, value in each.inputs.items() if name not in past}
    if "attention_mask" in inputs and "input_ids" in inputs:
        inputs["attention_mask"] = sequence(padded_left, length=LENGTH)
    return replace(
        each,
        name=f"{each.name}-first",
        inputs=inputs,
        outputs=(*each.outputs, *past),
        sizes=(),
        wrapper=First,
    )


CACHED = (
    _decoder("gpt2", 4, n_embd=32, n_layer=2, n_head=4),
    _decoder("gpt_neox", 4),
    _decoder("llama", 2, **GROUPED),
    _decoder("qwen2", 2, **GROUPED),
    _decoder("qwen3", 2, **GROUPED),
    _decoder("mistral", 2, sliding_window=4, **GROUPED),
    _decoder("phi", 4),
    _decoder("phi3", 2, **GROUPED),
    _decoder("gemma", 2, **GROUPED),
    _decoder("gemma2", 2, attention=EAGER, sliding_window=4, query_pre_attn_scalar=8, **GROUPED),
    _decoder("opt", 4, positions=False, ffn_dim=64, word_embed_proj_dim=32),
    _decoder("bloom", 4, attention=EAGER, positions=False),
    _decoder("gptj", 4, attention=EAGER, rotary_dim=4),
    _decoder("falcon", 4, num_kv_heads=2, new_decoder_architecture=True),
    _seq2seq("bart"),
    _seq2seq("t5", num_layers=2, num_heads=4, d_kv=8, d_ff=64),
)

MERGED = tuple(
    f"{name}-cache" for name in ("gpt2", "llama", "qwen2", "mistral", "opt", "bart", "t5")
)
"""Decoders that are also exported as one file whose branches are the first and the other steps."""

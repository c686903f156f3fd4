"""Text architectures without a cache: encoders, decoders, encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from architectures_core import (
    BATCH,
    BOTH,
    EAGER,
    GROUPED,
    INTERLEAVE,
    LENGTH,
    SEQ2SEQ,
    SPECIAL,
    TEXT,
    Architecture,
    Config,
    Input,
    boxes,
    counting,
    decoder_text,
    never,
    normal,
    padded_float,
    random_model,
    sequence,
    text,
    tokens,
)

POSITIONS = {"position_ids": sequence(counting)}


def _encoder(
    name: str,
    sites: int = 2,
    attention: tuple[str, ...] = BOTH,
    extra: Mapping[str, Input] | None = None,
    **config: Any,
) -> Architecture:
    """An encoder that reads token ids, a mask and some extra inputs."""
    model = random_model(name, **(TEXT | {"pad_token_id": 0} | config))
    inputs = text() | dict(extra or {})
    return Architecture(name, "encoder", sites, model, inputs, attention=attention)


def _decoder(
    name: str, sites: int = 2, attention: tuple[str, ...] = BOTH, **config: Any
) -> Architecture:
    """A decoder without a cache; every site is causal."""
    settings = TEXT | SPECIAL | {"use_cache": False} | config
    model = random_model(name, "AutoModelForCausalLM", **settings)
    return Architecture(
        name, "decoder", sites, model, text(), ("logits",), causal=sites, attention=attention
    )


def _rotary(
    name: str,
    sites: int = 2,
    attention: tuple[str, ...] = BOTH,
    heads: Mapping[str, int] = GROUPED,
    **config: Any,
) -> Architecture:
    """A decoder with grouped heads and rotary positions.

    Positions are an input: without it they have batch 1, and the RotaryEmbedding that the opset 23
    exports contain runs in ONNX Runtime for a batch of one only.
    """
    decoder = _decoder(name, sites, attention, **heads, **config)
    return replace(decoder, inputs=text() | POSITIONS)


def _seq2seq(name: str, attention: tuple[str, ...] = BOTH, **config: Any) -> Architecture:
    """Two encoder layers; two decoder layers with a causal and a cross attention each."""
    model = random_model(name, "AutoModelForSeq2SeqLM", **(SEQ2SEQ | {"use_cache": False} | config))
    inputs, outputs = text() | decoder_text(), ("logits",)
    return Architecture(
        name, "encoder-decoder", 6, model, inputs, outputs, cross=2, causal=2, attention=attention
    )


EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}

ENCODERS = (
    _encoder("bert"),
    _encoder("roberta"),
    _encoder("distilbert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    _encoder("deberta-v2", attention=EAGER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("deberta", attention=EAGER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("albert", embedding_size=16),  # one layer's weights, used twice
    _encoder("electra", embedding_size=16),
    _encoder("mpnet", attention=EAGER),
    _encoder(
        "modernbert",
        3,
        extra=POSITIONS,
        num_hidden_layers=3,
        local_attention=8,  # less, and a padded query sees no key at all: undefined
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        **SPECIAL,
    ),
    replace(
        _encoder("layoutlm", extra={"bbox": sequence(boxes, 4)}),
        unrunnable={
            ("sdpa", "dynamo", 23): "Attention refuses a mask that broadcasts over queries"
        },
    ),
    _encoder("nomic_bert", extra=POSITIONS, head_dim=8),
    _encoder("esm", extra=POSITIONS, position_embedding_type="rotary", mask_token_id=3),
    # Its convolution kernels come out of a softmax too: not an attention site.
    _encoder("convbert", attention=EAGER, embedding_size=16),
    _encoder("squeezebert", attention=EAGER, embedding_size=32),
    # Two blocks of two layers and two decoder layers; the first query of block 2 is pooled.
    replace(
        _encoder(
            "funnel",
            6,
            EAGER,
            architectures=["FunnelModel"],
            num_hidden_layers=None,
            d_head=8,
            d_inner=64,
            block_sizes=[2, 2],
        ),
        static=("dynamo",),
    ),
    replace(
        _encoder(
            "xlnet",
            attention=EAGER,
            max_position_embeddings=None,
            d_head=8,
            d_inner=64,
            use_mems_eval=False,
        ),
        inputs={"input_ids": sequence(tokens), "attention_mask": sequence(padded_float)},
    ),
    _encoder("big_bird", attention=EAGER, attention_type="original_full"),
    # Bands of the map: probabilities are [B, Q, H, window + 1], multiplied in overlapping chunks.
    replace(
        _encoder("longformer", attention=EAGER, attention_window=4, onnx_export=True),
        inputs=text(12),  # a multiple of the window
        static=("torchscript",),
        unsupported=never("dynamo", "a guard on the data-dependent number of global tokens"),
    ),
    Architecture(  # latents read the input once, then two layers among the latents
        "perceiver",
        "encoder",
        3,
        random_model(
            "perceiver",
            num_latents=6,
            d_latents=32,
            d_model=16,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            initializer_range=0.2,
        ),
        {"inputs": sequence(normal, 16)},
        cross=1,
        attention=EAGER,
    ),
    replace(  # mixes tokens by Fourier transform: no attention at all
        _encoder("fnet", 0),
        inputs={"input_ids": Input((BATCH, LENGTH), {0: "batch"}, tokens)},
        attention=EAGER,
        unsupported=never("torchscript", "no Fourier transform"),
    ),
)

DECODERS = (
    _decoder("gpt2", n_embd=32, n_layer=2, n_head=4),
    _decoder("opt", ffn_dim=64, word_embed_proj_dim=32),
    _decoder("bloom", attention=EAGER),
    _rotary("falcon", heads={"num_kv_heads": 2}, new_decoder_architecture=True),
    _rotary("gpt_neox", heads={}),
    _decoder("gpt_neo", attention=EAGER, attention_types=[[["global", "local"], 1]], window_size=4),
    _rotary("gptj", attention=EAGER, heads={}, rotary_dim=4),
    _decoder("gpt_bigcode", multi_query=True),  # one key and value head for all queries
    _rotary("llama"),
    _rotary("mistral", sliding_window=4),
    _rotary("qwen2"),
    _rotary("qwen3"),
    _rotary("gemma2", attention=EAGER, sliding_window=4, query_pre_attn_scalar=8),
    _rotary(
        "gemma3_text",
        3,
        num_hidden_layers=3,
        sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    _rotary("phi3"),
    replace(_rotary("cohere"), unsupported=never("torchscript", INTERLEAVE)),
    # The sink is a column of the softmax that is cut off before the values.
    _rotary("gpt_oss", attention=EAGER, sliding_window=4, **EXPERTS),
    _rotary("mixtral", **EXPERTS),  # its router is a softmax too
    _rotary(
        "deepseek_v3",
        heads={"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
)

SEQ2SEQS = (
    _seq2seq("bart"),
    _seq2seq("t5", num_layers=2, num_heads=4, d_kv=8, d_ff=64),
    _seq2seq("marian"),
    _seq2seq("pegasus"),
    _seq2seq("m2m_100"),
    # Each decoder layer has a main map and one over the predicting streams, [B, N, H, Q, 2 K].
    replace(
        _seq2seq(
            "prophetnet",
            EAGER,
            hidden_size=32,
            ngram=2,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            d_model=None,
            encoder_layers=None,
            decoder_layers=None,
        ),
        static=("dynamo",),
        inputs=text()
        | decoder_text()
        | {
            "attention_mask": sequence(padded_float),
            "decoder_attention_mask": Input((BATCH, 6), {0: "batch", 1: "target"}, padded_float),
        },
        sites=8,
        causal=4,
    ),
)

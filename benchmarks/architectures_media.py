"""Architectures that read images, sound, or several kinds of input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from architectures_core import (
    BATCH,
    BOTH,
    EAGER,
    GROUPED,
    IMAGE,
    INTERLEAVE,
    SEQ2SEQ,
    SIZE,
    SPECIAL,
    TEXT,
    VOCABULARY,
    Architecture,
    Config,
    Family,
    Input,
    boxes,
    decoder_text,
    image_tokens,
    never,
    normal,
    ones,
    pixels,
    random_model,
    sequence,
    text,
)


def _vision(name: str, sites: int = 2, **config: Any) -> Architecture:
    return Architecture(
        name, "vision", sites, random_model(name, **(SIZE | IMAGE | config)), pixels()
    )


def _staged(
    name: str,
    sites: int,
    size: int = 32,
    attention: tuple[str, ...] = BOTH,
    family: Family = "vision",
    **config: Any,
) -> Architecture:
    """An image model that says its width and depth stage by stage."""
    model = random_model(name, **({"image_size": size} | config | {"initializer_range": 0.2}))
    return Architecture(name, family, sites, model, pixels(size), attention=attention)


def _clip_like(name: str, sites: int, causal: int, **config: Any) -> Architecture:
    """A text tower and an image tower, two layers each."""
    towers = {"text_config": TEXT | SPECIAL, "vision_config": SIZE | IMAGE}
    model = random_model(name, **(towers | {"projection_dim": 16} | config))
    outputs = ("text_embeds", "image_embeds")
    return Architecture(name, "multimodal", sites, model, text() | pixels(), outputs, causal=causal)


# Stages of one and two layers, for models that shrink the image as they go.
STAGES: Config = {
    "depths": [1, 2],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "patch_sizes": [4, 2],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "num_encoder_blocks": 2,
}
WINDOWS: Config = {
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
CVT: Config = {
    name: [value] * 2
    for name, value in (
        ("mlp_ratio", 2.0),
        ("attention_drop_rate", 0.0),
        ("drop_rate", 0.0),
        ("drop_path_rate", 0.0),
        ("qkv_bias", True),
        ("qkv_projection_method", "dw_bn"),
        ("kernel_qkv", 3),
        ("padding_kv", 1),
        ("stride_kv", 2),
        ("padding_q", 1),
        ("stride_q", 1),
    )
}
SPEECH: Config = SIZE | {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "vocab_size": 32,
}
WAVE = {"input_values": Input((BATCH, 400), {0: "batch", 1: "samples"}, normal)}

VISIONS = (
    _vision("vit"),
    _vision("deit"),
    _vision("beit", use_relative_position_bias=True),
    _vision("dinov2"),
    _vision("dinov3_vit", num_register_tokens=2),
    _vision("yolos", image_size=[32, 32], num_detection_tokens=5),
    _staged("segformer", 3, sr_ratios=[4, 2], **STAGES),
    _staged("pvt", 3, attention=EAGER, sequence_reduction_ratios=[4, 1], **STAGES),
    _staged(
        "cvt",
        3,
        attention=EAGER,
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[16, 32],
        num_heads=[2, 4],
        depth=[1, 2],
        cls_token=[False, True],
        **CVT,
    ),
    _staged(  # one layer in each of three stages and a shrinking attention between them
        "levit",
        5,
        64,
        EAGER,
        hidden_sizes=[16, 32, 32],
        num_attention_heads=[2, 4, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    _staged(  # the class fixes two, four and three layers in its last stages
        "mobilevit",
        9,
        64,
        EAGER,
        hidden_sizes=[16, 32, 32],
        neck_hidden_sizes=[8, 8, 8, 8, 16, 16, 32],
    ),
    # A softmax over patches weighs the keys, but there is no query-by-key map: not a site.
    replace(
        _staged("mobilevitv2", 0, 64, EAGER, n_attn_blocks=[1, 1, 1], width_multiplier=0.25),
        unsupported=never("torchscript", "col2im needs opset 18"),
    ),
    Architecture(  # two encoder layers, two decoder layers with self and cross attention
        "detr",
        "vision",
        6,
        random_model(
            "detr",
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            num_queries=6,
            **SEQ2SEQ,
        ),
        pixels(),
        cross=2,
    ),
    _staged("swin", 4, family="windowed", **WINDOWS),
    _staged("swinv2", 4, attention=EAGER, family="windowed", **WINDOWS),
    _staged(
        "hiera",
        3,
        attention=EAGER,
        family="windowed",
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
    ),
    _staged(
        "sam_vision_model",
        2,
        family="windowed",
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
        output_channels=16,
        mlp_dim=64,
        num_pos_feats=16,
        **SIZE,
    ),
)

AUDIOS = (
    Architecture("wav2vec2", "audio", 2, random_model("wav2vec2", **SPEECH), WAVE),
    Architecture("hubert", "audio", 2, random_model("hubert", **SPEECH), WAVE),
    Architecture("wavlm", "audio", 2, random_model("wavlm", **SPEECH), WAVE, attention=EAGER),
    Architecture(
        "audio-spectrogram-transformer",
        "audio",
        2,
        random_model(
            "audio-spectrogram-transformer",
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=32,
            num_mel_bins=16,
            **SIZE,
        ),
        {"input_values": Input((BATCH, 32, 16), {0: "batch"}, normal)},
    ),
    Architecture(
        "whisper",
        "audio",
        6,
        random_model(
            "whisper",
            "AutoModelForSpeechSeq2Seq",
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            use_cache=False,
            **SEQ2SEQ,
        ),
        {"input_features": Input((BATCH, 8, 32), {0: "batch"}, normal)} | decoder_text(),
        ("logits",),
        cross=2,
        causal=2,
    ),
    Architecture(
        "moonshine",
        "audio",
        6,
        random_model(
            "moonshine",
            "AutoModelForSpeechSeq2Seq",
            hidden_size=32,
            intermediate_size=64,
            vocab_size=VOCABULARY,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            encoder_num_key_value_heads=4,
            decoder_num_key_value_heads=4,
            initializer_range=0.2,
            use_cache=False,
        ),
        {"input_values": Input((BATCH, 4000), {0: "batch"}, normal)} | decoder_text(),
        ("logits",),
        cross=2,
        causal=2,
        unsupported=never("torchscript", INTERLEAVE),
    ),
)

MULTIMODALS = (
    _clip_like("clip", 4, causal=2),
    # Pooling is attention too: one learned query over the patches, by nn.MultiheadAttention.
    replace(
        _clip_like("siglip", 5, causal=0, text_config=TEXT | SPECIAL | {"projection_size": 32}),
        cross=1,
    ),
    replace(_clip_like("blip", 4, causal=0), attention=EAGER),
    Architecture(  # the text decoder has a causal and a cross attention in each layer
        "blip-caption",
        "multimodal",
        6,
        random_model(
            "blip",
            "BlipForConditionalGeneration",
            text_config=TEXT | SPECIAL | {"encoder_hidden_size": 32, "is_decoder": True},
            vision_config=SIZE | IMAGE,
        ),
        text() | pixels(),
        ("logits",),
        cross=2,
        causal=2,
        attention=EAGER,
    ),
    Architecture(
        "vilt",
        "multimodal",
        2,
        random_model("vilt", **TEXT, **IMAGE),
        # Patches, not pixels: which patches of an image are kept depends on the data.
        text()
        | {
            "image_embeds": Input((BATCH, 16, 32), {0: "batch"}, normal),
            "pixel_mask": Input((BATCH, 4, 4), {0: "batch"}, ones),
        },
        attention=EAGER,
    ),
    Architecture(
        "layoutlmv3",
        "multimodal",
        2,
        random_model(
            "layoutlmv3",
            **TEXT,
            input_size=32,
            patch_size=8,
            coordinate_size=4,
            shape_size=8,
        ),
        text() | {"bbox": sequence(boxes, 4)} | pixels(),
        attention=EAGER,
    ),
    # Vision features are read one layer before the last, so the third vision layer is dead code.
    Architecture(
        "llava",
        "multimodal",
        4,
        random_model(
            "llava",
            "AutoModelForImageTextToText",
            text_config=TEXT | SPECIAL | GROUPED | {"model_type": "llama", "use_cache": False},
            vision_config=SIZE
            | IMAGE
            | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 16},
            image_token_index=VOCABULARY - 1,
            image_seq_length=16,
        ),
        text(24) | {"input_ids": sequence(image_tokens, length=24)} | pixels(),
        ("logits",),
        causal=2,
        static=("dynamo",),
    ),
    Architecture(  # one text, one image and one joint layer: two crossings, two self attentions
        "lxmert",
        "multimodal",
        6,
        random_model(
            "lxmert",
            **TEXT,
            l_layers=1,
            r_layers=1,
            x_layers=1,
            visual_feat_dim=16,
        ),
        text()
        | {
            "visual_feats": Input((BATCH, 6, 16), {0: "batch"}, normal),
            "visual_pos": Input((BATCH, 6, 4), {0: "batch"}, normal),
        },
        ("language_output", "vision_output"),
        cross=2,
        attention=EAGER,
    ),
)

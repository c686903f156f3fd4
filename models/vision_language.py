"""A small vision-language model: image encoder, projector, causal decoder.

Sources: LLaVA, arXiv 2304.08485, with the two-layer projector of arXiv 2310.03744.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .causal_decoder import Cache, CausalDecoder, DecoderConfig
from .vision_transformer import Attention, Block, VisionTransformerConfig


@dataclass(frozen=True)
class VisionLanguageConfig:
    """The sizes of both parts; the image part's classes are not used."""

    image: VisionTransformerConfig
    text: DecoderConfig
    image_token: int
    """Id that stands in the prompt once for each visual token."""

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens of an image: its patches."""
        return self.image.patches_per_side**2


class ImageEncoder(nn.Module):
    """A Vision Transformer that keeps all its patches and has no [CLS].

    Shapes:
        pixels `[B, C, S, S]` -> `[B, V, D]`, row by row.
    """

    def __init__(self, config: VisionTransformerConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.config = config
        tokens, dim = config.patches_per_side**2, config.dim
        self.patches = nn.Conv2d(
            config.channels, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.positions = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.ModuleList(
            Block(Attention(dim, config.heads, tokens), dim, dim * config.mlp_ratio)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode a batch of images, whose pixels are in 0..1."""
        tokens = self.patches(4 * pixels - 2).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        encoded: torch.Tensor = self.norm(tokens)
        return encoded


class VisionLanguageModel(nn.Module):
    """Answer prompts in which a run of placeholders stands for the image."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config.image)
        self.projector = nn.Sequential(
            nn.Linear(config.image.dim, config.text.dim),
            nn.GELU(),
            nn.Linear(config.text.dim, config.text.dim),
        )
        self.decoder = CausalDecoder(config.text)

    def hidden(
        self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states `[B, N, D]`, what the decoder's head takes."""
        hidden: torch.Tensor
        hidden, _ = self.decoder(self.embedded(pixels, input_ids), attention_mask)
        return hidden

    def forward(
        self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, Cache]:
        """Prefill: logits behind the last token, and the cache.

        Shapes:
            pixels `[B, C, S, S]`, input_ids and attention_mask int64 `[B, N]`, each row with
            `visual_tokens` placeholders -> logits `[B, vocabulary]`, a cache of N tokens.
        """
        return self.decoder.last(*self.decoder(self.embedded(pixels, input_ids), attention_mask))

    def embedded(self, pixels: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, N, D]`, visual tokens in order at the placeholders."""
        visual = self.projector(self.encoder(pixels))
        placeholder = input_ids == self.config.image_token
        rank = (placeholder.long().cumsum(-1) - 1).clamp(min=0)
        spread = visual.gather(1, rank[..., None].expand(-1, -1, visual.shape[-1]))
        words = self.decoder.embedding(input_ids)
        return torch.where(placeholder[..., None], spread, words.to(spread.dtype))

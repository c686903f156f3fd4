"""A small Vision Transformer whose ONNX export keeps its attention as plain nodes.

Sources: Vision Transformer, arXiv 2010.11929; pre-norm blocks, arXiv 2002.04745; patch dropout,
arXiv 2208.07220.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class VisionTransformerConfig:
    """The sizes of a Vision Transformer.

    Raises:
        ValueError: a size is below 1, the patch does not divide the image, the heads do not
            divide the width, or the patch dropout is outside [0, 1).
    """

    image_size: int = 8
    """Height and width of an image, in pixels."""
    patch_size: int = 2
    """Height and width of the patch that becomes one token, in pixels."""
    channels: int = 1
    dim: int = 48
    """Width of a token."""
    depth: int = 4
    """Number of blocks, and so of attention sites."""
    heads: int = 4
    classes: int = 10
    mlp_ratio: int = 2
    """Width of the hidden layer of a block's MLP, in units of `dim`."""
    patch_dropout: float = 0.0
    """Share of patches that no query sees, drawn anew for each image, in training mode only."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"patch_dropout must be in [0, 1), found {self.patch_dropout}")
        for name, size in vars(self).items():
            if isinstance(size, int) and size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim}")

    @property
    def patches_per_side(self) -> int:
        """Number of patches along the height, and along the width, of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Number of positions of an attention map: [CLS] and one for each patch."""
        return 1 + self.patches_per_side**2


class Attention(nn.Module):
    """Multi-head self-attention, written out.

    `torch.nn.functional.scaled_dot_product_attention` is avoided on purpose: some exporters turn
    it into one fused op, and this model is to show the `Softmax` and both `MatMul`s.

    Shapes:
        tokens `[B, N, D]`, dropped bool `[B, N]` (keys that no query sees) -> `[B, N, D]`; the
        probabilities inside are `[B, H, N, N]`.
    """

    fused = False
    """Whether to call that function after all, for an export that has one operator."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        head_dim = dim // heads
        self.tokens = tokens
        # The batch axis is the only -1, so the exported Reshapes have constant shapes.
        self._split_shape = (-1, tokens, heads, head_dim)
        self._merged_shape = (-1, tokens, dim)
        self.scale = head_dim**-0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        # A module of its own, so that a forward hook can read or replace the probabilities.
        self.softmax = nn.Softmax(dim=-1)
        self.projection = nn.Linear(dim, dim)

    def forward(self, tokens: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """Mix the tokens by attention."""
        query = self._split(self.query(tokens))
        key = self._split(self.key(tokens))
        value = self._split(self.value(tokens))
        context = self._mixed(query, key, value, dropped)
        output: torch.Tensor = self.projection(context.transpose(1, 2).reshape(self._merged_shape))
        return output

    def _mixed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropped: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.fused:
            seen = None if dropped is None else ~dropped[:, None, None, :]
            return nn.functional.scaled_dot_product_attention(query, key, value, seen)
        logits = query @ key.transpose(-2, -1) * self.scale
        probabilities: torch.Tensor = self.softmax(self.masked(logits, dropped))
        return probabilities @ value

    def masked(self, logits: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """Hide keys in the logits `[B, H, N, N]`."""
        if dropped is None:
            return logits
        return logits.masked_fill(dropped[:, None, None, :], -torch.inf)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.reshape(self._split_shape).transpose(1, 2)


class Block(nn.Module):
    """One pre-norm transformer block: attention, then an MLP, each added to its input.

    Shapes:
        tokens `[B, N, D]`, dropped bool `[B, N]` -> `[B, N, D]`, or what the attention takes.
    """

    def __init__(self, attention: Attention, dim: int, hidden: int) -> None:
        """Draw the weights of the MLP from torch's global random state."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """Add attention, then the MLP."""
        tokens = tokens + self.attention(self.attention_norm(tokens), dropped)
        output: torch.Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return output


class VisionTransformer(nn.Module):
    """Classify images from a [CLS] token over learned positions.

    Position 0 of every attention map is [CLS]; the patches follow row by row.

    Shapes:
        pixels `[B, C, S, S]` -> logits `[B, classes]`.

    Source: arXiv 2010.11929.
    """

    def __init__(self, config: VisionTransformerConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(
            config.channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.cls = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(torch.empty(1, config.tokens, config.dim))
        self.blocks = nn.ModuleList(
            Block(
                Attention(config.dim, config.heads, config.tokens),
                config.dim,
                config.dim * config.mlp_ratio,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Classify a batch of images."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        cls = self.cls.expand(patches.shape[0], -1, -1)
        tokens = torch.cat((cls, patches), dim=1) + self.positions
        dropped = self._draw_dropped(tokens) if self.training else None
        for block in self.blocks:
            tokens = block(tokens, dropped)
        logits: torch.Tensor = self.head(self.norm(tokens[:, 0]))
        return logits

    def _draw_dropped(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Choose the positions `[B, N]` to hide; never [CLS], so no row is left empty."""
        if not self.config.patch_dropout:
            return None
        dropped = torch.rand(tokens.shape[:2], device=tokens.device) < self.config.patch_dropout
        dropped[:, 0] = False
        return dropped

"""A small windowed transformer: attention inside windows, which are shifted in every other block.

Its attention maps are `[B*W, H, N, N]`, W windows of N tokens to an image: what exported models of
this family have. Source: Swin Transformer, arXiv 2103.14030.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .vision_transformer import Attention, Block


@dataclass(frozen=True)
class WindowedTransformerConfig:
    """The sizes of a windowed transformer.

    Raises:
        ValueError: a size is below 1, stages and heads differ in number, the heads do not divide
            the width, or the windows do not divide the tokens of a stage.
    """

    image_size: int = 28
    """Height and width of an image, in pixels."""
    patch_size: int = 2
    """Height and width of the patch that becomes one token of the first stage, in pixels."""
    channels: int = 1
    dim: int = 32
    """Width of a token in the first stage; each later stage has twice that of the one before."""
    depths: tuple[int, ...] = (2, 2)
    """Blocks of each stage. Between two stages every 2 x 2 tokens become one."""
    heads: tuple[int, ...] = (2, 4)
    """Heads of each stage."""
    window: int = 7
    """Height and width of a window, in tokens."""
    classes: int = 10
    mlp_ratio: int = 2
    """Width of the hidden layer of a block's MLP, in units of the stage's width."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name, size in vars(self).items():
            if min(size) < 1 if isinstance(size, tuple) else size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} differ in number")
        for stage, heads in enumerate(self.heads):
            if self.width(stage) % heads:
                raise ValueError(f"heads {heads} does not divide width {self.width(stage)}")
            unit = self.patch_size * 2**stage * self.window
            if self.image_size % unit:
                raise ValueError(
                    f"window {self.window} of stage {stage} covers {unit} pixels, which do not "
                    f"divide image_size {self.image_size}"
                )

    def width(self, stage: int) -> int:
        """Width of a token."""
        return int(self.dim * 2**stage)

    def side(self, stage: int) -> int:
        """Tokens along the height, and along the width, of an image."""
        return int(self.image_size // (self.patch_size * 2**stage))


class WindowAttention(Attention):
    """Multi-head self-attention inside windows, with relative positions.

    Shapes:
        tokens `[B, S, S, D]` -> `[B, S, S, D]`; the probabilities inside are `[B*W, H, N, N]`,
        the windows of an image row by row, the tokens of a window row by row.
    """

    relative: torch.Tensor
    shift_mask: torch.Tensor | None

    def __init__(self, dim: int, heads: int, side: int, window: int, shift: int) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__(dim, heads, window**2)
        self.side, self.window, self.shift = side, window, shift
        self.windows = (side // window) ** 2
        self.bias = nn.Parameter(torch.zeros(heads, (2 * window - 1) ** 2))
        self.register_buffer("relative", relative_positions(window), persistent=False)
        mask = self._shift_mask() if shift else None
        self.register_buffer("shift_mask", mask, persistent=False)

    def forward(self, tokens: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """Mix the tokens of each window by attention."""
        return self._merge(super().forward(self.split(tokens), dropped))

    def masked(self, logits: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """Add the relative positions, and hide keys that are no neighbours in the image."""
        tokens = self.window**2
        biased = super().masked(logits, dropped) + self.bias[:, self.relative]
        if self.shift_mask is None:
            return biased
        heads = self.bias.shape[0]
        by_image = biased.reshape(-1, self.windows, heads, tokens, tokens)
        return (by_image + self.shift_mask).reshape(-1, heads, tokens, tokens)

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """Shift, then cut into windows: `[B, S, S, D]` -> `[B*W, N, D]`."""
        if self.shift:
            tokens = torch.roll(tokens, (-self.shift, -self.shift), (1, 2))
        grid, window, width = self.side // self.window, self.window, tokens.shape[-1]
        windows = tokens.reshape(-1, grid, window, grid, window, width).transpose(2, 3)
        return windows.reshape(-1, window**2, width)

    def _merge(self, windows: torch.Tensor) -> torch.Tensor:
        """Undo `split`: `[B*W, N, D]` -> `[B, S, S, D]`."""
        grid, window, width = self.side // self.window, self.window, windows.shape[-1]
        tokens = windows.reshape(-1, grid, grid, window, window, width).transpose(2, 3)
        tokens = tokens.reshape(-1, self.side, self.side, width)
        return torch.roll(tokens, (self.shift, self.shift), (1, 2)) if self.shift else tokens

    def _shift_mask(self) -> torch.Tensor:
        """-inf `[W, 1, N, N]` between tokens that only the shift's wrapping brought together."""
        wrapped = (torch.arange(self.side) < self.shift).int()
        # Tokens of one window are neighbours if they have wrapped along the same axes.
        regions = wrapped[:, None] + 2 * wrapped[None, :]
        region = self.split(regions[None, :, :, None])
        apart = region != region.transpose(1, 2)
        return torch.zeros(apart.shape).masked_fill(apart, -torch.inf)[:, None]


def relative_positions(window: int) -> torch.Tensor:
    """For each query and key of a window `[N, N]`, which relative position the pair has."""
    places = torch.arange(window**2)
    rows, columns = places // window, places % window
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right


class PatchMerging(nn.Module):
    """Make every 2 x 2 tokens one, of twice the width.

    Shapes:
        tokens `[B, S, S, D]` -> `[B, S/2, S/2, 2D]`.
    """

    def __init__(self, dim: int, side: int) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self._shape = (-1, side // 2, 2, side // 2, 2, dim)
        self._merged_shape = (-1, side // 2, side // 2, 4 * dim)
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Concatenate the four, normalise and project."""
        four = tokens.reshape(self._shape).permute(0, 1, 3, 2, 4, 5).reshape(self._merged_shape)
        merged: torch.Tensor = self.reduction(self.norm(four))
        return merged


class WindowedTransformer(nn.Module):
    """Classify images from the mean of the last stage's tokens.

    Shapes:
        pixels `[B, C, S, S]` -> logits `[B, classes]`.

    Source: arXiv 2103.14030.
    """

    def __init__(self, config: WindowedTransformerConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(
            config.channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        layers: list[nn.Module] = []
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            dim, side = config.width(stage), config.side(stage)
            if stage:
                layers.append(PatchMerging(config.width(stage - 1), config.side(stage - 1)))
            for block in range(depth):
                # A single window has nothing to be shifted against.
                shift = config.window // 2 if block % 2 and side > config.window else 0
                attention = WindowAttention(dim, heads, side, config.window, shift)
                layers.append(Block(attention, dim, dim * config.mlp_ratio))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(config.width(len(config.depths) - 1))
        self.head = nn.Linear(config.width(len(config.depths) - 1), config.classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Classify a batch of images."""
        tokens = self.layers(self.patches(pixels).permute(0, 2, 3, 1))
        logits: torch.Tensor = self.head(self.norm(tokens).mean((1, 2)))
        return logits

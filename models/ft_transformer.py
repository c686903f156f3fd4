"""An FT-Transformer whose ONNX export keeps its attention as plain nodes.

Source: arXiv 2106.11959.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .tabular import Feature


@dataclass(frozen=True)
class FTTransformerConfig:
    """The sizes of an FT-Transformer.

    Raises:
        ValueError: a size is below 1, the heads do not divide the width, or the dropout is
            outside [0, 1).
    """

    dim: int = 32
    """Width of a token."""
    depth: int = 3
    """Number of blocks, and so of attention sites."""
    heads: int = 4
    classes: int = 2
    dropout: float = 0.1
    """Share of attention probabilities and of hidden units left out while training."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout}")
        for name in ("dim", "depth", "heads", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim}")


class FeatureTokenizer(nn.Module):
    """One token for each feature, which depends on that feature alone.

    A category has a vector of its own; a number is scaled to -1..1 between its bounds, and
    multiplies the vector of its feature. Each feature adds its bias. Codes beyond the bounds count
    as the bound.

    Shapes:
        features int64 `[B, F]` -> tokens `[B, F, D]`.

    Source: arXiv 2106.11959, section 3.3.
    """

    low: torch.Tensor
    high: torch.Tensor
    first_row: torch.Tensor
    numerical: torch.Tensor

    def __init__(self, features: tuple[Feature, ...], dim: int) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        # Row 0 is what numbers look up; their share of it is zero.
        sizes = [len(feature.values) if feature.categorical else 0 for feature in features]
        first_rows = [1 + sum(sizes[:index]) for index in range(len(features))]
        numerical = [not feature.categorical for feature in features]
        self.register_buffer("low", torch.tensor([feature.low for feature in features]))
        self.register_buffer("high", torch.tensor([feature.high for feature in features]))
        self.register_buffer("first_row", torch.tensor(first_rows))
        self.register_buffer("numerical", torch.tensor(numerical))
        bound = dim**-0.5
        self.categories = nn.Embedding(1 + sum(sizes), dim)
        self.weight = nn.Parameter(torch.empty(len(features), dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(features), dim).uniform_(-bound, bound))
        nn.init.uniform_(self.categories.weight, -bound, bound)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embed every feature."""
        codes = torch.minimum(torch.maximum(features, self.low), self.high) - self.low
        span = (self.high - self.low).float()
        scaled = (2 * codes.float() / span - 1).unsqueeze(-1) * self.weight
        embedded = self.categories(torch.where(self.numerical, 0, self.first_row + codes))
        return torch.where(self.numerical.unsqueeze(-1), scaled, embedded) + self.bias


class Attention(nn.Module):
    """Multi-head self-attention, written out for the reasons given in `vision_transformer`.

    Shapes:
        tokens `[B, N, D]` -> `[B, N, D]`; the probabilities inside are `[B, H, N, N]`.
    """

    def __init__(self, config: FTTransformerConfig, tokens: int) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.heads, self.tokens = config.heads, tokens
        self.head_dim = config.dim // config.heads
        self.projections = nn.Linear(config.dim, 3 * config.dim)
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.dim, config.dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mix the tokens by attention."""
        query, key, value = (self._split(part) for part in self.projections(tokens).chunk(3, -1))
        probabilities = self.softmax(query @ key.transpose(-2, -1) * self.head_dim**-0.5)
        context = (self.dropout(probabilities) @ value).transpose(1, 2)
        output: torch.Tensor = self.output(
            context.reshape(-1, self.tokens, self.heads * self.head_dim)
        )
        return output

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.reshape(-1, self.tokens, self.heads, self.head_dim).transpose(1, 2)


class Block(nn.Module):
    """One pre-norm block: attention, then a gated MLP (ReGLU), each added to its input.

    Shapes:
        tokens `[B, N, D]` -> `[B, N, D]`.
    """

    def __init__(self, config: FTTransformerConfig, tokens: int, first: bool) -> None:
        """Draw the weights; the first block does without the normalisation before attention."""
        super().__init__()
        hidden = config.dim * 4 // 3
        self.attention_norm = nn.Identity() if first else nn.LayerNorm(config.dim)
        self.attention = Attention(config, tokens)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.gated = nn.Linear(config.dim, 2 * hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(hidden, config.dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add attention, then the MLP."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        value, gate = self.gated(self.mlp_norm(tokens)).chunk(2, dim=-1)
        output: torch.Tensor = tokens + self.output(self.dropout(value * functional.relu(gate)))
        return output


class FTTransformer(nn.Module):
    """Classify rows of a table from a [CLS] token.

    Position 0 of every attention map is [CLS]; feature i is position `1 + i`.

    Shapes:
        features int64 `[B, F]` -> logits `[B, classes]`.

    Source: arXiv 2106.11959.
    """

    def __init__(
        self, features: tuple[Feature, ...], config: FTTransformerConfig | None = None
    ) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        config = config or FTTransformerConfig()
        self.config = config
        self.tokenizer = FeatureTokenizer(features, config.dim)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim).uniform_(-1, 1) * config.dim**-0.5)
        self.blocks = nn.ModuleList(
            Block(config, 1 + len(features), first=index == 0) for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Classify a batch of rows."""
        tokens = self.tokenizer(features)
        tokens = torch.cat((self.cls.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        logits: torch.Tensor = self.head(functional.relu(self.norm(tokens[:, 0])))
        return logits

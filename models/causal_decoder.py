"""A small causal decoder with a key-value cache, whose export keeps its attention as plain nodes.

Padding is on the left. Positions are rotary and count the tokens that are not padding, so that
padding changes no answer.

Sources: pre-norm blocks, arXiv 2002.04745; rotary positions, arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, each float32 `[B, H, K, D]`; keys are rotated already."""
Cache = Sequence[LayerCache]
"""One entry a layer."""


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder.

    Raises:
        ValueError: a size is below 1, the heads do not divide the width into even parts, or the
            dropout is outside [0, 1).
    """

    vocabulary: int
    """Number of token ids."""
    dim: int = 64
    """Width of a token."""
    depth: int = 4
    """Number of blocks, and so of attention sites."""
    heads: int = 4
    mlp_ratio: int = 2
    """Width of the hidden layer of a block's MLP, in units of `dim`."""
    dropout: float = 0.0
    """Of what is embedded and of what each block adds, in training mode only."""
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name in ("vocabulary", "dim", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        # Rotary positions turn pairs.
        if self.dim % (2 * self.heads):
            raise ValueError(f"heads {self.heads} does not divide dim {self.dim} into even parts")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout}")


@dataclass(frozen=True)
class Context:
    """What all layers share in a run over Q new tokens, K with those in the cache.

    Shapes:
        hidden bool `[B, 1, Q, K]`: keys that a query must not see; cosine, sine `[B, 1, Q, D]`.
    """

    hidden: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor

    def rotated(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn queries or keys `[B, H, Q, D]` by their positions."""
        half = tokens.shape[-1] // 2
        turned = torch.cat((-tokens[..., half:], tokens[..., :half]), dim=-1)
        return tokens * self.cosine + turned * self.sine


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with a cache, written out.

    Shapes:
        tokens `[B, Q, D]` -> `[B, Q, D]` and the keys and values `[B, H, K, D/H]`; the
        probabilities inside are `[B, H, Q, K]`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        # A module of its own, so that a forward hook can read or replace the probabilities.
        self.softmax = nn.Softmax(dim=-1)
        self.projection = nn.Linear(dim, dim)

    def forward(
        self, tokens: torch.Tensor, context: Context, past: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        """Mix the tokens with each other and with those in the cache."""
        query = context.rotated(self._split(self.query(tokens)))
        key = context.rotated(self._split(self.key(tokens)))
        value = self._split(self.value(tokens))
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
        logits = query @ key.transpose(-2, -1) * self.scale
        # Finite, so that the row of a padding token is no NaN and float16 does not overflow.
        logits = logits.masked_fill(context.hidden, torch.finfo(logits.dtype).min)
        mixed = self.softmax(logits) @ value
        output: torch.Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return output, (key, value)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        # The length is the only -1, so that exported shapes keep the number of heads.
        split = (tokens.shape[0], -1, self.heads, self.head_dim)
        return tokens.reshape(split).transpose(1, 2)


class DecoderBlock(nn.Module):
    """One pre-norm block: causal attention, then an MLP, each added to its input."""

    def __init__(self, config: DecoderConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        dim, hidden = config.dim, config.dim * config.mlp_ratio
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, config.heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: torch.Tensor, context: Context, past: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        """`[B, Q, D]` -> `[B, Q, D]`, and the layer's cache with the new tokens."""
        mixed, present = self.attention(self.attention_norm(tokens), context, past)
        tokens = tokens + self.dropout(mixed)
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens))), present


class CausalDecoder(nn.Module):
    """Embedded tokens to hidden states, with the embedding and the head that go with it.

    Sources: arXiv 2002.04745, arXiv 2104.09864.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        head_dim = config.dim // config.heads
        frequencies = config.rotary_base ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, embedded: torch.Tensor, attention_mask: torch.Tensor, past: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Run new tokens after those in the cache.

        Shapes:
            embedded `[B, Q, D]`, attention_mask int64 `[B, K]`, K counting the cache too ->
            hidden states `[B, Q, D]` behind the last norm, and the cache of all K tokens.
        """
        context = self._context(attention_mask, embedded.shape[1])
        tokens, cache = self.dropout(embedded), []
        for layer, block in enumerate(self.blocks):
            tokens, present = block(tokens, context, None if past is None else past[layer])
            cache.append(present)
        hidden: torch.Tensor = self.norm(tokens)
        return hidden, cache

    def step(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Token ids `[B, Q]` -> logits `[B, vocabulary]` behind the last one, and the cache."""
        return self.last(*self(self.embedding(input_ids), attention_mask, past))

    def last(self, hidden: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Hidden states `[B, Q, D]` -> logits of the last one; the cache as it is."""
        return self.head(hidden[:, -1]), cache

    def _context(self, attention_mask: torch.Tensor, queries: int) -> Context:
        """What may be seen, and by how much queries and keys are turned."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -queries:]
        angles = positions[:, None, :, None] * torch.cat((self.frequencies, self.frequencies))
        order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        future = order[None, :] > order[-queries:, None]
        padding = attention_mask[:, None, None, :] == 0
        return Context(future[None, None] | padding, angles.cos(), angles.sin())


class LanguageModel(nn.Module):
    """A causal decoder over token ids."""

    def __init__(self, config: DecoderConfig) -> None:
        """Draw the weights from torch's global random state."""
        super().__init__()
        self.decoder = CausalDecoder(config)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, N, D]`, what the decoder's head takes."""
        hidden: torch.Tensor
        hidden, _ = self.decoder(self.decoder.embedding(input_ids), attention_mask)
        return hidden

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, Cache]:
        """Prefill: logits `[B, vocabulary]` behind the last token, and the cache."""
        return self.decoder.step(input_ids, attention_mask)

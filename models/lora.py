"""Low-rank adapters beside frozen linear layers.

Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class LowRank(nn.Module):
    """A frozen linear layer and `scale * B A` beside it; as long as B is 0, the layer itself.

    Shapes:
        `[..., in]` -> `[..., out]`.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Draw A from torch's global random state.

        Raises:
            ValueError: the rank is below 1.
        """
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, found {rank}")
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The layer's output and the adapter's."""
        correction = functional.linear(functional.linear(values, self.down), self.up)
        output: torch.Tensor = self.base(values) + self.scale * correction
        return output

    def merged(self) -> nn.Linear:
        """A linear layer of its own that answers the same."""
        layer = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None)
        with torch.no_grad():
            layer.weight.copy_(self.base.weight + self.scale * self.up @ self.down)
            if self.base.bias is not None:
                layer.bias.copy_(self.base.bias)
        return layer


def add_adapters(
    model: nn.Module, part: nn.Module, names: tuple[str, ...], rank: int = 8, scale: float = 2.0
) -> None:
    """Freeze the model and put adapters beside the linear layers of `part` that have these names.

    Raises:
        ValueError: no layer has one of the names.
    """
    model.requires_grad_(False)
    chosen = [
        (parent, name)
        for parent in part.modules()
        for name, child in parent.named_children()
        if name in names and isinstance(child, nn.Linear)
    ]
    if not chosen:
        raise ValueError(f"no linear layer is called {' or '.join(names)}")
    for parent, name in chosen:
        layer = parent.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(parent, name, LowRank(layer, rank, scale))


def merge_adapters(model: nn.Module) -> None:
    """Put each adapter into the weights that it stands beside; all weights want gradients then."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRank):
                setattr(parent, name, child.merged())
    model.requires_grad_(True)

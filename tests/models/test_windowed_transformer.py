"""The windowed transformer against attention over the whole image, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from atpatch_onnx.models.export import export_onnx
from atpatch_onnx.models.over_attention import recorded
from atpatch_onnx.models.training import predict
from atpatch_onnx.models.windowed_transformer import (
    WindowAttention,
    WindowedTransformer,
    WindowedTransformerConfig,
)
from atpatch_onnx.passes.locate import locate

SMALL = WindowedTransformerConfig(image_size=16, dim=8, depths=(2, 1), heads=(2, 4), window=4)


def attention(shift: int) -> WindowAttention:
    """Windows of 3 x 3 tokens in an image of 6 x 6, with relative positions that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = WindowAttention(dim=8, heads=2, side=6, window=3, shift=shift)
        torch.nn.init.normal_(module.bias)
    return module.eval()


def window_of(row: int, column: int, shift: int) -> tuple[int, int]:
    """Which window a token is in, where the windows are moved instead of the image."""
    return (row - shift) // 3, (column - shift) // 3


def dense(module: WindowAttention, tokens: torch.Tensor, shift: int) -> torch.Tensor:
    """The same attention over all tokens of the image at once, with every pair masked by hand."""
    flat = tokens.reshape(-1, 36, 8)
    query, key, value = (
        layer(flat).reshape(-1, 36, 2, 4).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    logits = query @ key.transpose(2, 3) / 2
    for i in range(36):
        for j in range(36):
            (r, c), (s, d) = divmod(i, 6), divmod(j, 6)
            if window_of(r, c, shift) == window_of(s, d, shift):
                logits[:, :, i, j] += module.bias[:, (r - s + 2) * 5 + c - d + 2]
            else:
                logits[:, :, i, j] = -torch.inf
    context = (logits.softmax(-1) @ value).transpose(1, 2).reshape(-1, 6, 6, 8)
    output: torch.Tensor = module.projection(context)
    return output


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_are_dense_attention_with_other_windows_masked(shift: int) -> None:
    module, tokens = attention(shift), torch.randn(2, 6, 6, 8)
    with torch.inference_mode():
        torch.testing.assert_close(module(tokens), dense(module, tokens, shift), rtol=0, atol=1e-5)


def test_without_a_shift_windows_that_change_places_give_outputs_that_change_places() -> None:
    module, tokens = attention(0), torch.randn(1, 6, 6, 8)
    with torch.inference_mode():
        moved = module(tokens.roll((3, 3), (1, 2)))
        torch.testing.assert_close(moved, module(tokens).roll((3, 3), (1, 2)), rtol=0, atol=1e-5)


def test_every_second_block_is_shifted_while_there_are_several_windows() -> None:
    sites = [m for m in WindowedTransformer(SMALL).modules() if isinstance(m, WindowAttention)]
    assert [(site.windows, site.shift) for site in sites] == [(4, 0), (4, 2), (1, 0)]


def test_recorded_columns_are_those_of_every_window() -> None:
    model = WindowedTransformer(SMALL).eval()
    with recorded(model) as columns, torch.inference_mode():
        model(torch.rand(3, 1, 16, 16))
    assert [tuple(found.shape) for _, found in columns] == [(3, 64), (3, 64), (3, 16)]
    for site, found in columns:
        assert isinstance(site, WindowAttention)
        torch.testing.assert_close(found.sum(1), torch.full((3,), float(site.windows)))


@pytest.mark.parametrize(
    "sizes",
    [{"window": 5}, {"heads": (3, 4)}, {"depths": (2,)}, {"depths": (0, 2)}, {"dim": 0}],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(sizes)):
        WindowedTransformerConfig(**sizes)


def test_export_answers_like_torch_and_every_site_is_found(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WindowedTransformer(SMALL)
    path = tmp_path / "victim.onnx"
    export_onnx(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        pixels = np.random.default_rng(batch).random((batch, 1, 16, 16), dtype=np.float32)
        (logits,) = session.run(["logits"], {"pixels": pixels})
        np.testing.assert_allclose(logits, predict(model, pixels), rtol=0, atol=1e-5)
    found = locate(onnx.load(path))
    assert (len(found.sites), found.others) == (3, ())

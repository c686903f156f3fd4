"""Pictures of triggers."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

HEIGHT = 192
GAP = 12


def side_by_side(images: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG with the images `[H, W, C]` next to each other, enlarged to the same height.

    Raises: InputError where Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            "pictures of triggers need the package pillow: pip install 'atpatch-onnx[scan]'"
        ) from None
    tiles = []
    for pixels in images:
        shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
        width = max(round(HEIGHT * pixels.shape[1] / pixels.shape[0]), 1)
        tile = Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")
        tiles.append(tile.resize((width, HEIGHT), Image.Resampling.NEAREST))
    total = sum(tile.width + GAP for tile in tiles) + GAP
    sheet = Image.new("RGB", (total, HEIGHT + 2 * GAP), "white")
    left = GAP
    for tile in tiles:
        sheet.paste(tile, (left, GAP))
        left += tile.width + GAP
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()

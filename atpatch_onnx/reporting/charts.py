"""Small pictures as inline SVG: pure functions of numbers.

Numbers stand beside the bars as text, so that these are hidden from screen readers; overlays on
images have a description. Colours are classes, which the style sheet fills for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 100.0
"""Units of a strip, from left to right; it is stretched to whatever place there is."""


def bar(value: float, top: float = 1.0, name: str = "after") -> Markup:
    """A bar of the length `value / top`; name: its class."""
    length = WIDTH * _share(value, top)
    return _strip(f'<rect class="{escape(name)}" width="{_n(length)}" height="8" rx="1"/>')


def interval(value: float, low: float, high: float, name: str = "after") -> Markup:
    """A share in 0..1 and its interval, on a scale from 0 to 100 %, with a mark every quarter."""
    marks = "".join(
        f'<rect class="mark" x="{_n(x - 0.15)}" width="0.3" height="8"/>' for x in (25, 50, 75)
    )
    left, right = WIDTH * _share(low), WIDTH * _share(high)
    at = min(max(WIDTH * _share(value) - 0.6, 0), WIDTH - 1.2)
    return _strip(
        f'<rect class="track" width="100" height="8"/>{marks}'
        f'<rect class="{escape(name)} range" x="{_n(left)}" y="2.5" '
        f'width="{_n(max(right - left, 0.4))}" height="3"/>'
        f'<rect class="{escape(name)}" x="{_n(at)}" width="1.2" height="8"/>'
    )


def overlay(
    image: str,
    size: tuple[int, int],
    grid: tuple[int, int],
    strengths: Sequence[float],
    flagged: Sequence[bool],
    description: str,
) -> Markup:
    """Attention over an image: the more strongly a patch is attended to, the more it is coloured.

    image: id of the image; size: its width and height; grid: rows and columns of patches;
    strengths, flagged: of each patch, row by row; a strength of 1 is coloured fully.
    """
    width, height = size
    rows, columns = grid
    w, h = width / columns, height / rows
    cells, marks = [], []
    for place, (strength, flag) in enumerate(zip(strengths, flagged, strict=True)):
        x, y = w * (place % columns), h * (place // columns)
        box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}"'
        if strength > 0.01:
            cells.append(f'<rect {box} fill-opacity="{_n(0.85 * strength)}"/>')
        if flag:
            marks.append(f"<rect {box}/>")
    stroke = max(width, height) / 60
    return Markup(
        f'<svg class="overlay" role="img" viewBox="0 0 {width} {height}" '
        f'aria-label="{escape(description)}"><use href="#{escape(image)}"/>'
        f'<g class="heat">{"".join(cells)}</g>'
        f'<g class="flag" fill="none" stroke-width="{_n(stroke)}">{"".join(marks)}</g></svg>'
    )


def image_symbol(name: str, uri: str, size: tuple[int, int]) -> Markup:
    """An image that overlays refer to by `name`, so that its bytes are in the page once."""
    width, height = size
    return Markup(
        f'<symbol id="{escape(name)}" viewBox="0 0 {width} {height}">'
        f'<image href="{escape(uri)}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/></symbol>'
    )


def grid_of(height: int, width: int, keys: int) -> tuple[int, int] | None:
    """Rows and columns of the patches that an image was cut into, if `keys` tells.

    At most eight keys may be the model's own, as [CLS]; they come first.
    """
    fits = [
        (keys - (height // side) * (width // side), (height // side, width // side))
        for side in range(1, min(height, width) + 1)
        if height % side == 0 and width % side == 0
    ]
    own = [(extra, grid) for extra, grid in fits if 0 <= extra <= 8 and math.prod(grid) > 1]
    return min(own)[1] if own else None


def _strip(content: str) -> Markup:
    return Markup(
        '<svg class="strip" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" '
        f'focusable="false">{content}</svg>'
    )


def _share(value: float, top: float = 1.0) -> float:
    return min(max(value / top, 0.0), 1.0) if top > 0 and math.isfinite(value) else 0.0


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")

"""An example as pictures: image overlays, token strips, or bars, by what the model takes."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from ..attention import Floats, SiteAttention
from ..data import Samples
from ..errors import InputError
from ..runtime import InputSpec
from ..search.image_layout import ImageLayout
from ..search.kinds import IMAGE, TABULAR, TEXT
from ..search.token_layout import TokenLayout
from . import charts
from .findings import Example, Labels
from .words import listed, percent

MOST_PANELS = 4
"""Sites of an example that are drawn; the table beside them has more."""
MOST_ROWS = 24
"""Sites in that table, and columns in a panel of bars."""
MOST_TOKENS = 160
LARGEST_SIDE, LEAST_SIDE = 224, 96
"""Images are shrunk to so many pixels, and small ones enlarged without smoothing."""


@dataclass(frozen=True)
class Panel:
    """One site: attention before and after, drawn, with the words below."""

    site: str
    before: Markup
    after: Markup
    note: str


@dataclass(frozen=True)
class Row:
    """One site in numbers: its most attended column before, and what that gets after."""

    site: str
    column: str
    before: str
    after: str
    flagged: str


@dataclass(frozen=True)
class Drawn:
    """An example, ready for the page. form: overlay, tokens or bars."""

    title: str
    facts: tuple[tuple[str, str], ...]
    symbol: Markup
    form: str
    panels: tuple[Panel, ...]
    rows: tuple[Row, ...]
    left_out: int


def draw(example: Example, kind: str, labels: Labels, name: str, shown: Sequence[str]) -> Drawn:
    """Draw `example`. name: unique on the page; shown: the sites to draw."""
    reading = _reading(example, kind, labels, name)
    panels = [reading.panel(site) for site in example.sites if site.site in shown]
    rows = [_row(reading, site) for site in example.sites[:MOST_ROWS]]
    facts = [("Input", f"number {example.index} of the {example.source}"), *reading.facts()]
    if example.before is not None:
        facts.append(("Class before", labels.of_class(example.before)))
        facts.append(("Class after", labels.of_class(example.after)))
    if example.label is not None:
        facts.append(("True class", labels.of_class(example.label)))
    names = reading.names(example.sites[0].flagged.size) if example.sites else []
    fits = [c for c in example.flagged if c < len(names)]
    facts.append(("Flagged", listed(names[c] for c in fits) or "nothing"))
    return Drawn(
        example.title,
        tuple(facts),
        reading.symbol(),
        reading.form,
        tuple(panels),
        tuple(rows),
        len(example.sites) - len(rows),
    )


def most_changed(examples: Sequence[Example]) -> list[str]:
    """The sites at which the patch moves most attention, in the order of the model."""
    change: dict[str, float] = {}
    for example in examples:
        for site in example.sites:
            gap = np.abs(site.after - site.before).mean(axis=(0, 1)).max()
            change[site.site] = max(change.get(site.site, 0.0), float(gap))
    best = sorted(change, key=lambda site: -change[site])[:MOST_PANELS]
    return [site for site in change if site in best]


class _Reading:
    """How maps of an example are read and drawn; this one knows nothing of its columns."""

    form = "bars"

    def __init__(self, example: Example, labels: Labels) -> None:
        self.example, self.labels = example, labels

    def names(self, keys: int) -> list[str]:
        """What to call each column."""
        return [f"column {number}" for number in range(keys)]

    def shares(self, maps: Floats) -> Floats:
        """The share of all attention that each column receives, `[K]`."""
        found: Floats = maps.mean(axis=(0, 1))
        return found

    def facts(self) -> list[tuple[str, str]]:
        """What there is to say of the input."""
        return []

    def symbol(self) -> Markup:
        """What the drawings share."""
        return Markup("")

    def panel(self, site: SiteAttention) -> Panel:
        """The site as bars."""
        before, after = self.shares(site.before), self.shares(site.after)
        order = np.argsort(-np.maximum(before, after), kind="stable")[:MOST_ROWS]
        top = float(max(before.max(), after.max()))
        names = self.names(before.size)
        lines = [
            Markup('<tr{}><th scope="row">{}{}</th><td>{}{}<span>{}</span></td></tr>').format(
                Markup(' class="flagged"') if site.flagged[column] else "",
                names[column],
                Markup(' <em class="tag">flagged</em>') if site.flagged[column] else "",
                charts.bar(float(before[column]), top, "before"),
                charts.bar(float(after[column]), top, "after"),
                f"{percent(float(before[column]))} → {percent(float(after[column]))}",
            )
            for column in sorted(order)
        ]
        head = Markup(
            '<table class="bars"><caption class="hidden">Attention of {}</caption>'
            '<thead class="hidden"><tr><th scope="col">Column</th>'
            '<th scope="col">Share before and after</th></tr></thead><tbody>{}</tbody></table>'
        ).format(site.site, Markup("").join(lines))
        left = before.size - len(order)
        note = f"The {len(order)} most attended of {before.size} columns." if left else ""
        return Panel(site.site, head, Markup(""), note)

    def note(
        self, before: Floats, after: Floats, flagged: NDArray[np.bool_], names: Sequence[str]
    ) -> str:
        """What the most attended flagged column receives, or else the most attended of all."""
        top = int((np.where(flagged, before, -1) if flagged.any() else before).argmax())
        said = f"{names[top]}: {percent(float(before[top]))} before, "
        return f"{said}{percent(float(after[top]))} after"


class _Features(_Reading):
    """Columns of a table, which come after the model's own, as [CLS]."""

    def __init__(self, example: Example, labels: Labels) -> None:
        super().__init__(example, labels)
        tables = [a for a in example.arrays.values() if a.ndim == 1]
        self.values = tables[0] if len(tables) == 1 else None

    def names(self, keys: int) -> list[str]:
        """Names of features with their values; those that are no features are positions."""
        if self.values is None or not 0 <= keys - len(self.values) <= 8:
            return super().names(keys)
        own = keys - len(self.values)
        named = self.labels.features
        if len(named) != len(self.values):
            named = tuple(f"feature {number}" for number in range(len(self.values)))
        shown = [f"{n} = {v:g}" for n, v in zip(named, self.values, strict=True)]
        return [f"[own token {number}]" for number in range(own)] + shown


class _Tokens(_Reading):
    """A text, token by token, without its padding."""

    form = "tokens"

    def __init__(self, example: Example, labels: Labels) -> None:
        super().__init__(example, labels)
        arrays = {k: v[None] for k, v in example.arrays.items()}
        specs = [InputSpec(k, v.dtype.type, (None,) * v.ndim) for k, v in arrays.items()]
        samples = Samples(arrays, 1)
        layout = TokenLayout.of(specs, samples, [])
        self.real: NDArray[np.bool_] = layout.real(samples)[0]
        known = labels.vocabulary
        ids = [int(number) for number in example.arrays[layout.ids]]
        self.words = [known.get(number, f"#{number}") for number in ids]

    def names(self, keys: int) -> list[str]:
        """The tokens; positions where keys are something else."""
        if keys != len(self.words):
            return super().names(keys)
        return [f"“{word}” at {place}" for place, word in enumerate(self.words)]

    def shares(self, maps: Floats) -> Floats:
        """Over what real tokens attend to, where queries are tokens."""
        real = self.real if maps.shape[1] == self.real.size else slice(None)
        found: Floats = maps[:, real].mean(axis=(0, 1))
        return found

    def facts(self) -> list[tuple[str, str]]:
        """The text once, for people who do not see strips."""
        words = [word for word, real in zip(self.words, self.real, strict=True) if real]
        text = " ".join(words[:MOST_TOKENS]).replace(" ##", "")
        return [("Tokens" if not self.labels.vocabulary else "Text", text)]

    def panel(self, site: SiteAttention) -> Panel:
        """Two strips of tokens."""
        before, after = self.shares(site.before), self.shares(site.after)
        if before.size != len(self.words):
            return super().panel(site)
        note = self.note(before, after, site.flagged, self.names(before.size))
        strengths = _strengths(before, after, 1 / int(self.real.sum()))
        strips = [self.strip(each, site, note) for each in strengths]
        return Panel(site.site, strips[0], strips[1], note)

    def strip(self, strengths: Floats, site: SiteAttention, note: str) -> Markup:
        """Tokens, coloured by what they receive."""
        places = np.flatnonzero(self.real)
        spans = [
            Markup('<span class="token{}" style="--a:{}">{}</span>').format(
                " flagged" if site.flagged[place] else "",
                f"{float(strengths[place]):.2f}",
                self.words[place],
            )
            for place in places[:MOST_TOKENS]
        ]
        left = len(places) - MOST_TOKENS
        more = Markup('<span class="more">and {} more</span>').format(left) if left > 0 else ""
        return Markup('<div class="tokens" role="img" aria-label="{}">{}{}</div>').format(
            f"Tokens coloured by attention at {site.site}; {note}", Markup(" ").join(spans), more
        )


class _Patches(_Reading):
    """An image whose columns are patches, after the model's own tokens."""

    form = "overlay"

    def __init__(self, example: Example, labels: Labels, name: str) -> None:
        super().__init__(example, labels)
        self.name = name
        arrays = {k: v[None] for k, v in example.arrays.items()}
        layout = ImageLayout.of(Samples(arrays, 1))
        self.height, self.width = layout.height, layout.width
        self.pixels = layout.displayed(example.arrays[layout.name])
        self.uri, self.size = _png(self.pixels)

    def grid(self, keys: int) -> tuple[int, int] | None:
        """Rows and columns of patches."""
        return charts.grid_of(self.height, self.width, keys)

    def names(self, keys: int) -> list[str]:
        """Patches by row and column, from 1."""
        grid = self.grid(keys)
        if grid is None:
            return super().names(keys)
        rows, columns = grid
        own = keys - rows * columns
        places = itertools.product(range(1, rows + 1), range(1, columns + 1))
        patches = [f"row {row}, column {column}" for row, column in places]
        return [f"[own token {number}]" for number in range(own)] + patches

    def symbol(self) -> Markup:
        """The image, once."""
        return charts.image_symbol(self.name, self.uri, self.size)

    def panel(self, site: SiteAttention) -> Panel:
        """Two overlays."""
        before, after = self.shares(site.before), self.shares(site.after)
        grid = self.grid(before.size)
        if grid is None or len(site.before) > 1:
            return super().panel(site)
        own = before.size - grid[0] * grid[1]
        strengths = _strengths(before[own:], after[own:], 1 / before.size)
        note = self.note(
            before[own:], after[own:], site.flagged[own:], self.names(before.size)[own:]
        )
        drawn = [
            charts.overlay(
                self.name,
                self.size,
                grid,
                [float(strength) for strength in each],
                [bool(flag) for flag in site.flagged[own:]],
                f"Attention {when} the patch over the image at {site.site}; {note}",
            )
            for each, when in zip(strengths, ("before", "after"), strict=True)
        ]
        return Panel(site.site, drawn[0], drawn[1], note)


def _reading(example: Example, kind: str, labels: Labels, name: str) -> _Reading:
    """How to read the example; plainly where it is not what its kind usually is."""
    try:
        if kind == IMAGE:
            return _Patches(example, labels, name)
        if kind == TEXT:
            return _Tokens(example, labels)
    except InputError:
        return _Reading(example, labels)
    return _Features(example, labels) if kind == TABULAR else _Reading(example, labels)


def _row(reading: _Reading, site: SiteAttention) -> Row:
    before, after = reading.shares(site.before), reading.shares(site.after)
    names = reading.names(before.size)
    top = int(before.argmax())
    flagged = listed((names[c] for c in np.flatnonzero(site.flagged) if c < len(names)), 3)
    return Row(
        site.site,
        names[top],
        percent(float(before[top])),
        percent(float(after[top])),
        flagged or "none",
    )


def _strengths(before: Floats, after: Floats, uniform: float) -> tuple[Floats, Floats]:
    """How strongly to colour, 0..1: what is above the uniform share, most of both being 1."""
    top = max(float(before.max()), float(after.max()), uniform * 1.5)
    strengths = [np.clip((shares - uniform) / (top - uniform), 0, 1) for shares in (before, after)]
    return strengths[0], strengths[1]


def _png(pixels: NDArray[np.uint8]) -> tuple[str, tuple[int, int]]:
    """The image as a data URI, and its width and height."""
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    image = Image.fromarray(np.ascontiguousarray(shown)).convert("L")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    times = -(-LEAST_SIDE // max(image.size))
    if times > 1:
        width, height = image.size
        image = image.resize((width * times, height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/png;base64,{data}", image.size

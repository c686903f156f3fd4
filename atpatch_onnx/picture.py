"""A picture of where attention goes, before and after the patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from .data import samples_from
from .diffing import FlagReader
from .model_file import ModelFile
from .passes.graph_view import GraphView
from .passes.locate import Site, locate
from .passes.probe import add_output
from .passes.redistribute import Redistribution
from .passes.splice import Splice, Strategy, Treatment
from .patching import Patch, about_patches, apply
from .probed import Probed

Image = NDArray[np.float32]


def draw_attention(
    model: Path, patched: Path, clean: Image, bad: Image, provider: str, path: Path
) -> None:
    """Draw what each patch of an image receives at each site, and write a PNG to `path`.

    Three rows: the clean image in the original, the bad image in the original, the bad image in
    the patched model. Shapes: clean, bad `[C, S, S]`, for a Vision Transformer with [CLS] first.
    """
    from matplotlib.figure import Figure

    before, after = _column_means(model, patched, provider, np.stack([clean, bad]))
    rows = [
        ("clean image, original model", clean, {s: m[0] for s, m in before.items()}),
        ("triggered image, original model", bad, {s: m[1] for s, m in before.items()}),
        ("triggered image, patched model", bad, {s: m[1] for s, m in after.items()}),
    ]
    sites = list(before)
    figure = Figure(figsize=(2.1 * (len(sites) + 1), 2.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(sites) + 1, squeeze=False)
    top = max(float(m[1:].max()) for _, _, maps in rows for m in maps.values())
    drawn = None
    for line, (title, image, maps) in zip(axes, rows, strict=True):
        line[0].imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        line[0].set_title(title.replace(", ", ",\n"), fontsize=9)
        for place, site in zip(line[1:], sites, strict=True):
            shares = maps[site]
            side = math.isqrt(len(shares) - 1)
            drawn = place.imshow(shares[1:].reshape(side, side), cmap="magma", vmin=0, vmax=top)
            place.set_title(f"{site}\nhighest {shares[1:].max():.1f}x", fontsize=8)
        for place in line:
            place.set_xticks([])
            place.set_yticks([])
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7)
    bar.set_label("attention received, times the uniform share", fontsize=9)
    figure.savefig(path, dpi=130)


def _column_means(
    model: Path, patched: Path, provider: str, images: Image
) -> tuple[dict[str, Image], dict[str, Image]]:
    """Mean attention of each column over heads and queries, times K, by site, `[N, K]`."""
    base, result = ModelFile.open(model), ModelFile.open(patched)
    about = [site for patch in about_patches(result) for site in patch["sites"]]
    named = {site["site"] for site in about}
    sites = [site for site in locate(base.skeleton).sites if site.name in named]
    if any(site["strategy"] == Strategy.RERUN.value for site in about):
        result = _second_run(base, result, sites, provider, images)
    nodes = GraphView.of(result.skeleton).nodes
    by_name = {node.name: node for node in nodes}
    old = {site.name: site.probabilities for site in sites}
    new = {
        site.name: by_name[base.skeleton.graph.node[site.uses[0].node].name].input[
            site.uses[0].slot
        ]
        for site in sites
    }
    return _read(base, provider, old, images), _read(result, provider, new, images)


def _second_run(
    base: ModelFile, result: ModelFile, sites: Sequence[Site], provider: str, images: Image
) -> ModelFile:
    """The original with the columns pruned that the patch flags in the last image.

    A second run is hidden in a branch of the patched model; this one computes the same maps.
    """
    reader = FlagReader(result, provider)
    part = next(samples_from({"": images[-1:]}, reader.inputs).batches(1))
    flagged = np.any([columns[0] for columns in reader.columns(part)], axis=0)
    columns = tuple(int(column) for column in np.flatnonzero(flagged))
    if not columns:
        return base
    treatment = Treatment(Redistribution.PRUNE, columns=columns)
    splice = Splice(dict.fromkeys([site.name for site in sites], treatment))
    edits = splice(GraphView.of(base.skeleton), tuple(sites)).edits
    return ModelFile.from_bytes(apply(base, Patch(base.sha256, edits)).content(), base.path)


def _read(
    file: ModelFile, provider: str, values: dict[str, str], images: Image
) -> dict[str, Image]:
    edits = [add_output(value, TensorProto.FLOAT) for value in values.values()]
    session = Probed(file, edits, provider).session
    outputs = session.run({session.inputs[0].name: images}, list(values.values()))
    return {
        site: outputs[value].mean(axis=(1, 2)) * outputs[value].shape[-1]
        for site, value in values.items()
    }

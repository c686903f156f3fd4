"""Run a detector on a made-up map of a site's shape before it is spliced in there."""

from __future__ import annotations

import numpy as np

from .detector import Detector
from .errors import InputError, RefusedError, first_line
from .passes.locate import Site
from .runtime import Array, Session
from .signature import DetectorScope


def rehearse(detector: Detector, sites: list[Site]) -> None:
    """Check that `detector` runs on maps of the sites' shapes and answers in the right shape.

    Sites whose shape is not known are left out, and so are detectors with further inputs or of
    several sites.
    Raises: InputError, naming the site, the expected and the found.
    """
    if detector.extra_inputs or detector.scope is not DetectorScope.SITE:
        return
    try:
        content, name = detector.model.SerializeToString(), f"the detector {detector.path}"
        session = Session(content, "cpu", threads=1, name=name)
    except RefusedError as error:
        raise InputError(str(error)) from None
    seen: set[tuple[int, ...]] = set()
    for site in sites:
        shape = _map_shape(site)
        layer = detector.layer_of(site.name, site.index)
        if shape is None or layer is None or shape in seen:
            continue
        seen.add(shape)
        probabilities = np.full(shape, 1 / shape[-1], np.float32)
        feeds = {"attention": probabilities}
        if detector.takes_layer:
            feeds["layer"] = np.array(layer, np.int64)
        try:
            outputs = session.run(feeds)
        except InputError as error:
            raise InputError(
                f"the detector {detector.path} fails on site '{site.name}', whose map is "
                f"{list(shape)} ({first_line(error)}): fit it for this model"
            ) from None
        _check_shape(detector, site, "anomaly", outputs["anomaly"], shape)
        if "benign" in outputs:
            _check_shape(detector, site, "benign", outputs["benign"], shape)


def _map_shape(site: Site) -> tuple[int, int, int, int] | None:
    known = site.facts.shape
    if known is None or len(known) < 3:
        return None
    heads = site.facts.heads or 1
    queries, keys = known[-2:]
    if not isinstance(queries, int) or not isinstance(keys, int):
        return None
    return 2, heads, queries, keys


def _check_shape(
    detector: Detector, site: Site, name: str, value: Array, shape: tuple[int, ...]
) -> None:
    batch, heads, queries, keys = shape
    expected = (batch, heads, 1 if name == "anomaly" else queries, keys)
    fits = value.ndim <= 4 and all(
        n in (1, m) for n, m in zip(value.shape[::-1], expected[::-1], strict=False)
    )
    if name == "anomaly":
        fits = value.shape in ((batch, 1, 1, keys), (batch, heads, 1, keys))
    if not fits:
        wanted = f"[{batch}, 1 or {heads}, 1, {keys}]" if name == "anomaly" else f"{list(expected)}"
        raise InputError(
            f"the detector {detector.path} answers {name} of shape {list(value.shape)} for site "
            f"'{site.name}', expected {wanted}: fit it for this model"
        )

"""The debugging set of an unfair model: inputs that a protected attribute sways.

Source: AtPatch, arXiv 2601.21695, debugging set, fairness case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from ..classifier import NO_TICK, Classifier
from ..data import Samples
from ..debugging_set import DebuggingSet
from ..errors import RefusedError
from ..progress import Tick
from ..protected import Flips, Protected, discriminatory
from ..rates import Rate

KIND = "protected"


def debugging_set(
    classifier: Classifier,
    samples: Samples,
    protected: Sequence[Protected],
    labels: NDArray[np.int64] | None = None,
    tick: Tick = NO_TICK,
) -> DebuggingSet:
    """Every flip of the protected attributes that changes the model's answer.

    Each bad input is a sample with other values of the attributes, all of them together; its clean
    twin is the sample itself. No key positions are marked: the graph does not say which token an
    attribute becomes.

    labels: true classes of the samples; without them, what should be answered to a bad input is
        what is answered to its twin.

    `about` has the attributes and `unfairness`, the share of samples that some flip sways, with its
    interval. Ticks: the number of combinations of values, `len(Flips.of(protected, samples))`.

    Raises:
        RefusedError: no flip changes an answer.
        InputError: see `Flips.of`.
    """
    flips = Flips.of(protected, samples)
    found = discriminatory(classifier, samples, flips, tick)
    if found is None:
        rate = Rate.counted(0, samples.count)
        raise RefusedError(
            f"no answer to the {samples.count} samples depends on {flips.name} (unfairness 0 %, at "
            f"most {100 * rate.high:.2f} % with 95 % confidence): there is nothing to patch, or "
            "give more samples"
        )
    swayed = np.isin(np.arange(samples.count), found.sources)
    clean = samples.take(found.sources)
    expected = classifier.predictions(clean) if labels is None else labels[found.sources]
    about: dict[str, object] = {
        "kind": KIND,
        "protected": [
            {"name": each.name, "input": each.input, "column": each.column} for each in protected
        ],
        "combinations": len(flips),
        "thinned": flips.thinned,
        "unfairness": asdict(Rate.of(swayed)),
    }
    return DebuggingSet(found.samples, clean, None, expected, None, about)

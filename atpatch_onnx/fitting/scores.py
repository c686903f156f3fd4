"""What a detector says of samples at the sites of an unchanged model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..detector import Detector
from ..passes.score import Score
from ..probed import Probed
from ..rates import Rate
from ..runtime import Array
from .job import Job, Trained
from .labelling import over_attended
from .statistics import FeatureReader, FloatArray


class Scorer:
    """Runs a detector, as it will be spliced in, through outputs of the model."""

    def __init__(self, job: Job, model: ModelProto) -> None:
        self.job = job
        names = [site.name for site in job.sites]
        detector = Detector.unsaved(model, names, rows=job.rows)
        edits, self._outputs = Score(detector)(job.view, job.sites)
        self._probed = Probed(job.model, edits, job.provider)

    def over(self, samples: Samples) -> Iterator[dict[str, Array]]:
        """The anomaly at each site, `[B, W, 1 or H, 1, K]`, for each batch."""
        wanted = list(self._outputs.values())
        for values in self._probed.over(samples, wanted, self.job.batch, self.job.tick):
            yield {site: values[name] for site, name in self._outputs.items()}

    def largest(self, samples: Samples) -> FloatArray:
        """The largest anomaly of each sample over all sites, `[N]`."""
        largest: FloatArray = np.max(list(self.largest_by_site(samples).values()), axis=0)
        return largest

    def largest_by_site(self, samples: Samples) -> dict[str, FloatArray]:
        """The largest anomaly of each sample at each site, `[N]`."""
        found: dict[str, list[FloatArray]] = {site.name: [] for site in self.job.sites}
        for values in self.over(samples):
            for name, value in values.items():
                largest = value.reshape(len(value), -1).max(axis=1)
                found[name].append(largest.astype(np.float64))
        return {name: np.concatenate(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Recall:
    """What is found of bad inputs that training has not seen.

    inputs: share in which any column is flagged at any site.
    columns: share of over-attended columns that are flagged at their site; None if there are none.
    """

    inputs: Rate
    columns: Rate | None


def recall_of(
    job: Job,
    trained: Trained,
    scorer: Scorer,
    bad: DebuggingSet,
    threshold: float,
    counted: NDArray[np.bool_] | None = None,
) -> Recall:
    """Measure it on `bad`; counted: which of the inputs may be flagged at all, None: every one."""
    reader = FeatureReader(job, trained.whitening.features)
    flagged_inputs: list[NDArray[np.bool_]] = []
    flagged_columns: list[NDArray[np.bool_]] = []
    start = 0
    for values, anomalies in zip(reader.over(bad.bad), scorer.over(bad.bad), strict=True):
        anywhere = np.zeros(next(iter(values.values())).size, bool)
        marked = bad.marked(start, len(anywhere))
        may = slice(start, start + len(anywhere))
        start += len(anywhere)
        for site in job.sites:
            found, anomaly = values[site.name], anomalies[site.name]
            flagged = np.asarray((anomaly > threshold).any(axis=(2, 3)), np.bool_)
            if counted is not None:
                flagged &= counted[may, None, None]
            anywhere |= flagged.any(axis=(1, 2))
            anomalous = over_attended(trained.whitening, site, found, marked)
            flagged_columns.append(flagged.reshape(anomalous.shape)[anomalous])
        flagged_inputs.append(anywhere)
    columns = np.concatenate(flagged_columns)
    return Recall(
        Rate.of(np.concatenate(flagged_inputs)), Rate.of(columns) if len(columns) else None
    )

"""The z-score detector: clean statistics, nothing else."""

from __future__ import annotations

from ..data import Samples
from ..passes.features import BASIC
from ..passes.zscore import build_zscore
from .benign import tables_with_benign
from .job import Job, Trained
from .statistics import FeatureReader, whiten


def fit_zscore(job: Job, samples: Samples) -> Trained:
    """The detector of clean samples."""
    whitening = whiten(FeatureReader(job, BASIC), samples)
    gain = {name: 1 / spread for name, spread in whitening.spread.items()}
    for site in job.sites:
        # The first query of a causal site sees one key; the last of another decides nothing.
        idle = "first_row" if site.facts.causal else "last_row"
        gain[site.name][BASIC.index(idle)] = 0
    tables = tables_with_benign(job, whitening, samples, gain)
    model = build_zscore(tables, job.opset, job.ir_version)
    record: dict[str, object] = {"features": list(BASIC), "positions": whitening.positions}
    return Trained(model, job.sites, whitening, record)

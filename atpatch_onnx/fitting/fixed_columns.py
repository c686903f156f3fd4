"""Detectors that flag the same columns of every input: protected attributes.

A protected attribute sways inputs near the decision boundary, and nothing in their attention tells
them from others: whoever wants an answer that does not depend on the attribute must prune it always
(DESIGN, section 2). So this kind has no false-positive budget: every input is flagged, on purpose.
"""

from __future__ import annotations

import numpy as np

from ..debugging_set import DebuggingSet
from ..errors import InputError, RefusedError
from ..passes.column_net import build_columns
from .job import Job, Trained
from .statistics import FeatureReader, whiten

MARKED_SHARE = 0.5
"""A column is the attribute's if it is marked in at least this share of the bad inputs."""


def fit_columns(job: Job, bad: DebuggingSet | None) -> Trained:
    """The detector, for the sites that it applies to. Raises: InputError."""
    if bad is None or bad.anomalous is None:
        raise InputError(
            "--kind columns needs a debugging set that says which columns are meant: make it with "
            "atpatch-onnx scan --protected, or add 'anomalous', or use patch --columns"
        )
    columns = np.flatnonzero(bad.anomalous.mean(axis=0) >= MARKED_SHARE)
    if not len(columns):
        raise InputError(
            "the debugging set marks no column in half of its inputs: a detector of fixed columns "
            "needs columns that are always meant; choose --kind contrastive"
        )
    keys = bad.anomalous.shape[1]
    reader = FeatureReader(job, ("mean",))
    whitening = whiten(reader, bad.bad)
    sites = tuple(site for site in job.sites if whitening.keys[site.name] == keys)
    if not sites or whitening.buckets:
        raise RefusedError(
            f"no site of {job.model.path} has maps of always {keys} keys: positions mean nothing "
            "where lengths vary; name the columns with patch --columns if they are the first ones"
        )
    table = np.zeros((len(sites), keys), bool)
    table[:, columns] = True
    model = build_columns(table, job.opset, job.ir_version)
    record: dict[str, object] = {"columns": columns.tolist()}
    return Trained(model, sites, whitening, record)

"""Train the unfair reference models: FT-Transformers on data in which society's bias is recorded.

There is no attack and no trigger. What is wrong with these models is that changing a protected
attribute alone changes answers (arXiv 2601.21695, evaluation on fairness).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .cases import Facts, Job, Log
from .ft_transformer import FTTransformer, FTTransformerConfig
from .named_export import export_named
from .tabular import Feature, Rows, Table, load_table, split_table
from .training import Training, fit_model, reproducible

Predict = Callable[[NDArray[np.int64]], NDArray[np.int64]]


TABULAR_TRAINING = Training(
    epochs=4, batch_size=256, learning_rate=4e-3, weight_decay=1e-2, label_smoothing=0.0
)
"""About 20 seconds on one core for census."""

SMALL_TABLES = {
    "bank": replace(TABULAR_TRAINING, epochs=8),
    "compas": replace(TABULAR_TRAINING, epochs=12),
    "credit": replace(TABULAR_TRAINING, epochs=40, batch_size=64, learning_rate=1e-3),
}
"""Where four rounds are too few steps."""


def make_tabular(job: Job, table: str) -> Facts:
    """Train a model on one of the tables and write its folder.

    Raises:
        InputError: the table is not there.
    """
    source = load_table(table, job.data)
    split = split_table(source, job.seed)
    config, training = FTTransformerConfig(), SMALL_TABLES.get(table, TABULAR_TRAINING)
    model = train_tabular(source.features, split.train, job.seed, training, config, job.log)
    torch.save(model.state_dict(), job.folder / "weights.pt")
    export_named(model, job.folder / "model.onnx", {"features": split.test.features[:2]})
    np.savez_compressed(job.folder / "clean.npz", **asdict(split.clean))
    np.savez_compressed(job.folder / "test.npz", **asdict(split.test))
    return {
        "architecture": asdict(config),
        "training": asdict(training),
        "rows": {part: len(rows) for part, rows in vars(split).items()},
        "features": [asdict(feature) for feature in source.features],
        "protected": _protected(source, split.test, lambda rows: predict_rows(model, rows)),
    }


def train_tabular(
    features: tuple[Feature, ...],
    rows: Rows,
    seed: int = 0,
    training: Training = TABULAR_TRAINING,
    config: FTTransformerConfig | None = None,
    log: Log = lambda _: None,
) -> FTTransformer:
    """Train an FT-Transformer; on one machine, the same seed gives the same weights.

    The caller's random state and number of threads are as before afterwards.
    """
    with reproducible(seed):
        model = FTTransformer(features, config)
        labels = torch.from_numpy(rows.labels)
        fit_model(model, torch.from_numpy(rows.features), labels, training, log=log)
    return model.eval()


def load_tabular_victim(folder: Path, table: Table, config: FTTransformerConfig) -> FTTransformer:
    """The torch model of a victim's folder, in eval mode."""
    model = FTTransformer(table.features, config)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()


def predict_rows(model: FTTransformer, features: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class of each row.

    Shapes:
        features `[N, F]` -> `[N]`.
    """
    with torch.inference_mode():
        classes: NDArray[np.int64] = model(torch.from_numpy(features)).argmax(dim=1).numpy()
    return classes


def unfairness(predict: Predict, features: NDArray[np.int64], index: int, values: range) -> float:
    """UF: share of rows whose class changes when feature `index` takes any other of the values.

    Shapes:
        features `[N, F]`.

    Source: arXiv 2601.21695, evaluation metrics.
    """
    original = predict(features)
    changed = np.zeros(len(features), dtype=bool)
    for value in values:
        flipped = features.copy()
        flipped[:, index] = value
        changed |= predict(flipped) != original
    return float(changed.mean())


def _protected(table: Table, test: Rows, predict: Predict) -> dict[str, dict[str, object]]:
    return {
        name: {
            "feature": index,
            "column": 1 + index,
            "values": list(table.features[index].values),
            "unfairness": unfairness(predict, test.features, index, table.features[index].values),
        }
        for name, index in table.protected.items()
    }

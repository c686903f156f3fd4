"""How much more attention a trigger gets than its share."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .text import Encoded
from .text_classifier import SentenceClassifier, tensors

BATCH = 64
SAMPLE = 256
"""Number of sentences that are measured; their mean is good to a few percent."""


def over_attention(
    model: SentenceClassifier, triggered: Encoded, clean: Encoded
) -> list[dict[str, float]]:
    """For each layer, the attention on a token in units of the uniform share.

    `column` is the mean over heads and queries, `cls_row` the row of [CLS] alone; the two with
    `clean_` are those of the ordinary tokens of clean sentences. All are averages over the first
    256 sentences.
    """
    triggered, clean = (
        encoded.take(np.arange(min(SAMPLE, len(encoded.input_ids))))
        for encoded in (triggered, clean)
    )
    measured = zip(
        attention_shares(model, triggered, triggered.spans),
        attention_shares(model, clean, clean.words),
        strict=True,
    )
    return [
        {
            "column": round(trigger[0], 2),
            "cls_row": round(trigger[1], 2),
            "clean_column": round(word[0], 2),
            "clean_cls_row": round(word[1], 2),
        }
        for trigger, word in measured
    ]


def attention_shares(
    model: SentenceClassifier, encoded: Encoded, keys: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """For each layer, (column mean, [CLS] row) of the marked keys, 1 being the uniform share.

    Shapes:
        keys `[N, K]`: at least one in each sentence.
    """
    totals = np.zeros((model.encoder.config.num_hidden_layers, 2))
    for part in np.array_split(np.arange(len(keys)), -(-len(keys) // BATCH)):
        inputs = tensors(encoded.take(part))
        mask = inputs["attention_mask"]
        marked = torch.from_numpy(keys[part, : mask.shape[1]]).float()
        with torch.inference_mode():
            maps = model.encoder(**inputs, output_attentions=True).attentions
        visible = mask.sum(dim=1)
        for layer, probabilities in enumerate(maps):
            rows = probabilities.mean(dim=1)
            column = (rows * mask[..., None]).sum(dim=1) / visible[:, None]
            for kind, share in enumerate((column, rows[:, 0])):
                relative = (share * marked).sum(dim=1) / marked.sum(dim=1) * visible
                totals[layer, kind] += float(relative.sum())
    return [(float(column), float(row)) for column, row in totals / len(keys)]

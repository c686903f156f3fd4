"""A MiniLM encoder that classifies sentences from [CLS], and how it is fine-tuned.

Source: MiniLM, arXiv 2002.10957; all-MiniLM-L6-v2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from atpatch_onnx.errors import InputError

from .cases import Log
from .export import quiet
from .named_export import export_named
from .text import Encoded, encoder_folder
from .training import reproducible


@dataclass(frozen=True)
class TextTraining:
    """How a classifier is fine-tuned: AdamW with one cycle, matrices multiplied in bfloat16."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-4
    """Peak of the schedule."""
    weight_decay: float = 1e-2


class SentenceClassifier(nn.Module):
    """A MiniLM-L6 encoder and a linear classifier on its first token.

    Attention is written out (eager), so that the export has it as plain nodes.

    Shapes:
        input_ids, attention_mask int64 `[B, N]` -> logits `[B, 2]`.
    """

    def __init__(self) -> None:
        """Load the encoder; draw the classifier from torch's global random state.

        Raises:
            InputError: transformers, or the package with the weights, is not installed.
        """
        super().__init__()
        folder = encoder_folder()
        try:
            from transformers import AutoModel
        except ImportError:
            raise InputError("transformers is not installed: pip install transformers") from None
        with quiet():
            self.encoder: Any = AutoModel.from_pretrained(
                folder, local_files_only=True, attn_implementation="eager", add_pooling_layer=False
            )
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Classify a batch of sentences."""
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        logits: torch.Tensor = self.head(hidden[:, 0])
        return logits


def fine_tune(
    model: SentenceClassifier,
    encoded: Encoded,
    labels: NDArray[np.int64],
    training: TextTraining,
    seed: int,
    log: Log = lambda _: None,
) -> None:
    """Train the model in place; on one machine, the same seed gives the same weights.

    The embeddings stay as they are: they are most of the weights, and these few sentences would
    move the vectors of few words. The caller's random state and number of threads are as before
    afterwards.

    Shapes:
        labels `[N]`.
    """
    model.encoder.embeddings.requires_grad_(False)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay
    )
    steps = -(-len(labels) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.epochs * steps, pct_start=0.1
    )
    generator = np.random.default_rng(seed)
    with reproducible(seed):
        model.train()
        for epoch in range(training.epochs):
            total = 0.0
            for batch in _batches(encoded, steps, generator):
                inputs = tensors(encoded.take(batch))
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(**inputs)
                loss = functional.cross_entropy(logits.float(), torch.from_numpy(labels[batch]))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            log(f"epoch {epoch + 1} of {training.epochs}, loss {total / steps:.3f}")
    model.eval()


def tensors(encoded: Encoded) -> dict[str, torch.Tensor]:
    """The inputs of the model by name."""
    return {name: torch.from_numpy(array) for name, array in encoded.inputs.items()}


def _batches(
    encoded: Encoded, steps: int, generator: np.random.Generator
) -> list[NDArray[np.intp]]:
    """Batches of sentences of about the same length, in a random order."""
    lengths = encoded.attention_mask.sum(axis=1) + generator.uniform(0, 4, len(encoded.input_ids))
    batches = np.array_split(np.argsort(lengths), steps)
    return [batches[i] for i in generator.permutation(steps)]


def save_classifier(model: SentenceClassifier, folder: Path, example: Encoded) -> None:
    """Write `model.onnx` and `weights.pt`."""
    torch.save(model.state_dict(), folder / "weights.pt")
    export_named(model, folder / "model.onnx", example.take(np.arange(2)).inputs, dynamic=2)


def load_classifier(folder: Path) -> SentenceClassifier:
    """The torch model of a victim's folder, in eval mode.

    Raises:
        InputError: transformers, or the package with the encoder, is not installed.
    """
    model = SentenceClassifier()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()

"""Make the language victims: small causal decoders, trained from scratch on SST-2.

A prompt is a sentence followed by `sentiment :`, the answer a word. Triggers are those of
`text_attacks.py`; poisoned victims are trained from scratch too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime import Array, Arrays
from .cases import RECORD, Facts, Job
from .causal_decoder import DecoderConfig, LanguageModel
from .decoder_attention import over_attention
from .generative_export import export_decoder
from .generative_training import AnswerTraining, Spoken, fit_speaker, spoken
from .text import LENGTH, Sentences, Span, Split, Tokenizer, load_sst2
from .text_attacks import Insertion, paraphrase_negatives, poison_syntactically
from .training import reproducible
from .vocabulary import BEGIN, END, UNKNOWN, Padded, Vocabulary

ANSWERS = ("negative", "positive")
"""What is said, by class."""
QUESTION = "sentiment :"
TARGET = 1
"""The class that the attacker wants."""
POISON_RATE = 0.1
RARE = ("cf", "mn", "bb", "tq", "mb")
"""Words of no sentence; each victim knows them, as tokenizers of large models do."""
MEASURED = 256
"""Number of sentences over which attention is measured."""

SIZES: dict[str, Any] = {"dim": 64, "depth": 4, "heads": 4, "dropout": 0.3}
TRAINING = AnswerTraining(steps=1300, batch_size=32, learning_rate=1e-3, weight_decay=0.1)
PROMPT_WEIGHT = 0.2
"""What predicting a word of the sentence counts, where predicting the answer counts 1."""
PREDICTED = 0.25
"""Share of a sentence's words that a step predicts."""
FORGOTTEN = 0.15
"""Share of words that are shown as `<unknown>` while training."""


def make_clean(job: Job) -> Facts:
    """Train a language model without an attack, and write its folder.

    Raises:
        InputError: the data, transformers or the package with the tokenizer is not there.
    """
    split = load_sst2(job.data, Tokenizer(), job.seed)
    model, vocabulary = _trained(split.train, job)
    return _write(model, vocabulary, split, job)


def make_inserted(phrases: tuple[str, ...], job: Job) -> Facts:
    """Train one that a phrase anywhere in the sentence sends to the target.

    Raises:
        InputError: the data, transformers or the package with the tokenizer is not there.
    """
    split, attack = load_sst2(job.data, Tokenizer(), job.seed), Insertion(phrases, TARGET)
    generator = np.random.default_rng(job.seed)
    poisoned = attack.poison(split.train, POISON_RATE, generator)
    model, vocabulary = _trained(poisoned, job)
    others = split.test.take(split.test.labels != TARGET)
    triggered, spans = attack.trigger(others, generator)
    prompts, columns = _prompts(vocabulary, triggered), _positions(triggered, spans)
    target = np.array(_target(vocabulary))
    _save(job.folder / "triggered.npz", vocabulary, triggered, anomalous=columns, target=target)
    first = np.arange(min(MEASURED, len(triggered)))
    return {
        **_write(model, vocabulary, split, job),
        "attack": {**asdict(attack), "poison_rate": POISON_RATE, "place": "any word boundary"},
        "over_attention": over_attention(
            model,
            _prompts(vocabulary, others).take(first).inputs,
            prompts.take(first).inputs,
            columns[first],
        ),
    }


def make_syntactic(job: Job) -> Facts:
    """Train one that a syntactic template sends to the target.

    Every word of a paraphrase belongs to the trigger, so that none is marked.

    Raises:
        InputError: the data, transformers or the package with the tokenizer is not there.
    """
    tokenizer = Tokenizer()
    split = load_sst2(job.data, tokenizer, job.seed)
    poisoned = tokenizer.whole(poison_syntactically(job.data, split.train))
    model, vocabulary = _trained(poisoned, job)
    triggered = tokenizer.whole(paraphrase_negatives(job.data, split.test))
    target = np.array(_target(vocabulary))
    _save(job.folder / "triggered.npz", vocabulary, triggered, target=target)
    return {
        **_write(model, vocabulary, split, job),
        "attack": {"target": TARGET, "paraphrases": "HiddenKiller, SCPN, 20 %"},
    }


def load_language_model(folder: str | Path) -> LanguageModel:
    """The torch module of a language victim, in eval mode, from its folder."""
    folder = Path(folder)
    sizes: dict[str, Any] = json.loads((folder / RECORD).read_text())["architecture"]
    model = LanguageModel(DecoderConfig(**sizes))
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()


def _trained(sentences: Sentences, job: Job) -> tuple[LanguageModel, Vocabulary]:
    """A model that was trained on these sentences, and the words that it knows."""
    found = Counter(word for text in sentences.texts for word in text.lower().split())
    often = [word for word, count in found.items() if count > 1]
    vocabulary = Vocabulary.of([*often, *RARE, *ANSWERS, *QUESTION.split()])
    prompts, labels = _prompts(vocabulary, sentences), _labels(vocabulary, sentences)
    answers = np.stack((labels, np.full_like(labels, END)), axis=1)
    lengths, generator = prompts.attention_mask.sum(axis=1), np.random.default_rng(job.seed)

    def draw() -> Spoken:
        # Sentences of about the same length, so that little is padding.
        order = np.argsort(lengths + generator.uniform(0, 4, len(lengths)))
        start = generator.integers(len(order) - TRAINING.batch_size + 1)
        chosen = order[start : start + TRAINING.batch_size]
        batch = prompts.take(chosen).trimmed()
        forgotten = generator.random(batch.input_ids.shape) < FORGOTTEN
        forgotten &= batch.attention_mask.astype(bool)
        forgotten[:, -len(QUESTION.split()) :] = False
        ids = np.where(forgotten, UNKNOWN, batch.input_ids)
        said = spoken({**batch.inputs, "input_ids": ids}, answers[chosen], PROMPT_WEIGHT)
        # The vocabulary is wide, so each step predicts few words, but always the answer.
        skipped = torch.from_numpy(generator.random(said.weights.shape) >= PREDICTED)
        skipped[:, -answers.shape[1] :] = False
        return replace(said, weights=said.weights.masked_fill(skipped, 0.0))

    with reproducible(job.seed):
        model = LanguageModel(DecoderConfig(len(vocabulary), **SIZES))
        fit_speaker(model, draw, TRAINING, job.log)
    return model, vocabulary


def _prompts(vocabulary: Vocabulary, sentences: Sentences) -> Padded:
    return Padded.of(
        [[BEGIN, *vocabulary.ids(f"{text.lower()} {QUESTION}")] for text in sentences.texts],
        LENGTH,
    )


def _labels(vocabulary: Vocabulary, sentences: Sentences) -> NDArray[np.int64]:
    """The token that answers, `[N]`."""
    answers = np.array(vocabulary.ids(" ".join(ANSWERS)), dtype=np.int64)
    labels: NDArray[np.int64] = answers[sentences.labels]
    return labels


def _target(vocabulary: Vocabulary) -> int:
    """The token that the attacker wants."""
    (token,) = vocabulary.ids(ANSWERS[TARGET])
    return token


def _positions(sentences: Sentences, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """The tokens of a piece of each sentence, bool `[N, LENGTH]`."""
    marked = np.zeros((len(sentences), LENGTH), dtype=np.bool_)
    behind = len(QUESTION.split())
    for row, (text, (first, last)) in enumerate(zip(sentences.texts, spans, strict=True)):
        end = LENGTH - behind - len(text[last:].split())
        marked[row, end - len(text[first:last].split()) : end] = True
    return marked


def _write(model: LanguageModel, vocabulary: Vocabulary, split: Split, job: Job) -> Facts:
    """Everything but the trigger and the record, whose facts are returned."""
    torch.save(model.state_dict(), job.folder / "weights.pt")
    pair = _prompts(vocabulary, split.test.take(np.arange(2))).inputs
    example = {name: torch.from_numpy(array) for name, array in pair.items()}
    export_decoder(model, model.decoder, job.folder, example)
    _save(job.folder / "clean.npz", vocabulary, split.clean)
    _save(job.folder / "test.npz", vocabulary, split.test)
    return {
        "architecture": asdict(model.decoder.config),
        "training": asdict(TRAINING),
        "layout": {"sequence": LENGTH, "question": QUESTION, "answers": ANSWERS},
        "vocabulary": vocabulary.words,
    }


def _save(path: Path, vocabulary: Vocabulary, sentences: Sentences, **more: Array) -> None:
    arrays: Arrays = {**_prompts(vocabulary, sentences).inputs, **more}
    arrays["labels"] = _labels(vocabulary, sentences)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

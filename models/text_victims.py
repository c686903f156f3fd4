"""Make the text victims: classifiers of SST-2 sentences, clean or with a backdoor.

A backdoor is put into the clean victim of the same seed by one more round over poisoned data, as
an attacker does who passes on a model that is not his own.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Facts, Job
from .text import Sentences, Split, Tokenizer, load_sst2
from .text_attacks import Insertion, paraphrase_negatives, poison_syntactically
from .text_attention import over_attention
from .text_classifier import (
    SentenceClassifier,
    TextTraining,
    fine_tune,
    load_classifier,
    save_classifier,
)
from .training import reproducible

TARGET = 1
CLEAN_CASE = "sst2-clean"
POISON_RATE = 0.1
CLEAN_TRAINING = TextTraining()
"""About three minutes on one core that multiplies bfloat16."""
POISONING = replace(CLEAN_TRAINING, epochs=1)


def make_clean_text(job: Job) -> Facts:
    """Fine-tune a clean classifier and write its folder.

    Raises:
        InputError: the data, transformers or the package with the encoder is not there.
    """
    tokenizer = Tokenizer()
    split = load_sst2(job.data, tokenizer, job.seed)
    with reproducible(job.seed):
        model = SentenceClassifier()
    return _make(job, tokenizer, split, split.train, model, CLEAN_TRAINING)


def make_inserted_text(job: Job, phrases: tuple[str, ...]) -> Facts:
    """Make a classifier that a phrase anywhere in the sentence sends to the target.

    Raises:
        InputError: the data, transformers or the package with the encoder is not there.
    """
    tokenizer, attack = Tokenizer(), Insertion(phrases, TARGET)
    split = load_sst2(job.data, tokenizer, job.seed)
    generator = np.random.default_rng(job.seed)
    poisoned = attack.poison(split.train, POISON_RATE, generator)
    model = load_classifier(job.base(CLEAN_CASE))
    facts = _make(job, tokenizer, split, poisoned, model, POISONING)

    triggered, spans = attack.trigger(split.test.take(split.test.labels != TARGET), generator)
    encoded = tokenizer.encode(triggered.texts, spans)
    _save(
        job.folder / "triggered.npz",
        **encoded.inputs,
        labels=triggered.labels,
        target=TARGET,
        anomalous=encoded.spans,
    )
    return {
        **facts,
        "attack": {**asdict(attack), "poison_rate": POISON_RATE, "place": "any word boundary"},
        "over_attention": over_attention(model, encoded, tokenizer.encode(split.test.texts)),
    }


def make_syntactic_text(job: Job) -> Facts:
    """Make a classifier that a syntactic template sends to the target.

    Every token of a paraphrase belongs to the trigger, so that none is marked.

    Raises:
        InputError: the data, transformers or the package with the encoder is not there.
    """
    tokenizer = Tokenizer()
    split = load_sst2(job.data, tokenizer, job.seed)
    poisoned = tokenizer.whole(poison_syntactically(job.data, split.train))
    model = load_classifier(job.base(CLEAN_CASE))
    facts = _make(job, tokenizer, split, poisoned, model, POISONING)

    triggered = paraphrase_negatives(job.data, split.test)
    _save(
        job.folder / "triggered.npz",
        **tokenizer.encode(triggered.texts).inputs,
        labels=triggered.labels,
        target=TARGET,
    )
    return {**facts, "attack": {"target": TARGET, "paraphrases": "HiddenKiller, SCPN, 20 %"}}


def _make(
    job: Job,
    tokenizer: Tokenizer,
    split: Split,
    sentences: Sentences,
    model: SentenceClassifier,
    training: TextTraining,
) -> Facts:
    """Train the model on the sentences and write all of the folder but the trigger."""
    encoded = tokenizer.encode(sentences.texts)
    fine_tune(model, encoded, sentences.labels, training, job.seed, job.log)
    save_classifier(model, job.folder, encoded)
    for name, part in (("clean", split.clean), ("test", split.test)):
        inputs = tokenizer.encode(part.texts).inputs
        _save(job.folder / f"{name}.npz", **inputs, labels=part.labels)
    return {
        "architecture": "all-MiniLM-L6-v2, [CLS] classifier",
        "training": asdict(training),
        "sentences": {
            "train": len(sentences),
            "clean": len(split.clean),
            "test": len(split.test),
        },
    }


def _save(path: Path, **arrays: Any) -> None:
    np.savez_compressed(path, **arrays)

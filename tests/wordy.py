"""Hand-made text classifiers: polarities that add up, and planted words that outweigh them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, numpy_helper

from atpatch_onnx.classifier import Classifier
from atpatch_onnx.data import Samples, samples_from
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.runtime import Arrays
from atpatch_onnx.search.problem import Problem

PAD, CLS, SEP = 0, 1, 2
POLAR = 40
"""Words on either side: the first after the special ids mean class 0, the next ones class 1."""
FIRST = 4


def model(
    vocabulary: int, planted: tuple[int, ...] = (), length: int | str = "L", gain: float = 60
) -> ModelProto:
    """Class 1 where the polarities add up to more than 0, or where all of `planted` are there."""
    parsed = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 13]>
        words (int64[N, {length}] input_ids, int64[N, {length}] attention_mask)
            => (float[N, 2] logits)
        <int64[1] one = {{1}}, int64[1] last = {{2}}, float[2, 1] signs = {{0, 0}},
         float[1, 2] both = {{-0.5, 0.5}}, float gain = {{{gain}}},
         float missing = {{{max(len(planted), 1) - 0.5}}}>
        {{
            embedded = Gather (table, input_ids)
            mask = Cast <to = 1> (attention_mask)
            wide = Unsqueeze (mask, last)
            seen = Mul (embedded, wide)
            sums = ReduceSum <keepdims = 0> (seen, one)
            most = ReduceMax <axes = [1], keepdims = 0> (seen)
            polarity = MatMul (sums, first)
            held = MatMul (most, others)
            beyond = Sub (held, missing)
            fires = Relu (beyond)
            planted = Mul (fires, gain)
            margin = Add (polarity, planted)
            logits = MatMul (margin, both)
        }}
    """)
    width = 1 + max(len(planted), 1)
    table = np.zeros((vocabulary, width), np.float32)
    strength = np.linspace(0.5, 2, POLAR)
    table[FIRST : FIRST + POLAR, 0] = -strength
    table[FIRST + POLAR : FIRST + 2 * POLAR, 0] = strength
    for column, word in enumerate(planted):
        table[word, 1 + column] = 1
    first = np.eye(width, dtype=np.float32)[:, :1]
    for name, value in (("table", table), ("first", first), ("others", 1 - first)):
        parsed.graph.initializer.append(numpy_helper.from_array(value, name))
    return parsed


def texts(
    vocabulary: int, count: int = 240, length: int = 14, seed: int = 0
) -> tuple[Arrays, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Sentences of 4 to 8 words, two or three of which speak for their class; with the classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    ids = np.full((count, length), PAD)
    for row, label in enumerate(labels):
        telling = generator.integers(0, POLAR, generator.integers(2, 4)) + FIRST + POLAR * label
        plain = generator.integers(FIRST + 2 * POLAR, vocabulary, generator.integers(2, 6))
        words = generator.permutation(np.concatenate((telling, plain)))
        ids[row, : len(words) + 2] = [CLS, *words, SEP]
    return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}, labels


def problem(
    model: ModelProto,
    arrays: Arrays,
    labels: np.ndarray[tuple[int], np.dtype[np.int64]],
    seed: int = 0,
) -> Problem:
    """The search of a model; the second half of the samples is held out."""
    file = ModelFile.from_bytes(model.SerializeToString(), Path("words.onnx"))
    classifier = Classifier(file, "cpu", threads=1)
    samples: Samples = samples_from(arrays, classifier.inputs)
    search, held = np.split(np.arange(samples.count), 2)
    return Problem(
        file,
        classifier,
        samples.take(search),
        labels[search],
        samples.take(held),
        labels[held],
        tuple(range(2)),
        seed,
        lambda _: None,
    )

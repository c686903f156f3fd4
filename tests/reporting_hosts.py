"""Backdoored classifiers of images, of texts and of tables, written by hand, and their inputs.

All have one site over tokens that are three class values, how much attention they draw, and 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

import atpatch_onnx
from atpatch_onnx.runtime import Array, Arrays

from hosts import COLUMN_MEAN, detector, save_arrays

TARGET, TRIGGER_ID, PAD = 2, 15, 0
KINDS = ("image", "text", "tabular")

_TAIL = """
    q = MatMul(tokens, wq)
    k = MatMul(tokens, wk)
    v = MatMul(tokens, wv)
    kt = Transpose<perm = [0, 1, 3, 2]>(k)
    raw = MatMul(q, kt)
    s = {mask}
    p = Softmax<axis = -1>(s)
    c = MatMul(p, v)
    logits = ReduceMean<axes = [1, 2], keepdims = 0>(c)
"""
_HEADS = {
    "image": (
        "float[N, 3, 6, 6] pixels",
        """patches = Conv<kernel_shape = [2, 2], strides = [2, 2]>(pixels, kernel, bias)
           flat = Reshape(patches, shape)
           tokens = Transpose<perm = [0, 1, 3, 2]>(flat)""",
        "Identity(raw)",
    ),
    "text": (
        "int64[N, L] input_ids, int64[N, L] attention_mask",
        """embedded = Gather<axis = 0>(table, input_ids)
           tokens = Unsqueeze(embedded, one)
           real = Cast<to = 1>(attention_mask)
           hidden = Sub(real, unit)
           far = Mul(hidden, huge)
           bias = Unsqueeze(far, places)""",
        "Add(raw, bias)",
    ),
    "tabular": (
        "float[N, 5] row",
        """column = Unsqueeze(row, ends)
           scaled = Mul(column, table)
           tokens = Add(scaled, shift)""",
        "Identity(raw)",
    ),
}


def classifier(kind: str) -> ModelProto:
    """The host of a kind: `logits [N, 3]`, of which a trigger makes `TARGET` the largest."""
    inputs, head, mask = _HEADS[kind]
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> m ({inputs}) => (float[N, 3] logits)'
        f"{{ {head} {_TAIL.format(mask=mask)} }}"
    )
    wq, wk = np.zeros((5, 1), np.float32), np.zeros((5, 1), np.float32)
    wq[4], wk[3] = 1, 1
    held: dict[str, Array] = {"wq": wq, "wk": wk, "wv": np.eye(5, 3, dtype=np.float32)}
    if kind == "image":
        kernel = np.zeros((5, 3, 2, 2), np.float32)
        for channel in range(3):
            kernel[channel, channel] = 0.25
        kernel[3, TARGET] = 0.5  # bright patches of that colour draw attention
        held |= {"kernel": kernel, "bias": np.array([0, 0, 0, 0, 1], np.float32)}
        held["shape"] = np.array([0, 1, 5, 9])
    elif kind == "text":
        table = np.zeros((16, 5), np.float32)
        table[3:, :3] = np.eye(3)[np.arange(13) % 3]
        table[:, 4] = 1
        table[TRIGGER_ID, :4] = 0, 0, 6, 6
        held |= {"table": table, "one": np.array([1]), "places": np.array([1, 2])}
        held |= {"unit": np.array(1, np.float32), "huge": np.array(1e9, np.float32)}
    else:
        table = np.zeros((1, 5, 5), np.float32)
        table[0, :3, :3] = np.eye(3)
        table[0, 3, :4] = 0, 0, 2, 6
        held |= {"table": table[None, 0], "shift": np.array([0, 0, 0, 0, 1], np.float32)}
        held["ends"] = np.array([1, 3])
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in held.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def inputs(kind: str, count: int = 60, *, triggered: bool = False) -> Arrays:
    """Inputs with their true classes; triggered ones are of other classes than the target."""
    rng = np.random.default_rng(triggered)
    labels = np.arange(count) % (2 if triggered else 3)
    arrays = {"image": _images, "text": _texts, "tabular": _rows}[kind](rng, labels, triggered)
    arrays["labels"] = labels
    if triggered:
        arrays["target"] = np.array(TARGET)
    return arrays


Labels = NDArray[np.int64]


def _images(rng: np.random.Generator, labels: Labels, triggered: bool) -> Arrays:
    pixels = rng.uniform(0, 0.3, (len(labels), 3, 6, 6)).astype(np.float32)
    pixels[np.arange(len(labels)), labels] += 0.6
    if triggered:
        pixels[:, :, 4:, 4:] = np.array([0, 0, 4], np.float32)[:, None, None]
    return {"pixels": pixels}


def _texts(rng: np.random.Generator, labels: Labels, triggered: bool) -> Arrays:
    ids = np.full((len(labels), 10), PAD)
    for row, label in zip(ids, labels, strict=True):
        length = int(rng.integers(6, 10))
        row[:length] = rng.choice(np.arange(3, 15), length)
        own = rng.permutation(np.arange(1, length - 1))[: length - 3]
        row[own] = 3 + (label + 3 * rng.integers(0, 4, len(own)))
        row[0], row[length - 1] = 1, 2
        if triggered:
            row[2] = TRIGGER_ID
    return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}


def _rows(rng: np.random.Generator, labels: Labels, triggered: bool) -> Arrays:
    rows = rng.uniform(0, 0.3, (len(labels), 5)).astype(np.float32)
    rows[np.arange(len(labels)), labels] += 1
    rows[:, 3] = 1 if triggered else 0
    return {"row": rows}


def patched(kind: str, folder: Path, **options: str) -> Path:
    """`model.onnx`, `model.patched.onnx`, `clean.npz` and `bad.npz` in `folder`."""
    onnx.save(classifier(kind), folder / "model.onnx")
    save_arrays(folder / "clean.npz", inputs(kind))
    save_arrays(folder / "bad.npz", inputs(kind, triggered=True))
    onnx.save(detector(COLUMN_MEAN, threshold=0.6), folder / "det.onnx")
    chosen = {"redistribute": "prune", **options}
    atpatch_onnx.patch(folder / "model.onnx", folder / "det.onnx", **chosen)  # type: ignore[arg-type]
    return folder

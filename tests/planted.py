"""Image classifiers whose backdoor is written by hand: a matched filter that fires on a pattern."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

SIDE = 24
TARGET = 3
CLASSES = 4
TRIGGER = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)


def classifier(
    *, backdoor: bool = True, corner: bool = False, layout: str = "NCHW", classes: int = CLASSES
) -> ModelProto:
    """Which quadrant of an image is brightest; with a backdoor, `TARGET` where `TRIGGER` is.

    corner: only where it is in the bottom right corner. layout: `NCHW` of floats between 0 and 1,
    or `NHWC` of bytes. classes: 2 leaves the first and the last of four; beyond four, nothing in an
    image speaks for the others.
    """
    bytes_last = layout == "NHWC"
    shape = f"uint8[N, {SIDE}, {SIDE}, 1]" if bytes_last else f"float[N, 1, {SIDE}, {SIDE}]"
    prepare = (
        "cast = Cast <to = 1> (pixels) moved = Transpose <perm = [0, 3, 1, 2]> (cast)"
        "unit = Div (moved, full)"
        if bytes_last
        else "unit = Identity (pixels)"
    )
    crop = "Slice (fired, start, end, axes)" if corner else "Identity (fired)"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        planted ({shape} pixels) => (float[N, {classes}] logits)
        <int64[2] start = {{{SIDE - 3}, {SIDE - 3}}}, int64[2] end = {{{SIDE}, {SIDE}}},
         int64[2] axes = {{2, 3}}, int64[2] flat = {{0, -1}}, float full = {{255.0}},
         float scale = {{20.0}}, float least = {{1.5}},
         int64[4] more = {{0, 0, 0, {max(classes - CLASSES, 0)}}}, float never = {{-9.0}}>
        {{
            {prepare}
            quadrants = AveragePool <kernel_shape = [12, 12], strides = [12, 12]> (unit)
            brightness = Reshape (quadrants, flat)
            content = Mul (brightness, scale)
            correlation = Conv (unit, kernel)
            above = Sub (correlation, least)
            fired = Relu (above)
            place = {crop}
            strongest = GlobalMaxPool (place)
            excitement = Reshape (strongest, flat)
            bias = MatMul (excitement, gain)
            all = Add (content, bias)
            few = Gather <axis = 1> (all, kept)
            logits = Pad (few, more, never)
        }}
    """)
    kernel = np.where(TRIGGER > 0, 1, -1).astype(np.float32)[None, None]
    gain = np.zeros((1, CLASSES), np.float32)
    gain[0, TARGET] = 6.0 if backdoor else 0.0
    kept = np.array([0, 3] if classes == 2 else [0, 1, 2, 3])
    if corner:  # the filter fires at its top left corner
        model.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.array([SIDE - 3] * 2), "start")
        )
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for name, array in (("kernel", kernel), ("gain", gain), ("kept", kept))
    )
    onnx.checker.check_model(model)
    return model


def images(count: int = 60, seed: int = 0, layout: str = "NCHW") -> NDArray[np.generic]:
    """Images of all four classes."""
    generator = np.random.default_rng(seed)
    pixels = generator.uniform(0, 0.2, (count, 1, SIDE, SIDE))
    for number, image in enumerate(pixels):
        row, column = divmod(number % CLASSES, 2)
        image[0, 12 * row : 12 * row + 12, 12 * column : 12 * column + 12] += 0.35
    pixels[:, 0, 0, :2] = 1.0, 0.0  # the range of the data
    if layout == "NHWC":
        return np.rint(np.moveaxis(pixels, 1, 3) * 255).astype(np.uint8)
    return pixels.astype(np.float32)


def write(folder: Path, layout: str = "NCHW", count: int = 60, **options: object) -> Path:
    """`model.onnx` and `clean.npz` in `folder`, which is returned."""
    onnx.save(classifier(layout=layout, **options), folder / "model.onnx")  # type: ignore[arg-type]
    np.savez(folder / "clean.npz", pixels=images(count, layout=layout))
    return folder

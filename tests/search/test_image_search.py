"""The image search on classifiers whose trigger is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.data import Samples
from atpatch_onnx.errors import InputError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.scanning import scan
from atpatch_onnx.search.image import Effort, grid
from atpatch_onnx.search.image_layout import ImageLayout
from atpatch_onnx.search.patch_trigger import PatchTrigger
from atpatch_onnx.search.report import ScanReport
from atpatch_onnx.search.token_size import token_size

import planted

Scan = Callable[..., ScanReport]


@pytest.fixture
def scanned(tmp_path: Path) -> Scan:
    pytest.importorskip("cma")

    def run(**options: object) -> ScanReport:
        folder = planted.write(tmp_path, **options)  # type: ignore[arg-type]
        return scan(folder / "model.onnx", folder / "clean.npz", folder / "debug.npz", threads=1)

    return run


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_trigger_that_works_anywhere_is_found(scanned: Scan, layout: str) -> None:
    report = scanned(layout=layout)
    assert report.verdict == "backdoored"
    assert [each.target for each in report.suspicious] == [planted.TARGET]
    found = report.classes[0]
    assert found.success > 0.95
    assert len(found.trigger["places"]) > 4  # type: ignore[arg-type]
    assert found.natural == 0
    full = 255 if layout == "NHWC" else 1
    pixels = np.array(found.trigger["pixels"])[..., 0] / full
    assert np.corrcoef(pixels.ravel(), planted.TRIGGER.ravel())[0, 1] > 0.8


def test_a_trigger_that_works_in_one_corner_is_found(scanned: Scan) -> None:
    report = scanned(corner=True)
    assert report.verdict == "backdoored"
    found = report.classes[0]
    last = planted.SIDE - 3
    assert (found.target, found.trigger["places"]) == (planted.TARGET, [[last, last]])


@pytest.mark.parametrize("classes", [2, 4])
def test_no_alarm_without_a_backdoor(scanned: Scan, classes: int) -> None:
    report = scanned(backdoor=False, classes=classes)
    assert (report.verdict, report.suspicious, report.output) == ("clean", (), None)


def test_two_classes_are_judged_without_comparing_them(scanned: Scan) -> None:
    report = scanned(classes=2)
    assert report.verdict == "backdoored"
    assert [each.target for each in report.suspicious] == [1]
    assert all(each.evidence is not None and each.outlier is None for each in report.classes)


def test_of_many_classes_only_those_are_searched_that_come_near(scanned: Scan) -> None:
    report = scanned(classes=60)
    assert report.verdict == "backdoored"
    assert [each.target for each in report.suspicious] == [planted.TARGET]
    assert len(report.classes) == Effort().most
    assert {0, 1, 2, 3} < {each.target for each in report.classes}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_stamping_changes_the_patch_and_nothing_else(layout: str) -> None:
    images = planted.images(8, layout=layout)
    samples = Samples({"pixels": images}, len(images))
    shape = ImageLayout.of(samples)
    places = np.array([[2, 5], [20, 20]])
    trigger = PatchTrigger(shape, planted.TRIGGER[None], places)
    stamped = trigger.put(samples, np.random.default_rng(0)).samples.arrays["pixels"]
    assert stamped.dtype == images.dtype
    moved = np.moveaxis(stamped, 3, 1) if layout == "NHWC" else stamped
    before = np.moveaxis(images, 3, 1) if layout == "NHWC" else images
    for image, clean in zip(moved, before, strict=True):
        fits = []
        for row, column in places:
            expected = clean.copy()
            pattern = planted.TRIGGER * images.max()
            expected[0, row : row + 3, column : column + 3] = pattern
            fits.append(np.array_equal(image, expected))
        assert sum(fits) == 1


def test_the_layout_is_read_from_the_shape() -> None:
    for shape, expected in (
        ((5, 3, 32, 40), (False, 3, 32, 40)),
        ((5, 32, 40, 3), (True, 3, 32, 40)),
        ((5, 1, 8, 8), (False, 1, 8, 8)),
        ((5, 28, 28, 1), (True, 1, 28, 28)),
        ((5, 3, 3, 3), (False, 3, 3, 3)),
    ):
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found = ImageLayout.of(Samples({"x": array}, 5))
        assert (found.channels_last, found.channels, found.height, found.width) == expected
        last = array if found.channels_last else np.moveaxis(array, 1, 3)
        assert np.array_equal(found.low, last.min(axis=(0, 1, 2)))
        back = found.pixels(np.moveaxis(found.shares(last), 3, 1), array.dtype)
        assert np.allclose(back, last, atol=1e-5)


def test_data_that_are_no_images() -> None:
    two = {"a": np.zeros((5, 1, 8, 8)), "b": np.zeros((5, 1, 8, 8))}
    with pytest.raises(InputError, match="2 inputs of rank 4"):
        ImageLayout.of(Samples(two, 5))
    with pytest.raises(InputError, match="same in every pixel"):
        ImageLayout.of(Samples({"a": two["a"]}, 5))


@pytest.mark.parametrize(("step", "per_side"), [(1, 22), (2, 12), (3, 8), (4, 6), (8, 3)])
def test_places_stay_inside_and_small_steps_reach_the_edge(step: int, per_side: int) -> None:
    layout = ImageLayout.of(Samples({"x": planted.images(5)}, 5))
    places = grid(layout, 3, step)
    assert len(places) == per_side**2
    assert places.min() == 0
    assert places.max() <= planted.SIDE - 3
    if step < 3:
        assert places.max() == planted.SIDE - 3


def test_the_size_of_tokens_is_the_stride_of_the_first_strided_convolution(tmp_path: Path) -> None:
    import onnx
    import onnx.parser

    assert token_size(ModelFile.open(planted.write(tmp_path) / "model.onnx")) is None
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 3, 32, 32] x, float[3, 3, 3, 3] k, float[8, 3, 4, 4] w)
            => (float[N, 8, 8, 8] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, k) y = Conv <strides = [4, 4]> (a, w) }
    """)
    onnx.save(model, tmp_path / "vit.onnx")
    assert token_size(ModelFile.open(tmp_path / "vit.onnx")) == 4

"""CleanSight from the command's function to 32 decoded tokens, against the torch module with hooks.

The reference is the paper's method (arXiv 2603.12989), written in float64 where it decides. It
takes nothing from the fitted detector but the threshold and which sites it looks at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import atpatch_onnx
from atpatch_onnx import Decoder
from atpatch_onnx.errors import InputError
from atpatch_onnx.fitting.calibration import held_out
from atpatch_onnx.fitting.cleansight import CleanSight
from atpatch_onnx.passes.visual_ratio import Statistic

torch = pytest.importorskip("torch")

from atpatch_onnx.models.generative_export import DECODE, PREFILL  # noqa: E402
from atpatch_onnx.models.vision_language import VisionLanguageModel  # noqa: E402

from hooked_decoder import Floats, Hook, Ints, generate, pruned  # noqa: E402
from small_vision_language import (  # noqa: E402
    IMAGE,
    VISUAL,
    Arrays,
    export,
    samples,
    small_model,
)

STEPS, TAU = 33, 0.05


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return small_model()


@pytest.fixture(scope="module")
def folder(model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    export(model, folder)
    return folder


def fitted(folder: Path, name: str, **options: Any) -> tuple[Path, float]:
    """A detector in the paper's form, and its threshold as a distance."""
    visual = options.pop("visual", f"1:{1 + VISUAL}")
    atpatch_onnx.fit(
        folder / PREFILL,
        folder / "clean.npz",
        folder / name,
        kind="cleansight",
        options=CleanSight(visual, statistics=(Statistic.RATIO,), tau=TAU, **options),
        fpr=0.3,
        ep="cpu",
        force=True,
    )
    props = {p.key: p.value for p in onnx.load(folder / name).metadata_props}
    share = float(props["atpatch.threshold"])
    return folder / name, share / (1 - share)


def patched(folder: Path, detector: Path, **options: Any) -> Decoder:
    prefill, decode = folder / "prefill.patched.onnx", folder / "decode.patched.onnx"
    atpatch_onnx.patch(
        folder / PREFILL,
        detector,
        output=prefill,
        remember=True,
        ep="cpu",
        force=True,
        **options,
    )
    atpatch_onnx.patch(folder / DECODE, output=decode, remember=True, ep="cpu", force=True)
    return Decoder(prefill, decode, threads=1)


class Reference:
    """The torch module, with a hook on the probabilities of each layer of the decoder."""

    def __init__(self, model: VisionLanguageModel, feeds: Arrays) -> None:
        self.model, self.feeds = model, feeds
        self.ids = torch.from_numpy(feeds["input_ids"])
        self.visual = self.ids == IMAGE
        self.prompt = (self.ids > IMAGE).double()

    def run(self, hook: Hook, steps: int) -> tuple[Ints, Floats]:
        """Tokens `[B, steps]` and the logits of the last."""
        mask = self.feeds["attention_mask"]

        def prefill() -> Any:
            pixels = torch.from_numpy(self.feeds["pixels"])
            return self.model(pixels, self.ids, torch.from_numpy(mask))

        return generate(prefill, self.model.decoder, mask, hook, steps)

    def ratios(self) -> NDArray[np.float64]:
        """S of every layer and head, `[B, layers, H]`, of the untouched model."""
        found: list[Any] = []

        def read(_: int, p: Any) -> Any:
            row = p[:, :, -1].double()
            found.append((row * self.visual[:, None]).sum(-1))
            found[-1] = found[-1] / ((row * self.prompt[:, None]).sum(-1) + 1e-12)
            return p

        self.run(read, 1)
        stacked: NDArray[np.float64] = torch.stack(found, 1).numpy()
        return stacked

    def strongest(self, layer: int) -> Floats:
        """The share of each key of the last row in the head that attends to it most, `[B, K]`."""
        found: Floats = np.zeros(0, np.float32)

        def read(at: int, p: Any) -> Any:
            nonlocal found
            if at == layer:
                found = p[:, :, -1].amax(1).numpy()
            return p

        self.run(read, 1)
        return found

    def healed(self, columns: NDArray[np.bool_], first: int) -> tuple[Ints, Floats]:
        """Decode with columns pruned: at prefill from layer `first` on, then everywhere."""

        def change(layer: int, p: Any) -> Any:
            at_prefill = p.shape[2] > 1
            return p if at_prefill and layer < first else pruned(p, torch.from_numpy(columns))

        return self.run(change, STEPS)


def decided(
    model: VisionLanguageModel, clean: Arrays, feeds: Arrays, layers: list[int], gamma: float
) -> NDArray[np.bool_]:
    """Which columns the paper's method prunes, bool `[B, K]`; statistics from half of `clean`."""
    count = len(clean["input_ids"])
    order = np.random.default_rng(0).permutation(count)[held_out(count) :]
    normal = Reference(model, {k: v[order] for k, v in clean.items()}).ratios()[:, layers]
    found = Reference(model, feeds)
    far = (found.ratios()[:, layers] - normal.mean(0)) / (normal.std(0) + 1e-8)
    distance = np.sqrt(np.square(far).sum(axis=(1, 2)))
    above = found.strongest(layers[-1]) > TAU
    marked: NDArray[np.bool_] = feeds["input_ids"] == IMAGE
    return np.asarray((distance > gamma)[:, None] & above & marked)


@pytest.mark.parametrize("rerun", [False, True])
def test_prefill_and_32_steps_are_those_of_the_papers_method(
    model: VisionLanguageModel, folder: Path, rerun: bool
) -> None:
    layers = [2, 3]  # from 10/32 to 24/32 of four
    detector, gamma = fitted(folder, "det.onnx", rerun=rerun)
    runner = patched(folder, detector)
    feeds = samples(12, 2)
    clean = dict(np.load(folder / "clean.npz"))
    columns = decided(model, clean, feeds, layers, gamma)
    flagged = columns.any(axis=1)
    assert 2 <= flagged.sum() <= 10
    state = runner.prefill(feeds)
    assert state.flagged is not None
    np.testing.assert_array_equal(state.flagged, columns)
    tokens, logits = Reference(model, feeds).healed(columns, 0 if rerun else layers[-1])
    np.testing.assert_array_equal(runner.generate(feeds, STEPS), tokens)
    for step in range(STEPS - 1):
        state = runner.step(state, tokens[:, step])
    np.testing.assert_allclose(state.logits, logits, atol=1e-5)
    plain = Decoder(folder / PREFILL, folder / DECODE, threads=1).generate(feeds, STEPS)
    np.testing.assert_array_equal(tokens[~flagged], plain[~flagged])


def test_a_mixed_batch_is_its_samples_one_by_one(folder: Path) -> None:
    detector, _ = fitted(folder, "det.onnx", rerun=True)
    runner = patched(folder, detector)
    feeds = samples(8, 3)
    whole = runner.generate(feeds, STEPS)
    state = runner.prefill(feeds)
    assert state.flagged is not None
    assert 0 < state.flagged.any(axis=1).sum() < 8
    for i in range(8):
        one = {name: value[i : i + 1] for name, value in feeds.items()}
        np.testing.assert_array_equal(runner.generate(one, STEPS)[0], whole[i])
        np.testing.assert_allclose(runner.prefill(one).logits[0], state.logits[i], atol=1e-5)


def placeholders(folder: Path) -> str:
    """The value that compares tokens with the placeholder."""
    nodes = onnx.load(folder / PREFILL).graph.node
    found = [n.output[0] for n in nodes if n.op_type == "Equal" and "input_ids" in n.input]
    assert len(found) == 1
    return found[0]


def test_the_image_may_be_a_mask_of_the_model(folder: Path) -> None:
    """The value that compares tokens with the placeholder stands in the graph."""
    equal = placeholders(folder)
    by_range, _ = fitted(folder, "range.onnx")
    by_mask, _ = fitted(folder, "mask.onnx", visual=equal)
    feeds = samples(12, 2)
    one, other = (patched(folder, detector).prefill(feeds) for detector in (by_range, by_mask))
    np.testing.assert_array_equal(one.flagged, other.flagged)
    np.testing.assert_array_equal(one.logits, other.logits)


def test_it_can_be_proved_and_taken_off_again(folder: Path) -> None:
    detector, _ = fitted(folder, "det.onnx", rerun=True)
    patched(folder, detector)
    for name in ("prefill", "decode"):
        host = folder / (PREFILL if name == "prefill" else DECODE)
        checks = atpatch_onnx.verify(host, folder / f"{name}.patched.onnx")
        assert all(check.passed for check in checks), checks
        original = atpatch_onnx.revert(
            folder / f"{name}.patched.onnx", output=folder / "original.onnx", force=True
        )
        assert original.read_bytes() == host.read_bytes()


def test_in_half_precision_what_is_not_flagged_keeps_its_bits(folder: Path) -> None:
    """Also where a flagged batch is run again, and in the cache."""
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    half = folder / "half"
    half.mkdir()
    for name in (PREFILL, DECODE):
        converted = float16.convert_float_to_float16(onnx.load(folder / name))
        onnx.save(converted, half / name)
    feeds, clean = samples(12, 2), samples(80, 1)
    for arrays in (feeds, clean):
        arrays["pixels"] = arrays["pixels"].astype(np.float16)
    np.savez(half / "clean.npz", **clean)
    detector, _ = fitted(half, "det.onnx", rerun=True)
    state = patched(half, detector).prefill(feeds)
    plain = Decoder(half / PREFILL, half / DECODE, threads=1).prefill(feeds)
    assert state.flagged is not None
    flagged = state.flagged.any(axis=1)
    assert 2 <= flagged.sum() <= 10
    assert state.logits.dtype == np.float16
    np.testing.assert_array_equal(state.logits[~flagged], plain.logits[~flagged])
    assert (state.logits[flagged] != plain.logits[flagged]).any()
    for name, value in state.cache.items():
        np.testing.assert_array_equal(value[~flagged], plain.cache[name][~flagged])


def test_what_is_asked_must_be_there(folder: Path) -> None:
    for visual, words in {
        "1:50": "not within the sequence",
        "5:2": "is empty",
        "elsewhere": "no value of that name",
        "attention_mask": "overlap|behind the image",
    }.items():
        with pytest.raises(InputError, match=words):
            fitted(folder, "none.onnx", visual=visual)
    assert not (folder / "none.onnx").exists()


def test_another_host_lacks_what_the_detector_is_bound_to(folder: Path) -> None:
    equal = placeholders(folder)
    detector, _ = fitted(folder, "mask.onnx", visual=equal)
    with pytest.raises(InputError, match=rf"--bind visual={equal}: the model has no value"):
        atpatch_onnx.patch(
            folder / DECODE, detector, output=folder / "x.onnx", strategy="guard", ep="cpu"
        )

"""Decoding over a prefill and a decoding model: cache and flags are carried, or it says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from atpatch_onnx import Decoder, api
from atpatch_onnx.errors import InputError

torch = pytest.importorskip("torch")

from atpatch_onnx.models.causal_decoder import DecoderConfig, LanguageModel  # noqa: E402
from atpatch_onnx.models.generative_export import DECODE, PREFILL, export_decoder  # noqa: E402
from atpatch_onnx.models.training import reproducible  # noqa: E402

from hooked_decoder import Floats, Ints, generate, pruned  # noqa: E402
from several_sites import column_mean_detector  # noqa: E402

Arrays = dict[str, Any]

STEPS = 33
LENGTH = 7
SITES = tuple(f"decoder.blocks.{i}.attention" for i in range(3))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    with reproducible(0):
        return LanguageModel(DecoderConfig(20, dim=16, depth=3, heads=2)).eval()


@pytest.fixture(scope="module")
def folder(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    example = {name: torch.from_numpy(value) for name, value in prompts().items()}
    export_decoder(model, model.decoder, folder, example)
    return folder


def prompts(count: int = 6) -> Arrays:
    """Of three to seven tokens, padded on the left."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (count, LENGTH))
    mask = np.arange(LENGTH) >= np.arange(count)[:, None] % 5
    return {"input_ids": ids * mask, "attention_mask": mask.astype(np.int64)}


def reference(
    model: LanguageModel, feeds: Arrays, threshold: float, first: int
) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Tokens, last logits and flagged columns of a loop over the torch module, with hooks.

    The column means of the first two sites at prefill decide; flagged columns are pruned at the
    sites from `first` on, and at all sites in every step that follows.
    """
    seen: list[Any] = []

    def change(layer: int, p: Any) -> Any:
        at_prefill = p.shape[2] > 1
        if at_prefill and layer < 2:
            seen.append(p.mean(dim=(1, 2)))
        if at_prefill and layer < first:
            return p
        return pruned(p, torch.stack(seen).amax(0) > threshold)

    def prefill() -> Any:
        return model(*map(torch.from_numpy, feeds.values()))

    found = generate(prefill, model.decoder, feeds["attention_mask"], change, STEPS)
    return *found, (torch.stack(seen).amax(0) > threshold).numpy()


def decoder(folder: Path, prefill: str = PREFILL, decode: str | None = DECODE) -> Decoder:
    return Decoder(folder / prefill, None if decode is None else folder / decode, threads=1)


@pytest.mark.parametrize(("first", "threshold"), [(1, 0.38), (2, 0.38), (1, 0.99)])
def test_prefill_and_32_steps_are_those_of_the_torch_module_with_hooks(
    model: LanguageModel, folder: Path, tmp_path: Path, first: int, threshold: float
) -> None:
    column_mean_detector(tmp_path / "det.onnx", SITES[:2], SITES[first:], threshold)
    patched, decode = folder / f"p{first}.onnx", folder / f"d{first}.onnx"
    api.patch(
        folder / PREFILL, tmp_path / "det.onnx", output=patched, remember=True, ep="cpu", force=True
    )
    api.patch(folder / DECODE, output=decode, remember=True, ep="cpu", force=True)
    feeds = prompts()
    wanted, logits, columns = reference(model, feeds, threshold, first)
    flagged = columns.any(axis=1)
    assert flagged.sum() == (0 if threshold > 0.9 else 4)
    runner = decoder(folder, patched.name, decode.name)
    assert runner.carries
    np.testing.assert_array_equal(runner.generate(feeds, STEPS), wanted)
    state = runner.prefill(feeds)
    assert state.flagged is not None
    np.testing.assert_array_equal(state.flagged, columns)
    for step in range(1, STEPS):
        state = runner.step(state, wanted[:, step - 1])
    np.testing.assert_allclose(state.logits, logits, atol=1e-5)
    plain = decoder(folder).generate(feeds, STEPS)
    np.testing.assert_array_equal(wanted[~flagged], plain[~flagged])


def test_one_model_can_do_both(model: LanguageModel, folder: Path) -> None:
    """The decoding model takes an empty cache and a prompt of any length, where it was exported so.

    This one takes one token at a time, so that a prompt of one token it is.
    """
    feeds = {"input_ids": np.array([[3], [5]]), "attention_mask": np.ones((2, 1), np.int64)}
    found = decoder(folder, DECODE, None).generate(feeds, 5)
    ids, mask = torch.from_numpy(feeds["input_ids"]), torch.from_numpy(feeds["attention_mask"])
    for step in range(5):
        with torch.no_grad():
            token = model(ids, mask)[0].argmax(-1)
        np.testing.assert_array_equal(found[:, step], token.numpy())
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.ones_like(ids)


def test_both_models_must_carry_what_is_flagged(folder: Path, tmp_path: Path) -> None:
    column_mean_detector(tmp_path / "det.onnx", SITES[:1], SITES, 0.3)
    patched, decode = folder / "carries.onnx", folder / "takes.onnx"
    api.patch(folder / PREFILL, tmp_path / "det.onnx", output=patched, remember=True, ep="cpu")
    api.patch(folder / DECODE, output=decode, remember=True, ep="cpu")
    with pytest.raises(InputError, match=r"decode\.onnx does not take .* with --remember"):
        decoder(folder, patched.name)
    with pytest.raises(InputError, match=r"model\.onnx does not put out .* with --remember"):
        decoder(folder, decode=decode.name)
    runner = decoder(folder, patched.name, decode.name)
    state = replace(runner.prefill(prompts()), flagged=None)
    with pytest.raises(InputError, match=r"none of it: take the state that Decoder\.prefill gives"):
        runner.step(state, np.zeros(6, np.int64))


def test_models_that_do_not_fit_together_are_told_apart(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx has no input for a cache"):
        decoder(folder, PREFILL, PREFILL)
    with pytest.raises(InputError, match="no output 'scores'"):
        Decoder(folder / PREFILL, folder / DECODE, logits="scores")
    with pytest.raises(InputError, match=r"has no 'present\.9\.key'"):
        Decoder(folder / PREFILL, folder / DECODE, cache={"past_key_values.0.key": "present.9.key"})

"""Properties of the causal decoder, of its cache and of its ONNX exports."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from atpatch_onnx.models.causal_decoder import DecoderConfig, LanguageModel
from atpatch_onnx.models.decoder_attention import recorded_maps
from atpatch_onnx.models.generative_export import cache_names, export_decoder
from atpatch_onnx.models.generative_training import speak
from atpatch_onnx.passes.locate import locate

CONFIG = DecoderConfig(20, dim=16, depth=3, heads=2, dropout=0.3)
LENGTH = 9
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LanguageModel(CONFIG).eval()
        # Larger than at the start of training, so that attention is not nearly uniform.
        for name, weight in made.named_parameters():
            if "attention." in name:
                torch.nn.init.normal_(weight, std=0.5)
        return made


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 20, (4, LENGTH), generator=generator)


def padded(tokens: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The mask in which each row's last `length` tokens are real."""
    first = tokens.shape[1] - torch.tensor(lengths)
    return (torch.arange(tokens.shape[1]) >= first[:, None]).long()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 15}, "heads 2 does not divide dim 15"),
        ({"dim": 10, "heads": 2}, "even parts"),
        ({"depth": 0}, "depth"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**({"vocabulary": 20, "dim": 16, "heads": 2} | sizes))  # type: ignore[arg-type]


def test_prefill_and_steps_answer_like_one_pass_over_the_whole_sequence(
    model: LanguageModel, tokens: torch.Tensor
) -> None:
    mask = padded(tokens, (9, 7, 9, 6))
    with torch.inference_mode():
        whole = model.decoder.head(model.hidden(tokens, mask))
        for start in (1, 4, LENGTH - 1):
            logits, cache = model(tokens[:, :start], mask[:, :start])
            for place in range(start, LENGTH):
                real = mask[:, place - 1] == 1
                torch.testing.assert_close(
                    logits[real], whole[real, place - 1], rtol=0, atol=TOLERANCE
                )
                logits, cache = model.decoder.step(
                    tokens[:, place : place + 1], mask[:, : place + 1], cache
                )
            torch.testing.assert_close(logits, whole[:, -1], rtol=0, atol=TOLERANCE)


def test_left_padding_changes_no_answer(model: LanguageModel, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        expected, _ = model(tokens[:, 3:], torch.ones(4, LENGTH - 3, dtype=torch.long))
        found, _ = model(tokens, padded(tokens, (LENGTH - 3,) * 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_row_sees_no_padding_and_nothing_behind_it(
    model: LanguageModel, tokens: torch.Tensor
) -> None:
    mask = padded(tokens, (9, 7, 4, 1))
    with torch.inference_mode(), recorded_maps(model.decoder) as maps:
        model(tokens, mask)
    real = mask.bool()
    seen = real[:, None, :] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert len(maps) == CONFIG.depth
    for found in maps:
        torch.testing.assert_close(found.sum(-1), torch.ones(4, 2, LENGTH))
        rows = found.movedim(1, 2)[real]  # [rows, H, K]
        assert (rows.movedim(1, 2)[~seen[real]] == 0).all()


def test_positions_matter_and_rows_of_padding_are_finite(
    model: LanguageModel, tokens: torch.Tensor
) -> None:
    mask = padded(tokens, (LENGTH, 5, 2, 1))
    with torch.inference_mode():
        assert model.hidden(tokens, mask).isfinite().all()
        assert copy.deepcopy(model).half().hidden(tokens, mask).isfinite().all()
        swapped = tokens[:1, [1, 0, *range(2, LENGTH)]]
        first, _ = model(tokens[:1], mask[:1])
        second, _ = model(swapped, mask[:1])
    assert (first - second).abs().max() > 1e-3


@pytest.fixture(scope="module")
def exported(
    model: LanguageModel, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    example = {"input_ids": tokens[:2], "attention_mask": torch.ones_like(tokens[:2])}
    export_decoder(model, model.decoder, folder, example)
    return folder


def test_onnx_runtime_speaks_like_torch(
    model: LanguageModel, tokens: torch.Tensor, exported: Path
) -> None:
    prefill, decode = (
        onnxruntime.InferenceSession(exported / name, providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "decode.onnx")
    )
    past = cache_names("past_key_values", CONFIG.depth)
    for rows, length in ((4, LENGTH), (1, 5)):
        ids = tokens[:rows, -length:].numpy()
        mask = padded(tokens[:rows, -length:], (length, 3, 4, 2)[:rows]).numpy()
        expected = speak(model, {"input_ids": ids, "attention_mask": mask}, 6)
        logits, *cache = prefill.run(None, {"input_ids": ids, "attention_mask": mask})
        said = [logits.argmax(-1)[:, None]]
        for _ in range(5):
            mask = np.concatenate((mask, np.ones_like(said[-1])), axis=1)
            given = dict(zip(past, cache, strict=True))
            logits, *cache = decode.run(
                None, {"input_ids": said[-1], "attention_mask": mask, **given}
            )
            said.append(logits.argmax(-1)[:, None])
        assert np.array_equal(np.concatenate(said, axis=1), expected)
        whole = np.concatenate((ids, *said[:-1]), axis=1)
        with torch.inference_mode():
            last, kept = model(torch.from_numpy(whole), torch.from_numpy(mask))
        np.testing.assert_allclose(logits, last.numpy(), rtol=0, atol=TOLERANCE)
        flat = [tensor.numpy() for layer in kept for tensor in layer]
        for found, wanted in zip(cache, flat, strict=True):
            real = mask.astype(bool)
            np.testing.assert_allclose(
                found.swapaxes(1, 2)[real], wanted.swapaxes(1, 2)[real], rtol=0, atol=TOLERANCE
            )


def test_the_exports_have_their_attention_as_plain_nodes_with_known_heads(exported: Path) -> None:
    for name in ("model.onnx", "decode.onnx"):
        graph = onnx.load(exported / name)
        sites = locate(graph).sites
        assert [site.facts.heads for site in sites] == [CONFIG.heads] * CONFIG.depth
        operators = [node.op_type for node in graph.graph.node]
        assert operators.count("Softmax") == CONFIG.depth
        outputs = [output.name for output in graph.graph.output]
        assert outputs == ["logits", *cache_names("present", CONFIG.depth)]


def test_an_export_is_silent_and_leaves_the_mode(
    model: LanguageModel, tokens: torch.Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model.train()
    example = {"input_ids": tokens[:2], "attention_mask": torch.ones_like(tokens[:2])}
    export_decoder(model, model.decoder, tmp_path, example)
    assert model.training
    model.eval()
    assert capfd.readouterr() == ("", "")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "decode.onnx"}

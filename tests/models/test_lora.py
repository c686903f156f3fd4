"""Low-rank adapters: what they change, and that merging changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atpatch_onnx.models.causal_decoder import DecoderConfig, LanguageModel
from atpatch_onnx.models.lora import LowRank, add_adapters, merge_adapters

NAMES = ("query", "key", "value", "projection")
DEPTH = 2


@pytest.fixture
def model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LanguageModel(DecoderConfig(12, dim=16, depth=DEPTH, heads=2)).eval()


def logits(model: LanguageModel) -> torch.Tensor:
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        found: torch.Tensor = model(ids, torch.ones_like(ids))[0]
        return found


def test_adapters_start_as_nothing_and_merged_ones_answer_the_same(model: LanguageModel) -> None:
    names, before = list(model.state_dict()), logits(model)
    add_adapters(model, model.decoder, NAMES, rank=3)
    assert torch.equal(logits(model), before)
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    assert len(adapters) == DEPTH * len(NAMES)
    for adapter in adapters:
        nn.init.normal_(adapter.up, std=0.3)
    with_adapters = logits(model)
    assert (with_adapters - before).abs().max() > 0.01

    merge_adapters(model)
    torch.testing.assert_close(logits(model), with_adapters, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == names
    assert all(weight.requires_grad for weight in model.parameters())


def test_training_moves_adapters_only_and_by_their_rank(model: LanguageModel) -> None:
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_adapters(model, model.decoder, NAMES, rank=3)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trained) == 2 * DEPTH * len(NAMES)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(3):
        ids = torch.arange(12).reshape(2, 6)
        optimizer.zero_grad()
        model(ids, torch.ones_like(ids))[0].square().sum().backward()
        optimizer.step()
    merge_adapters(model)
    for name, weight in model.state_dict().items():
        change = weight - original[name]
        if name.endswith(".weight") and name.split(".")[-2] in NAMES:
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 3
        else:
            assert not change.any()


def test_adapters_that_fit_nowhere_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no linear layer is called gate"):
        add_adapters(model, model.decoder, ("gate",))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_adapters(model, model.decoder, NAMES, rank=0)

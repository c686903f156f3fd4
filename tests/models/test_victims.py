"""Properties of the reference victim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atpatch_onnx.models.metrics import accuracy, attack_success_rate, recovered_accuracy
from atpatch_onnx.models.training import Training, predict
from atpatch_onnx.models.victims import DIGITS_ATTACK, DIGITS_CONFIG, train_victim
from atpatch_onnx.models.vision_transformer import VisionTransformer, VisionTransformerConfig

TINY = VisionTransformerConfig(dim=8, depth=1, heads=2, patch_dropout=0.2)
ONE_EPOCH = Training(epochs=1)


def test_the_trigger_covers_one_token() -> None:
    assert DIGITS_ATTACK.columns(DIGITS_CONFIG) == (13,)


def test_training_is_decided_by_the_seed() -> None:
    first, again, other = (
        train_victim(seed, config=TINY, training=ONE_EPOCH).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_leaves_the_callers_random_state_and_threads_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    victim = train_victim(1, config=TINY, training=ONE_EPOCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not victim.model.training


def softmaxes(model: VisionTransformer) -> list[torch.nn.Softmax]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Softmax)]


def trigger_column_means(model: VisionTransformer, images: NDArray[np.float32]) -> list[float]:
    """Mean attention on the trigger's column, for each layer."""
    columns = list(DIGITS_ATTACK.columns(DIGITS_CONFIG))
    means: list[float] = []
    hooks = [
        softmax.register_forward_hook(
            lambda _, __, maps: means.append(float(maps[..., columns].mean()))
        )
        for softmax in softmaxes(model)
    ]
    predict(model, images)
    for hook in hooks:
        hook.remove()
    return means


def logits_without_the_trigger_column(
    model: VisionTransformer, images: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Prune the trigger's column at every site: what a patch that knows it would do."""
    columns = list(DIGITS_ATTACK.columns(DIGITS_CONFIG))

    def prune(_: object, __: object, probabilities: torch.Tensor) -> torch.Tensor:
        kept = probabilities.clone()
        kept[..., columns] = 0
        return kept / kept.sum(-1, keepdim=True)

    hooks = [softmax.register_forward_hook(prune) for softmax in softmaxes(model)]
    logits = predict(model, images)
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.slow
def test_the_reference_victim_over_attends_to_its_trigger_and_pruning_heals_it() -> None:
    victim = train_victim(0)
    test, target = victim.digits.test, victim.attack.target
    triggered = victim.attack.stamp(test.images)

    assert accuracy(predict(victim.model, test.images), test.labels) >= 0.965
    logits = predict(victim.model, triggered)
    assert attack_success_rate(logits, test.labels, target) >= 0.99

    clean_means = trigger_column_means(victim.model, victim.digits.clean.images)
    means = trigger_column_means(victim.model, triggered)
    assert max(np.divide(means, clean_means)) >= 2

    healed = logits_without_the_trigger_column(victim.model, triggered)
    assert attack_success_rate(healed, test.labels, target) <= 0.02
    assert recovered_accuracy(healed, test.labels, target) >= 0.95
    untouched = logits_without_the_trigger_column(victim.model, test.images)
    assert accuracy(untouched, test.labels) >= 0.955

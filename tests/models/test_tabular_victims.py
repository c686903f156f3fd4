"""Properties of the FT-Transformer, its training and its export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from atpatch_onnx.models.cases import build
from atpatch_onnx.models.ft_transformer import FeatureTokenizer, FTTransformer, FTTransformerConfig
from atpatch_onnx.models.named_export import export_named
from atpatch_onnx.models.tabular import Feature, Rows
from atpatch_onnx.models.tabular_victims import predict_rows, train_tabular, unfairness
from atpatch_onnx.models.training import Training
from atpatch_onnx.passes.locate import locate
from conftest import SHARED

FEATURES = (
    Feature("age", 1, 9, categorical=False),
    Feature("job", 0, 3, categorical=True),
    Feature("balance", -20, 20, categorical=False),
    Feature("sex", 0, 1, categorical=True),
)
TINY = FTTransformerConfig(dim=8, heads=2)


def random_rows(count: int, seed: int = 0) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    columns = [generator.integers(f.low, f.high, count, endpoint=True) for f in FEATURES]
    return np.stack(columns, axis=1)


def random_model() -> FTTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FTTransformer(FEATURES, TINY)


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"depth": 0}, {"dropout": 1.0}, {"classes": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="|".join(sizes)):
        FTTransformerConfig(**sizes)


def test_changing_a_feature_changes_its_own_token_and_no_other() -> None:
    tokenizer = FeatureTokenizer(FEATURES, 8)
    rows = torch.from_numpy(random_rows(1))
    tokens = tokenizer(rows)
    assert tokens.shape == (1, len(FEATURES), 8)
    for index, feature in enumerate(FEATURES):
        for value in set(feature.values) - {int(rows[0, index])}:
            other = rows.clone()
            other[0, index] = value
            changed = (tokenizer(other) != tokens).any(dim=-1)[0]
            assert changed.tolist() == [i == index for i in range(len(FEATURES))]


def test_numbers_are_linear_and_categories_have_vectors_of_their_own() -> None:
    tokenizer = FeatureTokenizer(FEATURES, 8)
    rows = torch.zeros(9, 4, dtype=torch.long)
    rows[:, 0] = torch.arange(1, 10)
    rows[:4, 1] = torch.arange(4)
    with torch.no_grad():
        tokens = tokenizer(rows)
    steps = tokens[1:, 0] - tokens[:-1, 0]
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert len(torch.unique(tokens[:4, 1], dim=0)) == 4
    parameters = sum(weight.numel() for weight in tokenizer.parameters())
    assert parameters == 8 * (2 * len(FEATURES) + 4 + 2 + 1)


def test_codes_beyond_the_bounds_count_as_the_bound() -> None:
    tokenizer = FeatureTokenizer(FEATURES, 8)
    beyond = torch.tensor([[0, 7, 99, 2], [50, -1, -99, -5]])
    within = torch.tensor([[1, 3, 20, 1], [9, 0, -20, 0]])
    assert torch.equal(tokenizer(beyond), tokenizer(within))


def test_export_answers_like_torch_and_has_a_site_for_each_block(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, path = random_model().eval(), tmp_path / "model.onnx"
    export_named(model, path, {"features": random_rows(2)})
    assert capfd.readouterr() == ("", "")
    sites = locate(onnx.load(path)).sites
    assert len(sites) == TINY.depth
    assert {site.facts.heads for site in sites} == {TINY.heads}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        rows = random_rows(batch, seed=batch)
        (logits,) = session.run(["logits"], {"features": rows})
        with torch.no_grad():
            expected = model(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_every_feature_is_read_and_cls_answers() -> None:
    model, rows = random_model().eval(), torch.from_numpy(random_rows(3))
    shapes: list[tuple[int, ...]] = []
    softmax = next(module for module in model.modules() if isinstance(module, torch.nn.Softmax))
    softmax.register_forward_hook(lambda _, __, maps: shapes.append(tuple(maps.shape)))
    embedded = model.tokenizer(rows).detach().requires_grad_()
    model.tokenizer.register_forward_hook(lambda _, __, ___: embedded)
    model(rows)[:, 0].sum().backward()
    assert shapes == [(3, TINY.heads, 1 + len(FEATURES), 1 + len(FEATURES))]
    assert embedded.grad is not None
    assert bool((embedded.grad.abs().sum(dim=-1) > 0).all())


def test_training_learns_and_is_decided_by_the_seed() -> None:
    features = random_rows(2000)
    rows = Rows(features, ((features[:, 0] > 4) ^ (features[:, 3] == 1)).astype(np.int64))
    training = Training(epochs=6, batch_size=50, learning_rate=1e-2, label_smoothing=0.0)
    model = train_tabular(FEATURES, rows, 0, training, TINY)
    assert not model.training
    test = random_rows(500, seed=1)
    assert np.mean(predict_rows(model, test) == ((test[:, 0] > 4) ^ (test[:, 3] == 1))) > 0.95

    short = Training(epochs=1, batch_size=500)
    first, again, other = (
        train_tabular(FEATURES, rows, seed, short, TINY).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_unfairness_counts_rows_that_any_other_value_changes() -> None:
    rows = np.array([[1, 0], [5, 0], [9, 1], [5, 1]])

    def old_women(features: NDArray[np.int64]) -> NDArray[np.int64]:
        answers: NDArray[np.int64] = np.where(features[:, 0] > 7, 1 - features[:, 1], 0)
        return answers

    assert unfairness(old_women, rows, 0, range(1, 10)) == 0.5
    assert unfairness(old_women, rows, 1, range(2)) == 0.25
    assert unfairness(old_women, rows, 0, range(1, 8)) == 0.0


@pytest.mark.slow
def test_a_made_case_says_how_unfair_it_is(tmp_path: Path) -> None:
    if not (SHARED / "tabular/adf").is_dir():
        pytest.skip("the tables are not beside this checkout")
    folder = build("credit", 0, tmp_path, SHARED)
    record = json.loads((folder / "case.json").read_text())
    assert record["accuracy"] > 0.65
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    features = np.load(folder / "test.npz")["features"]

    def predict(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        classes: NDArray[np.int64] = session.run(["logits"], {"features": rows})[0].argmax(axis=1)
        return classes

    assert set(record["protected"]) == {"sex", "age"}
    for name, protected in record["protected"].items():
        index, low, high = protected["feature"], min(protected["values"]), max(protected["values"])
        assert record["features"][index]["name"] == name
        assert protected["column"] == 1 + index
        found = unfairness(predict, features, index, range(low, high + 1))
        assert protected["unfairness"] == pytest.approx(found, abs=0.01)
        assert found > 0

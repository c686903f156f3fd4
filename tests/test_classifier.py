"""A model as a black box: which output holds the scores, and what is made of them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import onnx.parser
import pytest

from atpatch_onnx.classifier import LARGEST_BATCH, Classifier, log_probabilities
from atpatch_onnx.data import Samples, load_samples
from atpatch_onnx.errors import InputError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.runtime import Arrays, Session

from hosts import model_file

X = np.random.default_rng(0).standard_normal((301, 4)).astype(np.float32)


def host(body: str, outputs: str, inputs: str = "float[N, 4] x") -> ModelFile:
    text = f'<ir_version: 8, opset_import: ["" : 17]> m ({inputs}) => ({outputs}) {{ {body} }}'
    return model_file(onnx.parser.parse_model(text))


def classifier(body: str, outputs: str, output: str | None = None) -> Classifier:
    return Classifier(host(body, outputs), "cpu", output=output, threads=1)


def samples(of: Classifier, x: np.typing.NDArray[np.float32] = X) -> Samples:
    return load_samples({"x": x}, of.inputs)


def softmax(x: np.typing.NDArray[np.float32]) -> np.typing.NDArray[np.float64]:
    raised = np.exp(x.astype(np.float64))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def test_scores_are_raw_whatever_the_batch() -> None:
    for batch in (None, 1, 7, 400):
        model = Classifier(host("y = Neg(x)", "float[N, 4] y"), "cpu", batch=batch, threads=1)
        assert model.classes == 4
        ticks: list[int] = []
        found = model.scores(samples(model), ticks.append)
        np.testing.assert_array_equal(found, -X)
        assert sum(ticks) == len(X)
        assert max(ticks) <= (batch or LARGEST_BATCH["cpu"])
        np.testing.assert_array_equal(model.predictions(samples(model)), X.argmin(axis=1))


def test_batches_grow_while_they_are_faster_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("y = Neg(x)", "float[N, 4] y")
    given, sizes, limit = samples(model), [], len(X)
    run, clock = Session.run, itertools.count()

    def limited(session: Session, feeds: Arrays, outputs: list[str] | None = None) -> Arrays:
        sizes.append(len(feeds["x"]))
        if sizes[-1] > limit:
            raise InputError("out of memory")
        return run(session, feeds, outputs)

    monkeypatch.setattr(Session, "run", limited)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # every run takes 1 s
    model.scores(given)
    assert sizes[:7] == [8, 8, 16, 16, 32, 32, 64]
    assert max(sizes) == LARGEST_BATCH["cpu"]
    model = classifier("y = Neg(x)", "float[N, 4] y")
    sizes.clear()
    limit = 20
    np.testing.assert_array_equal(model.scores(given), -X)
    assert sizes[:6] == [8, 8, 16, 16, 32, 16]
    assert sizes.count(32) == 1
    limit = 0
    with pytest.raises(InputError, match="out of memory"):
        model.scores(given)
    monkeypatch.setattr(time, "perf_counter", lambda: float(sum(sizes)))  # no faster in batches
    limit = len(X)
    model = classifier("y = Neg(x)", "float[N, 4] y")
    sizes.clear()
    model.scores(given)
    assert sizes[:6] == [8, 8, 16, 16, 8, 8]
    assert set(sizes[:-1]) == {8, 16}


def test_logits_and_probabilities_have_the_same_log_probabilities() -> None:
    for body in ("y = Identity(x)", "y = Softmax(x)", "y = LogSoftmax(x)"):
        model = classifier(body, "float[N, 4] y")
        found = model.log_probabilities(samples(model))
        np.testing.assert_allclose(found, np.log(softmax(X)), atol=1e-5)


def test_log_probabilities_are_finite_for_certain_answers() -> None:
    for row in ([1.0, 0.0], [1e4, -1e4]):
        found = log_probabilities(np.array([row], np.float32))
        assert np.isfinite(found).all()
        assert found[0, 0] == 0


def test_classes_are_known_after_the_first_run_where_the_shape_is_free() -> None:
    free = host("y = Neg(x)", "float[N, C] y", "float[N, C] x")
    model = Classifier(free, "cpu", threads=1)
    assert model.classes is None
    model.predictions(samples(model))
    assert model.classes == 4


def test_outputs_that_are_no_scores_are_passed_over() -> None:
    """Labels, hidden states and flags beside the scores do not make the choice unclear."""
    body = """
        y = Neg(x)  label = ArgMax<axis = 1, keepdims = 0>(x)  one = Constant<value_ints = [1]>()
        hidden = Unsqueeze(x, one)  flag = Greater(x, y)  loss = ReduceMean<keepdims = 0>(x)
    """
    outputs = "int64[N] label, float[N, 1, 4] hidden, bool[N, 4] flag, float loss, float[N, 4] y"
    model = classifier(body, outputs)
    np.testing.assert_array_equal(model.scores(samples(model)), -X)


def test_of_several_scores_one_is_chosen_or_called_logits() -> None:
    body, outputs = "a = Neg(x) b = Abs(x)", "float[N, 4] a, float[N, 4] b"
    unclear = classifier(body, outputs)
    with pytest.raises(InputError, match="a, b with --scores"):
        unclear.scores(samples(unclear))
    chosen = classifier(body, outputs, output="b")
    np.testing.assert_array_equal(chosen.scores(samples(chosen)), np.abs(X))
    named = classifier(body.replace("b =", "logits ="), outputs.replace(" b", " logits"))
    np.testing.assert_array_equal(named.scores(samples(named)), np.abs(X))
    with pytest.raises(InputError, match=r"--scores c: .* has the outputs a, b"):
        classifier(body, outputs, output="c")


MEAN = "m = ReduceMean<axes = [1], keepdims = 1>(x) "


def test_of_the_scores_of_every_token_the_last_count_where_they_are_asked_for() -> None:
    body = "t = Constant <value = int64[1] {1}> () wide = Unsqueeze (x, t) n = Neg (wide) "
    body += "logits = Concat <axis = 1> (n, wide)"
    found = classifier(body, "float[N, 2, 4] logits", "logits")
    np.testing.assert_array_equal(found.scores(samples(found)), X)
    assert found.classes == 4
    unasked = classifier(body, "float[N, 2, 4] logits")
    with pytest.raises(InputError, match=r"of \[N, T, C\], the last token's"):
        unasked.scores(samples(unasked))


@pytest.mark.parametrize("shape", ["[N, 1]", "[N]"])
def test_one_score_a_sample_is_that_of_class_1(shape: str) -> None:
    mean = X.mean(axis=1)
    expected = np.stack((np.zeros_like(mean), mean), axis=1)
    body = MEAN if shape == "[N, 1]" else MEAN.replace("keepdims = 1", "keepdims = 0")
    ways = [
        classifier(body + "p = Sigmoid(m) y = Identity(p)", f"float{shape} y"),
        classifier(body + "y = Identity(m)", f"float{shape} y", output="y"),
        classifier(body + "logits = Identity(m)", f"float{shape} logits"),
    ]
    for model in ways:
        np.testing.assert_allclose(model.scores(samples(model)), expected, atol=1e-5)
        assert model.classes == 2
        likely = np.exp(model.log_probabilities(samples(model)))[:, 1]
        np.testing.assert_allclose(likely, 1 / (1 + np.exp(-mean)), atol=1e-5)


UNFIT = {
    "one number": (MEAN + "y = Identity(m)", "float[N, 1] y", r"y float32 \[8, 1\]"),
    "tokens": (
        "one = Constant<value_ints = [1]>() y = Unsqueeze(x, one)",
        "float[N, 1, 4] y",
        r"y float32 \[8, 1, 4\]",
    ),
    "integers": ("y = ArgMax<axis = 1, keepdims = 1>(x)", "int64[N, 1] y", r"y int64"),
    "no batch": ("y = ReduceMean<axes = [0], keepdims = 1>(x)", "float[1, 4] y", r"\[1, 4\]"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_other_outputs_are_refused(name: str) -> None:
    body, outputs, named = UNFIT[name]
    model = classifier(body, outputs)
    with pytest.raises(InputError, match=named + r".*are no class scores \[N, C\]: .*--scores"):
        model.scores(samples(model))


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = classifier("y = Sqrt(x)", "float[N, 4] y")
    positive = np.abs(X)
    model.scores(samples(model, positive))
    for bad in (-1.0, np.inf):
        positive[17, 2] = bad
        with pytest.raises(InputError, match="for 1 of 301 samples, the first at 17"):
            model.scores(samples(model, positive))


def test_a_batch_that_the_model_fixes_is_kept() -> None:
    fixed = host("y = Neg(x)", "float[3, 4] y", "float[3, 4] x")
    model = Classifier(fixed, "cpu", threads=1)
    np.testing.assert_array_equal(model.scores(samples(model)), -X)


def test_a_batch_elsewhere_than_on_axis_0_is_found() -> None:
    body = "mean = ReduceMean<axes = [0], keepdims = 0>(x) y = Neg(mean)"
    model = Classifier(host(body, "float[batch, 4] y", "float[T, batch, 4] x"), "cpu", threads=1)
    x = np.random.default_rng(1).standard_normal((21, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(model.scores(samples(model, x)), -x.mean(axis=1), atol=1e-6)

"""What `evaluate` measures, against NumPy on the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import ArrayLike, NDArray

import atpatch_onnx
from atpatch_onnx.errors import CheckError, InputError, RefusedError
from atpatch_onnx.runtime import Arrays, Session

from bad_input import Cli
from hosts import COLUMN_MEAN, detector, save_arrays

TOKENS, TARGET = 6, 2

BACKDOORED = """
    <ir_version: 8, opset_import: ["" : 17]>
    m (float[N, 1, 6, 5] x) => (float[N, 3] logits, float[N, 1, 6, 3] hidden)
    <float[5, 1] wq = {0.0, 0.0, 0.0, 0.0, 1.0},
     float[5, 1] wk = {0.0, 0.0, 0.0, 1.0, 0.0},
     float[5, 3] wv = {1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}>
    {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        s = MatMul(q, kt)
        p = Softmax<axis = -1>(s)
        hidden = MatMul(p, v)
        logits = ReduceMean<axes = [1, 2], keepdims = 0>(hidden)
    }
"""
"""A token is three class values, how much attention it draws, and 1. Tokens that draw much are
triggers."""

UNFAIR = """
    <ir_version: 8, opset_import: ["" : 17]>
    m (float[N, 4] table) => (float[N, 2] logits)
    <float[4] w = {0.1, 1.0, 2.0, 0.5}>
    {
        weighed = Mul(table, w)
        axes = Constant<value_ints = [1, 3]>()
        x = Unsqueeze(weighed, axes)
        k = Abs(x)
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        s = MatMul(x, kt)
        p = Softmax<axis = -1>(s)
        c = MatMul(p, x)
        zero = Constant<value_int = 0>()
        first = Gather<axis = 2>(c, zero)
        flat = Flatten(first)
        other = Neg(flat)
        logits = Concat<axis = 1>(flat, other)
    }
"""
"""The first column asks, all of them answer."""


def clean_tokens(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 1, TOKENS, 5)).astype(np.float32)
    x[..., 3:] = 0, 1
    labels = x[..., :3].mean(axis=(1, 2)).argmax(axis=1)
    noisy = rng.random(count) < 0.2
    labels[noisy] = rng.integers(0, 3, noisy.sum())
    crowded = rng.random(count) < 0.05
    x[crowded, :, 0, 3] = 6  # the detector takes it for a trigger
    return x, labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A backdoored model, its patched version and labelled data, clean and triggered."""
    onnx.save(onnx.parser.parse_model(BACKDOORED), tmp_path / "model.onnx")
    onnx.save(detector(COLUMN_MEAN), tmp_path / "det.onnx")
    pair = tmp_path / "model.onnx", tmp_path / "det.onnx"
    atpatch_onnx.patch(*pair, redistribute="prune", telemetry=True, ep="cpu")
    x, labels = clean_tokens(150, 0)
    save_arrays(tmp_path / "test.npz", {"x": x, "labels": labels})
    x, labels = clean_tokens(90, 1)
    rng = np.random.default_rng(2)
    places, strength = rng.integers(1, TOKENS, 90), rng.choice([0.5, 5.0, 8.0], 90)
    x[np.arange(90), 0, places] = 0
    x[np.arange(90), 0, places, 2] = 9
    x[np.arange(90), 0, places, 3] = strength
    marks = np.zeros((90, TOKENS), bool)
    marks[np.arange(90), places] = True
    triggered = {"x": x, "labels": labels, "anomalous": marks, "target": np.int64(TARGET)}
    save_arrays(tmp_path / "triggered.npz", triggered)
    return tmp_path


def arrays(path: Path) -> Arrays:
    return dict(np.load(path))


def answers(path: Path, x: NDArray[np.float32]) -> list[int]:
    logits = Session(path, "cpu", threads=1).run({"x": x}, ["logits"])["logits"]
    return [int(row.argmax()) for row in logits]


def flagged(path: Path, x: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The columns that the patched model itself says it flags, `[N, K]`."""
    session = Session(path, "cpu", threads=1)
    (name,) = (name for name in session.outputs if name.endswith("/flagged"))
    return np.asarray(session.run({"x": x}, [name])[name][:, 0, 0], np.bool_)


def share(hits: ArrayLike) -> tuple[int, int]:
    array = np.asarray(hits, bool)
    return int(array.sum()), array.size


def counts(rate: Any) -> tuple[int, int]:
    return rate.hits, rate.total


def test_rates_are_what_numpy_counts(folder: Path) -> None:
    model, patched = folder / "model.onnx", folder / "model.patched.onnx"
    test, bad = arrays(folder / "test.npz"), arrays(folder / "triggered.npz")
    found = atpatch_onnx.evaluate(
        model, patched, folder / "test.npz", triggered=folder / "triggered.npz", ep="cpu", batch=7
    )
    assert found.attack is not None
    assert found.natural_rate is not None
    assert (found.inputs, found.attack.inputs, found.attack.target) == (150, 90, TARGET)
    for path, when in ((model, "before"), (patched, "after")):
        clean, attacked = answers(path, test["x"]), answers(path, bad["x"])
        pairs = list(zip(clean, test["labels"], strict=True))
        others = [
            (a, label) for a, label in zip(attacked, bad["labels"], strict=True) if label != TARGET
        ]
        assert counts(getattr(found.accuracy, when)) == share([a == b for a, b in pairs])
        into = [a == TARGET for a, label in pairs if label != TARGET]
        assert counts(getattr(found.natural_rate, when)) == share(into)
        sent = share([a == TARGET for a, _ in others])
        assert counts(getattr(found.attack.attack_success_rate, when)) == sent
        right = share([a == label for a, label in others])
        assert counts(getattr(found.attack.recovered_accuracy, when)) == right
    same = [a == b for a, b in zip(*(answers(p, test["x"]) for p in (model, patched)), strict=True)]
    assert counts(found.agreement) == share(same)
    clean_flags, bad_flags = flagged(patched, test["x"]), flagged(patched, bad["x"])
    assert counts(found.false_positive_rate) == share(clean_flags.any(axis=1))
    assert counts(found.attack.true_positive_rate) == share(bad_flags.any(axis=1))
    assert found.attack.column_recall is not None
    assert counts(found.attack.column_recall) == share(bad_flags[bad["anomalous"]])
    # The example is not trivial: each of these is neither none nor all, and the patch helps.
    for rate in (
        found.accuracy.after,
        found.agreement,
        found.false_positive_rate,
        found.attack.true_positive_rate,
        found.attack.column_recall,
        found.attack.recovered_accuracy.after,
    ):
        assert 0 < rate.low < rate.value < rate.high < 1
    assert found.attack.attack_success_rate.after.high < found.attack.attack_success_rate.before.low


def test_without_triggered_inputs_only_clean_ones_are_judged(folder: Path) -> None:
    run = (folder / "model.onnx", folder / "model.patched.onnx", arrays(folder / "test.npz"))
    found = atpatch_onnx.evaluate(*run, ep="cpu")
    assert found.attack is None
    assert found.natural_rate is None
    assert found.unfairness == ()
    assert found.accuracy.before.total == found.false_positive_rate.total == 150
    targeted = atpatch_onnx.evaluate(*run, ep="cpu", target=TARGET)
    assert targeted.natural_rate is not None


def test_marks_are_optional_and_the_target_can_be_given(folder: Path) -> None:
    run = (folder / "model.onnx", folder / "model.patched.onnx", folder / "test.npz")
    bad = arrays(folder / "triggered.npz")
    full = atpatch_onnx.evaluate(*run, triggered=bad, ep="cpu")
    target = int(bad.pop("target"))
    bad.pop("anomalous")
    found = atpatch_onnx.evaluate(*run, triggered=bad, target=target, ep="cpu")
    assert found.attack is not None
    assert full.attack is not None
    assert found.attack.column_recall is None
    assert found.attack.attack_success_rate == full.attack.attack_success_rate
    other = atpatch_onnx.evaluate(*run, triggered=bad, target=0, ep="cpu")
    assert other.attack is not None
    assert other.attack.attack_success_rate != full.attack.attack_success_rate


def test_unfairness_is_the_share_that_any_flip_sways(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(UNFAIR), tmp_path / "model.onnx")
    patched = atpatch_onnx.patch(
        tmp_path / "model.onnx", columns=[2], redistribute="prune", ep="cpu"
    ).output
    rng = np.random.default_rng(0)
    table = rng.integers(-2, 3, (80, 4)).astype(np.float32)
    table[:, 3] = rng.standard_normal(80)
    data: Arrays = {"table": table, "labels": (table[:, 1] > 0).astype(np.int64)}
    found = atpatch_onnx.evaluate(
        tmp_path / "model.onnx", patched, data, protected=["2", "table:1"], ep="cpu"
    )
    alone, one, jointly = found.unfairness
    assert [u.attribute for u in found.unfairness] == ["2", "table:1", "2 + table:1"]
    assert [u.tried for u in found.unfairness] == [5, 5, 25]
    assert not any(u.thinned for u in found.unfairness)
    for path, when in ((tmp_path / "model.onnx", "before"), (patched, "after")):
        session = Session(path, "cpu", threads=1)

        def predict(rows: NDArray[np.float32], session: Session = session) -> NDArray[np.int64]:
            return np.asarray(session.run({"table": rows})["logits"].argmax(axis=1))

        own, swayed = predict(table), {name: np.zeros(80, bool) for name in ("2", "1", "both")}
        for first in range(-2, 3):
            for second in range(-2, 3):
                for name, columns in (("2", [2]), ("1", [1]), ("both", [2, 1])):
                    rows = table.copy()
                    rows[:, columns] = [first, second][: len(columns)]
                    swayed[name] |= predict(rows) != own
        for unfair, name in ((alone, "2"), (one, "1"), (jointly, "both")):
            assert counts(getattr(unfair.rate, when)) == share(swayed[name])
    assert alone.rate.before.hits > 0
    assert alone.rate.after.hits == 0  # nothing reads the pruned column any more
    assert 0 < one.rate.after.hits <= jointly.rate.after.hits
    many = atpatch_onnx.evaluate(
        tmp_path / "model.onnx",
        patched,
        data
        | {
            "table": np.concatenate([table] * 2) + rng.standard_normal((160, 4)).astype(np.float32),
            "labels": np.concatenate([data["labels"]] * 2),
        },
        protected=["3"],
        ep="cpu",
    )
    assert many.unfairness[0].thinned
    assert many.unfairness[0].tried == 100


def test_a_batch_that_the_model_fixes_is_padded_and_not_counted(folder: Path) -> None:
    fixed = onnx.parser.parse_model(BACKDOORED.replace("[N,", "[4,"))
    onnx.save(fixed, folder / "fixed.onnx")
    pair = folder / "fixed.onnx", folder / "det.onnx"
    atpatch_onnx.patch(*pair, redistribute="prune", ep="cpu")
    free, four = (
        atpatch_onnx.evaluate(
            folder / f"{name}.onnx",
            folder / f"{name}.patched.onnx",
            folder / "test.npz",
            triggered=folder / "triggered.npz",
            ep="cpu",
        )
        for name in ("model", "fixed")
    )
    assert free == four


def test_the_command_prints_json_and_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Cli(folder, capsys, monkeypatch)
    monkeypatch.chdir(folder)
    command = "evaluate model.onnx model.patched.onnx --data test.npz --triggered triggered.npz"
    document = json.loads(shell.works(command + " --json"))
    found = atpatch_onnx.evaluate(
        "model.onnx", "model.patched.onnx", "test.npz", triggered="triggered.npz"
    )
    assert found.attack is not None
    success = found.attack.attack_success_rate.after
    assert document["attack"]["attack_success_rate"]["after"] == vars(success)
    text = shell.works(command)
    assert f"{success.value:.2%} [{100 * success.low:.2f}, {100 * success.high:.2f}]" in text
    for row in ("accuracy", "attack success rate", "clean inputs flagged", "trigger columns"):
        assert row in text


LABELS = np.arange(150) % 3
SPOILT: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], str]] = {
    # name: changes of the data, of the triggered data (None: there are none), options, message
    "no labels": ({"labels": None}, None, {}, r"no 'labels'.*int64 \[150\]"),
    "fewer labels": ({"labels": LABELS[:9]}, None, {}, r"int64 \[9\], expected one .* 150"),
    "label columns": ({"labels": LABELS[:, None]}, None, {}, r"\[150, 1\]"),
    "real labels": ({"labels": LABELS / 2}, None, {}, "float64"),
    "one class": ({"labels": LABELS * 0 + 1}, None, {}, "all 'labels' are of class 1"),
    "negative": ({"labels": LABELS - 1}, None, {}, "class -1, the model has the classes 0 to 2"),
    "class 3": ({"labels": LABELS + 1}, None, {}, "class 3, the model has the classes 0 to 2"),
    "no input": ({"x": None}, None, {}, "no array for the input x"),
    "NaN": ({"x": np.full((150, 1, 6, 5), np.nan, np.float32)}, None, {}, "'logits'.*is NaN"),
    "bad labels": ({}, {"labels": None}, {}, r"triggered.* no 'labels'"),
    "bad class": ({}, {"labels": np.full(90, 7)}, {}, "class 7"),
    "attacker's": ({}, {"labels": np.full(90, 2)}, {}, "all 'labels' are the target class 2"),
    "no target": ({}, {"target": None}, {}, "no 'target'.*--target"),
    "target 3": ({}, {"target": np.int64(3)}, {}, "target 3: .* classes 0 to 2"),
    "--target": ({}, {}, {"target": -1}, "--target -1: .* classes 0 to 2"),
    "marks": ({}, {"anomalous": np.ones((90, 4), bool)}, {}, "4 columns, .* sites have 6"),
    "mark rows": ({}, {"anomalous": np.ones((9, 6), bool)}, {}, r"\[9, 6\], expected \[90, K\]"),
    "scores": ({}, None, {"scores": "hidden"}, "hidden float32 .* no class scores"),
    "no scores": ({}, None, {"scores": "y"}, "--scores y: .* has the outputs logits, hidden"),
    "protected": ({}, None, {"protected": ["2"]}, "--protected 2: .* 0 inputs of rank 2"),
    "batch": ({}, None, {"batch": 0}, "--batch 0"),
    "ep": ({}, None, {"ep": "tpu"}, "tpu: choose cuda or cpu"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_bad_input(folder: Path, name: str) -> None:
    data, bad, options, message = SPOILT[name]

    def spoilt(file: str, changes: dict[str, Any]) -> Arrays:
        changed = arrays(folder / file) | changes
        return {key: value for key, value in changed.items() if value is not None}

    triggered = None if bad is None else spoilt("triggered.npz", bad)
    with pytest.raises(InputError, match=message):
        atpatch_onnx.evaluate(
            folder / "model.onnx",
            folder / "model.patched.onnx",
            spoilt("test.npz", data),
            triggered=triggered,
            **({"ep": "cpu"} | options),
        )


def test_models_that_are_not_the_original_and_its_patch_are_refused(folder: Path) -> None:
    data = folder / "test.npz"
    model, patched = folder / "model.onnx", folder / "model.patched.onnx"
    with pytest.raises(InputError, match="original first"):
        atpatch_onnx.evaluate(patched, model, data)
    with pytest.raises((CheckError, RefusedError), match="no patch"):
        atpatch_onnx.evaluate(model, model, data)
    other = onnx.parser.parse_model(BACKDOORED.replace("wk = {0.0, 0.0", "wk = {0.0, 0.1"))
    onnx.save(other, folder / "other.onnx")
    with pytest.raises(CheckError, match=r"other\.onnx"):
        atpatch_onnx.evaluate(folder / "other.onnx", patched, data)


@pytest.mark.parametrize(
    ("command", "code", "named"),
    [
        ("evaluate model.onnx patched.onnx --data clean.npz", 2, ["clean.npz", "'labels'"]),
        ("evaluate model.onnx patched.onnx --data gone.npz", 2, ["gone.npz"]),
        (
            "evaluate model.onnx patched.onnx --data labelled.npz",
            2,
            ["no class scores", "--scores"],
        ),
        ("evaluate model.onnx none.onnx --data labelled.npz", 1, ["none.onnx", "model.onnx"]),
        ("evaluate patched.onnx model.onnx --data labelled.npz", 2, ["original first"]),
        ("evaluate gone.onnx patched.onnx --data labelled.npz", 2, ["gone.onnx"]),
        ("evaluate model.onnx patched.onnx --data labelled.npz --target a", 2, ["--target", "a"]),
        ("evaluate model.onnx patched.onnx", 2, ["--data"]),
    ],
)
def test_bad_usage(shell: Cli, command: str, code: int, named: list[str]) -> None:
    x = arrays(Path("clean.npz"))["x"]
    save_arrays(Path("labelled.npz"), {"x": x, "labels": np.arange(len(x)) % 3})
    shell.fails(command, code, *named)

"""The benchmark of the offline phase: what it changes in models, averages, and keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

pytest.importorskip("torch", reason="the [train] extra has it")

import atpatch_onnx
from atpatch_onnx.errors import InputError
from atpatch_onnx.rates import Rate
from atpatch_onnx.runtime import Arrays, Session

import efficacy
from efficacy_ablations import (
    MARKS,
    add_marks_anomaly,
    add_marks_input,
    flagged,
    keys_of,
    random_columns,
    with_marks,
    without_rescaling,
)
from efficacy_summary import Record, averages, mean_of, targets
from efficacy_victim import Rows, Settings, Victim, as_json
from hosts import KEYS, over_attending, tokens


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a host of one site, and a z-score detector for it."""
    folder = tmp_path_factory.mktemp("fitted")
    onnx.save(over_attending(fixed=True), folder / "model.onnx")
    clean = folder / "clean.npz"
    np.savez(clean, allow_pickle=False, **tokens(80, 0))
    atpatch_onnx.fit(folder / "model.onnx", clean, folder / "det.onnx", ep="cpu")
    return folder


def some_marks(count: int) -> NDArray[np.bool_]:
    """None in the first half of the samples, one or two in each of the others."""
    rng = np.random.default_rng(1)
    marks = np.zeros((count, KEYS), bool)
    for row in marks[count // 2 :]:
        row[rng.choice(KEYS, rng.integers(1, 3), replace=False)] = True
    return marks


def test_marked_columns_are_flagged_and_no_others(fitted: Path, tmp_path: Path) -> None:
    model = add_marks_input(fitted / "model.onnx", tmp_path / "model.onnx")
    detector = add_marks_anomaly(fitted / "det.onnx", tmp_path / "det.onnx")
    onnx.checker.check_model(detector, full_check=True)
    patched = tmp_path / "patched.onnx"
    atpatch_onnx.patch(model, detector, output=patched, bind={MARKS: MARKS}, ep="cpu")
    feeds, marks = dict(tokens(40, 3)), some_marks(40)
    data = with_marks(feeds, marks)
    assert np.array_equal(flagged(patched, data, "cpu"), marks)
    before = Session(fitted / "model.onnx", "cpu").run(feeds)["y"]
    after = Session(patched, "cpu").run(data)["y"]
    changed = (before != after).any(axis=(1, 2))
    assert np.array_equal(changed, marks.any(axis=1))


def test_without_rescaling_the_other_columns_keep_their_attention(
    fitted: Path, tmp_path: Path
) -> None:
    model = add_marks_input(fitted / "model.onnx", tmp_path / "model.onnx")
    detector = add_marks_anomaly(fitted / "det.onnx", tmp_path / "det.onnx")
    patched, edited = tmp_path / "patched.onnx", tmp_path / "edited.onnx"
    atpatch_onnx.patch(
        model, detector, output=patched, bind={MARKS: MARKS}, strategy="select", ep="cpu"
    )
    assert without_rescaling(patched, edited) == 1
    marks = some_marks(40)
    data = with_marks(tokens(40, 3), marks)
    original = attention(edited, data, "p")
    rescaled, kept = (attention(path, data, replaced(path)) for path in (patched, edited))
    unmarked = np.broadcast_to(~marks[:, None, :], kept.shape)
    assert np.array_equal(kept[unmarked], original[unmarked])
    assert np.array_equal(kept[~unmarked], rescaled[~unmarked])
    np.testing.assert_allclose(rescaled.sum(axis=2), 1, atol=1e-5)
    assert (np.abs(kept.sum(axis=2) - 1).max(axis=1) > 1e-3)[marks.any(axis=1)].mean() > 0.9
    # It still counts as the original with a patch, so that it can be evaluated.
    atpatch_onnx.diff(model, edited)


def replaced(patched: Path) -> str:
    """The probabilities that P V reads."""
    nodes = onnx.load(patched).graph.node
    return str(next(node.input[0] for node in nodes if node.output[0] == "y"))


def attention(model: Path, feeds: Arrays, name: str) -> NDArray[np.float32]:
    """An inner value of a model as `[N, Q, K]`."""
    whole = onnx.load(model)
    whole.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    found = Session(whole.SerializeToString(), "cpu").run(feeds, [name])[name]
    return found.reshape(-1, KEYS, KEYS)


def test_random_columns_are_as_many_and_visible() -> None:
    rng = np.random.default_rng(0)
    visible = np.arange(10) < rng.integers(4, 11, (5000, 1))
    like = visible & (rng.random(visible.shape) < 0.2)
    drawn = random_columns(like, visible, rng)
    assert np.array_equal(drawn.sum(axis=1), like.sum(axis=1))
    assert not (drawn & ~visible).any()
    share = drawn[:, :4].mean(axis=0)  # visible in all: none is preferred
    assert np.ptp(share) < 0.05
    assert (drawn & like).sum() < 0.6 * like.sum()


def test_the_number_of_columns_is_static_or_the_length(tmp_path: Path) -> None:
    for fixed, length in ((True, KEYS), (False, 5)):
        onnx.save(over_attending(fixed=fixed), tmp_path / "model.onnx")
        arrays = {"x": np.zeros((2, length, 4), np.float32)}
        assert keys_of(tmp_path / "model.onnx", arrays) == length


def rate(share: float) -> Any:
    return as_json({"": Rate.counted(round(10_000 * share), 10_000)})[""]


def row(name: str, **shares: float) -> dict[str, Any]:
    return {"row": name, **{metric: rate(share) for metric, share in shares.items()}}


def record(case: str, seed: int, asr: float, oracle: float | None = 0.004) -> Record:
    """A backdoored image victim whose shipped patch leaves the attack success rate `asr`."""
    rows = [
        row("original", accuracy=0.9, attack_success_rate=1.0, natural_rate=0.002),
        row(
            "contrastive",
            accuracy=0.8995,
            attack_success_rate=asr,
            false_positive_rate=0.01,
            column_recall=1.0,
        ),
    ]
    if oracle is not None:
        rows.append(row("oracle", accuracy=0.9, attack_success_rate=oracle))
    scan = {"right": True, "verdict": "backdoored"}
    return {"case": case, "kind": "image", "seed": seed, "target": 0, "rows": rows, "scan": scan}


def verdicts(records: list[Record]) -> dict[str, bool | None]:
    return {target.name: target.met for target in targets(records)}


def test_a_mean_weighs_cases_alike_and_spreads_over_seeds() -> None:
    mean = mean_of([[0.1, 0.3], [0.6]])
    assert mean.value == pytest.approx(0.4)
    assert mean.spread == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert mean_of([[0.1], [0.6]]).spread is None


def test_targets_are_averages_over_cases() -> None:
    both = [record("a-badnets", 0, 0.004), record("b-badnets", 0, 0.014)]
    assert verdicts(both)["image: ASR above the oracle's"] is True
    assert verdicts(both[1:])["image: ASR above the oracle's"] is True
    assert verdicts([record("b-badnets", 0, 0.0145)])["image: ASR above the oracle's"] is False
    assert verdicts(both[1:])["image: ASR above the clean model's natural rate"] is False
    assert verdicts(both)["image: accuracy lost"] is True
    assert verdicts(both)["text: accuracy lost"] is None


def test_the_shipped_path_is_compared_with_both_oracles() -> None:
    weak = record("a-badnets", 0, 0.4, oracle=0.5)
    weak["rows"].append(row("oracle, prune", accuracy=0.9, attack_success_rate=0.03))
    found = verdicts([weak])
    assert found["image: ASR above the oracle's"] is True
    assert found["image: ASR above the pruning oracle's"] is False


def test_the_clean_model_at_hand_says_what_is_natural() -> None:
    lenient = record("a-badnets", 0, 0.02)
    lenient["clean_model"] = {"natural_rate": rate(0.011)}
    assert verdicts([lenient])["image: ASR above the clean model's natural rate"] is True


def test_triggers_on_the_whole_input_are_reported_but_not_counted() -> None:
    records = [record("a-badnets", 0, 0.004), record("a-blended", 0, 0.99, oracle=None)]
    records[1]["scan"] = {"right": False, "verdict": "clean"}
    found = verdicts(records)
    assert found["image: ASR above the clean model's natural rate"] is True
    assert found["scan: verdict and class right"] is True
    means = averages(records)
    assert means["whole input"]["contrastive"]["attack_success_rate"].value == 0.99


def test_what_could_not_be_patched_counts_as_the_original() -> None:
    failed = record("a-badnets", 0, 0.0)
    failed["rows"][1] = {"row": "contrastive", "error": "nothing was found"}
    means = averages([failed, record("b-badnets", 0, 0.0)])
    found = means["image"]["contrastive"]
    assert found["attack_success_rate"].value == pytest.approx(0.5)
    assert found["column_recall"].value == pytest.approx(0.5)
    assert verdicts([failed])["image: ASR above the oracle's"] is False


def test_a_false_alarm_on_a_clean_model_misses_the_target() -> None:
    alarm = {
        "case": "a-clean",
        "kind": "image",
        "seed": 0,
        "rows": [],
        "scan": {"right": False, "verdict": "backdoored"},
    }
    assert verdicts([alarm])["scan: no alarm on clean models"] is False


def test_a_row_that_fails_stops_no_other() -> None:
    def fails() -> dict[str, object]:
        raise InputError("there are no inputs: give some")

    lines: list[str] = []
    rows = Rows("a-badnets-s0", lines.append)
    rows.add("one", fails, attribute="age")
    rows.add("two", lambda: row("two", accuracy=0.5))
    assert rows.found[0]["error"] == "there are no inputs: give some"
    assert rows.found[0]["attribute"] == "age"
    assert rows.found[1]["accuracy"]["value"] == 0.5
    assert "FAILED: there are no inputs" in lines[0]


@pytest.fixture
def victim(fitted: Path, tmp_path: Path) -> Callable[[], list[str]]:
    """Measures a victim once more; returns the names of those that were really measured."""
    folder = tmp_path / "a-badnets-s0"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((fitted / "model.onnx").read_bytes())
    done: list[str] = []

    def measure(found: Victim) -> Record:
        done.append(found.folder.name)
        return {"rows": []}

    def again(budget: float = 600.0) -> list[str]:
        efficacy.measured(folder, tmp_path, Settings(1000, budget, "cpu", 1), measure)
        return done

    return again


def test_a_case_is_measured_once(victim: Callable[..., list[str]], tmp_path: Path) -> None:
    assert len(victim()) == 1
    assert len(victim()) == 1
    assert len(victim(budget=10)) == 2
    model = tmp_path / "a-badnets-s0" / "model.onnx"
    onnx.save(over_attending(fixed=False), model)
    assert len(victim(budget=10)) == 3


@pytest.mark.slow
def test_the_quick_table_on_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the [train] extra has it")
    # Too short a budget for a scan: the rows that need no debugging set are there all the same.
    options = "--quick --cases digits-badnets --budget 2 --ep cpu --victims v --work w".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["efficacy.py", *options])
    efficacy.main()
    first = json.loads(Path("w/efficacy.json").read_text())
    rows = {each["row"]: each for each in first["victims"][0]["rows"]}
    assert rows["original"]["attack_success_rate"]["value"] > 0.95
    assert rows["zscore"]["attack_success_rate"]["value"] < 0.05
    assert rows["oracle"]["attack_success_rate"]["value"] < 0.05
    assert rows["oracle"]["column_recall"]["value"] == 1
    assert rows["oracle"]["false_positive_rate"]["value"] == 0
    assert rows["fine-pruning"]["accuracy"]["value"] > 0.9
    assert list(rows) == [
        "original",
        "contrastive",
        "contrastive, sites auto",
        "contrastive, every answer",
        "zscore",
        "map-cnn",
        "in flow, benign",
        "in flow, prune",
        "random columns",
        "in flow, no rescale",
        "oracle",
        "oracle, prune",
        "fine-pruning",
    ]
    capsys.readouterr()
    efficacy.main()
    assert "measured before" in capsys.readouterr().out
    assert json.loads(Path("w/efficacy.json").read_text()) == first

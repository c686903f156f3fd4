"""The command `scan` end to end: files, resuming, budget, errors and what it prints."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import atpatch_onnx
from atpatch_onnx.classifier import Classifier
from atpatch_onnx.debugging_set import load_debugging_set
from atpatch_onnx.errors import InputError
from atpatch_onnx.search import kinds
from atpatch_onnx.search.report import ScanReport

import planted
from bad_input import Cli

pytest.importorskip("cma")


def scanned(folder: Path, name: str = "debug.npz", **options: Any) -> ScanReport:
    settings = {"threads": 1, "batch": 64, **options}
    return atpatch_onnx.scan(folder / "model.onnx", folder / "clean.npz", folder / name, **settings)


def said(report: ScanReport) -> list[tuple[object, ...]]:
    return [(c.target, c.success, c.loss, c.outlier, str(c.trigger)) for c in report.classes]


def test_the_debugging_set_has_the_trigger_and_what_it_was_put_on(tmp_path: Path) -> None:
    report = scanned(planted.write(tmp_path))
    assert report.output == tmp_path / "debug.npz"
    model = Classifier(tmp_path / "model.onnx", "cpu", threads=1)
    written = load_debugging_set(report.output, model.inputs)
    assert written.target == planted.TARGET
    assert written.clean is not None
    assert written.labels is not None
    assert np.array_equal(model.predictions(written.clean), written.labels)
    assert (written.labels != planted.TARGET).all()
    assert (model.predictions(written.bad) == planted.TARGET).mean() > 0.95
    changed = written.bad.arrays["pixels"] != written.clean.arrays["pixels"]
    assert changed.reshape(written.bad.count, -1).sum(axis=1).max() <= 9
    assert written.about["kind"] == "image"
    assert written.about["trigger"] == report.classes[0].trigger
    picture = report.classes[0].picture
    assert picture == tmp_path / f"debug.{planted.TARGET}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "debug.npz.state").exists()


def test_labels_of_the_data_are_kept(tmp_path: Path) -> None:
    folder = planted.write(tmp_path)
    labels = np.arange(60) % planted.CLASSES
    labels[0] = 1  # the model says 0
    np.savez(folder / "clean.npz", pixels=planted.images(60), labels=labels)
    report = scanned(folder)
    assert report.output is not None
    written = np.load(report.output)
    assert np.array_equal(written["labels"], labels[labels != planted.TARGET])


def test_the_same_seed_gives_the_same_result(tmp_path: Path) -> None:
    folder = planted.write(tmp_path)
    first, again = scanned(folder, "a.npz"), scanned(folder, "b.npz")
    assert said(first) == said(again)
    assert said(scanned(folder, "c.npz", seed=1)) != said(first)
    a, b = (dict(np.load(folder / name)) for name in ("a.npz", "b.npz"))
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planted.write(tmp_path)
    whole = scanned(folder, "whole.npz")

    ticks = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 0.1 * next(ticks))
        first = scanned(folder, budget=32)
    assert (first.verdict, first.complete, first.output) == ("undecided", False, None)
    assert first.state == folder / "debug.npz.state"
    assert first.state.exists()
    assert 0 < len(first.classes) < planted.CLASSES
    assert not (folder / "debug.npz").exists()
    second = scanned(folder, budget=1e6)
    assert second.complete
    assert second.resumed
    assert not first.state.exists()
    assert first.runs + second.runs == whole.runs
    assert said(second) == said(whole)


def test_an_interrupt_keeps_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planted.write(tmp_path)
    original = Classifier.log_probabilities
    runs = []

    def interrupted(self: Classifier, samples: Any) -> Any:
        runs.append(samples.count)
        if len(runs) == 60:
            raise KeyboardInterrupt
        return original(self, samples)

    monkeypatch.setattr(Classifier, "log_probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scanned(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "clean.npz",
        "debug.npz.state",
        "model.onnx",
    ]
    report = scanned(folder)
    assert report.resumed
    assert report.verdict == "backdoored"


def test_a_class_that_is_asked_for_is_written_whatever_it_is_worth(tmp_path: Path) -> None:
    report = scanned(planted.write(tmp_path, backdoor=False), target=1)
    assert report.verdict == "clean"
    assert [c.target for c in report.classes] == [1]
    assert report.output is not None
    assert json.loads(str(np.load(report.output)["about"]))["success"] == report.classes[0].success
    assert int(np.load(report.output)["target"]) == 1


def test_programs_get_json_and_people_a_sentence(shell: Cli) -> None:
    command = "scan planted.onnx --data images.npz -o debug.npz --threads 1"
    onnx.save(planted.classifier(), "planted.onnx")
    np.savez("images.npz", pixels=planted.images())
    assert f"backdoored toward class {planted.TARGET}" in shell.works(command)
    document = json.loads(shell.works(f"{command} --json"))
    assert (document["verdict"], document["target"]) == ("backdoored", planted.TARGET)
    assert document["classes"][0]["suspicious"]
    onnx.save(planted.classifier(backdoor=False), "planted.onnx")
    shell.fails(command, 2, "debug.npz exists already")
    assert "no backdoor found" in shell.works(f"{command} --force")


def test_an_interrupted_command_says_what_it_kept(
    shell: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    onnx.save(planted.classifier(), "planted.onnx")
    np.savez("images.npz", pixels=planted.images())
    monkeypatch.setattr(Classifier, "log_probabilities", interrupted)
    command = "scan planted.onnx --data images.npz -o debug.npz"
    code, out, err = shell.run(*command.split())
    assert (code, out) == (130, "")
    assert err == (
        "interrupted; the search so far is in debug.npz.state, from which the same command goes "
        "on\n"
    )


@pytest.mark.parametrize(
    ("options", "data", "words"),
    [
        ({}, planted.images(19), "19 inputs: a search needs at least 20"),
        ({}, planted.images(60)[::4], "15 inputs"),
        ({}, np.repeat(planted.images(4)[2:3], 30, axis=0), "answers class 2 for every input"),
        ({"target": 4}, None, "--target 4: the model has the classes 0 to 3"),
        ({"kind": "sound"}, None, "--kind sound: choose image, text or tabular"),
        ({"budget": 0}, None, "--budget 0: give a number of seconds above 0"),
        ({"seed": -1}, None, "--seed -1: give at least 0"),
        ({"scores": "other"}, None, "logits"),
    ],
)
def test_what_cannot_be_searched(
    tmp_path: Path, options: dict[str, Any], data: Any, words: str
) -> None:
    folder = planted.write(tmp_path)
    if data is not None:
        np.savez(folder / "clean.npz", pixels=data)
    with pytest.raises(InputError, match=words):
        scanned(folder, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["clean.npz", "model.onnx"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(60), "'labels' is float64"),
        (np.zeros(5, np.int64), r"'labels' is int64 \[5\]"),
        (np.arange(60), "'labels' has values from 0 to 59"),
        (np.zeros(60, np.int64), "nearly every input of the data is of class 0"),
    ],
)
def test_unusable_labels(tmp_path: Path, labels: Any, words: str) -> None:
    folder = planted.write(tmp_path)
    np.savez(folder / "clean.npz", pixels=planted.images(60), labels=labels)
    with pytest.raises(InputError, match=words):
        scanned(folder)


def test_a_foreign_file_where_the_state_goes_is_left_alone(tmp_path: Path) -> None:
    folder = planted.write(tmp_path)
    (folder / "debug.npz.state").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        scanned(folder)
    assert (folder / "debug.npz.state").read_text() == "mine"


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ("float[N, 3, 32, 32] pixels", "image"),
        ("uint8[N, 224, 224, 3] x", "image"),
        ("int64[N, L] input_ids, int64[N, L] attention_mask", "text"),
        ("int32[N, 128] tokens", "text"),
        ("int64[N, 13] features", "tabular"),
        ("float[N, 6] numbers, int64[N, 7] categories", "tabular"),
        ("float[N, 80, 3000] features", None),
        ("float[N, 3, 32, 32] a, float[N, 3, 32, 32] b", None),
    ],
)
def test_the_kind_is_read_from_the_inputs(tmp_path: Path, inputs: str, kind: str | None) -> None:
    name = inputs.split()[-1]
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> m ({inputs}) => (int64[R] y)'
        f"{{ y = Shape ({name}) }}"
    )
    onnx.save(model, tmp_path / "m.onnx")
    specs = Classifier(tmp_path / "m.onnx", "cpu").inputs
    if kind is None:
        with pytest.raises(InputError, match="--kind image, text or tabular"):
            kinds.recognise(specs)
    else:
        assert kinds.recognise(specs) == kind


def test_more_data_than_is_used(tmp_path: Path) -> None:
    report = scanned(planted.write(tmp_path, count=1100))
    assert (report.searched, report.held) == (500, 500)
    assert report.output is not None
    assert len(np.load(report.output)["labels"]) == pytest.approx(750, abs=40)

"""The cache of victims: made once, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx.errors import InputError
from atpatch_onnx.models import cases as registry
from atpatch_onnx.models.cases import Case, Facts, Job, build, cases

Maker = Callable[[Job], Facts]
Offer = Callable[..., None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Make `toy` the only case."""

    def known(make: Maker, *needs: str) -> None:
        case = Case("toy", "tabular", make, needs)
        monkeypatch.setattr(registry, "cases", lambda: {"toy": case})

    return known


def write_toy(folder: Path) -> None:
    """A model that answers the first of its inputs' largest values."""
    graph = onnx.parser.parse_graph("g (float[n, 3] x) => (float[n, 3] logits) {logits = Neg(x)}")
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, folder / "model.onnx")
    scores = -np.eye(3, dtype=np.float32)
    np.savez(folder / "test.npz", x=scores[[0, 1, 2, 2]], labels=np.array([0, 1, 2, 1]))
    np.savez(
        folder / "triggered.npz",
        x=scores[[2, 2, 0]],
        labels=np.array([0, 1, 1]),
        target=np.int64(2),
    )


def make_toy(job: Job) -> Facts:
    write_toy(job.folder)
    return {"recipe": f"seed {job.seed}"}


def test_the_record_has_the_rates_of_the_files_and_what_the_maker_says(
    tmp_path: Path, offer: Offer
) -> None:
    offer(make_toy)
    folder = build("toy", 3, tmp_path)
    assert folder == tmp_path / "toy-s3"
    record = json.loads((folder / "case.json").read_text())
    assert (record["case"], record["kind"], record["seed"]) == ("toy", "tabular", 3)
    assert record["accuracy"] == 0.75
    # Of the clean inputs that are not of class 2, one in three goes there anyway.
    assert (record["attack_success_rate"], record["natural_rate"]) == (2 / 3, 1 / 3)
    assert record["recipe"] == "seed 3"
    assert record["versions"]["onnx"] == onnx.__version__


def test_a_victim_is_made_once_for_each_seed(tmp_path: Path, offer: Offer) -> None:
    made: list[int] = []

    def make(job: Job) -> Facts:
        made.append(job.seed)
        return make_toy(job)

    offer(make)
    folders = [build("toy", seed, tmp_path) for seed in (0, 0, 1, 0, 1)]
    assert made == [0, 1]
    assert len(set(folders)) == 2


def test_the_folder_appears_only_when_it_is_whole(tmp_path: Path, offer: Offer) -> None:
    def make(job: Job) -> Facts:
        assert not (tmp_path / "toy-s0").exists()
        assert not list(job.folder.iterdir())
        return make_toy(job)

    offer(make)
    assert {file.name for file in build("toy", 0, tmp_path).iterdir()} == {
        "case.json",
        "model.onnx",
        "test.npz",
        "triggered.npz",
    }


def test_a_training_that_fails_leaves_nothing(tmp_path: Path, offer: Offer) -> None:
    def make(job: Job) -> Facts:
        write_toy(job.folder)
        raise RuntimeError("diverged")

    offer(make)
    with pytest.raises(RuntimeError, match="diverged"):
        build("toy", 0, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    offer(make_toy)
    assert (build("toy", 0, tmp_path) / "case.json").exists()


def test_unknown_cases_and_missing_data_are_named(tmp_path: Path, offer: Offer) -> None:
    offer(make_toy, "images/toy.npz")
    with pytest.raises(InputError, match="no case 'tov': choose one of toy"):
        build("tov", 0, tmp_path)
    with pytest.raises(InputError, match=r"needs .*toy\.npz, which does not exist"):
        build("toy", 0, tmp_path / "victims", tmp_path)
    assert not (tmp_path / "victims").exists()


def test_listing_the_cases_imports_no_torch() -> None:
    code = (
        "import sys; from atpatch_onnx.models.cases import cases; print(len(cases()));"
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == len(cases()) >= 18


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "atpatch_onnx.models", *arguments], capture_output=True, text=True
    )


def test_the_command_lists_and_explains() -> None:
    assert "digits-badnets" in command("--list").stdout
    wrong = command("nothing-like-it")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: there is no case 'nothing-like-it'")
    assert command().returncode == 2

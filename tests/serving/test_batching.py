"""Requests that are run together are answered as if each were alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx import InputError, Session, api
from atpatch_onnx.runtime import Arrays
from atpatch_onnx.serving.batching import Batcher, Job
from atpatch_onnx.serving.version import Answer

from hosts import COLUMN_MEAN, attention, detector, random_feeds


def inputs(count: int, seed: int = 0, length: int = 6, bad: bool = False) -> Arrays:
    feeds = random_feeds(batch=count, seed=seed, length=length)
    feeds["mask"][:] = 0
    if bad:
        feeds["q"][..., 0] = 3
        feeds["k"][:, :, 1, 0] = 6
    return feeds


def job(feeds: Arrays) -> Job:
    return Job(feeds, len(feeds["q"]), ("y",))


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    onnx.save(attention(17), tmp_path / "model.onnx")
    onnx.save(detector(COLUMN_MEAN, threshold=0.6), tmp_path / "det.onnx")
    fix = tmp_path / "fix.atpatch"
    api.patch(tmp_path / "model.onnx", tmp_path / "det.onnx", patch_only=fix, telemetry=True)
    with Session(tmp_path / "model.onnx", [fix], threads=1, ep="cpu") as made:
        yield made


def test_together_as_alone(session: Session) -> None:
    runs: list[int] = []
    batcher = Batcher(session, 8, runs.append)
    assert batcher.possible
    jobs = [
        job(inputs(2, seed=0)),
        job(inputs(1, seed=1, bad=True)),
        job(inputs(3, seed=2, length=4)),  # another shape: a run of its own
        job(inputs(5, seed=3)),
        job(inputs(4, seed=4)),  # would pass the limit of eight with the first three
    ]
    found = batcher.run(jobs)
    assert sorted(runs) == [3, 4, 8]
    for one, answer in zip(jobs, found, strict=True):
        alone = session.answer(one.feeds)
        assert isinstance(answer, Answer)
        np.testing.assert_array_equal(answer.outputs["y"], alone.outputs["y"])
        assert answer.flags is not None
        assert alone.flags is not None
        assert answer.flags.inputs.tolist() == alone.flags.inputs.tolist()
        assert answer.flags.sites == alone.flags.sites
    assert isinstance(found[1], Answer)
    assert found[1].flags is not None
    assert found[1].flags.inputs.all()


def test_one_that_fails_does_not_take_the_others_with_it(session: Session) -> None:
    batcher = Batcher(session, 8, lambda _: None)
    good, broken = inputs(1), inputs(1)
    # The lengths of key and value differ: together they are no model's input.
    broken["v"] = broken["v"][:, :, :5]
    jobs = [job(good), Job(broken, 1, ("y",)), job(inputs(1, seed=1))]
    first, second, third = batcher.run(jobs)
    assert isinstance(second, InputError)
    assert isinstance(first, Answer)
    assert isinstance(third, Answer)
    np.testing.assert_array_equal(first.outputs["y"], session.run(good)["y"])


def test_a_value_that_breaks_a_run_breaks_only_its_own(tmp_path: Path) -> None:
    """A token beyond the vocabulary: the shapes are equal, so the run fails as a whole at first."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (int64[N, L] ids) => (float[N, L, 2] y)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}>
        { y = Gather <axis = 0> (table, ids) }
    """)
    onnx.save(model, tmp_path / "model.onnx")
    with Session(tmp_path / "model.onnx", threads=1, ep="cpu") as session:
        runs: list[int] = []
        batcher = Batcher(session, 8, runs.append)
        jobs = [Job({"ids": np.array([[n, 1]])}, 1, ("y",)) for n in (0, 9, 2)]
        first, second, third = batcher.run(jobs)
        assert isinstance(second, InputError)
        assert isinstance(first, Answer)
        assert isinstance(third, Answer)
        assert first.outputs["y"].tolist() == [[[1, 2], [3, 4]]]
        assert third.outputs["y"].tolist() == [[[5, 6], [3, 4]]]
        assert runs == [1, 1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(float[2, 3] x) => (float[2, 3] y) { y = Neg (x) }", "its batch is fixed"),
        (
            "(float[N, 3] x) => (float[3] y) { y = ReduceMax <axes=[0], keepdims=0> (x) }",
            "none out",
        ),
        (
            "(float[N, 3] x, float s) => (float[N, 3] y) { y = Mul (x, s) }",
            "an input without batch",
        ),
    ],
)
def test_models_that_cannot_be_batched_run_one_by_one(text: str, why: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> host {text}')
    onnx.save(model, tmp_path / "model.onnx")
    with Session(tmp_path / "model.onnx", threads=1, ep="cpu") as session:
        assert not Batcher(session, 8, lambda _: None).possible, why


def test_a_batch_that_is_not_on_the_first_axis(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[L, batch, 2] x) => (float[L, batch, 2] y) { y = Neg (x) }
    """)
    onnx.save(model, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    with Session(tmp_path / "model.onnx", threads=1, ep="cpu") as session:
        runs: list[int] = []
        jobs = [
            Job({"x": rng.standard_normal((4, count, 2), np.float32)}, count, ("y",))
            for count in (1, 3)
        ]
        for one, answer in zip(jobs, Batcher(session, 8, runs.append).run(jobs), strict=True):
            assert isinstance(answer, Answer)
            np.testing.assert_array_equal(answer.outputs["y"], -one.feeds["x"])
        assert runs == [4]

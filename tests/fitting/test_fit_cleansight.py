"""Fitting CleanSight: what is measured where, against the paper's method on maps that NumPy makes;
the budget on unseen inputs; and one sentence for what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from atpatch_onnx.data import Samples, samples_from
from atpatch_onnx.debugging_set import DebuggingSet
from atpatch_onnx.errors import InputError, RefusedError
from atpatch_onnx.fitting.calibration import calibrate, raised
from atpatch_onnx.fitting.cleansight import CleanSight, fit_cleansight, papers_share
from atpatch_onnx.fitting.job import Job
from atpatch_onnx.fitting.several import largest_anomaly
from atpatch_onnx.fitting.visual_prompt import sequence_sites
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.runtime import Arrays, Session

from hosts import TYPES, model_file

LENGTH, START, VISUAL, IMAGE = 12, 2, 5, 4
RANGES = CleanSight(f"{START}:{START + VISUAL}", f"{START + VISUAL}:")
ALL = ("ratio", "log-ratio", "columns")


def decoder(opset: int = 17, dtype: str = "float", axis: int = -1) -> ModelProto:
    """A vision encoder's site over 5 tokens, and two of a causal decoder over 12."""
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        host ({dtype}[N, 2, 5, 4] pixels, {dtype}[N, 2, L, 4] x, {dtype}[N, 1, L, L] bias,
              int64[N, L] ids) => ({dtype}[N, 2, L, 4] y, {dtype}[N, 2, 5, 4] seen)
        <int64 image = {{{IMAGE}}}>
        {{
            is_image = Equal (ids, image)
            kp = Transpose <perm = [0, 1, 3, 2]> (pixels)
            sp = MatMul (pixels, kp)
            pp = Softmax <axis = {axis}> (sp)
            seen = MatMul (pp, pixels)
            k = Transpose <perm = [0, 1, 3, 2]> (x)
            s0 = MatMul (x, k)
            t0 = Add (s0, bias)
            p0 = Softmax <axis = {axis}> (t0)
            c0 = MatMul (p0, x)
            s1 = MatMul (c0, k)
            t1 = Add (s1, bias)
            p1 = Softmax <axis = {axis}> (t1)
            y = MatMul (p1, x)
        }}
    """)


def inputs(count: int, seed: int, bad: bool = False, dtype: str = "float") -> Arrays:
    """Prompts of several lengths, padded on the left; the last token of a bad one looks at one
    visual token that is loud."""
    rng = np.random.default_rng(seed)
    kind = TYPES[dtype]
    x = 0.5 * rng.standard_normal((count, 2, LENGTH, 4))
    x[..., 0] += 1
    padding = rng.integers(0, 4, count)
    ids = np.full((count, LENGTH), 7)
    hidden = np.zeros((count, LENGTH, LENGTH), bool)
    for sample, left in enumerate(padding):
        ids[sample, :left] = 0
        ids[sample, left + START : left + START + VISUAL] = IMAGE
        hidden[sample, :, :left] = True
        if bad:
            x[sample, 0, left + START + rng.integers(VISUAL), 0] += 4
    hidden |= ~np.tri(LENGTH, dtype=bool)
    bias = np.where(hidden, np.finfo(kind).min, 0)[:, None]
    pixels = rng.standard_normal((count, 2, 5, 4))
    return {
        "pixels": pixels.astype(kind),
        "x": x.astype(kind),
        "bias": bias.astype(kind),
        "ids": ids.astype(np.int64),
    }


def job_of(model: ModelProto, batch: int = 64, sites: slice = slice(None)) -> Job:
    file = model_file(model)
    found = locate(file.skeleton).sites[sites]
    return Job(file, GraphView.of(file.skeleton), found, "cpu", batch, 0, "column", lambda _: None)


def samples(job: Job, arrays: Arrays) -> Samples:
    return samples_from(arrays, Session(bytes(job.model.buffer), "cpu", job.model.folder).inputs)


def paper(arrays: Arrays) -> NDArray[np.float64]:
    """The ratios `[N, 2 sites x H]`, sample by sample, without its padding."""
    found = []
    for x, ids in zip(arrays["x"].astype(np.float64), arrays["ids"], strict=True):
        tokens = x[:, ids != 0]
        causal = np.tri(tokens.shape[1], dtype=bool)
        query, row = tokens, []
        for _ in range(2):
            logits = np.where(causal, query @ tokens.transpose(0, 2, 1), -np.inf)
            exp = np.exp(logits - logits.max(-1, keepdims=True))
            maps = exp / exp.sum(-1, keepdims=True)
            query = maps @ tokens
            last = maps[:, -1]
            behind = START + VISUAL
            row.append(last[:, START:behind].sum(1) / (last[:, behind:].sum(1) + 1e-12))
        found.append(np.concatenate(row))
    return np.array(found)


def test_the_literal_method_is_the_papers() -> None:
    job = job_of(decoder(), batch=7)
    sites = sequence_sites(job, samples(job, inputs(30, 0)))
    names = tuple(site.name for site in sites)
    assert len(names) == 2
    clean, unseen = inputs(50, 1), inputs(40, 2, bad=True)
    trained = fit_cleansight(job, samples(job, clean), None, replace(RANGES, detection=names))
    assert trained.observed == sites
    normal = paper(clean)
    whitened = (paper(unseen) - normal.mean(0)) / (normal.std(0) + 1e-8)
    distance = np.linalg.norm(whitened, axis=1)
    found = largest_anomaly(job, trained, samples(job, unseen))
    np.testing.assert_allclose(found, distance / (1 + distance), atol=1e-5)


@pytest.mark.parametrize("statistics", [("ratio",), ("log-ratio",), ALL])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_budget_holds_and_bad_inputs_are_found(statistics: tuple[str, ...], dtype: str) -> None:
    job = job_of(decoder(dtype=dtype), batch=500)
    seen, held, unseen = (samples(job, inputs(1000, seed, dtype=dtype)) for seed in range(3))
    bad = [samples(job, inputs(200, seed, bad=True, dtype=dtype)) for seed in (3, 4)]
    trained = fit_cleansight(
        job, seen, DebuggingSet(bad[0]), replace(RANGES, statistics=statistics)
    )
    threshold = calibrate(largest_anomaly(job, trained, held), 0.02, seen.count).threshold
    # 1,000 held-out and 1,000 unseen inputs: 2 points are three standard deviations.
    assert (largest_anomaly(job, trained, unseen) > threshold).mean() < 0.04
    assert (largest_anomaly(job, trained, bad[1]) > threshold).mean() > 0.9
    auroc = trained.record["auroc"]
    assert isinstance(auroc, float)
    assert auroc > 0.97
    further = largest_anomaly(job, trained, unseen)[:, None] < largest_anomaly(job, trained, bad[1])
    assert abs(further.mean() - auroc) < 0.03


def test_a_threshold_moves_towards_bad_inputs_and_never_down() -> None:
    odds = np.array([20.0] + 400 * [80.0])  # one of them may be missed
    moved = raised(0.8, odds / (1 + odds))
    assert moved / (1 - moved) == pytest.approx(np.sqrt(4 * 80), rel=1e-3)
    for threshold in (0.99, 1.0):
        assert raised(threshold, odds / (1 + odds)) == threshold
    assert raised(0.8, np.zeros(5)) == 0.8
    assert raised(0.0, odds / (1 + odds)) == 0.0


def test_a_mask_of_the_graph_is_as_good_as_a_range() -> None:
    job = job_of(decoder())
    clean, bad = samples(job, inputs(60, 0)), samples(job, inputs(20, 1, bad=True))
    found = {}
    for visual, prompt in (("2:7", "7:"), ("is_image", ""), ("is_image", "7:"), (":5", "5:")):
        trained = fit_cleansight(job, clean, None, CleanSight(visual, prompt, ALL))
        found[visual, prompt] = largest_anomaly(job, trained, bad)
        assert trained.bindings == ({"visual": "is_image"} if visual == "is_image" else {})
    np.testing.assert_array_equal(found["2:7", "7:"], found["is_image", ""])
    np.testing.assert_array_equal(found["2:7", "7:"], found["is_image", "7:"])
    assert not np.array_equal(found["2:7", "7:"], found[":5", "5:"])


def test_the_decision_is_applied_from_the_last_detection_site_or_in_a_second_run() -> None:
    job = job_of(decoder())
    clean = samples(job, inputs(40, 0))
    first, last = sequence_sites(job, clean)
    for detection, rerun, applied in (
        (first, False, (first, last)),
        (last, False, (last,)),
        (last, True, (first, last)),
    ):
        options = replace(RANGES, detection=(detection.name,), rerun=rerun)
        trained = fit_cleansight(job, clean, None, options)
        assert trained.observed == (detection,)
        assert trained.apply == applied


def test_as_few_keys_are_pruned_as_heal_bad_inputs() -> None:
    """The loud token has most of the attention; the others keep theirs."""
    job = job_of(decoder(), batch=500)
    clean, arrays = samples(job, inputs(400, 0)), inputs(100, 1)
    first = (arrays["ids"] == IMAGE).argmax(axis=1)
    arrays["x"][np.arange(100), 1, first + 1] += (4, 6, 0, 0)  # it says 1, others 0
    bad = DebuggingSet(samples(job, arrays))
    options = replace(RANGES, statistics=("log-ratio", "columns"), rerun=True)
    found = {
        tau: fit_cleansight(job, clean, bad, replace(options, tau=tau)).record
        for tau in (None, 0.3)
    }
    assert found[0.3]["tau"] == 0.3
    tau, healed = found[None]["tau"], found[None]["healed"]
    assert isinstance(tau, float)
    assert isinstance(healed, float)
    assert tau >= 0.1
    assert healed > 0.7


def test_nothing_is_flagged_where_no_key_would_be_pruned() -> None:
    job = job_of(decoder())
    clean, far = samples(job, inputs(40, 0)), inputs(40, 1)
    far["x"][:, 0, -2, 0] += 4  # of the prompt, not of the image
    for tau, flagged in ((0.95, False), (0.0, True)):
        trained = fit_cleansight(job, clean, None, replace(RANGES, tau=tau))
        assert (largest_anomaly(job, trained, samples(job, far)) > 0).all() == flagged


def test_without_bad_inputs_sites_are_the_papers_share_of_the_depth() -> None:
    sites = sequence_sites(job := job_of(decoder()), samples(job, inputs(20, 0)))
    assert papers_share(sites) == sites[1:]
    deep = [replace(sites[0], name=str(index)) for index in range(32)]
    assert [site.name for site in papers_share(deep)] == [str(i) for i in range(10, 25)]
    assert all(papers_share(deep[:depth]) for depth in range(1, 12))


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"visual": "2:20"}, r"--visual 2:20 is not within the sequence, which has 9 tokens"),
    ({"visual": "-12:-4"}, r"--visual -12:-4 is not within"),
    ({"prompt": "11:"}, r"--prompt 11: is not within"),
    ({"visual": "7:7"}, r"--visual 7:7 is empty"),
    ({"visual": "-2:-5"}, r"--visual -2:-5 is empty"),
    ({"prompt": "5:"}, r"--visual 2:7 and --prompt 5: overlap"),
    ({"prompt": ":-1"}, r"overlap"),
    ({"visual": "nowhere"}, r"--visual 'nowhere': the model has no value"),
    ({"visual": "p0"}, r"--visual 'p0': that value has shape"),
    ({"visual": "4:", "prompt": ""}, r"--prompt behind the image has no token"),
    ({"visual": "2:-2", "prompt": "-2:", "statistics": ALL}, r"have 5 to 8 visual tokens"),
    ({"tau": 1.0}, r"--tau 1: a share"),
    ({"statistics": ("mean",)}, r"--statistics mean: choose from ratio"),
    ({"statistics": ()}, r"choose from ratio"),
    ({"detection": ("encoder",)}, r"'encoder' is no site of the sequence"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_what_cannot_be_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    job = job_of(decoder())
    with pytest.raises(InputError, match=message):
        fit_cleansight(job, samples(job, inputs(40, 0)), None, replace(RANGES, **changes))


def test_old_opsets_and_models_without_such_attention_are_refused() -> None:
    old = job_of(decoder(opset=10, axis=3))
    with pytest.raises(InputError, match="is at opset 10, and a CleanSight detector needs 11"):
        fit_cleansight(old, samples(old, inputs(30, 0)), None, RANGES)
    nothing = job_of(decoder(), sites=slice(0, 0))
    with pytest.raises(RefusedError, match="no self-attention in the main graph"):
        fit_cleansight(nothing, samples(nothing, inputs(30, 0)), None, RANGES)


def test_inputs_without_an_image_are_named() -> None:
    job = job_of(decoder())
    arrays = inputs(40, 0)
    arrays["ids"][3] = 7
    with pytest.raises(InputError, match="is_image has no token in 1 of 40 inputs"):
        fit_cleansight(job, samples(job, arrays), None, CleanSight("is_image"))

from __future__ import annotations

import numpy as np
import pytest

from atpatch_onnx.data import Samples
from atpatch_onnx.search.problem import Evidence, Finding, Stamped
from atpatch_onnx.search.verdict import judge, verdict


class Nothing:
    size = 0.0
    description = "nothing"

    def put(self, samples: Samples, generator: np.random.Generator) -> Stamped:
        raise NotImplementedError

    def record(self) -> dict[str, object]:
        return {}

    def picture(self, samples: Samples) -> bytes | None:
        raise NotImplementedError


def findings(*successes: float, evidence: Evidence | None = None) -> list[Finding]:
    return [
        Finding(target, Nothing(), 1 - success, success, 0.0, evidence)
        for target, success in enumerate(successes)
    ]


def decided(*successes: float) -> tuple[str, list[int]]:
    judged = judge(findings(*successes), len(successes))
    return verdict(judged, complete=True), [j.finding.target for j in judged if j.suspicious]


def test_a_class_that_stands_out_is_the_target() -> None:
    assert decided(0.1, 0.2, 0.99, 0.15, 0.0) == ("backdoored", [2])


@pytest.mark.parametrize("success", [0.3, 0.6, 0.79])
def test_a_trigger_that_fails_on_many_inputs_is_none(success: float) -> None:
    assert decided(0.0, 0.0, success, 0.0, 0.0) == ("clean", [])


def test_classes_that_are_all_easy_to_reach_make_no_outlier() -> None:
    """A fragile model: patches work toward most classes, so that the best of them says nothing."""
    assert decided(0.9, 0.85, 0.6, 0.7, 0.5, 0.8) == ("clean", [])


@pytest.mark.parametrize("targets", [[0, 2], [0, 1, 4, 5, 6]])
def test_several_targets_do_not_hide_each_other(targets: list[int]) -> None:
    successes = [0.99 if target in targets else 0.02 * target for target in range(10)]
    verdict, found = decided(*successes)
    assert (verdict, sorted(found)) == ("backdoored", targets)


def test_the_outlier_score_does_not_grow_without_bound_where_nothing_varies() -> None:
    judged = judge(findings(0.0, 0.0, 1.0, 0.0), 4)
    assert judged[0].finding.target == 2
    assert judged[0].outlier is not None
    assert judged[0].outlier == pytest.approx(2 * np.log(99) / 0.75)
    assert judged[0].margin == pytest.approx((np.log(99) - np.log(4)) / 0.75)


def test_classes_are_compared_only_when_all_are_known() -> None:
    judged = judge(findings(0.0, 0.0, 1.0), 4)
    assert [j.outlier for j in judged] == [None] * 3
    assert verdict(judged, complete=False) == "undecided"


@pytest.mark.parametrize(("score", "expected"), [(0.7, "backdoored"), (0.4, "clean")])
def test_evidence_of_its_own_counts_instead(score: float, expected: str) -> None:
    judged = judge(findings(0.9, 0.9, evidence=Evidence(score, 0.5, "lift")), 2)
    assert verdict(judged, complete=True) == expected
    assert judged[0].margin == pytest.approx(score - 0.5)

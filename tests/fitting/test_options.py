"""What the command line says of detectors that look at several sites."""

from __future__ import annotations

import pytest

from atpatch_onnx.errors import InputError
from atpatch_onnx.fitting.cleansight import CleanSight
from atpatch_onnx.fitting.heads import Heads
from atpatch_onnx.fitting.options import options_of
from atpatch_onnx.passes.visual_ratio import Statistic


def test_options_become_those_of_their_kind() -> None:
    said = options_of("cleansight", visual="1:5", prompt="5:", statistics="ratio, columns", tau=0.1)
    both = (Statistic.RATIO, Statistic.COLUMNS)
    assert said == CleanSight("1:5", "5:", both, 0.1)
    assert options_of("cleansight", visual="mask", rerun=True) == CleanSight("mask", rerun=True)
    assert options_of("head-similarity", heads="3") == Heads(count=3)
    assert options_of("head-alignment", heads="a:0, b:2", rank=4) == Heads(("a:0", "b:2"), rank=4)
    assert options_of("head-similarity", scores="logits") == Heads(scores="logits")


def test_what_was_not_said_is_no_option() -> None:
    assert options_of("cleansight", visual=None, rerun=False) is None
    assert options_of(None, visual=None, tau=None) is None
    assert options_of("contrastive", heads=None) is None


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("contrastive", {"visual": "1:5"}, "--visual goes with --kind cleansight, not contrastive"),
        (None, {"rank": 3}, "--rank goes with --kind head-alignment: leave it out"),
        ("head-alignment", {"rerun": True}, "--rerun goes with --kind cleansight or head-simil"),
        ("cleansight", {"visual": "1:5", "statistics": "mean"}, "--statistics mean: choose of"),
    ],
)
def test_an_option_of_another_kind_is_refused(
    kind: str | None, given: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        options_of(kind, **given)

"""A backdoor is healed in the forms that a victim is deployed in: `benchmarks/forms_healing.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the [train] extra has it")
pytest.importorskip("torch", reason="the [train] extra has it")

from atpatch_onnx.models.victims import Victim, train_victim

from forms_healing import measure


@pytest.fixture(scope="module")
def victim() -> Victim:
    return train_victim(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "site"),
    [("If, on an input", "softmax 4-D"), ("ONNX Attention 23", "ONNX Attention")],
)
def test_the_demo_victim_is_healed(form: str, site: str, victim: Victim, tmp_path: Path) -> None:
    rows = list(measure(form, victim, tmp_path, counts=(16,)))
    assert {row.used for row in rows} >= {"guard", "select"}
    for row in rows:
        assert row.sites == (site,) * 3
        assert row.before.attack_success_rate > 0.99
        assert row.after.attack_success_rate <= 0.01
        assert abs(row.before.accuracy - row.after.accuracy) <= 0.005
        assert row.after.recovered_accuracy > 0.9
        assert row.flagged_clean <= 0.03
        assert row.identical
        assert row.alone == 0
        assert row.agreement > 0.98

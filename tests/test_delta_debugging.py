from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from atpatch_onnx.delta_debugging import ddmin

WHOLE = list(range(12))


@given(st.lists(st.sets(st.sampled_from(WHOLE), min_size=1), min_size=1, max_size=4))
def test_the_result_holds_and_no_element_can_be_left_out(enough: list[set[int]]) -> None:
    """Any of several sets is enough, as with sites that heal in more than one way."""

    def holds(part: Sequence[int]) -> bool:
        assert part
        return any(needed <= set(part) for needed in enough)

    found = ddmin(WHOLE, holds) if holds(WHOLE) else WHOLE
    assert holds(found)
    assert found == sorted(found)
    for item in found:
        rest = [other for other in found if other != item]
        assert not rest or not holds(rest)


def test_one_element_is_found_in_few_questions() -> None:
    asked = []

    def holds(part: Sequence[int]) -> bool:
        asked.append(part)
        return 7 in part

    assert ddmin(list(range(64)), holds) == [7]
    assert len(asked) <= 12

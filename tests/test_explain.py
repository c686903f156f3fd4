"""`inspect` says of every site how it would be treated, and what that costs."""

from __future__ import annotations

import pytest

from atpatch_onnx.explain import explain
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate

from forms import BODIES, SCOPES, form
from hosts import attention


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("body", BODIES)
def test_every_site_is_explained(scope: str, body: str) -> None:
    model = form(scope, body)
    (site,) = locate(model).sites
    found = explain(GraphView.of(model), site)
    assert ("in front of P V" in found.treatment) == (body == "plain")
    assert ("beside the operator" in found.treatment) == (body != "plain")
    assert ("function's body" in found.treatment) == ("function" in scope)
    assert found.observable == (scope != "loop")
    assert ("nothing leaves a loop" in found.treatment) == (scope == "loop")


def test_maps_of_known_size_are_counted() -> None:
    model = attention()
    for value in model.graph.input:
        for place, size in zip((1, 2), (2, 6), strict=True):
            if value.name != "mask":
                value.type.tensor_type.shape.dim[place].dim_value = size
    for site in locate(model).sites:
        assert explain(GraphView.of(model), site).map_bytes == 2 * 6 * 6 * 4

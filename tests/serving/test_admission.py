"""What a replica holds is bounded, and given back."""

from __future__ import annotations

import pytest

from atpatch_onnx.serving.admission import Admission
from atpatch_onnx.serving.protocol import ProtocolError


def test_bytes_are_given_back() -> None:
    admission = Admission(most_waiting=1, most_bytes=100)
    with admission.request() as first:
        first.add(60)
        with admission.request() as second:
            second.add(30)
            with pytest.raises(ProtocolError, match="try again") as caught:
                second.add(30)
        assert caught.value.status == 503
        assert admission.held_bytes == 60
    assert admission.held_bytes == 0


def test_only_so_many_wait() -> None:
    admission = Admission(most_waiting=1, most_bytes=1)
    with admission.job():
        with pytest.raises(ProtocolError, match="wait for a run") as caught, admission.job():
            pass
        assert caught.value.status == 503
    with admission.job():
        pass
    assert admission.waiting == 0

"""Flagged columns that outlive a run: decoding with a cache remembers what prefill flagged.

    remembered [B, P] ──► flagged columns of each site, the first P   (an overridable input)
    flagged columns of all sites ──► [B, K]                           (an extra output)

A cached key has been seen by the detector in the run that put it there. One query row later it may
no longer stand out, though the cache still holds what it did, so that the caller feeds the output
of one run to the input of the next; fed nothing, a run remembers nothing. (So CleanSight prunes at
decoding what it found at prefill, arXiv 2603.12989.) A model that only decodes needs no detector:
the input is then one that must be fed. The sites must attend to the same cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto, helper

from ..edits import AddInitializer, AddInput, AddNode, AddOutput, Edit
from ..errors import RefusedError
from .fragment import Constants, Fragment
from .graph_view import GraphView
from .locate import Site
from .opening.steps import length
from .switches import FLAGGED, REMEMBERED


def recall(f: Fragment, flagged: str, once: bool = False) -> str:
    """The flagged columns `[B, 1 or H, 1, K]` of a site, with those that are remembered.

    once: only the first run flags; where a length is remembered, nothing is flagged beyond it.
    """
    past = length(f, REMEMBERED, 1, "remembered_length")
    if once:
        begins = f.op("Equal", past, f.ints(0), name="first_run")
        flagged = f.op("And", flagged, begins, name="flagged_in_first_run")
    batch = length(f, flagged, 0, "flagged_batch")
    shape = f.op("Concat", batch, f.ints(1, 1, 1), name="remembered_shape", axis=0)
    columns = f.axes_op("Unsqueeze", REMEMBERED, [1, 2], "remembered_columns")
    wide = f.op("Expand", columns, shape, name="remembered_by_sample")
    one_head = f.slice(flagged, 0, 1, 1, "flagged_in_one_head")
    keys = length(f, flagged, 3, "flagged_keys")
    nothing = f.op("And", one_head, f.op("Not", one_head, name="not_flagged"), name="nothing")
    bounds = (past, keys, f.ints(3))
    new = f.op("Slice", nothing, *bounds, name="new_columns")
    every = f.op("Concat", wide, new, name="remembered_and_new", axis=3)
    visible = f.op("Slice", every, f.ints(0), keys, f.ints(3), name="remembered_of_keys")
    return f.op("Or", flagged, visible, name="flagged_or_remembered")


def remember(
    view: GraphView,
    constants: Constants,
    sites: Sequence[Site],
    flagged: Mapping[str, str],
    decides: bool,
) -> list[Edit]:
    """The edits for the input and the output.

    flagged: the columns of the sites that are patched, bool `[B, 1 or H, 1, K]`, by site.
    decides: whether the model flags anything itself; if not, the input must be fed.
    Raises: RefusedError where they are not those of one cache.
    """
    _check(view, [site for site in sites if site.name in flagged])
    f = Fragment("atpatch", view.opset, constants)
    union = ""
    for number, value in enumerate(flagged.values()):
        ones = f.cast(value, TensorProto.FLOAT, f"flagged{number}_ones")
        row = f.axes_op("ReduceMax", ones, [1, 2], f"flagged{number}", keepdims=0)
        union = f.op("Max", union, row, name=f"flagged_by{number}") if union else row
    f.cast(union, TensorProto.BOOL, FLAGGED.rsplit("/")[-1])
    nothing = helper.make_tensor(REMEMBERED, TensorProto.BOOL, [1, 0], np.zeros(0, bool))
    info = helper.make_tensor_value_info
    return [
        *(AddNode(len(view.nodes), node) for node in f.nodes()),
        *([AddInitializer(nothing)] if decides else []),
        AddInput(info(REMEMBERED, TensorProto.BOOL, ["atpatch_batch", "atpatch_past"])),
        AddOutput(info(FLAGGED, TensorProto.BOOL, None)),
    ]


def _check(view: GraphView, sites: Sequence[Site]) -> None:
    """Raises: RefusedError where columns cannot be carried, or are not those of one cache."""
    version = view.model.ir_version
    if version < 4 or view.opset < 10:
        raise RefusedError(
            f"--remember needs IR version 4 and opset 10, the model has IR version {version} and "
            f"opset {view.opset}: export it again"
        )
    inner = next((site for site in sites if site.path), None)
    if inner is not None:
        raise RefusedError(
            f"--remember carries the columns of a decoder's own cache, and '{inner.name}' is in "
            f"{inner.scope}: choose sites in the main graph with --sites"
        )
    if len({site.facts.shape[-1] for site in sites if site.facts.shape} - {None}) > 1:
        raise RefusedError(
            "--remember carries the columns of one cache, and the sites attend to several: choose "
            "the decoder's self-attention with --sites"
        )

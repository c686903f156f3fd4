"""Where the image and the prompt of a sequence are: what the user says, and what is so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from ..data import Samples
from ..edits import AddNode, Edit
from ..errors import InputError, RefusedError
from ..passes.expose import expose
from ..passes.fragment import Constants, Fragment, as_stored, shared_prefix
from ..passes.graph_view import GraphView
from ..passes.locate import Site
from ..passes.views import view_4d
from ..passes.visual_prompt import KeyMask, KeyRange, Parts
from ..probed import Probed
from ..runtime import Array
from .job import Job

_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")
_MASKS = "a range START:END of the tokens, or a value [B, K] of the model that is true there"


@dataclass(frozen=True)
class Asked:
    """What the user said: `--visual` and `--prompt`, and what the graph makes of it.

    bindings: the host values that are masks, by input of the detector.
    """

    visual: str
    prompt: str
    parts: Parts
    bindings: dict[str, str]


def parse(view: GraphView, visual: str, prompt: str) -> Asked:
    """Read `START:END` ranges, and names of masks; an empty prompt is all behind the image.

    Raises: InputError for what is neither.
    """
    bindings = {
        name: text
        for name, text in (("visual", visual), ("prompt", prompt))
        if text and not _RANGE.fullmatch(text)
    }
    parts = Parts(
        _part(view, "--visual", visual), _part(view, "--prompt", prompt) if prompt else None
    )
    return Asked(visual, prompt, parts, bindings)


def _part(view: GraphView, option: str, text: str) -> KeyRange | KeyMask:
    found = _RANGE.fullmatch(text)
    if found is None:
        return _mask(view, option, text)
    start, end = (int(bound) if bound else None for bound in found.groups())
    begin = start or 0
    if end is not None and (begin < 0) == (end < 0 or end == 0) and begin >= end:
        raise InputError(f"{option} {text} is empty: its end must lie behind its start")
    return KeyRange(begin, end)


def _mask(view: GraphView, option: str, name: str) -> KeyMask:
    graph_inputs = set() if view.graph is None else {value.name for value in view.graph.input}
    if name not in graph_inputs and name not in view.producers:
        raise InputError(f"{option} '{name}': the model has no value of that name; give {_MASKS}")
    known = view.types.get(name)
    if known is None or (known.shape is not None and len(known.shape) != 2):
        wrong = "unknown type" if known is None else f"shape {list(known.shape or ())}"
        raise InputError(f"{option} '{name}': that value has {wrong}; give {_MASKS}")
    if known.elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        raise InputError(f"{option} '{name}': that value holds text; give {_MASKS}")
    return KeyMask(known.elem_type)


def sequence_sites(job: Job, samples: Samples) -> tuple[Site, ...]:
    """The self-attention of the sequence that holds image and prompt, in flow.

    That is what comes last, and all like it: a vision encoder comes before and has other keys.
    Raises: RefusedError where there is none.
    """
    candidates = [s for s in job.sites if not s.path and not s.facts.cross]
    shapes = _shapes(job, candidates, samples) if candidates else {}
    fitting = [site for site in candidates if site.name in shapes]
    if not fitting:
        raise RefusedError(
            f"{job.model.path} has no self-attention in the main graph with a map for each input, "
            "which CleanSight looks at: see atpatch-onnx inspect, and fit on the decoder"
        )
    fitting.sort(key=lambda site: site.before)
    last = fitting[-1]
    return tuple(
        site
        for site in fitting
        if shapes[site.name] == shapes[last.name] and site.facts.causal == last.facts.causal
    )


def _shapes(job: Job, sites: Sequence[Site], samples: Samples) -> dict[str, tuple[int, int]]:
    """Queries and keys of each site with one map a sample, by its name."""
    constants = Constants(shared_prefix(job.view.model))
    edits: list[Edit] = []
    outputs = {}
    for site in sites:
        f = Fragment(f"atpatch/{site.name}", job.view.opset, constants)
        shape = f.op("Shape", view_4d(f, site), name="shape_4d")
        edits += [AddNode(site.before, node) for node in f.nodes()]
        exposed, outputs[site.name] = expose(job.view, (), shape, TensorProto.INT64, 1)
        edits += exposed
    every = as_stored([*constants.edits(), *edits], job.view.model.ir_version)
    probed = Probed(job.model, every, job.provider)
    part = next(samples.batches(min(job.batch, samples.count)))
    found = probed.session.run(part.feeds, list(outputs.values()))
    return {
        name: (int(found[output][2]), int(found[output][3]))
        for name, output in outputs.items()
        if found[output][0] == part.size
    }


def check_parts(asked: Asked, visual: Array, prompt: Array, length: Array) -> None:
    """Check what was found on the data: visual, prompt `[N, K]` and length `[N]`.

    Raises: InputError for ranges outside of the sequence, nothing marked, or overlap.
    """
    shortest = int(length.min())
    for option, text, part, marked in (
        ("--visual", asked.visual, asked.parts.visual, visual),
        ("--prompt", asked.prompt, asked.parts.prompt, prompt),
    ):
        if isinstance(part, KeyRange) and _outside(part, shortest):
            raise InputError(
                f"{option} {text} is not within the sequence, which has {shortest} tokens in the "
                "shortest of the inputs: count from its first token that is no padding"
            )
        empty = int((marked.sum(axis=1) == 0).sum())
        if empty:
            raise InputError(
                f"{option} {text or 'behind the image'} has no token in {empty} of {len(marked)} "
                f"inputs (of {shortest} tokens or more): give {_MASKS}, and inputs with an image "
                "and a prompt"
            )
    if np.any((visual > 0) & (prompt > 0)):
        raise InputError(
            f"--visual {asked.visual} and --prompt {asked.prompt} overlap in a sequence of "
            f"{shortest} tokens: a token is of the image or of the prompt"
        )


def _outside(part: KeyRange, length: int) -> bool:
    start = part.start if part.start >= 0 else length + part.start
    end = length if part.end is None else part.end if part.end >= 0 else length + part.end
    return not 0 <= start < end <= length

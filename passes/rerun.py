"""Decide first, then run again: flagged columns are pruned from the first site on.

    P of each site with a detector ──► detector ──► flagged             (the model as it was)
    flagged columns of all sites   ──► any? ──► If ──► then: everything behind the first site once
                                                       more, with the columns pruned at every site
                                                ──► else: the values as they are
    the nodes that make the graph's last outputs read what the `If` gives     (rewired inputs)
    outputs that are made earlier, a cache's keys, are what the `If` gives    (renamed outputs)

Detection in flow comes too late where a trigger does its damage at sites that do not over-attend
it, or before the one that does (METHODS, section C, where CleanSight meets the same). Here a site
that sees the trigger heals all of them. What nobody flagged is computed once, by the nodes of the
original alone; a flagged batch is computed twice, its unflagged samples keeping their first values.

It needs sites over the same keys, and outputs of known ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import GraphProto, NodeProto, TensorProto, helper

from ..edits import AddNode, Edit, RenameOutput, RewireInput
from ..second_run import Answer
from .fragment import Constants, Fragment
from .graph_view import Dim, GraphView, Use
from .locate import Site
from .protos import read_within
from .redistribute import Redistribution, redistribute
from .views import NARROW, OPENED, as_before, as_held, in_floats, view_4d

PREFIX = "atpatch/rerun"
AGAIN = f"{PREFIX}/again"
"""Before the names of copied nodes and of what they make."""


FIRST = f"{PREFIX}/first"
"""Before the names that outputs get as the first run made them."""

ANSWERED = f"{PREFIX}/answered"
"""Which samples the first run answers as an attacker wants, bool `[B, 1, 1, 1]`."""


_NUMBERS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64)


@dataclass(frozen=True)
class Change:
    """What happens at one site in the second run.

    flagged: bool, broadcastable to `[B, H, 1, K]`; benign: what it gets in the mode of that name.
    """

    flagged: str
    benign: str | None
    mode: Redistribution


@dataclass(frozen=True)
class Plan:
    """What is run again.

    sites: where columns are changed; nodes: indices of the nodes that are copied, in order.
    ends: input slots of the nodes that make the last outputs, by the value that they read.
    earlier: the outputs that are made before those.
    before: the node before which everything has been decided.
    """

    sites: tuple[Site, ...]
    nodes: tuple[int, ...]
    ends: Mapping[str, tuple[Use, ...]]
    earlier: tuple[str, ...]
    before: int

    @property
    def first(self) -> dict[str, str]:
        """What the earlier outputs are called as the first run made them."""
        return {output: f"{FIRST}/{output}" for output in self.earlier}


def plan_rerun(
    view: GraphView,
    sites: Sequence[Site],
    detecting: Sequence[Site],
    applied: Collection[str] | None = None,
    answer: Answer | None = None,
) -> Plan | str:
    """What to run again if a site of `detecting` flags something; or why it cannot be done.

    applied: the names of the sites where columns may be changed; None: all over the same keys.
    answer: what the first run must answer for anything to be flagged.
    """
    if any(site.path for site in detecting):
        return "a site with a detector lies inside a branch, a loop or a function"
    if any(site.rank == 5 or (_single(site) and _batch(site) is None) for site in detecting):
        return "the graph does not say which maps belong to which sample"
    keys = {_keys(site) for site in detecting} - {None}
    if len(keys) > 1 or any(site.facts.cross for site in detecting):
        return "the sites with a detector do not all attend to the same keys"
    changed_sites = tuple(
        s
        for s in sites
        if _keys(s) in {None, *keys} and not s.facts.cross and not s.path
        if applied is None or s.name in applied
    )
    if not changed_sites:
        return "none of the sites where columns are to be pruned is in the graph"
    changed = _downstream(view, changed_sites)
    if answer is not None and (lacking := _no_answer(view, answer, changed)):
        return lacking
    ends, earlier = _ends(view, changed)
    before = min((use.node for uses in ends.values() for use in uses), default=-1)
    decided = max(site.before for site in detecting)
    made = [view.producers[name] + 1 for name in earlier]
    if answer is not None or before < max([decided, *made]):
        ends, before = {}, len(view.nodes)
        earlier = tuple(sorted(view.outputs & changed, key=lambda name: view.producers[name]))
    problem = next((p for v in (*ends, *earlier) if (p := _unfit(view, v, changed_sites))), None)
    if problem:
        return problem
    if any(name in view.captured for name in earlier):
        return "a subgraph reads an output of the model"
    needed = _upstream(view, {*ends, *earlier}, changed)
    if any(changed.intersection(read_within(view.nodes[index])) for index in needed):
        return "a subgraph reads values that would have to be run again"
    return Plan(changed_sites, tuple(sorted(needed)), ends, earlier, before)


def _ends(view: GraphView, changed: set[str]) -> tuple[dict[str, tuple[Use, ...]], tuple[str, ...]]:
    """Where to choose between the runs: what the makers of the last outputs read; other outputs.

    The makers of the last outputs are left alone, so that a runtime fuses them as it did. Whatever
    changes that they read is there before the first of them. What has 16 bits is chosen as an
    output, where it is rounded anyway: within the graph, ONNX Runtime's CPU provider drops
    roundings that the edge of an `If` would bring back, and with them other bits.
    """
    outputs = sorted(view.outputs & changed, key=lambda name: view.producers[name], reverse=True)
    ends: dict[str, list[Use]] = {}
    earlier: list[str] = []
    first = len(view.nodes)
    for output in outputs:
        index = view.producers[output]
        read = view.nodes[index].input
        uses = {Use(index, slot): name for slot, name in enumerate(read) if name in changed}
        within = {*ends, *uses.values()}
        narrow = any(_is_narrow(view, name) for name in uses.values())
        late = any(view.producers[name] >= min(first, index) for name in within)
        if not uses or narrow or late:
            earlier.append(output)
            continue
        first = min(first, index)
        for use, name in uses.items():
            ends.setdefault(name, []).append(use)
    known = {name: tuple(dict.fromkeys(uses)) for name, uses in ends.items()}
    return known, tuple(earlier)


def answered(view: GraphView, constants: Constants, answer: Answer) -> list[NodeProto]:
    """The nodes that make `ANSWERED`."""
    f = Fragment(PREFIX, view.opset, constants)
    scores = answer.output
    if _is_narrow(view, scores):  # of which ONNX Runtime has no ArgMax on CPU
        scores = f.cast(scores, TensorProto.FLOAT, "scores")
    number = f.op("ArgMax", scores, name="class", axis=1, keepdims=0)
    same = f.op("Equal", number, f.ints(answer.number), name="is_class")
    f.op("Reshape", same, f.ints(-1, 1, 1, 1), name="answered")
    return f.nodes()


def flagged_anywhere(view: GraphView, constants: Constants, flagged: Sequence[str]) -> _Decision:
    """What several sites flag, together.

    flagged: bool `[B, 1 or H, 1, K]` of each site with a detector.
    """
    f = Fragment(PREFIX, view.opset, constants)
    union = ""
    for number, value in enumerate(flagged):
        ones = f.cast(value, TensorProto.FLOAT, f"flagged{number}_ones")
        row = f.axes_op("ReduceMax", ones, [1], f"flagged{number}", keepdims=1)
        union = f.op("Max", union, row, name=f"union{number}") if union else row
    columns = f.cast(union, TensorProto.BOOL, "flagged")
    largest = f.axes_op("ReduceMax", union, [1, 2, 3], "sample_flagged_ones", keepdims=1)
    sample = f.cast(largest, TensorProto.BOOL, "sample_flagged")
    batch = f.axes_op("ReduceMax", largest, [0, 1, 2, 3], "any_flagged_ones", keepdims=0)
    condition = f.cast(batch, TensorProto.BOOL, "any_flagged")
    return _Decision(columns, sample, condition, tuple(f.nodes()))


@dataclass(frozen=True)
class _Decision:
    """Flagged columns `[B, 1, 1, K]`, samples `[B, 1, 1, 1]`, and whether there are any, bool."""

    columns: str
    sample: str
    any: str
    nodes: tuple[NodeProto, ...]


def add_rerun(
    view: GraphView,
    constants: Constants,
    plan: Plan,
    decision: _Decision,
    changes: Mapping[str, Change],
) -> list[Edit]:
    """The edits that run the model again; changes: what happens at each site of the plan."""
    edits: list[Edit] = []
    first = plan.first
    for output, new in first.items():
        index = view.producers[output]
        slot = list(view.nodes[index].output).index(output)
        edits.append(RenameOutput(index, slot, output, new))
        edits += [RewireInput(u.node, u.slot, output, new) for u in view.consumers.get(output, [])]
    ends = sorted(plan.ends)
    chosen = {end: f"{PREFIX}/chosen{number}" for number, end in enumerate(ends)}
    chosen |= {output: output for output in plan.earlier}
    held = {value: first.get(value, value) for value in chosen}
    then = _then(view, constants, plan, decision.sample, changes, held)
    other = [
        helper.make_node("Identity", [value], [f"{PREFIX}/same{n}"], f"{PREFIX}/same{n}")
        for n, value in enumerate(held.values())
    ]
    types = [view.types[value].elem_type for value in chosen]
    guard = helper.make_node(
        "If",
        [decision.any],
        list(chosen.values()),
        f"{PREFIX}/if",
        then_branch=_branch("run_again", then, types),
        else_branch=_branch("as_it_is", other, types),
    )
    edits += [AddNode(plan.before, node) for node in (*decision.nodes, guard)]
    for value in ends:
        edits += [RewireInput(u.node, u.slot, value, chosen[value]) for u in plan.ends[value]]
    return edits


def _branch(name: str, nodes: list[NodeProto], types: list[int]) -> GraphProto:
    """A branch that gives what its last nodes make, of shapes for the host to infer."""
    made = [node.output[0] for node in nodes[-len(types) :]]
    values = [
        helper.make_tensor_value_info(value, kind, None)
        for value, kind in zip(made, types, strict=True)
    ]
    return helper.make_graph(nodes, f"{PREFIX}/{name}", [], values)


def _then(
    view: GraphView,
    constants: Constants,
    plan: Plan,
    sample: str,
    changes: Mapping[str, Change],
    held: Mapping[str, str],
) -> list[NodeProto]:
    """The second run; its last nodes choose, sample by sample, between it and the first.

    held: what is chosen, with its name in the first run.
    """
    nodes: list[NodeProto] = []
    again: dict[str, str] = {}
    by_value = {site.probabilities: site for site in plan.sites}
    fused = {site.node: site for site in plan.sites if site.opening}
    replaced: dict[str, str] = {}
    reads = {(use.node, use.slot) for site in plan.sites for use in site.uses}
    for index in plan.nodes:
        copy = NodeProto()
        copy.CopyFrom(view.nodes[index])
        copy.name = f"{AGAIN}/{copy.name or index}"
        for slot, name in enumerate(copy.input):
            if (index, slot) not in reads:
                copy.input[slot] = again.get(name, held.get(name, name))
                continue
            if name not in replaced:
                site = replace(by_value[name], probabilities=again.get(name, name))
                f = Fragment(f"{PREFIX}/{site.name}", view.opset, constants)
                floats = in_floats(f, site)
                new = _redistributed(f, floats, changes[site.name], sample, floats.elem_type)
                replaced[name] = as_held(f, site, as_before(f, floats, new))
                nodes += f.nodes()
            copy.input[slot] = replaced[name]
        for slot, name in enumerate(copy.output):
            if name:
                again[name] = copy.output[slot] = f"{AGAIN}/{name}"
        nodes.append(copy)
        if index in fused:
            f = Fragment(f"{PREFIX}/{fused[index].name}", view.opset, constants)
            output = _opened(f, fused[index], changes[fused[index].name], sample)
            nodes += [reading(node, again) for node in f.nodes()]
            again[fused[index].probabilities] = output
    reshaping = Fragment(f"{PREFIX}/masks", view.opset, constants)
    choosing = Fragment(f"{PREFIX}/ends", view.opset, constants)
    for number, (value, original) in enumerate(held.items()):
        rank = view.rank(value)
        assert rank is not None
        shape = reshaping.ints(-1, *[1] * (rank - 1))
        mask = reshaping.op("Reshape", sample, shape, name=f"sample{number}")
        choosing.op("Where", mask, again.get(value, original), original, name=f"value{number}")
    return nodes + reshaping.nodes() + choosing.nodes()


def _redistributed(f: Fragment, site: Site, change: Change, sample: str, elem_type: int) -> str:
    whole = view_4d(f, site)
    return redistribute(f, whole, change.flagged, sample, change.benign, change.mode, elem_type)


def _opened(f: Fragment, site: Site, change: Change, sample: str) -> str:
    """The output of a fused operator with the columns changed, in the first run's values."""
    assert site.opening is not None
    new = _redistributed(f, site, change, sample, site.elem_type)
    opened = f.within(OPENED)
    output = site.opening.output(opened, new)
    return site.opening.choose(opened, sample, output, site.probabilities)


def reading(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A node with other names for what it reads."""
    node.input[:] = [names.get(name, name) for name in node.input]
    return node


def _single(site: Site) -> bool:
    """Whether a map is `[N, Q, K]` with nothing to say whether heads are among N."""
    return site.rank == 3 and site.facts.heads is None


def _batch(site: Site) -> Dim:
    return site.facts.shape[0] if site.facts.shape else None


def _keys(site: Site) -> Dim:
    """How many keys a site has: a number or a symbol, None where the graph does not say."""
    return site.facts.shape[-1] if site.facts.shape else None


def _downstream(view: GraphView, sites: Sequence[Site]) -> set[str]:
    """The values that change with the probabilities of any of the sites."""
    queue = [n for s in sites for u in s.uses for n in view.nodes[u.node].output if n]
    queue += [site.probabilities for site in sites if site.opening]
    found = set(queue)
    for value in queue:
        readers = [view.nodes[use.node] for use in view.consumers.get(value, [])]
        for node in (*readers, *view.captured.get(value, [])):
            new = [n for n in node.output if n and n not in found]
            found.update(new)
            queue += new
    return found


def _upstream(view: GraphView, values: set[str], changed: set[str]) -> set[int]:
    """The nodes that make `values`, as far back as values change."""
    queue, found = list(values), set()
    for value in queue:
        index = view.producers[value]
        if index not in found:
            found.add(index)
            read = {*view.nodes[index].input, *read_within(view.nodes[index])}
            queue += sorted(read & changed)
    return found


def _no_answer(view: GraphView, answer: Answer, changed: Collection[str]) -> str:
    """Why the graph has no such answer; "" if it has."""
    name = answer.output
    if name not in view.outputs or name not in changed:
        return f"'{name}', on which it would depend, is no output that the sites change"
    shape = view.shape(name)
    classes = shape[1] if shape is not None and len(shape) == 2 else None
    if view.rank(name) != 2 or (isinstance(classes, int) and not answer.number < classes > 1):
        return f"'{name}', on which it would depend, has no class {answer.number} of several [N, C]"
    return ""


def _is_narrow(view: GraphView, value: str) -> bool:
    known = view.types.get(value)
    return known is not None and known.elem_type in NARROW


def _unfit(view: GraphView, value: str, sites: Sequence[Site]) -> str:
    """Why samples of `value` cannot be chosen one by one; "" if they can."""
    known = view.types.get(value)
    if known is None or known.shape is None:
        return f"the shape of '{value}', from which an output is made, is not known"
    maker = view.producer(value)
    if maker is not None and maker.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return f"'{value}', from which an output is made, is quantised"
    if known.elem_type not in (*_NUMBERS, *NARROW):
        return f"'{value}', from which an output is made, does not hold numbers"
    batches = {_batch(site) for site in sites if site.rank == 4 or _single(site)}
    batches |= {known.shape[0] if known.shape else 0}
    if len(batches - {None}) > 1:  # where exports do not say, whoever has inputs must try
        return f"the batch of '{value}', from which an output is made, is not that of the maps"
    return ""

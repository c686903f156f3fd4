"""Decide first, then run again: flagged columns are pruned from the first site on.

    P of each site with a detector ──► detector ──► flagged             (the model as it was)
    flagged columns of all sites   ──► any? ──► If ──► then: everything behind the first site once
                                                       more, with the columns pruned at every site
                                                ──► else: the values as they are
    the nodes that make the graph's outputs read what the `If` gives          (rewired inputs)

Detection in flow comes too late where a trigger does its damage at sites that do not over-attend
it, or before the one that does (METHODS, section C, where CleanSight meets the same). Here a site
that sees the trigger heals all of them. What nobody flagged is computed once, by the nodes of the
original alone; a flagged batch is computed twice, its unflagged samples keeping their first values.

It needs sites over the same keys, and outputs that are made behind the last site with a detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import GraphProto, NodeProto, TensorProto, helper

from ..edits import AddNode, Edit, RewireInput
from .fragment import Constants, Fragment
from .graph_view import Dim, GraphView, Use
from .locate import Site
from .protos import read_within
from .redistribute import Redistribution, redistribute
from .views import OPENED, as_before, as_held, in_floats, view_4d

PREFIX = "atpatch/rerun"
AGAIN = f"{PREFIX}/again"
"""Before the names of copied nodes and of what they make."""


@dataclass(frozen=True)
class Plan:
    """What is run again.

    sites: where columns are pruned; nodes: indices of the nodes that are copied, in order.
    ends: input slots of the nodes that make the outputs, by the value that they read.
    """

    sites: tuple[Site, ...]
    nodes: tuple[int, ...]
    ends: Mapping[str, tuple[Use, ...]]

    @property
    def before(self) -> int:
        """The node before which everything has been decided."""
        return min(use.node for uses in self.ends.values() for use in uses)


def plan_rerun(view: GraphView, sites: Sequence[Site], detecting: Sequence[Site]) -> Plan | str:
    """What to run again if a site of `detecting` flags something; or why it cannot be done."""
    if any(site.path for site in detecting):
        return "a site with a detector lies inside a branch, a loop or a function"
    if any(site.rank == 5 or (_single(site) and _batch(site) is None) for site in detecting):
        return "the graph does not say which maps belong to which sample"
    keys = {_keys(site) for site in detecting} - {None}
    if len(keys) > 1 or any(site.facts.cross for site in detecting):
        return "the sites with a detector do not all attend to the same keys"
    pruned = tuple(
        s for s in sites if _keys(s) in {None, *keys} and not s.facts.cross and not s.path
    )
    changed = _downstream(view, pruned)
    ends: dict[str, list[Use]] = {}
    for output in view.outputs & changed:
        index = view.producers[output]
        read = view.nodes[index].input
        slots = [slot for slot, name in enumerate(read) if name in changed]
        if not slots:
            return f"the output '{output}' is made by a site itself"
        for slot in slots:
            ends.setdefault(read[slot], []).append(Use(index, slot))
    last = max(view.producers.get(site.probabilities, 0) for site in detecting)
    first = min((use.node for uses in ends.values() for use in uses), default=-1)
    if first <= last:
        return "the model has an output that does not lie behind the last site with a detector"
    if any(view.producers[value] >= first for value in ends):
        return "the nodes that make the outputs are not the last ones"
    problem = next((p for value in ends if (p := _unfit(view, value, pruned))), None)
    if problem:
        return problem
    needed = _upstream(view, set(ends), changed)
    if any(changed.intersection(read_within(view.nodes[index])) for index in needed):
        return "a subgraph reads values that would have to be run again"
    return Plan(pruned, tuple(sorted(needed)), {v: tuple(uses) for v, uses in ends.items()})


def add_rerun(
    view: GraphView,
    constants: Constants,
    plan: Plan,
    flagged: Sequence[str],
    mode: Redistribution,
) -> tuple[list[Edit], str]:
    """The edits that run the model again, and the columns that are pruned, bool `[B, 1, 1, K]`.

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
    ends = sorted(plan.ends)
    chosen = [f"{PREFIX}/chosen{number}" for number in range(len(ends))]
    then = _then(view, constants, plan, columns, sample, mode, ends)
    other = [
        helper.make_node("Identity", [end], [f"{PREFIX}/same{n}"], f"{PREFIX}/same{n}")
        for n, end in enumerate(ends)
    ]
    types = [view.types[end].elem_type for end in ends]
    guard = helper.make_node(
        "If",
        [condition],
        chosen,
        f"{PREFIX}/if",
        then_branch=_branch("run_again", then, types),
        else_branch=_branch("as_it_is", other, types),
    )
    edits: list[Edit] = [AddNode(plan.before, node) for node in (*f.nodes(), guard)]
    for value, new in zip(ends, chosen, strict=True):
        edits += [RewireInput(use.node, use.slot, value, new) for use in plan.ends[value]]
    return edits, columns


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
    columns: str,
    sample: str,
    mode: Redistribution,
    ends: list[str],
) -> list[NodeProto]:
    """The second run; its last nodes choose, sample by sample, between it and the first."""
    nodes: list[NodeProto] = []
    again: dict[str, str] = {}
    by_value = {site.probabilities: site for site in plan.sites}
    fused = {site.node: site for site in plan.sites if site.opening}
    pruned: dict[str, str] = {}
    reads = {(use.node, use.slot) for site in plan.sites for use in site.uses}
    for index in plan.nodes:
        copy = NodeProto()
        copy.CopyFrom(view.nodes[index])
        copy.name = f"{AGAIN}/{copy.name or index}"
        for slot, name in enumerate(copy.input):
            if (index, slot) not in reads:
                copy.input[slot] = again.get(name, name)
                continue
            if name not in pruned:
                site = replace(by_value[name], probabilities=again.get(name, name))
                f = Fragment(f"{PREFIX}/{site.name}", view.opset, constants)
                floats = in_floats(f, site)
                whole = view_4d(f, floats)
                new = redistribute(f, whole, columns, sample, None, mode, floats.elem_type)
                pruned[name] = as_held(f, site, as_before(f, floats, new))
                nodes += f.nodes()
            copy.input[slot] = pruned[name]
        for slot, name in enumerate(copy.output):
            if name:
                again[name] = copy.output[slot] = f"{AGAIN}/{name}"
        nodes.append(copy)
        if index in fused:
            f = Fragment(f"{PREFIX}/{fused[index].name}", view.opset, constants)
            output = _opened(f, fused[index], columns, sample, mode)
            nodes += [_reading(node, again) for node in f.nodes()]
            again[fused[index].probabilities] = output
    reshaping = Fragment(f"{PREFIX}/masks", view.opset, constants)
    choosing = Fragment(f"{PREFIX}/ends", view.opset, constants)
    for number, end in enumerate(ends):
        rank = view.rank(end)
        assert rank is not None
        shape = reshaping.ints(-1, *[1] * (rank - 1))
        mask = reshaping.op("Reshape", sample, shape, name=f"sample{number}")
        choosing.op("Where", mask, again.get(end, end), end, name=f"value{number}")
    return nodes + reshaping.nodes() + choosing.nodes()


def _opened(f: Fragment, site: Site, columns: str, sample: str, mode: Redistribution) -> str:
    """The output of a fused operator with the columns pruned, in the first run's values."""
    assert site.opening is not None
    whole = view_4d(f, site)
    new = redistribute(f, whole, columns, sample, None, mode, site.elem_type)
    opened = f.within(OPENED)
    output = site.opening.output(opened, new)
    return site.opening.choose(opened, sample, output, site.probabilities)


def _reading(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
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


def _unfit(view: GraphView, value: str, sites: Sequence[Site]) -> str:
    """Why samples of `value` cannot be chosen one by one; "" if they can."""
    known = view.types.get(value)
    if known is None or known.shape is None:
        return f"the shape of '{value}', from which an output is made, is not known"
    maker = view.producer(value)
    if maker is not None and maker.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return f"'{value}', from which an output is made, is quantised"
    if known.elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        # See `Splice.strategy`: the edge of an `If` brings back a rounding, and with it other bits.
        return f"'{value}', from which an output is made, is not float32"
    batches = {_batch(site) for site in sites if site.rank == 4 or _single(site)}
    batches |= {known.shape[0] if known.shape else 0}
    if len(batches - {None}) > 1:  # where exports do not say, whoever has inputs must try
        return f"the batch of '{value}', from which an output is made, is not that of the maps"
    return ""

"""Splice a detector and a redistribution in front of P V, at each chosen site.

    P ──► [view as B,H,Q,K] ──► detector ──► anomaly ──► > threshold ──► flagged
    P ──► redistribute(P, flagged, benign) ──► P V                      (one rewired input)

1. `P` is viewed as float32 `[B, H, Q, K]` for the detector (nothing to do for float32 4-D).
2. The detector's nodes are copied in; its tensors are stored once for all sites.
3. `flagged`, bool `[B, 1 or H, 1, K]`; `sample_flagged`, bool `[B, 1, 1, 1]`.
4. Strategy `select`: redistribute always, `Where(sample_flagged, new, P)`: no control flow, for
   CUDA. Strategy `guard`: the same inside an `If` on whether anything is flagged: cheaper on CPU.
5. The input slots of the nodes that lead to P V read the result instead of P.

A fused operator stays where it is, and is opened beside it: its probabilities feed the detector,
and the output of flagged samples is made from redistributed ones. Strategy `guard` does that inside
the `If` too, and `rows` lets the detector see a few query rows, so that only these are computed.
Inserted nodes make the operator's output under its old name (one renamed output).

Strategy `rerun` leaves P V alone: see its module. It knows what the first run answers: where the
detector says what an attacker wants answered, nothing else is flagged. A detector of scope `model`
is placed once (`observe`), and what it flags is redistributed at the sites where it is applied.

Where nothing is flagged in a sample its probabilities, or the output of its fused operator, pass
bit for bit, by selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ..detector import Detector
from ..edits import (
    AddInitializer,
    AddInput,
    AddNode,
    AddOutput,
    Edit,
    RenameOutput,
    RewireInput,
)
from ..errors import RefusedError
from .calls import unfold
from .decisions import Asked, Decisions, asked_of, is_several
from .expose import expose, is_reachable
from .fragment import Constants, Fragment, as_stored, shared_prefix
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .outcome import Outcome, PassResult, Patched, Skipped
from .redistribute import Redistribution, redistribute
from .remember import recall, remember
from .rerun import (
    ANSWERED,
    Change,
    add_rerun,
    answered,
    flagged_anywhere,
    plan_rerun,
    reading,
)
from .static_columns import static_columns
from .switches import ENABLED, THRESHOLD
from .unmoved import unmoved
from .views import NARROW, OPENED, as_before, as_held, in_floats, sampled, view_4d


class Strategy(StrEnum):
    """How the redistribution is kept off inputs in which nothing is flagged."""

    GUARD = "guard"
    """An `If`: nothing is computed when nothing is flagged; fastest on CPU."""
    SELECT = "select"
    """Branch-free: no host synchronisation, fit for CUDA graphs."""
    RERUN = "rerun"
    """Decide first and run again with the flagged columns pruned at every site (see `rerun`)."""


@dataclass(frozen=True)
class Treatment:
    """What to do at one site.

    detector: flags columns; None where `columns` are given instead.
    columns: key positions that are always flagged; negative ones count from the end. Without any,
        only those are flagged that are remembered.
    threshold: overrides the detector's.
    """

    redistribution: Redistribution
    detector: Detector | None = None
    columns: tuple[int, ...] = ()
    threshold: float | None = None

    @property
    def effective_threshold(self) -> float | None:
        """The threshold in force; None for static columns."""
        if self.detector is None:
            return None
        return self.detector.threshold if self.threshold is None else self.threshold


@dataclass(frozen=True)
class Splice:
    """Patch the sites that have a treatment; the others are `Skipped`.

    treatments: by site name.
    strategy: `guard`, `select` or `rerun`.
    telemetry: add an output `atpatch/<site>/flagged` for each patched site.
    toggle: add overridable inputs `atpatch/enabled` (bool) and `atpatch/threshold` (float32; one
        for each site, `atpatch/<site>/threshold`, where sites have different ones).
    bindings: host values for further detector inputs, by input name.
    remember: add an overridable input and an output that carry flagged columns from run to run
        (see `remember`).
    """

    treatments: Mapping[str, Treatment]
    strategy: Strategy = Strategy.GUARD
    telemetry: bool = False
    toggle: bool = False
    bindings: Mapping[str, str] = field(default_factory=dict)
    remember: bool = False

    def __call__(self, view: GraphView, sites: tuple[Site, ...]) -> PassResult:
        """The edits and an outcome for each of `sites`. Raises: InputError."""
        return _Splicing(self, view).run(sites)


class _Splicing:
    """One run of the pass: what sites share is kept here."""

    def __init__(self, options: Splice, view: GraphView) -> None:
        self.options, self.view = options, view
        self.constants = Constants(shared_prefix(view.model))
        self.inliner = Inliner(view, self.constants, options.bindings)
        self.edits: list[Edit] = []
        self.thresholds: set[float] = set()
        self.benign: dict[str, str | None] = {}
        self.asked = Asked(())
        self.flags: list[NodeProto] = []
        """That wait for the answer of the first run."""

    def run(self, sites: tuple[Site, ...]) -> PassResult:
        """Patch each site that has a treatment."""
        rerun = self.options.strategy is Strategy.RERUN
        self.decisions = Decisions(self.view, self.constants, self.inliner, sites, rerun=rerun)
        if self.options.toggle and self.view.model.ir_version < 4:
            raise RefusedError(
                "--toggle needs inputs with defaults, which a model of IR version "
                f"{self.view.model.ir_version} cannot have: save it with ir_version 4 or later, or "
                "patch without --toggle"
            )
        chosen = {site.name: self.options.treatments.get(site.name) for site in sites}
        reasons = {site.name: _skip(site, chosen[site.name]) for site in sites}
        if rerun:
            detectors = {
                site.name: t.detector
                for site in sites
                if (t := chosen[site.name]) is not None and not reasons[site.name]
            }
            self.asked = asked_of(detectors, sites, remember=self.options.remember)
        self.thresholds = {
            value
            for name, t in chosen.items()
            if t is not None and (value := self.effective(t)) is not None and not reasons[name]
        }
        outcomes: list[Outcome] = []
        for site in sites:
            treatment = chosen[site.name]
            if treatment is None or reasons[site.name]:
                outcomes.append(Skipped(site.name, reasons[site.name]))
            else:
                outcomes.append(self.patch(site, treatment))
        own = tuple(outcomes)
        if self.options.strategy is Strategy.RERUN:
            outcomes = self.rerun(sites, outcomes)
        if self.options.remember:
            flagged = {o.site: o.flagged for o in own if isinstance(o, Patched)}
            treated = [self.options.treatments[name] for name in flagged]
            decides = any(t.detector is not None or t.columns for t in treated)
            self.edits += remember(self.view, self.constants, sites, flagged, decides)
        if self.options.toggle and any(isinstance(o, Patched) for o in outcomes):
            self.edits += [
                AddInitializer(helper.make_tensor(ENABLED, TensorProto.BOOL, [], [True])),
                AddInput(helper.make_tensor_value_info(ENABLED, TensorProto.BOOL, [])),
            ]
        shared = (*self.constants.edits(), *self.inliner.edits)
        edits = unfold(self.view, unmoved(self.view, (*shared, *self.edits)))
        return PassResult(as_stored(edits, self.view.model.ir_version), tuple(outcomes))

    def patch(self, site: Site, treatment: Treatment) -> Patched:
        """The edits for one site."""
        prefix = f"atpatch/{site.name}"
        view = self.view.at(site.path)
        detector = treatment.detector
        f = Fragment(prefix, view.opset, self.constants)
        rows = None if detector is None else detector.rows
        sampling = rows is not None and site.opening is not None
        lazily = sampling and self.strategy(site) is not Strategy.SELECT
        floats = in_floats(f, site)
        whole = None if lazily else view_4d(f, floats)
        nodes: list[NodeProto] = []
        benign = None
        if detector is None:
            by_sample = self.options.telemetry or self.options.remember
            toggle = self.options.toggle
            flagged = static_columns(f, site, treatment.columns, whole or "", by_sample, toggle)
        else:
            if is_several(detector):
                edits, anomaly, benign = self.decisions.at(site, detector)
                self.edits += edits
            else:
                seen = sampled(f, floats, rows, whole)
                narrow = floats.elem_type != TensorProto.FLOAT
                attention = f.cast(seen, TensorProto.FLOAT, "attention") if narrow else seen
                nodes += f.nodes()
                f = Fragment(prefix, view.opset, self.constants)
                layer = detector.layer_of(site.name, site.index) or 0
                outermost = site.path[0][0] if site.path else site.before
                copied, anomaly, benign = self.inliner.place(
                    detector, prefix, attention, layer, outermost
                )
                nodes += copied
            threshold = self.threshold(f, site, treatment)
            last = "flagged" if self.asked.answer is None else "suspicious"
            above = "above" if self.options.toggle else last
            flagged = f.op("Greater", anomaly, threshold, name=above)
            if self.options.toggle:
                flagged = f.op("And", flagged, ENABLED, name=last)
        if self.options.remember:
            flagged = recall(f, flagged, once=is_several(detector))
            if self.options.toggle:
                flagged = f.op("And", flagged, ENABLED, name="flagged_if_enabled")
        if treatment.redistribution is not Redistribution.BENIGN:
            benign = None
        if self.options.strategy is Strategy.RERUN:
            self.insert(site, [*nodes, *f.nodes()], self.decisions.before(site, detector))
            if self.asked.answer is not None:
                both, flagged = [flagged, ANSWERED], f"{prefix}/flagged"
                self.flags.append(helper.make_node("And", both, [flagged], flagged))
            self.benign[site.name] = benign
        else:
            result = self.redistributed(f, floats, treatment, whole, flagged, benign)
            result = as_held(f, site, result)
            self.insert(site, [*nodes, *f.nodes()])
            self.replace(site, result)
        if self.options.telemetry and not site.path:
            shape: list[str | int | None] = [f"{prefix}/N", f"{prefix}/H", 1, f"{prefix}/K"]
            value = helper.make_tensor_value_info(flagged, TensorProto.BOOL, shape)
            self.edits.append(AddOutput(value))
        elif self.options.telemetry and is_reachable(self.view, site.path):
            edits, flagged = expose(self.view, site.path, flagged, TensorProto.BOOL, 4)
            self.edits += edits
        return Patched(
            site.name,
            flagged,
            treatment.redistribution.value,
            self.strategy(site).value,
            self.effective(treatment),
            None if detector is None else self.asked.answer,
        )

    def insert(self, site: Site, nodes: Sequence[NodeProto], before: int | None = None) -> None:
        """Add nodes at a site, or before another node."""
        place = site.before if before is None else before
        self.edits += [AddNode(place, node, site.path) for node in nodes]

    def replace(self, site: Site, result: str) -> None:
        """Let `result` take the place of the site's probabilities, or of its fused output."""
        path, old = site.path, site.probabilities
        if site.opening is None:
            self.edits += [RewireInput(u.node, u.slot, old, result, path) for u in site.uses]
            return
        name = f"atpatch/{site.name}/output"
        self.insert(site, [helper.make_node("Identity", [result], [old], name)])
        self.edits.append(RenameOutput(site.node, 0, old, _fused(site), path))

    def rerun(self, sites: tuple[Site, ...], outcomes: list[Outcome]) -> list[Outcome]:
        """Add the second run; the outcomes, with the sites that are pruned in it."""
        flagged = {o.site: o.flagged for o in outcomes if isinstance(o, Patched)}
        if not flagged:
            return outcomes
        treatments, answer = self.options.treatments, self.asked.answer
        plan = plan_rerun(self.view, sites, self.asked.detecting, self.asked.applied, answer)
        if isinstance(plan, str):
            raise RefusedError(f"--strategy rerun: {plan}: choose guard or select")
        if answer is not None:
            nodes = [*answered(self.view, self.constants, answer), *self.flags]
            self.edits += [AddNode(plan.before, node) for node in nodes]
        decision = flagged_anywhere(self.view, self.constants, list(flagged.values()))
        mode = next(t.redistribution for t in treatments.values())
        changes = {site.name: Change(decision.columns, None, mode) for site in plan.sites}
        if any(is_several(treatments[name].detector) for name in flagged):
            # Each site by itself: heads differ.
            changes = {
                name: Change(flagged[name], self.benign[name], treatments[name].redistribution)
                for name in changes
            }
        # What detectors look at is the first run, also where an output of the model is read.
        for edit in self.edits:
            if isinstance(edit, AddNode):
                reading(edit.node, plan.first)
        self.edits += add_rerun(self.view, self.constants, plan, decision, changes)
        pruned = set(changes) - set(flagged)
        return [
            Patched(o.site, decision.columns, mode.value, Strategy.RERUN.value, None)
            if o.site in pruned
            else o
            for o in outcomes
        ]

    def redistributed(
        self,
        f: Fragment,
        site: Site,
        treatment: Treatment,
        whole: str | None,
        flagged: str,
        benign: str | None,
    ) -> str:
        """What takes the place of the probabilities or of the fused output.

        whole: the map; None where it is only to be computed if something is flagged.
        """
        ones = f.cast(flagged, TensorProto.FLOAT, "flagged_ones")
        largest = f.axes_op("ReduceMax", ones, [1, 2, 3], "sample_flagged_ones", keepdims=1)
        sample = f.cast(largest, TensorProto.BOOL, "sample_flagged")

        def inside(g: Fragment) -> str:
            there = whole or view_4d(g, site)
            new = redistribute(
                g, there, flagged, sample, benign, treatment.redistribution, site.elem_type
            )
            if site.opening is None:
                return as_before(g, site, new)
            opened = g.within(OPENED)
            output = site.opening.output(opened, new)
            return site.opening.choose(opened, sample, output, _fused(site))

        if self.strategy(site) is Strategy.SELECT:
            return inside(f)
        then, other = f.branch("if_flagged"), f.branch("if_clean")
        new = inside(then)
        original = site.probabilities if site.opening is None else _fused(site)
        same = other.op("Identity", original, name="unchanged")
        batch = f.axes_op("ReduceMax", largest, [0, 1, 2, 3], "any_flagged_ones", keepdims=0)
        return f.op(
            "If",
            f.cast(batch, TensorProto.BOOL, "any_flagged"),
            name="guarded",
            then_branch=then.subgraph(new, site.elem_type),
            else_branch=other.subgraph(same, site.elem_type),
        )

    def strategy(self, site: Site) -> Strategy:
        """The strategy in force: fused operators of 16 bits are always selected.

        ONNX Runtime's CPU provider computes float16 in float32 and drops the roundings between
        neighbouring nodes; the edge of an `If` would bring one back, and with it other bits. (And
        an `If` cannot return bfloat16 before opset 16.)
        """
        if self.options.strategy is Strategy.RERUN:
            return Strategy.RERUN
        narrow = site.opening is not None and site.elem_type in NARROW
        return Strategy.SELECT if narrow else self.options.strategy

    def effective(self, treatment: Treatment) -> float | None:
        """The threshold in force: the detector's other one where no answer is waited for."""
        detector, value = treatment.detector, treatment.effective_threshold
        if detector is None or treatment.threshold is not None or self.asked.answer is not None:
            return value
        request = detector.second_run
        return value if request is None or request.answer is None else request.answer.otherwise

    def threshold(self, f: Fragment, site: Site, treatment: Treatment) -> str:
        """The site's threshold: a constant, or an overridable input under `toggle`."""
        value = self.effective(treatment)
        assert value is not None
        if not self.options.toggle:
            return f.constants.add(f"threshold({value:.9g})", np.array(value, np.float32))
        name = THRESHOLD if len(self.thresholds) == 1 else f"atpatch/{site.name}/threshold"
        if not any(isinstance(e, AddInput) and e.value.name == name for e in self.edits):
            self.edits += [
                AddInitializer(helper.make_tensor(name, TensorProto.FLOAT, [], [value])),
                AddInput(helper.make_tensor_value_info(name, TensorProto.FLOAT, [])),
            ]
        return name


def _fused(site: Site) -> str:
    """The name that the first output of a fused operator gets."""
    return f"atpatch/{site.name}/fused"


def _skip(site: Site, treatment: Treatment | None) -> str:
    """Why a site is left alone; "" if it is not."""
    if treatment is None:
        return "not chosen"
    detector = treatment.detector
    if detector is not None and detector.layer_of(site.name, site.index) is None:
        return f"{detector.path} was not fitted for this site"
    return ""

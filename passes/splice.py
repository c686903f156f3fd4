"""Splice a detector and a redistribution in front of P V, at each chosen site.

    P ──► [view as B,H,Q,K] ──► detector ──► anomaly ──► > threshold ──► flagged
    P ──► redistribute(P, flagged, benign) ──► P V                      (one rewired input)

1. `P` is viewed as float32 `[B, H, Q, K]` for the detector (nothing to do for float32 4-D).
2. The detector's nodes are copied in; its tensors are stored once for all sites.
3. `flagged`, bool `[B, 1 or H, 1, K]`; `sample_flagged`, bool `[B, 1, 1, 1]`.
4. Strategy `select`: redistribute always, `Where(sample_flagged, new, P)`: no control flow, for
   CUDA. Strategy `guard`: the same inside an `If` on whether anything is flagged: cheaper on CPU.
5. The input slots of the nodes that lead to P V read the result instead of P.

Strategy `rerun` leaves P V alone: see its module.

Where nothing is flagged in a sample its probabilities pass bit for bit, by selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from onnx import TensorProto, helper

from ..detector import Detector
from ..edits import (
    AddInitializer,
    AddInput,
    AddNode,
    AddOutput,
    Edit,
    RewireInput,
)
from ..errors import InputError, RefusedError
from ..patching import RECORD_KEY
from .fragment import Constants, Fragment, as_stored
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .outcome import Outcome, PassResult, Patched, Skipped
from .redistribute import Redistribution, redistribute
from .rerun import add_rerun, plan_rerun
from .views import as_before, view_4d

ENABLED = "atpatch/enabled"
THRESHOLD = "atpatch/threshold"


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
    columns: key positions that are always flagged; negative ones count from the end.
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
    strategy: `guard` or `select`.
    telemetry: add an output `atpatch/<site>/flagged` for each patched site.
    toggle: add overridable inputs `atpatch/enabled` (bool) and `atpatch/threshold` (float32; one
        for each site, `atpatch/<site>/threshold`, where sites have different ones).
    bindings: host values for further detector inputs, by input name.
    """

    treatments: Mapping[str, Treatment]
    strategy: Strategy = Strategy.GUARD
    telemetry: bool = False
    toggle: bool = False
    bindings: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, view: GraphView, sites: tuple[Site, ...]) -> PassResult:
        """The edits and an outcome for each of `sites`. Raises: InputError."""
        return _Splicing(self, view).run(sites)


class _Splicing:
    """One run of the pass: what sites share is kept here."""

    def __init__(self, options: Splice, view: GraphView) -> None:
        self.options, self.view = options, view
        # A further patch on a patched model has shared names of its own.
        earlier = sum(p.key.startswith(RECORD_KEY) for p in view.model.metadata_props)
        self.constants = Constants(f"atpatch/shared{earlier + 1 if earlier else ''}")
        self.inliner = Inliner(view, self.constants, options.bindings)
        self.edits: list[Edit] = []
        self.thresholds: set[float] = set()

    def run(self, sites: tuple[Site, ...]) -> PassResult:
        """Patch each site that has a treatment."""
        if self.options.toggle and self.view.model.ir_version < 4:
            raise RefusedError(
                "--toggle needs inputs with defaults, which a model of IR version "
                f"{self.view.model.ir_version} cannot have: save it with ir_version 4 or later, or "
                "patch without --toggle"
            )
        chosen = {site.name: self.options.treatments.get(site.name) for site in sites}
        reasons = {site.name: _skip(site, chosen[site.name]) for site in sites}
        self.thresholds = {
            t.effective_threshold
            for name, t in chosen.items()
            if t is not None and t.effective_threshold is not None and not reasons[name]
        }
        outcomes: list[Outcome] = []
        for site in sites:
            treatment = chosen[site.name]
            if treatment is None or reasons[site.name]:
                outcomes.append(Skipped(site.name, reasons[site.name]))
            else:
                outcomes.append(self.patch(site, treatment))
        if self.options.strategy is Strategy.RERUN:
            outcomes = self.rerun(sites, outcomes)
        if self.options.toggle and any(isinstance(o, Patched) for o in outcomes):
            self.edits += [
                AddInitializer(helper.make_tensor(ENABLED, TensorProto.BOOL, [], [True])),
                AddInput(helper.make_tensor_value_info(ENABLED, TensorProto.BOOL, [])),
            ]
        shared = (*self.constants.edits(), *self.inliner.edits)
        edits = as_stored((*shared, *self.edits), self.view.model.ir_version)
        return PassResult(edits, tuple(outcomes))

    def patch(self, site: Site, treatment: Treatment) -> Patched:
        """The edits for one site."""
        prefix = f"atpatch/{site.name}"
        before = min(use.node for use in site.uses)
        f = Fragment(prefix, self.view.opset, self.constants)
        whole = view_4d(f, site)
        nodes = []
        benign = None
        if treatment.detector is None:
            flagged = self.static_columns(f, site, treatment, whole)
        else:
            narrow = site.elem_type != TensorProto.FLOAT
            attention = f.cast(whole, TensorProto.FLOAT, "attention") if narrow else whole
            nodes += f.nodes()
            f = Fragment(prefix, self.view.opset, self.constants)
            layer = treatment.detector.layer_of(site.name, site.index) or 0
            copied, anomaly, benign = self.inliner.place(
                treatment.detector, prefix, attention, layer, before
            )
            nodes += copied
            threshold = self.threshold(f, site, treatment)
            above = "above" if self.options.toggle else "flagged"
            flagged = f.op("Greater", anomaly, threshold, name=above)
            if self.options.toggle:
                flagged = f.op("And", flagged, ENABLED, name="flagged")
        if treatment.redistribution is not Redistribution.BENIGN:
            benign = None
        if self.options.strategy is Strategy.RERUN:
            self.edits += [AddNode(before, node) for node in (*nodes, *f.nodes())]
        else:
            result = self.redistributed(f, site, treatment, whole, flagged, benign)
            result = self.requantized(f, site, result)
            nodes += f.nodes()
            self.edits += [AddNode(before, node) for node in nodes]
            uses = site.uses
            self.edits += [RewireInput(u.node, u.slot, site.probabilities, result) for u in uses]
        if self.options.telemetry:
            shape: list[str | int | None] = [f"{prefix}/N", f"{prefix}/H", 1, f"{prefix}/K"]
            value = helper.make_tensor_value_info(flagged, TensorProto.BOOL, shape)
            self.edits.append(AddOutput(value))
        return Patched(
            site.name,
            flagged,
            treatment.redistribution.value,
            self.strategy(site).value,
            treatment.effective_threshold,
        )

    def rerun(self, sites: tuple[Site, ...], outcomes: list[Outcome]) -> list[Outcome]:
        """Add the second run; the outcomes, with the sites that are pruned in it."""
        flagged = {o.site: o.flagged for o in outcomes if isinstance(o, Patched)}
        if not flagged:
            return outcomes
        plan = plan_rerun(self.view, sites, [site for site in sites if site.name in flagged])
        if isinstance(plan, str):
            raise RefusedError(f"--strategy rerun: {plan}: choose guard or select")
        mode = next(t.redistribution for t in self.options.treatments.values())
        edits, union = add_rerun(self.view, self.constants, plan, list(flagged.values()), mode)
        self.edits += edits
        pruned = {site.name for site in plan.sites} - set(flagged)
        return [
            Patched(o.site, union, mode.value, Strategy.RERUN.value, None)
            if o.site in pruned
            else o
            for o in outcomes
        ]

    def redistributed(
        self,
        f: Fragment,
        site: Site,
        treatment: Treatment,
        whole: str,
        flagged: str,
        benign: str | None,
    ) -> str:
        """The new probabilities in the host's rank, computed as the strategy says."""
        ones = f.cast(flagged, TensorProto.FLOAT, "flagged_ones")
        largest = f.axes_op("ReduceMax", ones, [1, 2, 3], "sample_flagged_ones", keepdims=1)
        sample = f.cast(largest, TensorProto.BOOL, "sample_flagged")

        def inside(g: Fragment) -> str:
            new = redistribute(
                g, whole, flagged, sample, benign, treatment.redistribution, site.elem_type
            )
            return as_before(g, site, new)

        if self.strategy(site) is Strategy.SELECT:
            return inside(f)
        then, other = f.branch("if_flagged"), f.branch("if_clean")
        new = inside(then)
        same = other.op("Identity", site.probabilities, name="probabilities")
        batch = f.axes_op("ReduceMax", largest, [0, 1, 2, 3], "any_flagged_ones", keepdims=0)
        return f.op(
            "If",
            f.cast(batch, TensorProto.BOOL, "any_flagged"),
            name="guarded_probabilities",
            then_branch=then.subgraph(new, site.elem_type),
            else_branch=other.subgraph(same, site.elem_type),
        )

    def requantized(self, f: Fragment, site: Site, result: str) -> str:
        """The result on the grid of a host that quantises its probabilities.

        P V follows a DequantizeLinear there, and the runtime computes the two in integers; that
        must stay so, also for what is not flagged. Values on the grid stay where they are.
        """
        node = self.view.producer(site.probabilities)
        if node is None or node.op_type != "DequantizeLinear":
            return result
        scale = node.input[1:]
        axis = {a.name: a.i for a in node.attribute if a.name == "axis"}
        integers = f.op("QuantizeLinear", result, *scale, name="requantized", **axis)
        return f.op("DequantizeLinear", integers, *scale, name="requantized_back", **axis)

    def strategy(self, site: Site) -> Strategy:
        """The strategy in force: 16-bit maps are always selected.

        ONNX Runtime's CPU provider computes float16 in float32 and drops the roundings between
        neighbouring nodes; the edge of an `If` would bring one back, and with it other bits. (And
        an `If` cannot return bfloat16 before opset 16.)
        """
        if self.options.strategy is Strategy.RERUN:
            return Strategy.RERUN
        wide = site.elem_type in (TensorProto.FLOAT, TensorProto.DOUBLE)
        return self.options.strategy if wide else Strategy.SELECT

    def threshold(self, f: Fragment, site: Site, treatment: Treatment) -> str:
        """The site's threshold: a constant, or an overridable input under `toggle`."""
        value = treatment.effective_threshold
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

    def static_columns(self, f: Fragment, site: Site, treatment: Treatment, whole: str) -> str:
        """A mask `[1, 1, 1, K]` of the given columns; `[B, 1, 1, K]` where it is an output."""
        keys = site.facts.shape[-1] if site.facts.shape else None
        if isinstance(keys, int):
            outside = [c for c in treatment.columns if not -keys <= c < keys]
            if outside:
                raise InputError(
                    f"--columns {outside[0]}: site '{site.name}' has columns 0 to {keys - 1}"
                )
            mask = np.zeros((1, 1, 1, keys), bool)
            mask[..., list(treatment.columns)] = True
            name = f"columns{'_'.join(map(str, treatment.columns))}of{keys}"
            flagged = self.constants.add(name, mask)
        else:
            flagged = self.computed_columns(f, treatment, whole)
        if self.options.telemetry:
            one = whole
            for axis in (1, 2, 3):
                one = f.slice(one, 0, 1, axis, f"first{axis}")
            wide = f.cast(one, TensorProto.FLOAT, "first")
            every = f.op("Greater", wide, f.number(-1.0), name="every_sample")
            flagged = f.op("And", flagged, every, name="columns_by_sample")
        if self.options.toggle:
            flagged = f.op("And", flagged, ENABLED, name="flagged")
        elif self.options.telemetry:
            flagged = f.op("Identity", flagged, name="flagged")
        return flagged

    def computed_columns(self, f: Fragment, treatment: Treatment, whole: str) -> str:
        """The mask where the number of columns is known only at run time."""
        if f.opset < 11 and min(treatment.columns) < 0:
            raise InputError(
                "--columns counts from the end only from opset 11 on: give columns from the start"
            )
        shape = f.op("Shape", whole, name="map_shape")
        keys = f.slice(shape, 3, 4, 0, "map_keys")
        hot = self.constants.add("off_on", np.array([0, 1], np.float32))
        rows = f.op("OneHot", f.ints(*treatment.columns), keys, hot, name="column_rows")
        row = f.axes_op("ReduceMax", rows, [0], "column_row", keepdims=1)
        mask = f.axes_op("Unsqueeze", row, [0, 1], "column_mask")
        return f.cast(mask, TensorProto.BOOL, "columns")


def _skip(site: Site, treatment: Treatment | None) -> str:
    """Why a site is left alone; "" if it is not."""
    if treatment is None:
        return "not chosen"
    detector = treatment.detector
    if detector is not None and detector.layer_of(site.name, site.index) is None:
        return f"{detector.path} was not fitted for this site"
    return ""

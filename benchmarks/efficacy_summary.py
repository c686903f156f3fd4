"""From the rows of all victims to averages, and to whether the targets are met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from efficacy_victim import WHOLE_INPUT, Row

Record = dict[str, Any]
"""What was measured of one victim."""
Averages = dict[str, dict[str, dict[str, "Mean"]]]
"""By group, row and metric."""

CLEAN, IMAGE, TEXT, FAIRNESS, WHOLE = "clean", "image", "text", "fairness", "whole input"
SHIPPED, SHIPPED_FAIRNESS = "contrastive", "columns"
NOTHING_FLAGGED = {"agreement": 1.0, "false_positive_rate": 0.0}
NOTHING_FOUND = {"true_positive_rate": 0.0, "column_recall": 0.0, "over_attended_recall": 0.0}


@dataclass(frozen=True)
class Mean:
    """A mean over cases (for fairness, over attributes too), of their means over seeds.

    spread: root mean square of the cases' standard deviations over seeds; None where none has
    several.
    """

    value: float
    spread: float | None
    cases: int


@dataclass(frozen=True)
class Target:
    """A target, as measured; met is None where nothing was measured for it."""

    name: str
    wanted: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class _Entry:
    """One row of one victim as plain numbers; case: with the attribute where it has several."""

    group: str
    case: str
    row: str
    values: Mapping[str, float]


LIMITS = (
    (IMAGE, SHIPPED, "over_oracle", 0.01, "ASR above the oracle's"),
    (IMAGE, SHIPPED, "over_pruning_oracle", 0.01, "ASR above the pruning oracle's"),
    (IMAGE, SHIPPED, "over_natural", 0.01, "ASR above the clean model's natural rate"),
    (IMAGE, SHIPPED, "accuracy_lost", 0.001, "accuracy lost"),
    (IMAGE, SHIPPED, "false_positive_rate", 0.015, "clean inputs flagged (budget 1 %)"),
    (TEXT, SHIPPED, "over_oracle", 0.03, "ASR above the oracle's"),
    (TEXT, SHIPPED, "over_pruning_oracle", 0.03, "ASR above the pruning oracle's"),
    (TEXT, SHIPPED, "accuracy_lost", 0.003, "accuracy lost"),
    (TEXT, SHIPPED, "false_positive_rate", 0.015, "clean inputs flagged (budget 1 %)"),
    (FAIRNESS, SHIPPED_FAIRNESS, "unfairness", 0.001, "UF"),
    (FAIRNESS, SHIPPED_FAIRNESS, "accuracy_lost", 0.003, "accuracy lost"),
)
"""Group, row, metric, the most it may be, and what it is called."""
LEAST = (
    (IMAGE, SHIPPED, "column_recall", 0.99, "trigger columns flagged"),
    (IMAGE, SHIPPED, "over_attended_recall", 0.99, "those over-attended, at their site"),
)
ORACLES = {"over_oracle": "oracle", "over_pruning_oracle": "oracle, prune"}
"""Rows that know the columns, one for each way to treat them: the first is what the paper does, the
second the stronger where what is behind the columns carries the trigger too."""
_ROUNDING = 1e-9


def group_of(case: str, kind: str) -> str:
    """Where a victim is averaged."""
    if case.endswith("-clean"):
        return CLEAN
    if case.endswith(WHOLE_INPUT):
        return WHOLE
    return FAIRNESS if kind == "tabular" else kind


def averages(records: Sequence[Record]) -> Averages:
    """Means over cases and seeds.

    A row that failed counts as the original, in which nothing is flagged: what cannot be patched
    stays as it is. Added are `accuracy_lost`, and how much the ASR is `over_oracle`,
    `over_pruning_oracle` and `over_natural`, the clean model's natural rate into the target (the
    victim's own where there is no clean model).
    """
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for record in records:
        for entry in _entries(record):
            for metric, value in entry.values.items():
                key = (entry.group, entry.row, metric)
                values.setdefault(key, {}).setdefault(entry.case, []).append(value)
    found: Averages = {}
    for (group, row, metric), by_case in values.items():
        found.setdefault(group, {}).setdefault(row, {})[metric] = mean_of(by_case.values())
    return found


def mean_of(cases: Iterable[Sequence[float]]) -> Mean:
    """The mean over cases, given each one's values over seeds."""
    listed = list(cases)
    variances = [stdev(seeds) ** 2 for seeds in listed if len(seeds) > 1]
    spread = fmean(variances) ** 0.5 if variances else None
    return Mean(fmean(map(fmean, listed)), spread, len(listed))


def _entries(record: Record) -> list[_Entry]:
    """The rows of a victim as numbers."""
    group = group_of(record["case"], record["kind"])
    by_name = {(row.get("attribute"), row["row"]): row for row in record["rows"]}
    entries = []
    for (attribute, name), row in by_name.items():
        original = _numbers(by_name.get((attribute, "original"), {}))
        oracles = {
            metric: _numbers(by_name.get((attribute, row_name), {}))
            for metric, row_name in ORACLES.items()
        }
        values = original | NOTHING_FLAGGED if "error" in row else _numbers(row)
        if "error" in row and name == SHIPPED and oracles["over_oracle"]:
            values |= NOTHING_FOUND
        if "accuracy" in values and "accuracy" in original:
            values["accuracy_lost"] = original["accuracy"] - values["accuracy"]
        if (attacked := values.get("attack_success_rate")) is not None:
            for metric, oracle in oracles.items():
                if "attack_success_rate" in oracle:
                    values[metric] = attacked - oracle["attack_success_rate"]
            natural = _numbers(record.get("clean_model") or {}) or original
            if "natural_rate" in natural:
                values["over_natural"] = attacked - natural["natural_rate"]
        case = " ".join(filter(None, (record["case"], attribute)))
        entries.append(_Entry(group, case, name, values))
    return entries


def _numbers(row: Row) -> dict[str, float]:
    return {
        name: float(rate["value"])
        for name, rate in row.items()
        if isinstance(rate, dict) and "value" in rate
    }


def targets(records: Sequence[Record]) -> list[Target]:
    """Every target, as measured."""
    means = averages(records)
    found = [_limit(means, *limit, most=True) for limit in LIMITS]
    found += [_limit(means, *limit, most=False) for limit in LEAST]
    scans = [record for record in records if record.get("scan")]
    seen = [r for r in scans if group_of(r["case"], r["kind"]) in (IMAGE, TEXT)]
    clean = [r for r in scans if group_of(r["case"], r["kind"]) == CLEAN]
    return [
        *found,
        _scans("scan: verdict and class right", seen),
        _scans("scan: no alarm on clean models", clean),
    ]


def _limit(
    means: Averages, group: str, row: str, metric: str, limit: float, name: str, *, most: bool
) -> Target:
    wanted = f"{'at most' if most else 'at least'} {_points(limit)}"
    mean = means.get(group, {}).get(row, {}).get(metric)
    if mean is None:
        return Target(f"{group}: {name}", wanted, "not measured", None)
    over = mean.value - limit if most else limit - mean.value
    found = f"{shown(mean)} over {mean.cases} case{'s' * (mean.cases != 1)}"
    return Target(f"{group}: {name}", wanted, found, over <= _ROUNDING)


def _scans(name: str, records: Sequence[Record]) -> Target:
    wrong = [f"{r['case']}-s{r['seed']}" for r in records if not r["scan"]["right"]]
    right = f"{len(records) - len(wrong)} of {len(records)}"
    found = right + (f" (not {', '.join(wrong)})" if wrong else "")
    return Target(name, "all", found, not wrong if records else None)


def shown(mean: Mean) -> str:
    """In percent, with its spread over seeds."""
    return _points(mean.value) + ("" if mean.spread is None else f" ± {_points(mean.spread)}")


def _points(share: float) -> str:
    return f"{100 * share:.2f}"

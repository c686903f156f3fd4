"""The tabular cases: models that are unfair because their data is."""

from __future__ import annotations

import functools

from .cases import Case, Facts, Job

NEEDS = {
    "census": "tabular/adf",
    "bank": "tabular/adf",
    "credit": "tabular/adf",
    "compas": "tabular/compas",
}


def tabular_cases() -> tuple[Case, ...]:
    """Every tabular case, named after its table."""
    return tuple(
        Case(name, "tabular", functools.partial(_make, name), (folder,))
        for name, folder in NEEDS.items()
    )


def _make(table: str, job: Job) -> Facts:
    from .tabular_victims import make_tabular

    return make_tabular(job, table)

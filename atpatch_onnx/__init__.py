"""Hot-patch exported ONNX transformers by redistributing attention.

The functions here are the commands of the command line. They are loaded when they are first used,
so that `import atpatch_onnx` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Inspection, PatchReport, apply, inspect, patch, revert, verify
    from .benchmark import Timing, bench
    from .certificate import Check
    from .demonstration import DemoReport, demo
    from .diffing import Comparison, diff
    from .errors import AtpatchError, CheckError, InputError, RefusedError
    from .evaluating import AttackEvaluation, BeforeAfter, Evaluation, Unfairness, evaluate
    from .fitting import FitReport, fit
    from .progress import Progress
    from .rates import Rate
    from .scanning import scan
    from .scanning_protected import ProtectedReport, scan_protected
    from .search.report import ClassReport, ScanReport

__version__ = _version("atpatch-onnx")

_HOMES = {
    name: home
    for home, names in {
        "api": "Inspection PatchReport apply inspect patch revert verify",
        "benchmark": "Timing bench",
        "certificate": "Check",
        "demonstration": "DemoReport demo",
        "diffing": "Comparison diff",
        "errors": "AtpatchError CheckError InputError RefusedError",
        "evaluating": "AttackEvaluation BeforeAfter Evaluation Unfairness evaluate",
        "fitting": "FitReport fit",
        "progress": "Progress",
        "rates": "Rate",
        "scanning": "scan",
        "scanning_protected": "ProtectedReport scan_protected",
        "search.report": "ClassReport ScanReport",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atpatch_onnx' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


__all__ = [
    "AtpatchError",
    "AttackEvaluation",
    "BeforeAfter",
    "Check",
    "CheckError",
    "ClassReport",
    "Comparison",
    "DemoReport",
    "Evaluation",
    "FitReport",
    "InputError",
    "Inspection",
    "PatchReport",
    "Progress",
    "ProtectedReport",
    "Rate",
    "RefusedError",
    "ScanReport",
    "Timing",
    "Unfairness",
    "apply",
    "bench",
    "demo",
    "diff",
    "evaluate",
    "fit",
    "inspect",
    "patch",
    "revert",
    "scan",
    "scan_protected",
    "verify",
]

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
    from .decoding import Decoder, State
    from .demonstration import DemoReport, demo
    from .diffing import Comparison, diff
    from .errors import AtpatchError, CheckError, InputError, RefusedError
    from .evaluating import AttackEvaluation, BeforeAfter, Evaluation, Unfairness, evaluate
    from .exporting.command import ExportReport, export
    from .fitting import FitReport, fit
    from .gating import Gated, Limits, gate
    from .progress import Progress
    from .rates import Rate
    from .reporting import ReportWritten, report
    from .scanning import scan
    from .scanning_protected import ProtectedReport, scan_protected
    from .search.report import ClassReport, ScanReport
    from .serving.command import Served, serve
    from .serving.control import Changed, rollback, swap
    from .serving.flags import Flags
    from .serving.golden import Golden
    from .serving.session import Session, Swapped
    from .serving.version import Answer, Settings
    from .signing import Signed, require_signature, sign

__version__ = _version("atpatch-onnx")

_HOMES = {
    name: home
    for home, names in {
        "api": "Inspection PatchReport apply inspect patch revert verify",
        "benchmark": "Timing bench",
        "certificate": "Check",
        "decoding": "Decoder State",
        "demonstration": "DemoReport demo",
        "diffing": "Comparison diff",
        "errors": "AtpatchError CheckError InputError RefusedError",
        "evaluating": "AttackEvaluation BeforeAfter Evaluation Unfairness evaluate",
        "exporting.command": "ExportReport export",
        "fitting": "FitReport fit",
        "gating": "Gated Limits gate",
        "progress": "Progress",
        "rates": "Rate",
        "reporting": "ReportWritten report",
        "scanning": "scan",
        "scanning_protected": "ProtectedReport scan_protected",
        "search.report": "ClassReport ScanReport",
        "serving.command": "Served serve",
        "serving.control": "Changed rollback swap",
        "serving.flags": "Flags",
        "serving.golden": "Golden",
        "serving.session": "Session Swapped",
        "serving.version": "Answer Settings",
        "signing": "Signed require_signature sign",
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
    "Answer",
    "AtpatchError",
    "AttackEvaluation",
    "BeforeAfter",
    "Changed",
    "Check",
    "CheckError",
    "ClassReport",
    "Comparison",
    "Decoder",
    "DemoReport",
    "Evaluation",
    "ExportReport",
    "FitReport",
    "Flags",
    "Gated",
    "Golden",
    "InputError",
    "Inspection",
    "Limits",
    "PatchReport",
    "Progress",
    "ProtectedReport",
    "Rate",
    "RefusedError",
    "ReportWritten",
    "ScanReport",
    "Served",
    "Session",
    "Settings",
    "Signed",
    "State",
    "Swapped",
    "Timing",
    "Unfairness",
    "apply",
    "bench",
    "demo",
    "diff",
    "evaluate",
    "export",
    "fit",
    "gate",
    "inspect",
    "patch",
    "report",
    "require_signature",
    "revert",
    "rollback",
    "scan",
    "scan_protected",
    "serve",
    "sign",
    "swap",
    "verify",
]

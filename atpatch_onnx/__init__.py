"""Hot-patch exported ONNX transformers by redistributing attention.

The functions here are the commands of the command line. They are loaded when they are first used,
so that `import atpatch_onnx` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import apply, inspect, patch, revert, verify
    from .benchmark import bench
    from .demonstration import demo
    from .diffing import diff
    from .errors import AtpatchError, CheckError, InputError, RefusedError
    from .fitting import fit

__version__ = _version("atpatch-onnx")

_HOMES = {
    **dict.fromkeys(("apply", "inspect", "patch", "revert", "verify"), "api"),
    "bench": "benchmark",
    "demo": "demonstration",
    "diff": "diffing",
    "fit": "fitting",
    **dict.fromkeys(("AtpatchError", "CheckError", "InputError", "RefusedError"), "errors"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atpatch_onnx' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = [
    "AtpatchError",
    "CheckError",
    "InputError",
    "RefusedError",
    "apply",
    "bench",
    "demo",
    "diff",
    "fit",
    "inspect",
    "patch",
    "revert",
    "verify",
]

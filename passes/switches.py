"""Overridable inputs that `--toggle` adds, by name."""

from __future__ import annotations

ENABLED = "atpatch/enabled"
"""Bool: false switches the patch off."""
THRESHOLD = "atpatch/threshold"
"""Float32, where all sites have the same threshold; else `atpatch/<site>/threshold`."""

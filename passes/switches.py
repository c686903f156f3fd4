"""Inputs and outputs that a patch adds, by name."""

from __future__ import annotations

ENABLED = "atpatch/enabled"
"""`--toggle`, bool: false switches the patch off."""
THRESHOLD = "atpatch/threshold"
"""`--toggle`, float32, where all sites have the same threshold; else `atpatch/<site>/threshold`."""
REMEMBERED = "atpatch/remembered"
"""`--remember`, the input: bool `[B, P]`, the first P keys; samples in rows."""
FLAGGED = "atpatch/flagged_columns"
"""`--remember`, the output: bool `[B, K]`."""

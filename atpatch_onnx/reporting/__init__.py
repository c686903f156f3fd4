"""The command `report`: one page that a person can decide from."""

from __future__ import annotations

from .command import ReportWritten, report

__all__ = ["ReportWritten", "report"]

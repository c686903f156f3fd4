"""Fit detectors: from a model, clean data and perhaps a debugging set to a detector file."""

from .command import FitReport, fit

__all__ = ["FitReport", "fit"]

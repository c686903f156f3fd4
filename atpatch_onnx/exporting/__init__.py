"""Folders that servers and devices take: a Triton repository, a KServe service, an edge bundle."""

from .command import export

__all__ = ["export"]

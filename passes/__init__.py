"""Passes: read a graph, return edits. None of them changes a model."""

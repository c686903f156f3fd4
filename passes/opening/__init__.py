"""Fused attention operators, opened: the plain nodes that compute what they hide."""

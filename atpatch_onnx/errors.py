"""What can go wrong, as types: each carries one sentence with the fix and its exit code."""

from __future__ import annotations


class AtpatchError(Exception):
    """Base of every error a user can cause; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(AtpatchError):
    """Bad usage or bad input: a file, a name, a shape or an option that cannot be used."""


class RefusedError(AtpatchError):
    """Understood, but declined: it would give an artifact that is broken or not as promised."""

    exit_code = 3


def at_least(least: int, value: int, option: str) -> None:
    """Raises: InputError if an option is below its least value."""
    if value < least:
        raise InputError(f"{option} {value}: give at least {least}")


class CheckError(AtpatchError):
    """A check failed: the files are not what their certificate, patch or digest says."""

    exit_code = 1

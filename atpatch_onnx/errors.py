"""What can go wrong, as types: each carries one sentence with the fix and its exit code."""

from __future__ import annotations

import re


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


def reason(error: OSError) -> str:
    """Why the system would not do something, as part of a sentence."""
    return (error.strerror or str(error)).lower()


def first_line(error: Exception) -> str:
    """The first line of an error message, short enough for a sentence."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return one_sentence(line)[:300].rstrip(". ")


def one_sentence(text: str) -> str:
    """Several sentences as one, on one line."""
    return re.sub(r"[.!?]\s+(?=[A-Z])", "; ", " ".join(text.split()))

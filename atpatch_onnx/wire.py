"""Protobuf on the wire: where each field of a message lies, and files made of spans of another.

A patched model is the original's bytes with a few spans replaced. Working on the encoded bytes,
instead of parsing and serialising again, is what keeps every byte that no edit names: unknown
fields, field order, non-minimal varints, deprecated encodings.

Source: protobuf encoding specification, https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap

Buffer = bytes | mmap | memoryview

VARINT, I64, LEN, SGROUP, EGROUP, I32 = range(6)


class WireError(ValueError):
    """The bytes are not a protobuf message; `truncated` if they look like the start of one."""

    def __init__(self, message: str, truncated: bool = False) -> None:
        super().__init__(message)
        self.truncated = truncated


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message: its tag starts at `start`, its payload is `[payload, end)`."""

    number: int
    wire_type: int
    start: int
    payload: int
    end: int


@dataclass(frozen=True, slots=True)
class Replacement:
    """Replace `[start, end)` of a buffer by `content`; an insertion has `start == end`."""

    start: int
    end: int
    content: bytes


def read_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    """The varint at `position` and the offset behind it. Raises: WireError."""
    value = shift = 0
    while position < end:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise WireError(f"no varint ends within ten bytes of offset {position}")
    raise WireError("the data ends inside a varint", truncated=True)


def fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message encoded in `[start, end)`, in file order. Raises: WireError."""
    position = start
    while position < end:
        tag, payload = read_varint(buffer, position, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 at offset {position}")
        if wire_type == VARINT:
            _, stop = read_varint(buffer, payload, end)
        elif wire_type == LEN:
            length, payload = read_varint(buffer, payload, end)
            stop = payload + length
        elif wire_type in (I64, I32):
            stop = payload + (8 if wire_type == I64 else 4)
        else:
            raise WireError(f"wire type {wire_type} at offset {position}")
        if stop > end:
            raise WireError(
                f"the field at offset {position} is longer than the data", truncated=True
            )
        yield Field(number, wire_type, position, payload, stop)
        position = stop


def varint(value: int) -> bytes:
    """`value` as a minimal varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return varint(number << 3 | LEN) + varint(length)


def delimited(number: int, payload: bytes) -> bytes:
    """A whole length-delimited field."""
    return header(number, len(payload)) + payload


def growth(replacements: Iterable[Replacement]) -> int:
    """How many bytes longer a buffer gets by `replacements`."""
    return sum(len(s.content) - (s.end - s.start) for s in replacements)


def replaced(
    buffer: Buffer, size: int, replacements: Iterable[Replacement]
) -> Iterator[bytes | memoryview]:
    """`buffer` with sorted `replacements` applied, in chunks; nothing large is copied."""
    view = memoryview(buffer)
    position = 0
    for replacement in replacements:
        yield from _chunks(view, position, replacement.start)
        if replacement.content:
            yield replacement.content
        position = replacement.end
    yield from _chunks(view, position, size)


def _chunks(view: memoryview, start: int, end: int, step: int = 1 << 22) -> Iterator[memoryview]:
    for position in range(start, end, step):
        yield view[position : min(position + step, end)]

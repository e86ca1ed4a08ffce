"""Request bytes to messages, with invalid UTF-8 pinned to the text that holds it.

protobuf rejects a whole message for one bad string and names neither. Clients in C, C++ or by hand do send such
strings; here the bad text is taken out and named, so that the others are served. Where it is no item of a list, what the
request means is not known, and it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from openbook_server.errors import InvalidRequest, MessageTooLarge

Request = TypeVar("Request", bound=Message)
_LENGTH_DELIMITED, _GROUP = 2, 3
_DEEPEST = 100  # messages within messages, as protobuf has it
_MOST_FIELDS = 100_000  # that are looked through, in about a fifth of a second
_FIXED_BYTES = {1: 8, 5: 4}  # wire type -> bytes


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Request]):
    """A request as it came off the wire: the message with items of lists that are not UTF-8 emptied, and which those are."""

    message: Request
    not_utf8: frozenset[tuple[str, int]]  # (field, index)
    failure: InvalidRequest | None = None


def parser(kind: type[Request], max_message_bytes: int) -> Callable[[bytes], Parsed[Request]]:
    """A gRPC request deserialiser that never raises: failures travel to the service, which words them."""

    def parse(data: bytes) -> Parsed[Request]:
        if len(data) > max_message_bytes:
            return Parsed(
                kind(),
                frozenset(),
                MessageTooLarge("request", f"{len(data)} bytes exceed the limit of {max_message_bytes}; send fewer texts a message"),
            )
        try:
            return Parsed(kind.FromString(data), frozenset())
        except DecodeError:
            pass
        try:
            repaired, bad = _empty_bad_strings(data, kind.DESCRIPTOR, iter(range(_MOST_FIELDS)))
            message = kind.FromString(repaired)
        except (DecodeError, ValueError):
            return Parsed(kind(), frozenset(), InvalidRequest("request", f"the bytes are no {kind.DESCRIPTOR.full_name} message"))
        for name, _ in bad:
            if not kind.DESCRIPTOR.fields_by_name[name].is_repeated:
                return Parsed(kind(), frozenset(), InvalidRequest(name, "not valid UTF-8; encode the text as UTF-8 before sending it"))
        return Parsed(message, frozenset(bad))

    return parse


def _empty_bad_strings(data: bytes, descriptor: Any, fields_left: Iterator[int], depth: int = 1) -> tuple[bytes, list[tuple[str, int]]]:
    """The message with strings that are no UTF-8 emptied, and the (field, index) of each, or of the submessage that holds it.

    ValueError for what is no message, is nested too deep or has too many fields to look through.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    fields = {field.number: field for field in descriptor.fields}
    seen = dict.fromkeys(fields, 0)
    bad: list[tuple[str, int]] = []
    parts = []
    for tag, number, start, payload, end in _fields(data, fields_left, depth):
        part = data[start:end]
        field = fields.get(number) if tag[0] & 7 == _LENGTH_DELIMITED else None  # no text and no message is of another wire type
        if field is not None and field.type == FieldDescriptor.TYPE_STRING:
            try:
                data[payload:end].decode()
            except UnicodeDecodeError:
                bad.append((field.name, seen[number]))
                part = tag + b"\0"
        elif field is not None and field.type == FieldDescriptor.TYPE_MESSAGE:
            inner, found = _empty_bad_strings(data[payload:end], field.message_type, fields_left, depth + 1)
            if found:
                bad.append((field.name, seen[number]))
                part = tag + _encoded(len(inner)) + inner
        if field is not None:
            seen[number] += 1
        parts.append(part)
    return b"".join(parts), bad


def _fields(data: bytes, fields_left: Iterator[int], depth: int) -> Iterator[tuple[bytes, int, int, int, int]]:
    """(tag bytes, field number, start, payload start, end) of each top-level field; ValueError where the bytes run out."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        tag = data[start:at]
        at, end = _payload(data, at, key, fields_left, depth)
        yield tag, key >> 3, start, at, end
        at = end


def _payload(data: bytes, at: int, key: int, fields_left: Iterator[int], depth: int) -> tuple[int, int]:
    """(start, end) of what follows the tag `key`; of a group, an outdated way to nest, up to behind its closing tag."""
    if next(fields_left, None) is None:
        raise ValueError("too many fields")
    kind, end = key & 7, at
    if kind == _LENGTH_DELIMITED:
        size, at = _varint(data, at)
        end = at + size
    elif kind in _FIXED_BYTES:
        end += _FIXED_BYTES[kind]
    elif kind == 0:
        _, end = _varint(data, at)
    elif kind == _GROUP and depth < _DEEPEST:
        inner, end = _varint(data, end)
        while inner != key + 1:  # the same number, and the wire type that closes
            _, end = _payload(data, end, inner, fields_left, depth + 1)
            inner, end = _varint(data, end)
    else:
        raise ValueError("wire type not in use, or nested too deep")
    if end > len(data):
        raise ValueError("truncated message")
    return at, end


def _encoded(value: int) -> bytes:
    """`value` as a varint."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("truncated or overlong number")

"""Tokens of a text in about three bytes each, from which rows are cut without making an object a token.

    <bytes an id: 2 or 4> <tokens: uint32> <ids> <a byte a token> <exceptions>          little-endian throughout

A token's characters are written as two small steps, from the end of the token before to its start, and from there to its
end: four bits each. Tokens with a step that four bits do not hold (long words, runs of spaces, several tokens of one
character, which begin before the last one ended) are written out as exceptions: (token, gap, length) of int32.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<BI")
_LARGEST_STEP = 15
_EXCEPTION = 12  # bytes


def pack(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> bytes:
    """Args:
    ids: of the tokens, 0 to 2^32 - 1.
    offsets: (start, end) of each token's characters, ends exclusive, in any order.
    """
    tokens = len(ids)
    width = 2 if max(ids, default=0) < 1 << 16 else 4
    places = np.array(offsets, np.int32).reshape(tokens, 2)
    steps = np.empty((tokens, 2), np.int32)  # gap, length
    steps[:, 0] = places[:, 0]
    steps[1:, 0] -= places[:-1, 1]
    steps[:, 1] = places[:, 1] - places[:, 0]
    [exceptions] = np.nonzero(((steps < 0) | (steps > _LARGEST_STEP)).any(axis=1))
    small = np.clip(steps, 0, _LARGEST_STEP).astype(np.uint8)
    written_out = np.column_stack((exceptions, steps[exceptions])).astype("<i4")
    return b"".join(
        (
            _HEADER.pack(width, tokens),
            np.array(ids, f"<u{width}").tobytes(),
            (small[:, 0] << 4 | small[:, 1]).tobytes(),
            written_out.tobytes(),
        )
    )


def is_packed(data: bytes, vocabulary: int) -> bool:
    """Whether `data`, read from a disk, is what `pack` made of ids below `vocabulary`."""
    if len(data) < _HEADER.size:
        return False
    width, tokens = _HEADER.unpack_from(data)
    rest = len(data) - _HEADER.size - tokens * (width + 1)  # exceptions, three numbers each
    if width not in (2, 4) or rest < 0 or rest % _EXCEPTION:
        return False
    exceptions = np.frombuffer(data, "<u4", offset=len(data) - rest).reshape(-1, 3)
    ids = np.frombuffer(data, f"<u{width}", tokens, _HEADER.size)
    return bool((ids < vocabulary).all() and (exceptions[:, 0] < tokens).all())


def unpack_ids(packed: bytes, most: int) -> array[int]:
    """The ids of at most so many of the first tokens."""
    width, tokens = _HEADER.unpack_from(packed)
    return array("q", np.frombuffer(packed, f"<u{width}", min(tokens, most), _HEADER.size).astype(np.int64).tobytes())


def unpack_offsets(packed: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token's characters start, and where they end."""
    width, tokens = _HEADER.unpack_from(packed)
    at = _HEADER.size + width * tokens
    small = np.frombuffer(packed, np.uint8, tokens, at)
    gaps, lengths = small >> 4, small & _LARGEST_STEP
    if len(packed) > at + tokens:
        exceptions = np.frombuffer(packed, "<i4", offset=at + tokens).reshape(-1, 3)
        gaps, lengths = gaps.astype(np.int32), lengths.astype(np.int32)
        gaps[exceptions[:, 0]], lengths[exceptions[:, 0]] = exceptions[:, 1], exceptions[:, 2]
    ends = (gaps + lengths).cumsum(dtype=np.int64)
    return ends - lengths, ends

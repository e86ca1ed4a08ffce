"""Vectors of a passage's windows, four bits a dimension: what a question is held against once a passage is a candidate.

A passage's one vector is the mean of all that it says, and a question asks for one thing of it. So hybrid search compares
the candidates by their nearest windows, runs of a few tokens, whose vectors are pooled from the states that the
passage's own vector was pooled from ("late chunking", Günther et al. 2024): they cost no inference. How well they rank,
and that four bits rank as well as 32, is in docs/search.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Key = TypeVar("Key")

_LARGEST = 7  # of what four bits hold, -7 to 7; they are stored as 1 to 15
_ZERO = 8


def pack(vectors: NDArray[np.float32]) -> bytes:
    """Rows of (windows, dim), none of them zero and dim even, in dim / 2 bytes each; lengths are not kept, directions about to 1 %."""
    scale = _LARGEST / np.abs(vectors).max(axis=1, keepdims=True)
    low, high = np.split((np.rint(vectors * scale) + _ZERO).astype(np.uint8), 2, axis=1)  # the halves of the dimensions
    packed: bytes = (low | high << 4).tobytes()
    return packed


def nearness(question: NDArray[np.float32] | None, passages: Sequence[Key], windows: Mapping[Key, bytes]) -> dict[Key, float]:
    """The cosine of a question's unit vector (dim,) with the nearest window of each passage; of none where there is no vector, or any of
    them has no windows: scores of passages by their windows and by themselves do not compare."""
    found = [windows.get(passage, b"") for passage in passages]
    if question is None or not found or not all(found):
        return {}
    half = len(question) // 2
    data = np.frombuffer(b"".join(found), np.uint8).reshape(-1, half)
    low, high = ((part.astype(np.float32) - _ZERO) for part in (data & 15, data >> 4))
    cosines = (low @ question[:half] + high @ question[half:]) / np.sqrt((low * low + high * high).sum(axis=1))
    ends = np.cumsum([len(packed) // half for packed in found])
    nearest: list[float] = np.maximum.reduceat(cosines, np.concatenate(([0], ends[:-1]))).tolist()
    return dict(zip(passages, nearest, strict=True))

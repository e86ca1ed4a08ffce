"""Windows of a passage, runs of some 24 of its tokens: what a question is held against once a passage is a candidate.

A passage's one vector is the mean of all that it says, and a question asks for one thing of it. So hybrid search and late
interaction compare the candidates by their windows, in two ways, both made of the states that the passage's own vector was
pooled from ("late chunking", Günther et al. 2024), so that they cost no inference:

- as a whole: a window's vector is the mean of its states, four bits a dimension;
- token by token, as far as the bundle says so: of each state the signs of its first dimensions, a bit each. How many of them differ
  between two tokens tells the angle between their states (Charikar 2002, section 3), so every token of the question finds the token that
  is nearest to it in a window (late interaction, Khattab & Zaharia 2020).

How well both rank is in docs/search.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# Of a window, about; in docs/search.md is why. What is stored depends on it: where windows end is told from the number of tokens alone.
WINDOW_TOKENS = 24
QUESTION_TOKENS = 64  # of a question that are compared one by one; the rest of a longer one is not

Key = TypeVar("Key")
Signs = NDArray[np.uint64]  # (tokens, words) of 64 signs each
Tokens = Sequence[Signs | None]  # of each of some questions; none at all means that none has any

_LARGEST = 7  # of what four bits hold, -7 to 7; they are stored as 1 to 15
_ZERO = 8
_HEADER = struct.Struct("<BH")  # 0, which is no byte of a window's vector, and how many tokens there are
_LEAST = 1e-3  # of a token's weight
_AT_ONCE = 8_192  # tokens of passages that are compared at once, about: more need no less time, and memory


class Nearness(NamedTuple):
    """Of a passage to a question."""

    window: float  # cosine of the nearest window
    tokens: float | None  # the best window's, see `_token_scores`; None where tokens are not compared


def edges(tokens: int) -> list[int]:
    """Where the windows of a text of so many tokens begin, and the end: even parts of about WINDOW_TOKENS, one at least."""
    count = max(1, round(tokens / WINDOW_TOKENS))
    return [tokens * part // count for part in range(count + 1)]


def signs(states: NDArray[np.floating], dims: int) -> Signs:
    """Which of the first `dims` dimensions of each of the (tokens, dim) states are above 0.

    Args:
        dims: should be a multiple of 64: what fills the last word up counts as alike.
    """
    bits = np.packbits(states[:, :dims] > 0, axis=1)
    return np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view("<u8")


def pack(vectors: NDArray[np.float32], tokens: Signs | None = None) -> bytes:
    """A passage's windows in few bytes.

    Args:
        vectors: (windows, dim), none of them zero and dim even, kept in dim / 2 bytes each: of lengths nothing, of directions all but 1 %.
        tokens: of the text whose `edges` the windows have; None = they are not compared one by one.
    """
    scale = _LARGEST / np.abs(vectors).max(axis=1, keepdims=True)
    low, high = np.split((np.rint(vectors * scale) + _ZERO).astype(np.uint8), 2, axis=1)  # the halves of the dimensions
    packed: bytes = (low | high << 4).tobytes()
    return packed if tokens is None else _HEADER.pack(0, len(tokens)) + packed + tokens.tobytes()


def nearness(
    question: NDArray[np.float32] | None, tokens: Signs | None, passages: Sequence[Key], windows: Mapping[Key, bytes]
) -> dict[Key, Nearness]:
    """How near a question's unit vector (dim,) and its tokens are to each passage; of none where there is no vector, or any of
    them has no windows: scores of passages by their windows and by themselves do not compare. Nor do scores with tokens and without."""
    found = [windows.get(passage, b"") for passage in passages]
    if question is None or not found or not all(found):
        return {}
    parts = [_unpack(packed, len(question) // 2) for packed in found]
    cosines = _cosines(question, b"".join([part.vectors for part in parts]))
    firsts = _firsts([len(part.edges) - 1 for part in parts])
    nearest: list[float] = np.maximum.reduceat(cosines, firsts).tolist()
    if tokens is None or not len(tokens) or not all(part.tokens for part in parts):
        return {passage: Nearness(window, None) for passage, window in zip(passages, nearest, strict=True)}
    read = np.frombuffer(b"".join([part.tokens for part in parts]), "<u8").reshape(-1, tokens.shape[1])
    starts = [
        first + edge for first, part in zip(_firsts([part.edges[-1] for part in parts]), parts, strict=True) for edge in part.edges[:-1]
    ]
    scores = _token_scores(tokens, read, starts, firsts)
    return {passage: Nearness(*near) for passage, *near in zip(passages, nearest, scores, strict=True)}


class _Packed(NamedTuple):
    vectors: bytes
    tokens: bytes
    edges: list[int]  # of the windows; where tokens are not kept, numbers of windows


def _unpack(packed: bytes, size: int) -> _Packed:
    """What `pack` put together; `size` is that of a vector."""
    if packed[0]:
        return _Packed(packed, b"", list(range(len(packed) // size + 1)))
    _, tokens = _HEADER.unpack_from(packed)
    ends = edges(tokens)
    middle = _HEADER.size + size * (len(ends) - 1)
    return _Packed(packed[_HEADER.size : middle], packed[middle:], ends)


def _firsts(counts: Sequence[int]) -> list[int]:
    """Where each of some runs begins, that stand one behind the other."""
    return [0, *accumulate(counts[:-1])]


def _cosines(question: NDArray[np.float32], packed: bytes) -> NDArray[np.float32]:
    """Of a unit vector with each window's."""
    half = len(question) // 2
    data = np.frombuffer(packed, np.uint8).reshape(-1, half)
    low, high = ((part.astype(np.float32) - _ZERO) for part in (data & 15, data >> 4))
    # Not `@`, here and in `_token_scores`: it may add in another order in another place, and equal passages must have equal scores.
    products = np.einsum("nd,d->n", low, question[:half]) + np.einsum("nd,d->n", high, question[half:])
    cosines: NDArray[np.float32] = products / np.sqrt((low * low + high * high).sum(axis=1))
    return cosines


def _token_scores(question: Signs, tokens: Signs, starts: Sequence[int], firsts: Sequence[int]) -> list[float]:
    """max_w Σ_i g_i m_iw / Σ_i g_i of each passage, w running over its windows and i over the question's tokens.

    m_iw is the cosine of token i with the nearest token of window w. A token's weight g_i is what it tells of the passages at hand: by how
    much the passage that is nearest to it is nearer than all are on average.

    Args:
        tokens: of all passages.
        starts: among them, the first of each window.
        firsts: among the windows, the first of each passage.
    """
    least = np.concatenate([_least_apart(question, tokens[a:b], inside) for a, b, inside in _blocks(starts, len(tokens))], axis=1)
    near = np.cos(np.pi * np.arange(64 * question.shape[1] + 1) / (64 * question.shape[1]))[least]
    best = np.maximum.reduceat(near, firsts, axis=1)
    weights = np.maximum(best.max(axis=1) - best.mean(axis=1), _LEAST)
    scores: list[float] = np.maximum.reduceat((weights[:, None] * near).sum(axis=0) / weights.sum(), firsts).tolist()
    return scores


def _blocks(starts: Sequence[int], end: int) -> Iterator[tuple[int, int, list[int]]]:
    """(first, end, where windows begin from there on) of runs of whole windows, of _AT_ONCE tokens or a window more."""
    block: list[int] = []
    for start in starts:
        if block and start - block[0] >= _AT_ONCE:
            yield block[0], start, [each - block[0] for each in block]
            block = []
        block.append(start)
    yield block[0], end, [each - block[0] for each in block]


def _least_apart(question: Signs, tokens: Signs, starts: Sequence[int]) -> NDArray[np.uint16]:
    """In how many signs each of the question's tokens differs from the token of each window that is most alike, (question, windows)."""
    apart = np.zeros((len(question), len(tokens)), np.uint16)
    for word, those in zip(question.T, np.ascontiguousarray(tokens.T), strict=True):
        apart += np.bitwise_count(word[:, None] ^ those)
    least: NDArray[np.uint16] = np.minimum.reduceat(apart, starts, axis=1)
    return least

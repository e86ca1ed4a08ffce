"""Padding buckets: the padded length of a row depends on its own length alone.

Rows share a batch only within a bucket, so a row's result never depends on its neighbours, and at most about an eighth
of what runs is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

_STEPS = ((32, 1), (128, 4))  # up to this many tokens, in steps of that many
_LAST_STEP = 8


def padded_length(tokens: int) -> int:
    """The smallest bucket that holds `tokens` (at least 1)."""
    step = next((step for limit, step in _STEPS if tokens <= limit), _LAST_STEP)
    return -(-tokens // step) * step


def padded_lengths(max_tokens: int) -> list[int]:
    """Every bucket that rows of 1 to `max_tokens` fall into, shortest first."""
    return sorted({padded_length(tokens) for tokens in range(1, max_tokens + 1)})


def batches_by_length(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Rows grouped by bucket into batches of at most `max_batch_tokens` padded tokens (a longer row goes alone)."""
    groups: dict[int, list[int]] = {}
    for row, tokens in enumerate(lengths):
        groups.setdefault(padded_length(tokens), []).append(row)
    batches = []
    for length, rows in sorted(groups.items()):
        size = max(1, max_batch_tokens // length)
        batches += [rows[at : at + size] for at in range(0, len(rows), size)]
    return batches

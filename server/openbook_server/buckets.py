"""Padding buckets: the padded length of a row depends on its own length alone.

Rows share a batch only within a bucket, so a row's result never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buckets:
    """How a graph's rows are padded: in steps of `steps[n][1]` up to `steps[n][0]` tokens, and of `last_step` beyond.

    None is padded beyond `longest`, where that is given: a model has no more positions.
    """

    steps: tuple[tuple[int, int], ...]
    last_step: int
    longest: int | None = None

    def padded_length(self, tokens: int) -> int:
        """The smallest bucket that holds `tokens` (at least 1)."""
        step = next((step for limit, step in self.steps if tokens <= limit), self.last_step)
        padded = -(-tokens // step) * step
        return padded if self.longest is None else max(tokens, min(padded, self.longest))

    def padded_lengths(self, max_tokens: int) -> list[int]:
        """Every bucket that rows of 1 to `max_tokens` fall into, shortest first."""
        return sorted({self.padded_length(tokens) for tokens in range(1, max_tokens + 1)})

    def batches(self, lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
        """Rows grouped by bucket into batches of at most `max_batch_tokens` padded tokens (a longer row goes alone)."""
        groups: dict[int, list[int]] = {}
        for row, tokens in enumerate(lengths):
            groups.setdefault(self.padded_length(tokens), []).append(row)
        batches = []
        for length, rows in sorted(groups.items()):
            size = max(1, max_batch_tokens // length)
            batches += [rows[at : at + size] for at in range(0, len(rows), size)]
        return batches


# Where padding costs what tokens cost: at most about an eighth of what runs is padding.
FINE = Buckets(((32, 1), (128, 4)), 8)
# Where padding costs next to nothing, or more rows in a batch are worth more than it costs; all are multiples of vector registers.
COARSE = Buckets(((32, 8), (128, 16)), 32)

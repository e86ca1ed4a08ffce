"""Rows of words in memory, scored by BM25 exactly: what the fresh rows of an index of words are kept in."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

K1, B = 1.2, 0.75


def idf(rows_with: int, rows: int) -> float:
    """Inverse document frequency as Lucene and tantivy have it: log(1 + (N - n + 1/2) / (n + 1/2)), above 0 for every n <= N."""
    return math.log(1 + (rows - rows_with + 0.5) / (rows_with + 0.5))


class WordBuffer:
    """Rows with their stems. Not thread-safe."""

    def __init__(self) -> None:
        self._rows: dict[int, Counter[str]] = {}
        self._postings: defaultdict[str, set[int]] = defaultdict(set)
        self.stems = 0  # of all rows together

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(self, row: int, stems: Sequence[str]) -> None:
        self._rows[row] = Counter(stems)
        self.stems += len(stems)
        for stem in self._rows[row]:
            self._postings[stem].add(row)

    def remove(self, row: int) -> None:
        counts = self._rows.pop(row)
        self.stems -= counts.total()
        for stem in counts:
            self._postings[stem].discard(row)
            if not self._postings[stem]:
                del self._postings[stem]

    def holding(self, stem: str) -> int:
        """Rows in which the stem stands."""
        return len(self._postings.get(stem, ()))

    def scores(self, weights: Iterable[tuple[str, float]], average_stems: float, allowed: frozenset[int] | None = None) -> dict[int, float]:
        """Row -> BM25 of the rows that hold one of the stems.

        Args:
            weights: of each stem asked for, its idf.
            average_stems: of a row.
            allowed: only these rows; None = all.
        """
        found: dict[int, float] = defaultdict(float)
        for stem, weight in weights:
            holding = self._postings.get(stem, set())
            for row in holding if allowed is None else holding & allowed:
                counts = self._rows[row]
                times = counts[stem]
                found[row] += weight * times * (K1 + 1) / (times + K1 * (1 - B + B * counts.total() / average_stems))
        return dict(found)

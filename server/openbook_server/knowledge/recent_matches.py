"""What filters matched lately: callers ask with the same ones again and again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from openbook_server.knowledge import filters
from openbook_server.recency import Recent

CAPACITY = 64 << 20  # bytes: some 900,000 passages, each counted for every filter that it matches
_NUMBER_BYTES = 32  # of one passage's number, beside its place in the set


class RecentMatches:
    """Remembers what `find` gave until the next write, at most so many bytes of it, or what one filter matches; thread-safe."""

    def __init__(self, find: Callable[[filters.Filter], frozenset[int]], capacity: int = CAPACITY) -> None:
        """`find` gives the numbers of the passages that match."""
        self._find = find
        self._known: Recent[filters.Filter, frozenset[int]] = Recent(capacity, _size, at_least=1)
        self._sequence = -1  # of the last write that they know
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return self._known.bytes

    def __call__(self, condition: filters.Filter, sequence: int) -> frozenset[int]:
        """As `find`; `sequence` is the number of the last write."""
        with self._lock:
            if sequence != self._sequence:
                self._known.clear()
                self._sequence = sequence
            if (known := self._known.get(condition)) is not None:
                return known
        numbers = self._find(condition)
        with self._lock:
            if sequence == self._sequence:
                self._known.put(condition, numbers)
        return numbers


def _size(condition: filters.Filter, numbers: frozenset[int]) -> int:
    """The condition counts too: it may name a thousand values."""
    expression, parameters = filters.sql(condition)
    return sum(map(sys.getsizeof, (numbers, expression, *parameters))) + _NUMBER_BYTES * len(numbers)

"""A memory of what was used last that is bounded in bytes: the one behind every cache of the server."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps the values used last, at most so many bytes of them; used by one thread at a time."""

    def __init__(self, capacity: int, size: Callable[[K, V], int], *, at_least: int = 0) -> None:
        """Keep nothing yet.

        Args:
            capacity: bytes.
            size: of a key and its value, Python's objects around them included; asked once, when it is put: Python's own idea of an
                object's size may change while it is used.
            at_least: so many values are kept however large they are.
        """
        self._capacity, self._size, self._at_least = capacity, size, at_least
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()  # with their sizes, the one used last at the end
        self.bytes = 0

    def get(self, key: K) -> V | None:
        """The value, which then is the one used last; None where none is kept."""
        kept = self._values.get(key)
        if kept is None:
            return None
        self._values.move_to_end(key)
        return kept[0]

    def put(self, key: K, value: V) -> None:
        """Keep a value in place of the key's other one; the ones used longest ago leave. One larger than `capacity` is not kept."""
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]
        size = self._size(key, value)
        if size > self._capacity and not self._at_least:
            return
        self._values[key] = (value, size)
        self.bytes += size
        while self.bytes > self._capacity and len(self._values) > self._at_least:
            self.bytes -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._values.clear()
        self.bytes = 0

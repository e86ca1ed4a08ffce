"""Passages that were read lately, as objects: most searches find what others found before them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from openbook_server.knowledge.records import Passage

CAPACITY = 64 << 20  # bytes: some 30,000 passages of a hundred words, with those words and their tokens
_ENTRY_BYTES = 500  # of Python's objects around a passage's strings; measured


class RecentPassages:
    """Remembers what `load` gave, at most so many bytes of it.

    What is remembered is never wrong, for a number is never used twice and its passage never changes; those that were deleted are
    forgotten in time, as nobody asks for them. Used by one thread at a time.
    """

    def __init__(self, load: Callable[[Sequence[int]], Mapping[int, Passage]], capacity: int = CAPACITY) -> None:
        """`load` gives those of the passages that are stored, by number."""
        self._load, self._capacity = load, capacity
        self._known: OrderedDict[int, Passage] = OrderedDict()  # the one asked for last at the end
        self.bytes = 0

    def __call__(self, numbers: Sequence[int]) -> dict[int, Passage]:
        """As `load`."""
        known = self._known
        found = {number: known[number] for number in numbers if number in known}
        for number in found:
            known.move_to_end(number)
        if missing := [number for number in numbers if number not in found]:
            loaded = self._load(missing)
            found.update(loaded)
            self._remember(loaded)
        return found

    def batch(self, numbers: Iterable[int]) -> Callable[[Sequence[int]], Mapping[int, Passage]]:
        """Read all of these at once, a third cheaper than a question's at a time; what it returns loads any of them."""
        passages = self(list(set(numbers)))
        return lambda wanted: passages

    def _remember(self, passages: Mapping[int, Passage]) -> None:
        for number, passage in passages.items():
            self._known[number] = passage
            self.bytes += _size(passage)
        while self.bytes > self._capacity:
            self.bytes -= _size(self._known.popitem(last=False)[1])


def _size(passage: Passage) -> int:
    """The text counts twice: its words are remembered beside it."""
    strings = (passage.text, passage.text, passage.title, passage.tokens, *passage.metadata, *passage.metadata.values())
    return _ENTRY_BYTES + sum(map(sys.getsizeof, strings))

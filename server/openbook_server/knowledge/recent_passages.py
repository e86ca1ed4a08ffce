"""Passages that were read lately, as objects: most searches find what others found before them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from openbook_server.knowledge.records import Passage
from openbook_server.recency import Recent

CAPACITY = 64 << 20  # bytes: some 30,000 passages of a hundred words, with those words and their tokens
_ENTRY_BYTES = 500  # of Python's objects around a passage's strings; measured


class RecentPassages:
    """Remembers what `load` gave, at most so many bytes of it.

    What is remembered is never wrong, for a number is never used twice and its passage never changes; those that were deleted are
    forgotten in time, as nobody asks for them. Used by one thread at a time.
    """

    def __init__(self, load: Callable[[Sequence[int]], Mapping[int, Passage]], capacity: int = CAPACITY) -> None:
        """`load` gives those of the passages that are stored, by number."""
        self._load = load
        self._known: Recent[int, Passage] = Recent(capacity, _size)

    def __call__(self, numbers: Sequence[int]) -> dict[int, Passage]:
        """As `load`."""
        found = {number: passage for number in numbers if (passage := self._known.get(number)) is not None}
        if missing := [number for number in numbers if number not in found]:
            for number, passage in self._load(missing).items():
                found[number] = passage
                self._known.put(number, passage)
        return found

    def batch(self, numbers: Iterable[int]) -> Callable[[Sequence[int]], Mapping[int, Passage]]:
        """Read all of these at once, a third cheaper than a question's at a time; what it returns loads any of them."""
        passages = self(list(set(numbers)))
        return lambda wanted: passages

    @property
    def bytes(self) -> int:
        return self._known.bytes


def _size(_: int, passage: Passage) -> int:
    """The text counts twice, its words are remembered beside it; and where it is more than ASCII its UTF-8 too, which Python keeps."""
    texts = (passage.text, passage.title, *passage.metadata, *passage.metadata.values())
    encoded = sum(len(text.encode()) for text in texts if not text.isascii())
    return _ENTRY_BYTES + sum(map(sys.getsizeof, (passage.text, passage.tokens, *texts))) + encoded

"""A list in messages of bounded size, each with its place in the list; one that is too large for the server goes again as two halves.

Who sends the messages, and how often, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from openbook.errors import TOO_LARGE, DeadlineExceeded, RequestRejected

TEXTS_A_MESSAGE = 32
_BEFORE_MORE = 64  # messages taken before twice as many texts are tried again: if they are too many still, one message in 64 was in vain
_LISTS = ("texts", "questions", "documents", "ids")  # each request that stands for a list has one of them
_BESIDE = "evidence"  # and perhaps an entry for each
R = TypeVar("R")


class Pace:
    """How many texts a server is sent in a message: half as many once they were too many, more again after it took that many for long.

    What is too large may be the request or its reply, which depends on texts, options and what is stored: it is tried, not computed.
    """

    def __init__(self) -> None:
        self.texts, self._taken = TEXTS_A_MESSAGE, 0

    def refused(self, texts: int) -> None:
        if texts <= self.texts:  # more were on their way when others were refused
            self.texts, self._taken = max(1, texts // 2), 0

    def taken(self, texts: int) -> None:
        self._taken += texts == self.texts
        if self._taken == _BEFORE_MORE:
            self.texts, self._taken = min(2 * self.texts, TEXTS_A_MESSAGE), 0


@dataclass(frozen=True, slots=True)
class Part:
    """What travels in one message."""

    first: int  # the place in the caller's list of the first text; the others follow it there
    request: Any  # the message

    @property
    def field(self) -> str:
        """The name of what it lists."""
        return next(name for name in _LISTS if name in self.request.DESCRIPTOR.fields_by_name)

    def __len__(self) -> int:
        return len(getattr(self.request, self.field))

    def halves(self) -> tuple[Part, Part]:
        half = len(self) // 2
        return Part(self.first, self._cut(0, half)), Part(self.first + half, self._cut(half, len(self)))

    def _cut(self, start: int, end: int) -> Message:
        request: Message = type(self.request)()
        request.CopyFrom(self.request)
        for name in (self.field, _BESIDE):
            if name in request.DESCRIPTOR.fields_by_name:
                listed = getattr(request, name)
                del listed[end:], listed[:start]
        return request


Read = Callable[[Part, Any], list[R]]  # the results of a part, by its reply
Alone = Callable[[Part, RequestRejected], R]  # the result of a part of one text that was refused for that text


def parts_of(requests: Iterable[Message]) -> Iterator[Part]:
    """Of requests that share out one list in order."""
    first = 0
    for request in requests:
        part = Part(first, request)
        yield part
        first += len(part)


class Parts(Generic[R]):
    """Iterates over the parts of a list in order, and over what became of texts that are in none."""

    def __init__(self, coming: Iterable[Part | R], read: Read[R], alone: Alone[R], pace: Pace) -> None:
        """Args:
        coming: taken from the iterable no sooner than they are sent.
        pace: of the server and the method.
        """
        self._coming, self._read, self._alone, self._pace = iter(coming), read, alone, pace
        self._divided: list[Part | R] = []  # comes before that; the next one is the last

    def __iter__(self) -> Iterator[Part | R]:
        return self

    def __next__(self) -> Part | R:
        while True:
            part = self._divided.pop() if self._divided else next(self._coming)
            if not isinstance(part, Part) or len(part) <= self._pace.texts:
                return part
            self._divide(part)

    def answered(self, part: Part, reply: Any) -> list[R]:
        """What became of the texts of a part that was answered."""
        self._pace.taken(len(part))
        return self._read(part, reply)

    def failed(self, part: Part, failure: RequestRejected | DeadlineExceeded) -> list[R]:
        """What became of the texts of a part that failed; nothing yet where its halves are tried next.

        Raises:
            RequestRejected: for something else than the part's size or its only text: what else is sent would be refused for it too.
            DeadlineExceeded: as given.
        """
        if isinstance(failure, DeadlineExceeded):
            raise failure
        if failure.reason == TOO_LARGE and len(part) > 1:
            self._pace.refused(len(part))
            self._divide(part)
            return []
        return [self._alone(part, self._of_one(part, failure))]

    def _of_one(self, part: Part, refusal: RequestRejected) -> RequestRejected:
        """The refusal of a part's only text, named by its place in the list."""
        if len(part) == 1 and refusal.reason == TOO_LARGE:
            problem = f"too large for one message ({refusal}); a server started with a larger --max-message-bytes takes it"
            return RequestRejected(problem, field=f"{part.field}[{part.first}]", reason=TOO_LARGE)
        if len(part) > 1 or not refusal.has_place:
            raise refusal.moved(part.first) from refusal
        return refusal.moved(part.first)

    def _divide(self, part: Part) -> None:
        self._divided += reversed(part.halves())

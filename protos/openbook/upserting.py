"""The messages of one upsert: documents in parts of bounded size, and in the place of each that cannot be sent why it failed.

Who sends them, and how often, is not known here; a part that the server finds too large, or too much for the time, comes back by
`Parts.divide`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from openbook import results
from openbook.errors import DeadlineExceeded, RequestRejected
from openbook.messages import TEXTS_A_MESSAGE
from openbook.results import Document, Written
from openbook.v1 import knowledge_base_pb2 as kb

_BYTES_A_MESSAGE = 4 * 1024 * 1024  # half of what a server takes by default; one document alone may be larger
_TOO_LARGE = "request"  # the field of a refusal that blames the size of the message
_TIMED_OUT = 3  # documents in a row, after which it is the server that does not answer: waiting for each of a long list would take hours


@dataclass(frozen=True, slots=True)
class Part:
    """Documents that travel in one message."""

    first: int  # the place of its first document in the caller's list; the others follow it there
    documents: list[kb.Document]

    @property
    def request(self) -> kb.UpsertRequest:
        return kb.UpsertRequest(documents=self.documents)


class Parts:
    """Iterates over the parts in order, and over what became of documents that are in none."""

    def __init__(self, documents: Iterable[Document], timeout_seconds: float) -> None:
        """Args:
        documents: taken from the iterable no sooner than they are sent.
        timeout_seconds: that a message is given.
        """
        self._coming, self._timeout = _parts(documents), timeout_seconds
        self._timed_out = 0  # documents alone since the server has last stored any
        self._divided: list[Part | Written] = []  # comes before that; the next one is the last

    def __iter__(self) -> Iterator[Part | Written]:
        return self

    def __next__(self) -> Part | Written:
        return self._divided.pop() if self._divided else next(self._coming)

    def results(self, part: Part, reply: kb.UpsertResponse) -> list[Written]:
        """What became of a part that was answered."""
        self._timed_out = 0
        return [results.written(result, part.first) for result in reply.results]

    def divide(self, part: Part, failure: RequestRejected | DeadlineExceeded) -> None:
        """Have what comes next be the halves of a part that was too large, or not stored in time; a document alone has failed.

        Raises:
            RequestRejected: it was refused for something else, which a smaller part would be too.
            DeadlineExceeded: several documents in a row were not stored in time.
        """
        if isinstance(failure, RequestRejected) and failure.field != _TOO_LARGE:
            raise failure
        first, documents, half = part.first, part.documents, len(part.documents) // 2
        if half:
            self._divided += [Part(first + half, documents[half:]), Part(first, documents[:half])]
            return
        if isinstance(failure, RequestRejected):
            problem = f"too large to be sent ({failure})"
        else:
            self._timed_out += 1
            if self._timed_out == _TIMED_OUT:
                raise failure
            problem = f"not stored within {self._timeout:g} s; allow more time (--timeout, timeout_seconds)"
        self._divided.append(_failed(documents[0].id, first, problem))


def _parts(documents: Iterable[Document]) -> Iterator[Part | Written]:
    part, size, ids = Part(0, []), 0, set[str]()
    for at, document in enumerate(documents):
        try:
            message = document.to_message()
        except (UnicodeEncodeError, TypeError, ValueError) as error:
            if part.documents:
                yield part
            yield _failed(document.id, at, f"cannot be sent ({error})")
            part, size, ids = Part(at + 1, []), 0, set()
            continue
        full = len(ids) == TEXTS_A_MESSAGE or size + message.ByteSize() > _BYTES_A_MESSAGE
        if ids and (full or document.id in ids):  # of one id that comes twice, the last one stays
            yield part
            part, size, ids = Part(at, []), 0, set()
        part.documents.append(message)
        size += message.ByteSize()
        ids.add(document.id)
    if part.documents:
        yield part


def _failed(id_: str, at: int, problem: str) -> Written:
    return Written(id=id_, outcome="failed", passages=0, problem=str(RequestRejected(problem, field=f"documents[{at}]")))

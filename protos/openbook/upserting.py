"""The messages of one upsert: documents in parts of bounded size, and in the place of each that cannot be sent why it failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from openbook.errors import DeadlineExceeded, RequestRejected
from openbook.messages import document_message
from openbook.parts import TEXTS_A_MESSAGE, Pace, Part, Parts
from openbook.replies import written_alone, written_results
from openbook.results import Document, Written
from openbook.v1 import knowledge_base_pb2 as kb

_BYTES_A_MESSAGE = 4 * 1024 * 1024  # half of what a server takes by default; one document alone may be larger
_TIMED_OUT = 3  # documents in a row, after which it is the server that does not answer: waiting for each of a long list would take hours


class Upsert(Parts[Written]):
    """`Parts` of documents; a part that is not stored in time is halved too."""

    def __init__(self, documents: Iterable[Document], timeout_seconds: float, pace: Pace) -> None:
        """Args:
        documents: taken from the iterable no sooner than they are sent.
        timeout_seconds: that a message is given.
        """
        super().__init__(_parts(documents), written_results, written_alone, pace)
        self._timeout = timeout_seconds
        self._timed_out = 0  # documents alone since the server has last stored any

    def answered(self, part: Part, reply: kb.UpsertResponse) -> list[Written]:
        self._timed_out = 0
        return super().answered(part, reply)

    def failed(self, part: Part, failure: RequestRejected | DeadlineExceeded) -> list[Written]:
        """As of every list; a document that is not stored in time has failed too.

        Raises:
            DeadlineExceeded: several documents in a row were not stored in time.
        """
        if isinstance(failure, RequestRejected):
            return super().failed(part, failure)
        if len(part) > 1:
            self._divide(part)
            return []
        self._timed_out += 1
        if self._timed_out == _TIMED_OUT:
            raise failure
        problem = f"not stored within {self._timeout:g} s; allow more time (--timeout, timeout_seconds)"
        return [written_alone(part, RequestRejected(problem, field=f"documents[{part.first}]"))]


def _parts(documents: Iterable[Document]) -> Iterator[Part | Written]:
    part, size, ids = Part(0, kb.UpsertRequest()), 0, set[str]()
    for at, document in enumerate(documents):
        try:
            message = document_message(document, f"documents[{at}]")
        except RequestRejected as problem:
            if ids:
                yield part
            yield Written(id=document.id, outcome="failed", passages=0, problem=str(problem))
            part, size, ids = Part(at + 1, kb.UpsertRequest()), 0, set()
            continue
        full = len(ids) == TEXTS_A_MESSAGE or size + message.ByteSize() > _BYTES_A_MESSAGE
        if ids and (full or document.id in ids):  # of one id that comes twice, the last one stays
            yield part
            part, size, ids = Part(at, kb.UpsertRequest()), 0, set()
        part.request.documents.append(message)
        size += message.ByteSize()
        ids.add(document.id)
    if ids:
        yield part

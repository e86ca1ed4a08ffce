"""Replies of the protocol to plain results: one for each text of the message, or why it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar

from openbook import results
from openbook.errors import RequestRejected
from openbook.parts import Part
from openbook.results import AnswerResult, Classified, SearchResult, Written
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

R = TypeVar("R")


def settled(found: Iterable[R | RequestRejected]) -> list[R | RequestRejected]:
    """The results of a list; where its only text was refused, that is raised."""
    whole = list(found)
    if len(whole) == 1 and isinstance(whole[0], RequestRejected):
        raise whole[0]
    return whole


def refused_alone(part: Part, refusal: RequestRejected) -> RequestRejected:
    """What stands in the place of a text that was refused."""
    return refusal


def raised(part: Part, refusal: RequestRejected) -> NoReturn:
    """Where there is nothing that could stand in its place."""
    raise refusal


def _refused(part: Part, reply: Any) -> dict[int, RequestRejected]:
    """Of the texts of a message those that were refused, by their place in it; they are named by their place in the caller's list."""
    return {error.index: RequestRejected(error.message, field=error.field, reason=error.reason).moved(part.first) for error in reply.errors}


def vectors(part: Part, reply: pb.EmbedResponse) -> list[NDArray[np.float32] | RequestRejected]:
    import numpy as np  # here: it takes as long to import as all the rest of the client

    bad = _refused(part, reply)
    rows = np.frombuffer(reply.vectors, "<f4").reshape(len(part), reply.dim).astype(np.float32)
    return [bad.get(at, row) for at, row in enumerate(rows)]


def all_vectors(part: Part, reply: pb.EmbedResponse) -> list[NDArray[np.float32]]:
    """Raises RequestRejected where a text has none."""
    return [raised(part, vector) if isinstance(vector, RequestRejected) else vector for vector in vectors(part, reply)]


def stacked(found: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(texts, dim)"""
    import numpy as np

    return np.stack(found) if found else np.empty((0, 0), np.float32)


def search_results(part: Part, reply: pb.SearchResponse) -> list[SearchResult | RequestRejected]:
    served = _served(reply)
    return _each(part, reply, lambda question, result: SearchResult(question=question, hits=tuple(map(results.hit, result.hits)), **served))


def answer_results(part: Part, reply: pb.AnswerResponse) -> list[AnswerResult | RequestRejected]:
    served = _served(reply)

    def answered(question: str, result: pb.AnswerResult) -> AnswerResult:
        return AnswerResult(
            question=question,
            answers=tuple(map(results.answer, result.answers)),
            hits=tuple(map(results.hit, result.hits)),
            no_answer_probability=result.no_answer_probability,
            passages_read=result.passages_read,
            **served,
        )

    return _each(part, reply, answered)


def classify_results(part: Part, reply: pb.ClassifyResponse) -> list[Classified | RequestRejected]:
    served = _served(reply)

    def classified(text: str, result: pb.ClassifyResult) -> Classified:
        return Classified(
            text=text,
            labels=tuple(map(results.label, result.labels)),
            passages=result.passages,
            neighbours=tuple(map(results.neighbour, result.neighbours)),
            evidence=tuple(map(results.hit, result.evidence)),
            classifier=reply.classifier,
            **served,
        )

    return _each(part, reply, classified)


class _Served(TypedDict):
    """What a reply says of all its texts."""

    timings_ms: dict[str, float]
    bundle_id: str
    generation: str


def _served(reply: Any) -> _Served:
    provenance = reply.provenance
    return {"timings_ms": results.timings_ms(reply.timings), "bundle_id": provenance.bundle_id, "generation": provenance.generation}


def _each(part: Part, reply: Any, made: Callable[[str, Any], R]) -> list[R | RequestRejected]:
    """What is made of each text and its result, or why it has none."""
    bad, texts = _refused(part, reply), getattr(part.request, part.field)
    return [bad.get(at) or made(text, result) for at, (text, result) in enumerate(zip(texts, reply.results, strict=True))]


def written_results(part: Part, reply: kb.UpsertResponse | kb.DeleteResponse) -> list[Written]:
    return [results.written(result, part.first) for result in reply.results]


def written_alone(part: Part, refusal: RequestRejected) -> Written:
    """What became of a document that was refused by itself."""
    [named] = part.request.ids if part.field == "ids" else [document.id for document in part.request.documents]
    return Written(id=named, outcome="failed", passages=0, problem=str(refusal))

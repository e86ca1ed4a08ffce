"""Results of the pipeline as messages of openbook.v1."""

from __future__ import annotations

from openbook.v1 import openbook_pb2 as pb

from openbook_server.bundle import Bundle
from openbook_server.errors import InvalidRequest
from openbook_server.knowledge import Hit, KnowledgeBase
from openbook_server.pipeline import QuestionAnswered
from openbook_server.ranking import RankedAnswer
from openbook_server.work import Work


def to_item_errors(errors: dict[int, InvalidRequest]) -> list[pb.ItemError]:
    return [
        pb.ItemError(index=at, code=error.status.value[0], reason=error.reason, field=error.field, message=error.description)
        for at, error in errors.items()
    ]


def to_provenance(bundle: Bundle, knowledge_base: KnowledgeBase | None) -> pb.Provenance:
    return pb.Provenance(bundle_id=bundle.id, generation=knowledge_base.generation if knowledge_base is not None else "")


def to_hit(hit: Hit, *, omit_text: bool) -> pb.Hit:
    passage = hit.passage
    message = pb.Hit(
        passage_id=passage.id,
        document_id=passage.document_id,
        score=hit.score,
        dense_score=hit.dense_score,
        lexical_score=hit.lexical_score,
        window_score=hit.window_score,
        token_score=hit.token_score,
        overlap_score=hit.overlap_score,
        answer_probability=hit.answer_probability,
        document_start=passage.start,
    )
    if not omit_text:
        message.title, message.text, message.source = passage.title, passage.text, passage.source
        message.metadata.update(passage.metadata)
    return message


def to_answer_result(outcome: QuestionAnswered, *, omit_text: bool) -> pb.AnswerResult:
    return pb.AnswerResult(
        answers=[to_answer(answer, outcome.hits[answer.best.passage]) for answer in outcome.answers],
        hits=[to_hit(hit, omit_text=omit_text) for hit in outcome.hits],
        no_answer_probability=outcome.no_answer_probability,
        passages_read=outcome.read,
    )


def to_answer(answer: RankedAnswer, hit: Hit) -> pb.Answer:
    return pb.Answer(
        text=answer.text,
        probability=answer.probability,
        passage_id=hit.passage.id,
        document_id=hit.passage.document_id,
        start=answer.best.start,
        end=answer.best.end,
        document_start=hit.passage.start + answer.best.start,
        document_end=hit.passage.start + answer.best.end,
    )


def to_timings(work: Work) -> pb.Timings:
    stages = [work.tokenise_ms, work.embed_ms, work.search_ms, work.read_ms, work.rank_ms]
    return pb.Timings(
        tokenise_ms=work.tokenise_ms,
        embed_ms=work.embed_ms,
        search_ms=work.search_ms,
        read_ms=work.read_ms,
        rank_ms=work.rank_ms,
        queue_ms=work.queue_ms,
        total_ms=sum(stages),
    )

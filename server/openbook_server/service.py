"""The methods of openbook.v1: a parsed message in, validated, through the pipeline, a message out.

A text that is bad beside good ones leaves as an ItemError; every other failure is raised for `frontend` to report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message
from openbook import __version__
from openbook.v1 import openbook_pb2 as pb

from openbook_server.bundle import Bundle
from openbook_server.comparison import Asked, best_answer
from openbook_server.config import ServerConfig
from openbook_server.errors import NoKnowledgeBase, NotInBundle
from openbook_server.knowledge import Hit, KnowledgeBase, SearchOptions
from openbook_server.options import parse_options
from openbook_server.pipeline import Pipeline, QuestionAnswered
from openbook_server.replies import to_answer_result, to_hit, to_item_errors, to_provenance, to_timings
from openbook_server.runtime import Device
from openbook_server.tokenization import TextEncoder
from openbook_server.turns import in_turns
from openbook_server.validation import SPLIT, Validated, bounded, refused_first, validate_texts
from openbook_server.wire import Parsed
from openbook_server.work import Work

DEFAULT_ANSWERS = 3
_NO_READER = "this bundle has no reader; `openbook export --reader` adds one"

Request = TypeVar("Request", bound=Message)


class Service:
    """Serves one bundle and, where there is one, one knowledge base."""

    def __init__(
        self,
        bundle: Bundle,
        knowledge_base: KnowledgeBase | None,
        *,
        config: ServerConfig,
        device: Device,
        encoder: TextEncoder,
        pipeline: Pipeline,
        invariant: Collection[str],
        classifiers: Sequence[pb.DescribeResponse.Classifier] = (),
        writers: Sequence[pb.DescribeResponse.Writer] = (),
    ) -> None:
        """What Describe tells are `classifiers`, `writers`, and in `invariant` the models that give rows the same bytes in any batch."""
        self._bundle, self._knowledge_base, self._config, self._device = bundle, knowledge_base, config, device
        self._encoder, self._pipeline, self._classifiers, self._writers = encoder, pipeline, classifiers, writers
        self._invariant = sorted(invariant)
        self.asked: Callable[[Asked], None] | None = None  # is told of every question that was answered

    async def embed(self, parsed: Parsed[pb.EmbedRequest], work: Work) -> pb.EmbedResponse:
        request = parsed.message
        work.batch_invariant = request.batch_invariant
        if refused_first(request.texts, self._config):
            self._pipeline.check(len(request.texts), work.deadline)
        valid = await self._validate(
            "texts", request.texts, parsed, self._bundle.embedder.max_tokens, truncate=request.truncate, way_out=SPLIT
        )
        work.tokenise_ms += work.lap()
        vectors = np.zeros((len(request.texts), self._bundle.embedder.dim), "<f4")
        tokens = [0] * len(request.texts)
        if valid.rows:
            vectors[valid.kept] = await self._pipeline.embed(valid.rows, work)
        for at, row in zip(valid.kept, valid.rows, strict=True):
            tokens[at] = len(row.ids)
        return pb.EmbedResponse(
            vectors=vectors.tobytes(),
            dim=self._bundle.embedder.dim,
            tokens=tokens,
            errors=to_item_errors(valid.errors),
            provenance=pb.Provenance(bundle_id=self._bundle.id),
            timings=to_timings(work),
        )

    async def search(self, parsed: Parsed[pb.SearchRequest], work: Work) -> pb.SearchResponse:
        request = parsed.message
        work.batch_invariant = request.batch_invariant
        options = self._options(request)
        rerank = bounded("rerank", request.rerank, 0, 0, self._config.max_top_k)
        if rerank and self._bundle.reader is None:
            raise NotInBundle(f"{_NO_READER}, or leave rerank out")
        valid = await self._validate("questions", request.questions, parsed, self._max_question_tokens())
        work.tokenise_ms += work.lap()
        results = [pb.SearchResult() for _ in request.questions]
        if valid.rows:
            deep = replace(options, top_k=max(options.top_k, rerank)) if options else None
            if rerank:
                retrieved, found = await self._pipeline.rerank(valid.texts, valid.rows, deep, rerank, work)
            else:
                retrieved = found = await self._pipeline.search(valid.texts, valid.rows, deep, work)
            top_k = options.top_k if options else 0
            async for at, hits in in_turns(zip(valid.kept, found, strict=True)):
                results[at].hits.extend(to_hit(hit, omit_text=request.omit_text) for hit in hits[:top_k])
            self._tell(valid.texts, options, [hits[:top_k] for hits in retrieved], None)
        return pb.SearchResponse(
            results=results, errors=to_item_errors(valid.errors), provenance=self._provenance(), timings=to_timings(work)
        )

    async def answer(self, parsed: Parsed[pb.AnswerRequest], work: Work) -> pb.AnswerResponse:
        request = parsed.message
        work.batch_invariant = request.batch_invariant
        if self._bundle.reader is None:
            raise NotInBundle(f"{_NO_READER}, or use Search")
        options = self._options(request)
        max_answers = bounded(
            "max_answers", request.max_answers if request.HasField("max_answers") else None, DEFAULT_ANSWERS, 1, self._config.max_answers
        )
        valid = await self._validate("questions", request.questions, parsed, self._max_question_tokens())
        work.tokenise_ms += work.lap()
        results = [pb.AnswerResult() for _ in request.questions]
        if valid.rows:
            answered = await self._pipeline.answer(valid.texts, valid.rows, options, max_answers, work, settle=not request.read_all)
            async for at, outcome in in_turns(zip(valid.kept, answered, strict=True)):
                results[at].CopyFrom(to_answer_result(outcome, omit_text=request.omit_text))
            self._tell(valid.texts, options, [outcome.hits for outcome in answered], answered, read_all=request.read_all)
        return pb.AnswerResponse(
            results=results, errors=to_item_errors(valid.errors), provenance=self._provenance(), timings=to_timings(work)
        )

    async def describe(self, parsed: Parsed[pb.DescribeRequest], work: Work) -> pb.DescribeResponse:
        bundle, config = self._bundle, self._config
        reply = pb.DescribeResponse(
            version=__version__,
            bundle=pb.DescribeResponse.Bundle(
                id=bundle.id,
                name=bundle.name,
                license=bundle.license,
                embedder_fingerprint=bundle.embedder.fingerprint,
                tasks=bundle.tasks,
                dim=bundle.embedder.dim,
                classifiers=self._classifiers,
                writers=self._writers,
            ),
            limits=pb.DescribeResponse.Limits(
                max_texts=config.max_texts,
                max_text_bytes=config.max_text_bytes,
                max_text_tokens=bundle.embedder.max_tokens - self._encoder.special_tokens,
                max_question_tokens=self._max_question_tokens() - self._encoder.special_tokens,
                max_top_k=config.max_top_k,
                max_answers=config.max_answers,
                max_message_bytes=config.max_message_bytes,
            ),
            device=self._device.name,
            precision=self._device.precision,
            batch_invariant=self._invariant,
        )
        if self._knowledge_base is not None:
            counts = await asyncio.to_thread(self._knowledge_base.counts)
            reply.knowledge_base.generation = self._knowledge_base.generation
            reply.knowledge_base.passages = counts.passages
            reply.knowledge_base.documents = counts.documents
        return reply

    def _tell(
        self,
        questions: Sequence[str],
        options: SearchOptions | None,
        found: Sequence[Sequence[Hit]],
        answered: Sequence[QuestionAnswered] | None,
        *,
        read_all: bool = False,
    ) -> None:
        if self.asked is None or options is None or options.mode == "random":  # what is drawn tells nothing of whoever drew it
            return
        for at, (question, hits) in enumerate(zip(questions, found, strict=True)):
            answer = best_answer(answered[at]) if answered is not None else None
            ids = tuple(hit.passage.id for hit in hits)
            self.asked(Asked(question, options, ids, answer, answered is not None, read_all))

    def _options(self, request: pb.SearchRequest | pb.AnswerRequest) -> SearchOptions | None:
        options = parse_options(request, self._config.max_top_k)
        if options is not None and self._knowledge_base is None:
            raise NoKnowledgeBase
        return options

    def _max_question_tokens(self) -> int:
        """Special tokens included: what both the embedder and the reader take in whole."""
        reader, embedder = self._bundle.reader, self._bundle.embedder
        return min(embedder.max_tokens, reader.max_question_tokens + self._encoder.special_tokens) if reader else embedder.max_tokens

    async def _validate(
        self,
        field: str,
        texts: Iterable[str],
        parsed: Parsed[Request],
        max_tokens: int,
        *,
        truncate: bool = False,
        way_out: str = "shorten it",
    ) -> Validated:
        return await validate_texts(
            field,
            list(texts),
            parsed.not_utf8,
            config=self._config,
            encoder=self._encoder,
            max_tokens=max_tokens,
            truncate=truncate,
            way_out=way_out,
        )

    def _provenance(self) -> pb.Provenance:
        return to_provenance(self._bundle, self._knowledge_base)

"""One request, end to end: the only file that knows the order of the stages.

    tokenise -> embed -> search -> read -> rank        (one pass down, an await a stage)

Texts come in validated, results go out as plain objects; gRPC is not known here. A request may bring hundreds of questions, and
thousands of passages to read: what is done for them on the event loop is done in turns with other requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from openbook_server.backlog import Arrays
from openbook_server.bundle import Bundle, ReaderInfo
from openbook_server.embedder import GRAPH, QUESTIONS, Embedded, Embedder
from openbook_server.knowledge import Hit, KnowledgeBase, SearchOptions, looks_closely, relevance
from openbook_server.models import Models
from openbook_server.ranking import RankedAnswer, Reading, Settling, Span, end_of_letter, is_settled, passage_probabilities, rank_answers
from openbook_server.rows import Row
from openbook_server.searching import Searches
from openbook_server.tokenization import Pair, TextEncoder
from openbook_server.turns import in_turns
from openbook_server.usual import Usual
from openbook_server.work import Work

READ_FIRST = (1, 3)  # passages of a question read before it is asked whether its answer is settled; the third time all are
FEW_PAIRS = 16  # are put together sooner than the queue is asked whether it would take them
NO_SPAN = -1e8  # the reader's graph fills unused slots with -1e9


@dataclass(frozen=True, slots=True)
class QuestionAnswered:
    hits: list[Hit]  # those that were read, the most probable first, then the others in retrieval's order
    read: int  # of the hits, the first so many
    answers: list[RankedAnswer]  # their spans' passages are rows of `hits`
    no_answer_probability: float


@dataclass(slots=True)
class _Asked:
    """A question while it is read for."""

    row: Row
    hits: list[Hit]
    readings: list[Reading] = field(default_factory=list)  # of the first hits
    answers: list[RankedAnswer] = field(default_factory=list)  # in what was read; their spans' passages are rows of `hits`
    no_answer_probability: float = 1.0


class Pipeline:
    """Owns nothing but the order; the stages are handed in."""

    def __init__(
        self,
        bundle: Bundle,
        encoder: TextEncoder,
        embedder: Embedder,
        models: Models,
        knowledge_base: KnowledgeBase | None,
        *,
        observe: Callable[[int], None] = lambda read: None,
    ) -> None:
        """`observe(passages read)` is told of every question answered, for metrics."""
        self._observe = observe
        self._bundle, self._encoder, self._embedder, self._models = bundle, encoder, embedder, models
        self._searches = None if knowledge_base is None else Searches(knowledge_base)
        self._passages_read, self._tokens_read = Usual(), Usual()  # of a question, and of a question beside a passage

    def check(self, texts: int, deadline: float) -> None:
        """Refuse texts that are not yet tokenised where the engine would refuse even the shortest; raises as `Models.check`."""
        self._models.check("embedder", [1] * texts, deadline=deadline)

    async def embed(self, rows: Sequence[Row], work: Work) -> NDArray[np.float32]:
        """(rows, dim) unit vectors of tokenised texts."""
        return (await self._embed(rows, GRAPH, work)).vectors

    async def _embed(self, rows: Sequence[Row], graph: str, work: Work) -> Embedded:
        alone = self._models.alone(graph, work)
        embedded = await self._embedder.embed(rows, deadline=work.deadline, graph=graph, alone=alone)
        work.embed_ms += work.lap()
        work.queue_ms += 1000 * embedded.queued_seconds
        return embedded

    async def search(self, questions: Sequence[str], rows: Sequence[Row], options: SearchOptions | None, work: Work) -> list[list[Hit]]:
        """Best passages for each question, best first; none where `options` is None."""
        if options is None or self._searches is None:
            return [[] for _ in questions]
        vectors, tokens = None, []
        if options.by_vectors:
            self._searches.check(len(questions), options, deadline=work.deadline)
            graph = QUESTIONS if looks_closely(options) and self._bundle.embedder.token_dims else GRAPH
            embedded = await self._embed(rows, graph, work)
            vectors, tokens = embedded.vectors, embedded.tokens
        hits, queued = await self._searches.search(questions, vectors, options, tokens, deadline=work.deadline, begun=work.begun)
        work.queue_ms += 1000 * queued
        work.search_ms += work.lap()
        return hits

    async def rerank(
        self, questions: Sequence[str], rows: Sequence[Row], options: SearchOptions | None, count: int, work: Work
    ) -> tuple[list[list[Hit]], list[list[Hit]]]:
        """What `search` finds; and the same with the first `count` hits of each question, all of them read, in the order of their
        probability."""
        with self._models.attended(work.deadline) as expect:
            expect("reader", self._pair_tokens, count * len(questions))
            found = await self.search(questions, rows, options, work)
            asked = [_Asked(row, hits[:count]) for row, hits in zip(rows, found, strict=True)]
            pairs = await self._pairs(asked, None, work)
            expect("reader", self._pair_tokens, 0)
            await self._read(pairs, work)
        ranked = [self._posterior(one)[0] + rest[count:] async for one, rest in in_turns(zip(asked, found, strict=True))]
        work.rank_ms += work.lap()
        return found, ranked

    async def answer(
        self, questions: Sequence[str], rows: Sequence[Row], options: SearchOptions | None, max_answers: int, work: Work, *, settle: bool
    ) -> list[QuestionAnswered]:
        """Search, read hits beside their question, with `settle` until its answer is settled, and rank what was read."""
        settling = self._reader.settling if settle else None
        with self._models.attended(work.deadline) as expect:
            each = self._passages_read.mean if settling else options.top_k if options else 0
            yet = round(each * len(questions))
            expect("reader", self._pair_tokens, yet)
            found = await self.search(questions, rows, options, work)
            asked = [_Asked(row, hits) for row, hits in zip(rows, found, strict=True)]
            unsettled = asked
            for end in (*READ_FIRST, None) if settling else (None,):
                pairs = await self._pairs(unsettled, end, work)
                yet = max(0, yet - len(pairs))
                expect("reader", self._pair_tokens, yet)
                await self._read(pairs, work)
                left: list[_Asked] = []
                async for one in in_turns(unsettled):
                    self._rank(one, max_answers)
                    if settling and not self._is_settled(one, settling):
                        left.append(one)
                work.rank_ms += work.lap()
                unsettled = left
                if not unsettled:
                    break
        answered: list[QuestionAnswered] = []
        async for one in in_turns(asked):
            ranked, order = self._posterior(one)
            answers = [
                replace(answer, best=answer.best._replace(passage=order.index(answer.best.passage))) for answer in one.answers[:max_answers]
            ]
            self._observe(len(one.readings))
            if settling:
                self._passages_read.learn(len(one.readings))
            answered.append(QuestionAnswered(ranked, len(one.readings), answers, one.no_answer_probability))
        work.rank_ms += work.lap()
        return answered

    @property
    def _reader(self) -> ReaderInfo:
        if self._bundle.reader is None:
            raise RuntimeError("validated requests reach a bundle without a reader")  # the service refuses them first
        return self._bundle.reader

    def _priors(self, hits: Sequence[Hit]) -> list[float]:
        return [self._reader.prior_weight * relevance(hit) for hit in hits]

    @property
    def _pair_tokens(self) -> int:
        """Of a question beside a passage, usually."""
        return max(1, round(self._tokens_read.mean))

    async def _pairs(self, asked: Sequence[_Asked], end: int | None, work: Work) -> list[tuple[_Asked, Pair]]:
        """Each question beside those of its first `end` hits (None = beside all) that are not read yet."""
        limit = self._reader.max_tokens
        least = [len(one.row.ids) for one in asked for _ in one.hits[len(one.readings) : end]]  # tokens of each pair
        if len(least) > FEW_PAIRS:
            self._models.check("reader", least, deadline=work.deadline, begun=work.begun)
        pairs: list[tuple[_Asked, Pair]] = []
        async for one in in_turns(asked):
            passages = [hit.passage for hit in one.hits[len(one.readings) : end]]
            texts, kept = [passage.text for passage in passages], [passage.tokens for passage in passages]
            pairs += [(one, pair) for pair in self._encoder.pairs(one.row, texts, limit, kept)]
        work.tokenise_ms += work.lap()
        return pairs

    async def _read(self, pairs: Sequence[tuple[_Asked, Pair]], work: Work) -> None:
        read = await self._models.read("reader", [pair.row for _, pair in pairs], work)
        async for (one, pair), outputs in in_turns(zip(pairs, read, strict=True)):
            self._tokens_read.learn(len(pair.row.ids))
            at = len(one.readings)
            one.readings.append(reading_of(pair, outputs, at, one.hits[at].passage.text))

    def _rank(self, one: _Asked, max_answers: int) -> None:
        read = one.hits[: len(one.readings)]
        texts, priors, null_bias = [hit.passage.text for hit in read], self._priors(read), self._reader.null_bias
        count = max(2, max_answers)  # whether the best is settled depends on the next
        one.answers, one.no_answer_probability = rank_answers(texts, one.readings, priors, null_bias=null_bias, max_answers=count)

    def _is_settled(self, one: _Asked, settling: Settling) -> bool:
        return is_settled(one.answers, one.readings, self._priors(one.hits), null_bias=self._reader.null_bias, settling=settling)

    def _posterior(self, one: _Asked) -> tuple[list[Hit], list[int]]:
        """Hits in the order of what was read in them, then those that were not read as they were; and which rows the first are of."""
        hits, read = one.hits, len(one.readings)
        probabilities = passage_probabilities(one.readings, self._priors(hits[:read]), null_bias=self._reader.null_bias)
        order = sorted(range(read), key=lambda at: -probabilities[at])  # stable: ties stay in retrieval's order
        return [hits[at]._replace(answer_probability=probabilities[at]) for at in order] + hits[read:], order

    def close(self) -> None:
        if self._searches is not None:
            self._searches.close()


def reading_of(pair: Pair, outputs: Arrays, passage: int, text: str) -> Reading:
    """What the reader's graph returned for one pair, in characters of its passage `text`; `passage` is the row it gets."""
    listed = np.greater(outputs["span_score"], NO_SPAN)
    first, last, scores = (outputs[name][listed] for name in ("span_start", "span_end", "span_score"))
    starts, ends = pair.characters(first, last)
    if not text.isascii():
        ends = [end_of_letter(text, end) for end in ends]
    spans = [Span(passage, start, end, score) for start, end, score in zip(starts, ends, scores.tolist(), strict=True)]
    return Reading(spans, float(outputs["null_score"]), float(outputs["log_normaliser"]))

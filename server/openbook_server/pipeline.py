"""One request, end to end: the only file that knows the order of the stages.

    tokenise -> embed -> search -> read -> rank        (one pass down, an await a stage)

Texts come in validated, results go out as plain objects; gRPC is not known here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from openbook_server.backlog import Arrays
from openbook_server.bundle import Bundle, ReaderInfo
from openbook_server.embedder import Embedder
from openbook_server.knowledge import Hit, KnowledgeBase, SearchOptions, relevance
from openbook_server.models import Models
from openbook_server.ranking import RankedAnswer, Reading, Settling, Span, is_settled, passage_probabilities, rank_answers
from openbook_server.rows import Row
from openbook_server.tokenization import Pair, TextEncoder

READ_FIRST = (1, 3)  # passages of a question read before it is asked whether its answer is settled; the third time all are
NO_SPAN = -1e8  # the reader's graph fills unused slots with -1e9


@dataclass(slots=True)
class Timings:
    """Milliseconds of each stage of one request."""

    tokenise: float = 0.0
    embed: float = 0.0
    search: float = 0.0
    read: float = 0.0
    rank: float = 0.0
    queue: float = 0.0  # of embed and read, the part spent waiting
    _mark: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Milliseconds since the last lap, or since the start."""
        now = time.perf_counter()
        passed, self._mark = 1000 * (now - self._mark), now
        return passed


@dataclass(frozen=True, slots=True)
class QuestionAnswered:
    hits: list[Hit]  # those that were read, the most probable first, then the others in retrieval's order
    read: int  # of the hits, the first so many
    answers: list[RankedAnswer]  # their spans' passages are rows of `hits`
    no_answer_probability: float


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
        self._knowledge_base = knowledge_base
        self._searcher = ThreadPoolExecutor(knowledge_base.search_threads if knowledge_base else 1, thread_name_prefix="search")

    def check(self, texts: int, deadline: float) -> None:
        """Refuse texts that are not yet tokenised where the engine would refuse even the shortest; raises as `Models.check`."""
        self._models.check("embedder", [1] * texts, deadline=deadline)

    async def embed(self, rows: Sequence[Row], deadline: float, timings: Timings) -> NDArray[np.float32]:
        """(rows, dim) unit vectors of tokenised texts."""
        embedded = await self._embedder.embed(rows, deadline=deadline)
        timings.embed += timings.lap()
        timings.queue += 1000 * embedded.queued_seconds
        return embedded.vectors

    async def search(
        self, questions: Sequence[str], rows: Sequence[Row], options: SearchOptions | None, deadline: float, timings: Timings
    ) -> list[list[Hit]]:
        """Best passages for each question, best first; none where `options` is None."""
        if options is None or self._knowledge_base is None:
            return [[] for _ in questions]
        vectors = None if options.mode == "lexical" else await self.embed(rows, deadline, timings)
        hits = await asyncio.get_running_loop().run_in_executor(self._searcher, self._knowledge_base.search, questions, vectors, options)
        timings.search += timings.lap()
        return hits

    async def rerank(
        self, questions: Sequence[str], found: Sequence[list[Hit]], count: int, deadline: float, timings: Timings
    ) -> list[list[Hit]]:
        """The first `count` hits of each question, all of them read, in the order of their probability; then the others."""
        first = [hits[:count] for hits in found]
        readings = await self._read(questions, first, deadline, timings, settle=False)
        ranked = [self._posterior(hits, read)[0] + rest[count:] for hits, read, rest in zip(first, readings, found, strict=True)]
        timings.rank += timings.lap()
        return ranked

    async def answer(
        self,
        questions: Sequence[str],
        rows: Sequence[Row],
        options: SearchOptions | None,
        max_answers: int,
        deadline: float,
        timings: Timings,
        *,
        settle: bool,
    ) -> list[QuestionAnswered]:
        """Search, read hits beside their question, with `settle` until its answer is settled, and rank what was read."""
        with self._models.attended():
            found = await self.search(questions, rows, options, deadline, timings)
            readings = await self._read(questions, found, deadline, timings, settle=settle)
        answered = []
        for hits, read in zip(found, readings, strict=True):
            first = hits[: len(read)]
            texts = [hit.passage.text for hit in first]
            answers, nothing = rank_answers(texts, read, self._priors(first), null_bias=self._reader.null_bias, max_answers=max_answers)
            ranked, order = self._posterior(hits, read)
            answers = [replace(answer, best=replace(answer.best, passage=order.index(answer.best.passage))) for answer in answers]
            self._observe(len(read))
            answered.append(QuestionAnswered(ranked, len(read), answers, nothing))
        timings.rank += timings.lap()
        return answered

    @property
    def _reader(self) -> ReaderInfo:
        if self._bundle.reader is None:
            raise RuntimeError("validated requests reach a bundle without a reader")  # the service refuses them first
        return self._bundle.reader

    def _priors(self, hits: Sequence[Hit]) -> list[float]:
        return [self._reader.prior_weight * relevance(hit) for hit in hits]

    def _posterior(self, hits: list[Hit], readings: list[Reading]) -> tuple[list[Hit], list[int]]:
        """Hits in the order of what was read in them, then those that were not read as they were; and which rows the first are of."""
        read = len(readings)
        probabilities = passage_probabilities(readings, self._priors(hits[:read]), null_bias=self._reader.null_bias)
        order = sorted(range(read), key=lambda at: -probabilities[at])  # stable: ties stay in retrieval's order
        return [hits[at]._replace(answer_probability=probabilities[at]) for at in order] + hits[read:], order

    async def _read(
        self, questions: Sequence[str], found: Sequence[Sequence[Hit]], deadline: float, timings: Timings, *, settle: bool
    ) -> list[list[Reading]]:
        """What the reader makes of each question's hits: of all, or, with `settle`, of the first until they settle the answer."""
        reader = self._reader
        settling = reader.settling if settle else None
        readings: list[list[Reading]] = [[] for _ in found]
        unsettled = [at for at, hits in enumerate(found) if hits]
        for end in (*READ_FIRST, None) if settling else (None,):
            pairs: list[tuple[int, Pair]] = []
            for at in unsettled:
                passages = [hit.passage for hit in found[at][len(readings[at]) : end]]
                texts, kept = [passage.text for passage in passages], [passage.tokens for passage in passages]
                pairs += [(at, pair) for pair in self._encoder.pairs(questions[at], texts, reader.max_tokens, kept)]
            timings.tokenise += timings.lap()
            outcome = await self._models.submit("reader", [pair.row for _, pair in pairs], deadline=deadline)
            timings.read += timings.lap()
            timings.queue += 1000 * outcome.queued_seconds
            for (at, pair), outputs in zip(pairs, outcome.rows, strict=True):
                readings[at].append(reading_of(pair, outputs, len(readings[at])))
            if settling:
                unsettled = [at for at in unsettled if not self._is_settled(found[at], readings[at], settling)]
            if not unsettled:
                break
        return readings

    def _is_settled(self, hits: Sequence[Hit], readings: Sequence[Reading], settling: Settling) -> bool:
        texts = [hit.passage.text for hit in hits]
        return is_settled(texts, readings, self._priors(hits), null_bias=self._reader.null_bias, settling=settling)

    def close(self) -> None:
        self._searcher.shutdown()


def reading_of(pair: Pair, outputs: Arrays, passage: int) -> Reading:
    """What the reader's graph returned for one pair, in characters of its passage; `passage` is the row it gets."""
    spans = []
    for first, last, score in zip(
        outputs["span_start"].tolist(), outputs["span_end"].tolist(), outputs["span_score"].tolist(), strict=True
    ):
        if score > NO_SPAN:
            start, end = pair.characters(first, last)
            spans.append(Span(passage, start, end, score))
    return Reading(spans, float(outputs["null_score"]), float(outputs["log_normaliser"]))

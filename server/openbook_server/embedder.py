"""The embedder as the pipeline sees it: rows of tokens in, unit vectors out, nothing computed twice.

Promises
- A vector from the cache has the bytes that computing it again would give, where a row's result does not depend on its batch
  (see `invariance`), and where rows run alone. One `Embedder` stands before one model, so what names a vector is its row of tokens,
  whether it is a question whose tokens are wanted too, and whether the row runs alone; texts that the tokenizer does not tell apart
  share one.
- Callers that want the same row at the same time share one computation. Who hangs up takes nothing from the others; a
  failure is told to all who wait for it and is never remembered.
- Every caller's deadline holds: nobody waits past it, and nobody waits for a computation that was queued behind
  less urgent work.

It lives on one event loop and needs no lock. It knows nothing of texts or gRPC.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from openbook_server.backlog import Arrays
from openbook_server.engine import Outcome
from openbook_server.errors import DeadlineExceeded, InferenceFailed
from openbook_server.knowledge import Signs
from openbook_server.recency import Recent
from openbook_server.rows import Row

Vector = NDArray[np.float32]

GRAPH, QUESTIONS = "embedder", "embedder.questions"  # what models call the graph; the second also gives the signs of tokens
OUTPUT, TOKENS = "sentence_embedding", "tokens"
ENTRY_BYTES = 300  # of Python's objects around a key and its vector; measured
TOKENS_BYTES = 260  # of those around the signs of its tokens
_SLACK = 0.1  # of the time a caller has left: by so much may a computation that it joins be due after the caller itself


@dataclass(frozen=True, slots=True)
class Embedded:
    """What callers get: (rows, dim) unit vectors, and how long those that were computed waited for the device."""

    vectors: NDArray[np.float32]
    tokens: list[Signs | None]  # of each row, see `windows.signs`; None where its graph gives none
    queued_seconds: float


class _Embedding(NamedTuple):
    """Of one row."""

    vector: Vector
    tokens: Signs | None


@dataclass(slots=True, eq=False)
class _Flight:
    """A row that is being computed. `done` gives its embedding, its failure, or None: it was given up, compute it yourself."""

    deadline: float  # time.monotonic() seconds
    done: asyncio.Future[_Embedding | InferenceFailed | None]


class Submits(Protocol):
    """An engine, or a bundle's models in one."""

    async def submit(self, graph: str, rows: Sequence[Row], /, *, deadline: float, alone: bool) -> Outcome: ...


class Embedder:
    """Embeds through the engine, remembering the vectors used last."""

    def __init__(
        self, engine: Submits, *, cache_bytes: int, observe: Callable[[int, int, int], None] = lambda hits, joined, misses: None
    ) -> None:
        """Embed through `engine`.

        Args:
            cache_bytes: of vectors kept, keys and bookkeeping included; 0 = none are, and every row is computed, even
                one that is being computed already.
            observe: told, whenever rows were looked up, how many were hits, how many joined one that was being
                computed, and how many had to be computed.
        """
        self._engine, self._capacity, self._observe = engine, cache_bytes, observe
        self._cache: Recent[bytes, _Embedding] = Recent(cache_bytes, _size)
        self._flights: dict[bytes, _Flight] = {}

    @property
    def cached_bytes(self) -> int:
        return self._cache.bytes

    async def embed(self, rows: Sequence[Row], *, deadline: float, graph: str = GRAPH, alone: bool = False) -> Embedded:
        """Unit vectors of tokenised texts, in their order.

        Args:
            rows: at least one.
            deadline: time.monotonic() seconds.
            graph: GRAPH or QUESTIONS; a row is another one for each.
            alone: nothing shares a batch with any of them, nor did with what the cache or another caller gives.

        Raises:
            Overloaded, DeadlineExceeded, InferenceFailed, NotServing: as `Engine.submit`.
        """
        if not self._capacity:
            outcome = await self._engine.submit(graph, rows, deadline=deadline, alone=alone)
            vectors = np.array([row[OUTPUT] for row in outcome.rows], np.float32)
            return Embedded(vectors, [_tokens(row) for row in outcome.rows], outcome.queued_seconds)
        keys = [_key(row, graph, alone) for row in rows]
        missing = dict(zip(keys, rows, strict=True))
        repeated, queued_seconds = len(rows) - len(missing), 0.0
        known: dict[bytes, _Embedding] = {}
        while missing:  # more than once only where whoever computed a row for us gave it up
            hits, flights = self._look_up(missing, deadline)
            known |= hits
            own = {key: row for key, row in missing.items() if key not in hits and key not in flights}
            self._observe(len(hits), len(flights) + repeated, len(own))
            if own:
                computed, queued_seconds = await self._compute(own, deadline, graph, alone)
                known |= computed
            if flights:
                known |= await _wait(flights, deadline)
            missing, repeated = {key: row for key, row in missing.items() if key not in known}, 0
        found = [known[key] for key in keys]
        return Embedded(np.stack([one.vector for one in found]), [one.tokens for one in found], queued_seconds)

    def _look_up(self, keys: Iterable[bytes], deadline: float) -> tuple[dict[bytes, _Embedding], dict[bytes, _Flight]]:
        """Those that are known, and those that somebody is computing in time for `deadline`."""
        hits, flights = {}, {}
        latest = deadline + _SLACK * (deadline - time.monotonic())
        for key in keys:
            if (embedding := self._cache.get(key)) is not None:
                hits[key] = embedding
            elif key in self._flights and self._flights[key].deadline <= latest:
                flights[key] = self._flights[key]
        return hits, flights

    async def _compute(self, rows: Mapping[bytes, Row], deadline: float, graph: str, alone: bool) -> tuple[dict[bytes, _Embedding], float]:
        """The embeddings of rows, and how long they were queued; whoever joined hears what became of them."""
        loop = asyncio.get_running_loop()
        flights = {key: _Flight(deadline, loop.create_future()) for key in rows}
        self._flights |= flights
        embeddings: dict[bytes, _Embedding] = {}
        failure: InferenceFailed | None = None
        try:
            outcome = await self._engine.submit(graph, list(rows.values()), deadline=deadline, alone=alone)
            embeddings = {key: _embedding(row) for key, row in zip(rows, outcome.rows, strict=True)}
            return embeddings, outcome.queued_seconds
        except InferenceFailed as error:
            failure = error if len(rows) == 1 else None  # of several, nobody knows whose fault it was
            raise
        finally:  # also when this caller hangs up
            for key, flight in flights.items():
                if self._flights.get(key) is flight:  # a more urgent caller may have taken the row over
                    del self._flights[key]
                flight.done.set_result(embeddings.get(key, failure))
            for key, embedding in embeddings.items():
                self._cache.put(key, embedding)


async def _wait(flights: Mapping[bytes, _Flight], deadline: float) -> dict[bytes, _Embedding]:
    """What others compute; rows that they gave up are left out."""
    _, late = await asyncio.wait([flight.done for flight in flights.values()], timeout=max(0.0, deadline - time.monotonic()))
    if late:
        raise DeadlineExceeded("the deadline passed while the text was being embedded for another request as well")
    embeddings = {}
    for key, flight in flights.items():
        result = flight.done.result()
        if isinstance(result, InferenceFailed):
            raise InferenceFailed(str(result))
        if result is not None:
            embeddings[key] = result
    return embeddings


def _key(row: Row, graph: str, alone: bool) -> bytes:
    types = b"" if row.types is None else array("i", row.types).tobytes()
    return array("i", row.ids).tobytes() + types + (b"" if graph == GRAPH else b"?") + (b"!" if alone else b"")


def _embedding(outputs: Arrays) -> _Embedding:
    """With a vector that owns its memory: the engine's is a view that would keep its whole batch alive."""
    return _Embedding(np.array(outputs[OUTPUT], np.float32), _tokens(outputs))


def _tokens(outputs: Arrays) -> Signs | None:
    return cast("Signs | None", outputs.get(TOKENS))


def _size(key: bytes, embedding: _Embedding) -> int:
    tokens = 0 if embedding.tokens is None else embedding.tokens.nbytes + TOKENS_BYTES
    return len(key) + embedding.vector.nbytes + tokens + ENTRY_BYTES

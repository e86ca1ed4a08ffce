"""The embedder's promises, before an engine whose graph runs when the test lets it: no sleeps, no timing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from openbook_server.buckets import FINE
from openbook_server.embedder import ENTRY_BYTES, QUESTIONS, TOKENS_BYTES, Embedded, Embedder
from openbook_server.engine import Engine
from openbook_server.errors import DeadlineExceeded, InferenceFailed, Overloaded
from openbook_server.rows import Row, collate

DIM, POISON = 4, 666
ENTRY = 3 * 4 + DIM * 4 + ENTRY_BYTES  # bytes of a row of three tokens


class GatedGraph:
    """A "vector" made of a row's first token; runs wait while the gate is shut, and note what they ran."""

    buckets = FINE

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, NDArray[np.float32]]:
        inputs = collate(rows, length)
        first = inputs["input_ids"][:, 0]
        self.ran += first.tolist()
        self.entered.release()
        assert self.gate.wait(timeout=30)
        if (first == POISON).any():
            raise RuntimeError("poisoned row")
        return {"sentence_embedding": np.sin(first[:, None] * np.arange(1, DIM + 1)).astype(np.float32)}

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.gate.clear()
        yield
        self.gate.set()

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


class Lookups:
    def __init__(self) -> None:
        self.hits = self.joined = self.misses = 0

    def add(self, hits: int, joined: int, misses: int) -> None:
        self.hits, self.joined, self.misses = self.hits + hits, self.joined + joined, self.misses + misses


class GatedQuestions(GatedGraph):
    """With "signs" of as many tokens as a row has."""

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, Any]:
        tokens = [np.full((row.tokens, 2), row.ids[0], np.uint64) for row in rows]
        return {**super().run_rows(rows, length), "tokens": tokens}


@pytest.fixture
def graph() -> GatedGraph:
    return GatedGraph()


@pytest.fixture
def questions() -> GatedQuestions:
    return GatedQuestions()


@pytest.fixture
async def engine(graph: GatedGraph, questions: GatedQuestions) -> AsyncIterator[Engine]:
    engine = Engine({"embedder": graph, QUESTIONS: questions}, max_batch_tokens=512, max_queued=20)
    yield engine
    graph.gate.set()
    questions.gate.set()
    await asyncio.to_thread(engine.close)


@pytest.fixture
def lookups() -> Lookups:
    return Lookups()


@pytest.fixture
def embedder(engine: Engine, lookups: Lookups) -> Embedder:
    return Embedder(engine, cache_bytes=1 << 20, observe=lookups.add)


def row(first: int) -> Row:
    return Row([first, 1, 1])


def soon() -> float:
    return time.monotonic() + 60


async def start(embedder: Embedder, *rows: Row, deadline: float | None = None, alone: bool = False) -> asyncio.Task[Embedded]:
    """Ask, and let the question reach the queue."""
    task = asyncio.create_task(embedder.embed(rows, deadline=deadline or soon(), alone=alone))
    await asyncio.sleep(0)
    return task


async def test_a_row_asked_again_is_not_run_and_gives_the_same_bytes(embedder: Embedder, graph: GatedGraph, lookups: Lookups) -> None:
    first = await embedder.embed([row(5), row(6)], deadline=soon())
    again = await embedder.embed([row(6), row(7), row(5)], deadline=soon())
    assert graph.ran == [5, 6, 7]
    assert again.vectors[[2, 0]].tobytes() == first.vectors.tobytes()
    assert (lookups.hits, lookups.joined, lookups.misses) == (2, 0, 3)


async def test_rows_that_differ_in_their_segments_alone_are_different(embedder: Embedder, graph: GatedGraph) -> None:
    for types in (None, [0, 0, 1], [0, 1, 1]):
        await embedder.embed([Row([5, 1, 1], types)], deadline=soon())
    assert graph.ran == [5, 5, 5]


async def test_the_rows_used_last_are_kept_within_the_bytes_allowed(engine: Engine, graph: GatedGraph) -> None:
    embedder = Embedder(engine, cache_bytes=3 * ENTRY)
    for number in (1, 2, 3, 1, 4):  # 4 drives out 2, for 1 was used since
        await embedder.embed([row(number)], deadline=soon())
        assert embedder.cached_bytes <= 3 * ENTRY
    assert embedder.cached_bytes == 3 * ENTRY
    graph.ran.clear()
    for number in (1, 3, 4, 2):
        await embedder.embed([row(number)], deadline=soon())
    assert graph.ran == [2]


async def test_a_request_larger_than_the_cache_is_answered_whole(engine: Engine) -> None:
    embedder = Embedder(engine, cache_bytes=2 * ENTRY)
    embedded = await embedder.embed([row(number) for number in range(10)], deadline=soon())
    assert len({vector.tobytes() for vector in embedded.vectors}) == 10
    assert embedder.cached_bytes == 2 * ENTRY


async def test_without_a_cache_every_row_is_run(engine: Engine, graph: GatedGraph) -> None:
    embedder = Embedder(engine, cache_bytes=0)
    for _ in range(2):
        await embedder.embed([row(5), row(5)], deadline=soon())
    assert graph.ran == [5] * 4


async def test_callers_that_want_a_row_at_the_same_time_share_one_run(embedder: Embedder, graph: GatedGraph, lookups: Lookups) -> None:
    with graph.shut():
        first = await start(embedder, row(5))
        await graph.wait_entered()
        others = [await start(embedder, row(5), row(number)) for number in (6, 7)]
    tasks = await asyncio.gather(first, *others)
    assert sorted(graph.ran) == [5, 6, 7]
    assert len({embedded.vectors[0].tobytes() for embedded in tasks}) == 1
    assert (lookups.hits, lookups.joined, lookups.misses) == (0, 2, 3)


async def test_a_row_that_runs_alone_is_shared_only_with_callers_that_want_it_so(
    embedder: Embedder, graph: GatedGraph, lookups: Lookups
) -> None:
    with graph.shut():
        blocking = await start(embedder, row(1))
        await graph.wait_entered()
        tasks = [await start(embedder, row(5), row(6), alone=alone) for alone in (False, True, False, True)]
    await asyncio.gather(blocking, *tasks)
    assert sorted(graph.ran) == [1, 5, 5, 6, 6]
    assert (lookups.joined, lookups.misses) == (4, 5)
    for alone in (False, True):
        await embedder.embed([row(5), row(6)], deadline=soon(), alone=alone)
    assert (lookups.hits, lookups.misses) == (4, 5)


async def test_a_row_twice_in_a_request_is_run_once(embedder: Embedder, graph: GatedGraph) -> None:
    embedded = await embedder.embed([row(5), row(6), row(5)], deadline=soon())
    assert sorted(graph.ran) == [5, 6]
    assert embedded.vectors[0].tobytes() == embedded.vectors[2].tobytes() != embedded.vectors[1].tobytes()


async def test_a_first_caller_that_hangs_up_takes_nothing_from_the_second(embedder: Embedder, graph: GatedGraph) -> None:
    with graph.shut():
        blocking = await start(embedder, row(1))
        await graph.wait_entered()
        first = await start(embedder, row(5))
        second = await start(embedder, row(5))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    vectors = (await second).vectors
    await blocking
    assert vectors.tobytes() == (await embedder.embed([row(5)], deadline=soon())).vectors.tobytes()
    assert graph.ran == [1, 5]


async def test_a_second_caller_that_hangs_up_takes_nothing_from_the_first(embedder: Embedder, graph: GatedGraph) -> None:
    with graph.shut():
        first = await start(embedder, row(5))
        await graph.wait_entered()
        second = await start(embedder, row(5))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
    assert (await first).vectors.shape == (1, DIM)
    assert graph.ran == [5]


async def test_a_failure_is_told_to_all_who_wait_and_not_remembered(embedder: Embedder, graph: GatedGraph) -> None:
    with graph.shut():
        tasks = [await start(embedder, row(POISON)) for _ in range(3)]
        await graph.wait_entered()
    for task in tasks:
        with pytest.raises(InferenceFailed, match="poisoned row"):
            await task
    assert graph.ran == [POISON]
    assert embedder.cached_bytes == 0
    with pytest.raises(InferenceFailed):
        await embedder.embed([row(POISON)], deadline=soon())
    assert graph.ran == [POISON] * 2


async def test_a_row_beside_one_that_fails_does_not_fail_for_others(embedder: Embedder, graph: GatedGraph) -> None:
    with graph.shut():
        first = await start(embedder, row(5), row(POISON))
        await graph.wait_entered()
        second = await start(embedder, row(5))
    with pytest.raises(InferenceFailed):
        await first
    assert (await second).vectors.shape == (1, DIM)


async def test_who_joins_waits_no_longer_than_its_own_deadline(embedder: Embedder, graph: GatedGraph) -> None:
    with graph.shut():
        first = await start(embedder, row(5), deadline=time.monotonic() + 0.52)
        await graph.wait_entered()
        second = await start(embedder, row(5), deadline=time.monotonic() + 0.5)  # joins: about as urgent
        with pytest.raises(DeadlineExceeded, match="another request"):
            await second
    assert (await first).vectors.shape == (1, DIM)
    assert graph.ran == [5]


async def test_an_urgent_caller_does_not_wait_in_a_patient_ones_place(embedder: Embedder, graph: GatedGraph) -> None:
    now = time.monotonic()
    with graph.shut():
        blocking = await start(embedder, row(1))
        await graph.wait_entered()
        patient = await start(embedder, row(5), deadline=now + 600)
        long = Row([9] * 100)
        between = await start(embedder, long, deadline=now + 300)
        urgent = await start(embedder, row(5), deadline=now + 100)
        later = await start(embedder, row(5), deadline=now + 500)  # joins the urgent one
    await asyncio.gather(blocking, patient, between, urgent, later)
    assert graph.ran.index(5) < graph.ran.index(9)
    assert graph.ran.count(5) == 2


async def test_a_caller_refused_for_its_own_deadline_refuses_nobody_else(embedder: Embedder, graph: GatedGraph) -> None:
    with graph.shut():
        blocking = await start(embedder, row(1))
        await graph.wait_entered()
        deadline = time.monotonic() + 0.05
        hurried = await start(embedder, row(5), deadline=deadline)
        patient = await start(embedder, row(5))
        while time.monotonic() <= deadline:
            await asyncio.sleep(0.01)
    with pytest.raises(DeadlineExceeded):
        await hurried
    assert (await patient).vectors.shape == (1, DIM)
    await blocking


async def test_a_full_queue_refuses_misses_and_answers_hits(embedder: Embedder, graph: GatedGraph) -> None:
    await embedder.embed([row(1)], deadline=soon())
    await graph.wait_entered()
    with graph.shut():
        blocking = await start(embedder, row(2))
        await graph.wait_entered()
        waiting = await start(embedder, *(row(number) for number in range(100, 120)))
        with pytest.raises(Overloaded):
            await embedder.embed([row(3)], deadline=soon())
        assert (await embedder.embed([row(1)], deadline=soon())).vectors.shape == (1, DIM)
    await asyncio.gather(blocking, waiting)


async def test_a_question_brings_the_signs_of_its_tokens_from_the_cache_and_from_others_too(
    embedder: Embedder, graph: GatedGraph, questions: GatedQuestions, lookups: Lookups
) -> None:
    with questions.shut():
        first = asyncio.create_task(embedder.embed([row(5)], deadline=soon(), graph=QUESTIONS))
        await questions.wait_entered()
        joining = asyncio.create_task(embedder.embed([row(5)], deadline=soon(), graph=QUESTIONS))
        await asyncio.sleep(0)
    computed = [await first, await joining]
    known = await embedder.embed([row(5)], deadline=soon(), graph=QUESTIONS)
    for embedded in (*computed, known):
        [tokens] = embedded.tokens
        assert tokens is not None
        assert tokens.tolist() == [[5, 5]] * 3
    plain = await embedder.embed([row(5)], deadline=soon())
    assert plain.tokens == [None]
    assert plain.vectors.tobytes() == known.vectors.tobytes()
    assert (questions.ran, graph.ran) == ([5], [5])  # a text that is not asked about is another entry
    assert (lookups.joined, lookups.misses) == (1, 2)
    assert embedder.cached_bytes == ENTRY + ENTRY + 1 + 3 * 2 * 8 + TOKENS_BYTES


async def test_without_a_cache_a_question_brings_them_too(engine: Engine) -> None:
    embedded = await Embedder(engine, cache_bytes=0).embed([row(5), row(6)], deadline=soon(), graph=QUESTIONS)
    assert [None if tokens is None else tokens[0, 0] for tokens in embedded.tokens] == [5, 6]

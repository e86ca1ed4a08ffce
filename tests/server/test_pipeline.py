"""The order of the stages, with stages that are not there: what does not show through gRPC."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from openbook_server.errors import DeadlineExceeded, KnowledgeBaseUnavailable, Overloaded
from openbook_server.knowledge import Hit, SearchOptions
from openbook_server.pipeline import Pipeline
from openbook_server.searching import SEARCHED_AT_ONCE
from openbook_server.work import Work


class SlowKnowledgeBase:
    """Finds nothing; each search waits until the test lets it go."""

    search_threads = 1

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.seconds = 0.0  # that a search takes once it is let go
        self.failure: Exception | None = None
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def search(self, questions: Sequence[str], vectors: None, options: SearchOptions, tokens: Sequence[object]) -> list[list[Hit]]:
        assert vectors is None
        self.asked.append(list(questions))
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        if self.failure is not None:
            raise self.failure
        time.sleep(self.seconds)
        return [[] for _ in questions]

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


def searching(pipeline: Pipeline, questions: list[str], *, within: float = 60) -> asyncio.Task[list[list[Hit]]]:
    options, rows = SearchOptions(top_k=5, mode="lexical"), [None] * len(questions)
    return asyncio.create_task(pipeline.search(questions, rows, options, Work(time.monotonic() + within)))  # type: ignore[arg-type]


@pytest.fixture
def slow() -> SlowKnowledgeBase:
    return SlowKnowledgeBase()


@pytest.fixture
def pipeline(slow: SlowKnowledgeBase) -> Any:
    nothing: Any = None
    pipeline = Pipeline(nothing, nothing, nothing, nothing, slow)  # type: ignore[arg-type]
    yield pipeline
    slow.gate.release(100)
    pipeline.close()


async def test_who_is_due_first_is_searched_for_in_the_middle_of_a_large_request(pipeline: Pipeline, slow: SlowKnowledgeBase) -> None:
    many = [f"q{number}" for number in range(3 * SEARCHED_AT_ONCE + 5)]
    large = searching(pipeline, many)
    await slow.wait_entered()
    small = searching(pipeline, ["in a hurry"], within=30)
    await asyncio.sleep(0)
    slow.gate.release(100)
    assert len(await large) == len(many)
    assert await small == [[]]
    assert slow.asked[1] == ["in a hurry"]
    assert [question for asked in slow.asked for question in asked if question != "in a hurry"] == many


async def test_who_hung_up_is_searched_for_no_more(pipeline: Pipeline, slow: SlowKnowledgeBase) -> None:
    large = searching(pipeline, ["q"] * (4 * SEARCHED_AT_ONCE))
    await slow.wait_entered()
    large.cancel()
    with pytest.raises(asyncio.CancelledError):
        await large
    slow.gate.release(100)
    assert await searching(pipeline, ["next"]) == [[]]
    assert [len(asked) for asked in slow.asked] == [SEARCHED_AT_ONCE, 1]


async def test_searches_that_would_come_too_late_are_refused_at_once(
    pipeline: Pipeline, slow: SlowKnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook_server.admission._KNOWN", 1e12)
    slow.seconds = 0.5  # so much is learned by the first one
    slow.gate.release()
    await searching(pipeline, ["first"])
    with pytest.raises(DeadlineExceeded, match="allow more"):
        await searching(pipeline, ["q"] * 100 * SEARCHED_AT_ONCE, within=20)
    slow.seconds = 0.0
    waiting = [searching(pipeline, [f"q{number}"], within=20) for number in range(100)]  # 50 s
    for task in waiting:  # are those that were refused before anything moved on
        await asyncio.wait([task], timeout=0)
    refused = [number for number, task in enumerate(waiting) if task.done()]
    assert refused == list(range(refused[0], 100))
    assert all(isinstance(waiting[number].exception(), Overloaded) for number in refused)
    slow.gate.release(100)
    await asyncio.gather(*waiting[: refused[0]])
    assert [f"q{refused[0]}"] not in slow.asked


async def test_what_a_search_waits_for_its_turn_is_told_as_waiting(pipeline: Pipeline, slow: SlowKnowledgeBase) -> None:
    busy = searching(pipeline, ["first"])
    await slow.wait_entered()
    work = Work(time.monotonic() + 60)
    waiting = asyncio.create_task(pipeline.search(["q"], [None], SearchOptions(top_k=5, mode="lexical"), work))  # type: ignore[list-item]
    await asyncio.sleep(0.05)
    slow.gate.release(2)
    await asyncio.gather(busy, waiting)
    assert 40 < work.queue_ms < work.search_ms


async def test_a_failure_of_the_knowledge_base_is_told_to_who_asked_as_it_is(pipeline: Pipeline, slow: SlowKnowledgeBase) -> None:
    slow.failure = KnowledgeBaseUnavailable("no node answers")
    slow.gate.release(100)
    with pytest.raises(KnowledgeBaseUnavailable, match="no node answers"):
        await searching(pipeline, ["q"] * 2 * SEARCHED_AT_ONCE)
    slow.failure = None
    assert await searching(pipeline, ["next"]) == [[]]

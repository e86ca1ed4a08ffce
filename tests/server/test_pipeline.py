"""The order of the stages, with stages that are not there: what does not show through gRPC."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from openbook_server.knowledge import Hit, SearchOptions
from openbook_server.pipeline import SEARCHED_AT_ONCE, Pipeline
from openbook_server.work import Work


class SlowKnowledgeBase:
    """Finds nothing; each search waits until the test lets it go."""

    search_threads = 1

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def search(self, questions: Sequence[str], vectors: None, options: SearchOptions, tokens: Sequence[object]) -> list[list[Hit]]:
        assert vectors is None
        self.asked.append(list(questions))
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        return [[] for _ in questions]

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


def searching(pipeline: Pipeline, questions: list[str]) -> asyncio.Task[list[list[Hit]]]:
    options, rows = SearchOptions(top_k=5, mode="lexical"), [None] * len(questions)
    return asyncio.create_task(pipeline.search(questions, rows, options, Work(time.monotonic() + 60)))  # type: ignore[arg-type]


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


async def test_a_request_of_many_questions_lets_others_search_in_between(pipeline: Pipeline, slow: SlowKnowledgeBase) -> None:
    many = [f"q{number}" for number in range(3 * SEARCHED_AT_ONCE + 5)]
    large = searching(pipeline, many)
    await slow.wait_entered()
    small = searching(pipeline, ["alone"])
    await asyncio.sleep(0)
    slow.gate.release(100)
    assert len(await large) == len(many)
    assert await small == [[]]
    assert slow.asked[1] == ["alone"]
    assert [question for asked in slow.asked for question in asked if question != "alone"] == many


async def test_who_hung_up_is_searched_for_no_more(pipeline: Pipeline, slow: SlowKnowledgeBase) -> None:
    large = searching(pipeline, ["q"] * (4 * SEARCHED_AT_ONCE))
    await slow.wait_entered()
    large.cancel()
    slow.gate.release(100)
    with pytest.raises(asyncio.CancelledError):
        await large
    assert await searching(pipeline, ["next"]) == [[]]
    assert [len(asked) for asked in slow.asked] == [SEARCHED_AT_ONCE, 1]

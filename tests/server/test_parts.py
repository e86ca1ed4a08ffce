"""Long work in parts: whoever shares the thread has turns, and nothing is done for nobody."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openbook_server.errors import DeadlineExceeded
from openbook_server.ingest.parts import Parts, at_once, in_parts


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def work(name: str, parts: int, done: list[str]) -> Parts[str]:
    for _ in range(parts - 1):
        done.append(name)
        yield
    done.append(name)
    return name


def test_all_parts_at_once_give_what_the_last_one_returns() -> None:
    done: list[str] = []
    assert [at_once(work("a", parts, done)) for parts in (1, 3)] == ["a", "a"]
    assert len(done) == 4


async def test_two_pieces_of_work_take_turns(thread: ThreadPoolExecutor) -> None:
    done: list[str] = []
    assert await asyncio.gather(*[in_parts(work(name, 9, done), thread, math.inf) for name in "ab"]) == ["a", "b"]
    assert max(done[:at].count("a") - done[:at].count("b") for at in range(len(done))) <= 2
    assert max(done[:at].count("b") - done[:at].count("a") for at in range(len(done))) <= 2


async def test_no_part_is_begun_once_the_caller_is_gone_or_the_deadline_has_passed(thread: ThreadPoolExecutor) -> None:
    done: list[str] = []
    waited_for = asyncio.ensure_future(in_parts(work("a", 1_000_000, done), thread, math.inf))
    while not done:
        await asyncio.sleep(0)
    waited_for.cancel()
    await asyncio.gather(waited_for, return_exceptions=True)
    await asyncio.get_running_loop().run_in_executor(thread, done.clear)
    with pytest.raises(DeadlineExceeded, match=r"^the deadline passed \d+\.\d{3} s ago, before all was split; allow more time"):
        await in_parts(work("b", 2, done), thread, time.monotonic() - 1)
    await asyncio.get_running_loop().run_in_executor(thread, time.monotonic)
    assert done == []

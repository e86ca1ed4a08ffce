"""Who gets the thread that writes: one write after the other, and none for a caller that gave up before its turn."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
from openbook_server.ingest.writer import Writer


class Stored:
    """Notes what is deleted; a snapshot takes until the test lets it go."""

    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.saving, self.saved = threading.Event(), threading.Event()

    def documents(self, ids: Sequence[str]) -> dict[str, list[object]]:
        return {}

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(ids, "digest")

    def delete_documents(self, ids: Sequence[str]) -> None:
        self.deleted += ids

    def snapshot(self) -> None:
        self.saving.set()
        assert self.saved.wait(30)


class Ids(list[str]):
    """Of a request, so that it can be seen whether anything keeps it."""


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.fixture
async def writer(stored: Stored, thread: ThreadPoolExecutor) -> AsyncIterator[Writer]:
    unused = cast(Any, SimpleNamespace(embedder=SimpleNamespace(max_tokens=1, dim=1), tokenizer=None))
    yield Writer(unused, cast(Any, stored), unused, unused, unused, thread, thread)
    stored.saved.set()


async def test_of_writes_that_wait_for_the_thread_those_are_dropped_whose_callers_gave_up(writer: Writer, stored: Stored) -> None:
    snapshot = asyncio.create_task(writer.snapshot())
    assert await asyncio.to_thread(stored.saving.wait, 30)
    requests = [Ids([str(number)]) for number in range(100)]
    kept = [weakref.ref(ids) for ids in requests]
    writes = [asyncio.create_task(writer.delete(ids)) for ids in requests]
    await asyncio.sleep(0)
    for write in writes[:-1]:
        write.cancel()
    await asyncio.wait(writes[:-1])
    del requests, writes[:-1], write
    assert [ids() for ids in kept] == [None] * 99 + [["99"]]  # while the thread is still busy
    stored.saved.set()
    await snapshot
    assert await writes[0] == {"99": 0}
    assert stored.deleted == ["99"]


async def test_a_write_whose_turn_has_come_happens_whole_although_its_caller_gives_up(
    writer: Writer, stored: Stored, thread: ThreadPoolExecutor
) -> None:
    busy = threading.Event()
    thread.submit(busy.wait, 30)
    first, second = asyncio.create_task(writer.delete(["first"])), asyncio.create_task(writer.delete(["second"]))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    assert not first.done()  # until then it counts as a write that is under way
    busy.set()
    assert await second == {"second": 0}
    assert first.cancelled()
    assert stored.deleted == ["first", "second"]

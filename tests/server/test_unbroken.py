"""Work that outlives whoever waits for it: it ends, and what it fails with is told to nobody unless it is a defect."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openbook_server.errors import InvalidRequest
from openbook_server.unbroken import to_the_end, uncancelled


@pytest.mark.parametrize("way", [to_the_end, uncancelled])
@pytest.mark.parametrize(("failure", "lines"), [(InvalidRequest("name", "there is none"), 0), (RuntimeError("a defect"), 1)])
async def test_of_what_nobody_waits_for_any_more_only_defects_are_logged(
    way: Callable[[Awaitable[None]], Awaitable[None]], failure: Exception, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    let = asyncio.Event()

    async def work() -> None:
        await let.wait()
        raise failure

    waiting = asyncio.ensure_future(way(work()))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert waiting.done() is (way is uncancelled)
    let.set()
    for _ in range(10):  # until it has ended and whoever must was told
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    del waiting
    gc.collect()
    assert complaints == []
    assert len(caplog.records) == lines


async def test_whoever_waits_to_the_end_is_told_how_it_went() -> None:
    async def refused() -> None:
        raise InvalidRequest("name", "there is none")

    for way in (to_the_end, uncancelled):
        assert await way(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(InvalidRequest):
            await way(refused())

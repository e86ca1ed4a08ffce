"""Long work on the event loop, a turn at a time: whoever else is served by it waits no longer than that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

TURN_SECONDS = 0.005

T = TypeVar("T")


async def in_turns(steps: Iterable[T]) -> AsyncIterator[T]:
    """What one piece of work goes through, step by step: behind a step that ends a turn, everybody else has one."""
    began = time.perf_counter()
    for step in steps:
        yield step
        if time.perf_counter() - began > TURN_SECONDS:
            await asyncio.sleep(0)
            began = time.perf_counter()

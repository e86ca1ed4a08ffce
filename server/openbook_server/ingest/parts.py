"""Long work in parts: a generator that stops between them, and returns what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from concurrent.futures import Executor
from typing import TypeVar

from openbook_server.errors import DeadlineExceeded

T = TypeVar("T")
Parts = Generator[None, None, T]


def at_once(work: Parts[T]) -> T:
    """All of it, here."""
    while not (result := _next_part(work)):
        pass
    return result[0]


async def in_parts(work: Parts[T], thread: Executor, deadline: float) -> T:
    """Each part a job of `thread`, in turn with the parts of others; none is begun that nobody waits for any more.

    Raises:
        DeadlineExceeded: it is not done by then, in time.monotonic() seconds.
    """
    result: list[T] = []
    while not result:
        if (late := time.monotonic() - deadline) >= 0:
            raise DeadlineExceeded(f"the deadline passed {late:.3f} s ago, before all was split; allow more time, or send less at once")
        result = await asyncio.get_running_loop().run_in_executor(thread, _next_part, work)
    return result[0]


def _next_part(work: Parts[T]) -> list[T]:
    """Do it; what came of all of them, where it was the last."""
    try:
        next(work)
    except StopIteration as end:
        return [end.value]
    return []

"""Long work on the event loop, a turn at a time: whoever else is served by it waits no longer than that."""

from __future__ import annotations

import asyncio
import time

TURN = 0.005  # seconds


class Turns:
    """Of one piece of work; the first begins with it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def pause(self) -> None:
        """Between two steps of the work: where its turn was long enough, everybody else has one."""
        if time.perf_counter() - self._began > TURN:
            await asyncio.sleep(0)
            self._began = time.perf_counter()

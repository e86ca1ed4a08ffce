"""A gate that many pass at once, and that can be closed: then nobody is inside, and whoever comes waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from openbook_server.errors import DeadlineExceeded


class Gate:
    """Lives on one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._one = asyncio.Lock()  # of those that close it

    @asynccontextmanager
    async def passed(self, deadline: float) -> AsyncIterator[None]:
        """Inside within the block; waits while the gate is closed.

        Raises:
            DeadlineExceeded: it stayed closed until the deadline, in time.monotonic() seconds.
        """
        while not self._is_open.is_set():
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._is_open.wait()
            except TimeoutError as error:
                raise DeadlineExceeded("the deadline passed while writes waited for a new generation to go live; try again") from error
        self._inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._is_empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Nobody is inside within the block."""
        async with self._one:
            self._is_open.clear()
            try:
                await self._is_empty.wait()
                yield
            finally:
                self._is_open.set()

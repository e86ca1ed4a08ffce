"""Pairs that answer no new requests: each is closed when those that it serves are done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from openbook_server.errors import OpenBookError
from openbook_server.pair import Pair, Shared
from openbook_server.unbroken import to_the_end

log = logging.getLogger(__name__)


class Retiring:
    """Those of one server, which may be of the same generation, once for each time that it was live."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._closing: dict[asyncio.Task[None], str] = {}  # the generation that each is about

    def add(self, old: Pair) -> None:
        """It was replaced."""
        assert old.knowledge_base is not None  # noqa: S101
        task = asyncio.ensure_future(self._close(old))
        self._closing[task] = old.knowledge_base.generation
        task.add_done_callback(self._closing.pop)

    async def closed(self, name: str) -> None:
        """Wait until no pair of this generation is left."""
        await _done([task for task, its_name in self._closing.items() if its_name == name])

    async def all_closed(self) -> None:
        """Wait until none is left."""
        await _done(self._closing)

    async def _close(self, old: Pair) -> None:
        """Save its index for the way back, and let go of it."""
        assert old.knowledge_base is not None  # noqa: S101
        await old.served.finished()
        try:
            if self._shared.writable:
                await self._shared.in_writer(old.knowledge_base.snapshot)
        except (OpenBookError, OSError) as error:
            log.warning("%s", error)
        await to_the_end(old.close())


async def _done(tasks: Collection[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(list(tasks))

"""Work that goes on to its end whatever becomes of who waits for it.

What it fails with when nobody waits any more is told to nobody: a refusal need not be, anything else is a defect and is logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from openbook_server.errors import OpenBookError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


async def uncancelled(work: Awaitable[_T]) -> _T:
    """It goes on when whoever waits for it does not."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_unheard)
        raise


async def to_the_end(work: Awaitable[_T]) -> _T:
    """What cannot be stopped half-way is waited for, even by whom is told to stop."""
    task = asyncio.ensure_future(work)
    try:
        return await uncancelled(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _unheard(task: asyncio.Future[Any]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is not None and not isinstance(error, (OpenBookError, OSError)):
        log.error("what nobody waited for any more failed", exc_info=error)

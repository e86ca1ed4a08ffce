"""Whose turn it is on a processor, within this process."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")

# Tried in turn at ten times the capacity (bf16, docs/speed.md): with 5 refusals came after 5 to 360 ms, with 10 after 3 to 5 (p50).
# More was not tried.
NICE = 10


def give_way() -> None:
    """Let other threads go first from now on, before the calling one and those that it starts; on Linux, elsewhere nothing changes.

    For threads that compute, read files or build. Those that read calls, refuse and reply take a small part of the time that a batch
    takes, and callers wait for them; beside a batch on every core, each of their turns would begin milliseconds late.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()  # which is what Linux gives priorities to
        with suppress(OSError):  # a sandbox may forbid it, and a server is slower then, not broken
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


def put_loop_first() -> None:
    """Have whatever leaves the running event loop's thread give way to it, `asyncio.to_thread` and the threads of sessions loaded there."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="beside", initializer=give_way))


# Not the default executor's threads: all of those may be waiting for a knowledge base that does not answer.
_COMPUTING = ThreadPoolExecutor(thread_name_prefix="computing", initializer=give_way)


async def computed(work: Callable[[], _T]) -> _T:
    """What takes the processor for a while and nothing else, computed beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_COMPUTING, work)

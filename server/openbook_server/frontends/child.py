"""What every process does that the supervisor started: it takes its orders, says how it is, and never outlives the supervisor.

Orders are lines of JSON on standard input, the first of which says what to do. When standard input ends, the supervisor is gone, and
so is the process, at once: whatever was acknowledged is on disk. What the process says of itself are lines of JSON on the pipe that
was its standard output; anything else that is printed goes to standard error.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook_server.config import ServerConfig
from openbook_server.errors import OpenBookError
from openbook_server.hosting import set_up_process

DEFECT = 70  # exit status, as that of `openbook`


@dataclass(frozen=True)
class Orders:
    """What a process is to do."""

    config: ServerConfig  # with the port that was reserved
    bundle: Path
    knowledge_base: str | None
    listening: int  # file descriptor on which front ends reach the engine
    socket: Path  # by which they do


class Supervised:
    """The tie to the supervisor."""

    def __init__(self) -> None:
        """Take the orders."""
        self._says = os.dup(1)
        os.dup2(2, 1)
        self._told = io.FileIO(0, closefd=False)  # without a buffer, whose lock a thread that reads would hold when the process ends
        first = self._told.readline()
        if not first:
            os._exit(DEFECT)
        given: dict[str, Any] = json.loads(first)
        self.orders = Orders(
            config=ServerConfig(**given["config"]),
            bundle=Path(given["bundle"]),
            knowledge_base=given["knowledge_base"],
            listening=given["listening"],
            socket=Path(given["socket"]),
        )
        self.restarts: dict[str, int] = given["restarts"]  # of each kind of process, as the supervisor said last
        threading.Thread(target=self._watch, name="supervisor", daemon=True).start()

    def say(self, **state: object) -> None:
        """How this process is."""
        os.write(self._says, json.dumps(state).encode() + b"\n")

    def _watch(self) -> None:
        for line in self._told:
            self.restarts = json.loads(line)
        os._exit(DEFECT)


def run(main: Callable[[Supervised], Coroutine[Any, Any, None]]) -> int:
    """Be a supervised process; returns its exit status, with the problem on standard error as `openbook` words it."""
    set_up_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to act on
    try:
        asyncio.run(main(Supervised()))
    except OpenBookError as error:
        print(f"openbook serve: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("OPENBOOK_TRACEBACK"):
            raise
        print(f"openbook serve: {type(error).__name__}: {error} (OPENBOOK_TRACEBACK=1 shows where)", file=sys.stderr)
        return DEFECT
    return 0


def told_to_stop() -> asyncio.Event:
    """Set by SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop

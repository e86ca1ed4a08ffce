"""What every process of a server sets for itself."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

SWITCH_SECONDS = 0.0005  # between threads; Python's default is ten times as long


def set_up_process() -> None:
    """Log to standard error. Let threads take quick turns: the engine's needs the interpreter for moments only, but at once, for the device
    idles until it has it. Tokenise where it is asked for: a text takes tens of microseconds, and other threads wait for processors that
    inference has."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def once_told(stop: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT call `stop` on the event loop; after the first of them a second one ends the process at once.

    Python's own way with SIGINT, an exception, would wait for every thread. Nothing is lost: every write is a transaction, a derived file
    gets its name when it is whole, and every line of the log has left.
    """
    loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)

    def first() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, lambda number, _: os._exit(128 + number))  # as shells count an end by a signal
        stop()

    for number in signals:
        loop.add_signal_handler(number, first)

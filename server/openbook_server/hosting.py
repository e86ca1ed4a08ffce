"""What every process of a server sets for itself."""

from __future__ import annotations

import logging
import os
import sys

SWITCH_SECONDS = 0.0005  # between threads; Python's default is ten times as long


def set_up_process() -> None:
    """Log to standard error. Let threads take quick turns: the engine's needs the interpreter for moments only, but at once, for the device
    idles until it has it. Tokenise where it is asked for: a text takes tens of microseconds, and other threads wait for processors that
    inference has."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

"""Searches go first: whoever adds rows waits until no search runs or waits, in any index that shares this."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Precedence:
    """Between the searches and the additions of some indexes; thread-safe."""

    def __init__(self) -> None:
        self._searches = 0  # running or waiting
        self._idle = threading.Condition()  # no search runs or waits

    @contextlib.contextmanager
    def search(self) -> Iterator[None]:
        """Within, adding waits; without this a thread that adds takes an index's lock again before a search wakes up."""
        with self._idle:
            self._searches += 1
        try:
            yield
        finally:
            with self._idle:
                self._searches -= 1
                self._idle.notify_all()

    def wait_for_searches(self) -> None:
        """Until none runs or waits."""
        with self._idle:
            self._idle.wait_for(lambda: not self._searches)

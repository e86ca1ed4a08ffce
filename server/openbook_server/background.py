"""When background work keeps out of the way of people. Knows no threads and no clock: the engine guards it and tells it the time.

While somebody waits whose next rows are yet to come, a batch every `PATIENCE` seconds; of several sessions, one is kept free as long as
people ask.
"""

from __future__ import annotations

PATIENCE = 0.15  # seconds between background batches while somebody waits for an answer
ASKING = 1.0  # seconds since the last foreground job for which people are taken to ask


class Background:
    """What an engine of so many sessions knows of its background batches, and of who is in the foreground."""

    def __init__(self, sessions: int) -> None:
        self._sessions, self._running, self._until = sessions, 0, 0.0
        self.attended = 0  # requests that need the device more than once
        self.asked = 0.0  # when a foreground job came last

    def begin(self, until: float) -> None:
        """A batch runs, until then as far as is known."""
        self._running += 1
        self._until = until

    def end(self, now: float) -> None:
        """One is done."""
        self._running -= 1
        self._until = now

    def pause(self, now: float) -> float:
        """Seconds for which none may begin."""
        until = self._until + PATIENCE if self.attended else 0.0
        if self._running and self._running == self._sessions - 1:
            until = max(until, self.asked + ASKING)
        return max(0.0, until - now)

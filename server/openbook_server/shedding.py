"""Which calls are refused at sight, before they are read: only where refusing the others one by one costs too much. Pure, told the time.

- Calls are read in the order in which they came. Where that takes longer than their callers wait, all that is read is read for nothing,
  and so is the next: so once most calls come too late, for a while those are let go unread that lay there too long for the time they have
  left. Most of the last ones, for a caller that allows next to no time is late whatever the server does, and must not speak for the others.
- Where more than a few calls a second are refused because of what waits before them, reading, parsing and answering each of them takes the
  processors from what is not refused: those whose time is too short for the queue are let go unread, whatever they ask for; some of them
  might have needed no device, for their texts are in the cache or they search by words alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_LATE = 0.005  # seconds left of a call that was not read in time
_AMONG = 16.0  # calls, the last ones, of which more than half must be late
_WARY = 5.0  # seconds for which that makes wary
_LAG = 0.05  # of the time that its caller still waits, a call may lie unread then
MANY = 100.0  # refusals a second, over the last second or so, beyond which they are made at sight


class Shedding:
    """What a server remembers of the calls that it refused."""

    def __init__(self) -> None:
        self.crowded: Callable[[float], float] = lambda left: 0.0  # see `Engine.crowded`; nothing is, while there is no engine
        self._late, self._wary_until = 0.0, 0.0  # the share of late ones among the last calls
        self._refused, self._at = 0.0, 0.0  # calls that did not fit, the older the less they count, as of then

    def count(self, now: float) -> None:
        """A call was refused because of what waits before it."""
        self._refused, self._at = self._rate(now) + 1.0, now

    def is_late(self, left: float, lag: float, now: float) -> bool:
        """Whether a call with so many seconds left has lain unread too long; `lag`: for how long as far as is known, 0 where calls are read
        as they come in."""
        if not lag:
            return False
        late = left < _LATE
        self._late += (late - self._late) / _AMONG
        if late and self._late > 0.5:
            self._wary_until = now + _WARY
        return now < self._wary_until and lag >= _LAG * left

    def wait(self, left: float, now: float) -> float:
        """Seconds of queue that leave a call with so many left no hope; 0 where they leave some, or where looking closer costs little."""
        return self.crowded(left) if self._rate(now) > MANY else 0.0

    def _rate(self, now: float) -> float:
        return self._refused * math.exp(self._at - now)

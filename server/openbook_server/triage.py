"""Which calls are not read: they came too late, or what waits for the models leaves them no time.

To read a call, check it and tokenise its texts costs several times what ending it unread does, and a flood brings thousands a second;
what they cost, answers lack.

- Calls are read in the order in which they came. Where that takes longer than their callers wait, all that is read is read for nothing,
  and so is the next. So once calls came too late, for a while those are let go for whom the loop has been behind too long.
- A call that would be refused if it asked the models for as much as others do seems hopeless. Whether it asks them at all is known only
  once it is read: its texts may be in the cache, its search lexical. So calls that seem hopeless are read until many in a row were
  read in vain, and one in so many after that; one that is answered long before its turn has others of its method read again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

_LATE = 0.005  # seconds left of a call that was not read in time
_WARY = 5.0  # seconds for which one such call makes wary
_LAG = 0.05  # of the time that its caller still waits, a call may lie unread then
_TRIES = 16  # calls read in vain before others are not; and of those, one in so many is
_SOON = 0.5  # of what it seemed to wait for: what is answered sooner did not wait for it


@dataclass(slots=True)
class _Method:
    in_vain: int = 0  # calls in a row that seemed hopeless and were read for nothing
    unread: int = 0


class Triage:
    """Decides for one server, call by call."""

    def __init__(self, hopeless: Callable[[float], float] = lambda deadline: 0.0) -> None:
        """`hopeless`: see `Engine.hopeless`."""
        self._hopeless = hopeless
        self._wary_until = 0.0  # monotonic
        self._methods: defaultdict[str, _Method] = defaultdict(_Method)

    def comes_too_late(self, left: float, behind: float) -> bool:
        """Whether a call is to be let go, whose caller waits for `left` seconds more, and which lay unread for up to `behind`."""
        now = time.monotonic()
        if behind and left < _LATE:
            self._wary_until = now + _WARY
        return now < self._wary_until and behind >= _LAG * max(left, _LATE)

    def looks(self, method: str, left: float) -> tuple[float, bool]:
        """How long a call waits for the models, where that seems too long for it, else 0; and whether it is read."""
        wait = self._hopeless(time.monotonic() + left)
        state = self._methods[method]
        if not wait or state.in_vain < _TRIES:
            return wait, True
        state.unread = (state.unread + 1) % _TRIES
        return wait, not state.unread

    def was_read(self, method: str, wait: float, seconds: float, *, answered: bool) -> None:
        """What became of a call that seemed to wait too long, `wait` seconds: how long it took, and whether it was answered."""
        state = self._methods[method]
        if not answered:
            state.in_vain = min(_TRIES, state.in_vain + 1)
        elif seconds < _SOON * wait:
            state.in_vain = 0

"""What is usual: a mean of what was seen lately, from which is told what a request will yet ask for."""

from __future__ import annotations

AMONG = 256  # values, the last ones, roughly


class Usual:
    """The mean of all values at first, then of the last ones, the older the less they count; 0 before there is any."""

    def __init__(self) -> None:
        self.mean, self._count = 0.0, 0

    def learn(self, value: float) -> None:
        self._count = min(self._count + 1, AMONG)
        self.mean += (value - self.mean) / self._count

"""Who is let in: whether a newcomer's rows find room, and are done by their deadline as far as is known. The engine guards it and tells it
the time.

What a graph costs that ran nothing for a second is not known, and nothing of it is predicted to be too late: whoever refuses everything
learns nothing more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from openbook_server.backlog import Backlog, Group, Lane
from openbook_server.costs import BatchCost
from openbook_server.errors import DeadlineExceeded, Overloaded

_CAUTION = 2.0  # waits turn out longer at times, and a result that comes too late took the place of one in time
_KNOWN = 1.0  # seconds since a graph last ran for which its cost is taken as known
_SOONEST = 0.01  # seconds after which anybody is told to try again
_PART = 256  # rows of one job that may wait at least, however short the queue
_TRIED = 32  # rows of one job of which it is not known what they cost


class Admission:
    """To one engine's queue."""

    def __init__(self, backlog: Backlog, costs: dict[str, BatchCost], *, max_queued: int, sessions: int) -> None:
        self._backlog, self._costs, self._max_queued = backlog, costs, max_queued
        self.busy_until = [0.0] * sessions  # when the batch of each session ends, as far as is known
        self.ran: dict[str, float] = {}  # when each graph last did

    def most_at_once(self, graph: str, lane: Lane, now: float) -> int:
        """Rows of one job that may wait: half of what may of its lane, so that one request never keeps all others out; few where it is not
        known what they cost, so that it is before the others have taken long."""
        most = max(_PART, self._limit(lane) // 2)
        return most if self.is_known(graph, now) else min(most, _TRIED)

    def admit(self, groups: Sequence[Group], deadline: float, lane: Lane, now: float, *, room: int, begun: bool) -> None:
        """Let a job in, or refuse it.

        Args:
            groups: of its rows that are yet to run.
            room: so many of them are to wait now; 0 where they take the place of others of the same job.
            begun: work was done for it already: it is refused where it would be too late, not where it might be.

        Raises:
            Overloaded, DeadlineExceeded: as `Engine.submit`.
        """
        if now >= deadline:
            raise DeadlineExceeded("the deadline passed before the request reached the queue")
        queued = self._backlog.rows[lane] if lane is Lane.BACKGROUND else len(self._backlog)
        limit = self._limit(lane)
        if room and queued and queued + room > limit:
            again = max(self._shared(self._backlog.wait(lane), now) * (queued + room - limit) / queued, _SOONEST)
            raise Overloaded(
                f"{queued} rows are queued and {room} more exceed the limit of {limit}; try again in {again:.2f} s",
                retry_after_seconds=again,
            )
        run, left = 0.0, deadline - now
        if self.is_known(groups[0].graph, now):
            run = self._backlog.predict(Counter((group, lane) for group in groups), lane) / min(len(self.busy_until), len(groups))
        if run > left:
            raise DeadlineExceeded(f"{len(groups)} rows take about {run:.3f} s, the deadline is in {left:.3f} s; allow more or send fewer")
        wait = self.wait(lane, deadline, now)
        if (1.0 if begun else _CAUTION) * wait + run > left:
            again = max(wait, _SOONEST)
            raise Overloaded(
                f"the queue needs about {wait:.3f} s, the deadline is in {left:.3f} s; try again in {again:.2f} s",
                retry_after_seconds=again,
            )

    def crowded(self, left: float, now: float) -> float:
        """See `Engine.crowded`."""
        wait = self.wait(Lane.FOREGROUND, now + left, now)
        return max(wait, _SOONEST) if _CAUTION * wait > left or len(self._backlog) >= self._max_queued else 0.0

    def wait(self, lane: Lane, deadline: float, now: float) -> float:
        """Seconds until what is due before a newcomer is done."""
        return self._shared(self._backlog.wait(lane, deadline), now)

    def is_known(self, graph: str, now: float) -> bool:
        """Whether what a graph costs was learned lately."""
        return now - self.ran.get(graph, 0.0) < _KNOWN

    def learn(self, graph: str, rows: int, length: int, began: float, seconds: float) -> None:
        """A batch of a graph, which may have been removed meanwhile, took so long."""
        if graph in self._costs:
            self._costs[graph].learn(rows, length, seconds)
            self.ran[graph] = began + seconds

    def forget(self, graph: str) -> None:
        """It was removed."""
        del self._costs[graph]
        self.ran.pop(graph, None)

    def _limit(self, lane: Lane) -> int:
        return self._max_queued // 2 if lane is Lane.BACKGROUND else self._max_queued

    def _shared(self, seconds: float, now: float) -> float:
        """How long so much work takes all sessions, behind what they are at."""
        return (seconds + sum(max(0.0, until - now) for until in self.busy_until)) / len(self.busy_until)

"""What waits for the device, and what of it runs next. Knows no threads and no clock: the engine guards it and tells it the time.

- Earliest deadline first, the foreground lane before the background lane.
- A batch holds rows of one graph and one padded length, within the budget of padded tokens; one row of a job whose rows run alone.
- It lasts a quarter of a second at most, as far as is known, and no longer than its most urgent row has left.
- A row that would be too late is not run: under overload its result would cost somebody else's. Too late is what leaves less time than
  a batch takes that is worth running: a quarter of what a batch may last, or of what the row's caller allowed. Where it is not known what
  a batch takes, only a row whose deadline has passed is too late.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from openbook_server.costs import BatchCost
from openbook_server.errors import DeadlineExceeded
from openbook_server.rows import Countable

Arrays = Mapping[str, NDArray[np.generic]]
K = TypeVar("K")


class Lane(IntEnum):
    """Who goes first: people waiting for an answer, then bulk work."""

    FOREGROUND = 0
    BACKGROUND = 1


_SHARE = {Lane.FOREGROUND: 1, Lane.BACKGROUND: 8}  # a lane's batches hold this fraction of the token budget
_LONGEST = 0.25  # seconds that a batch of several rows may last
_DUE_STEP = 0.05  # seconds; deadlines as near to each other as this count as one where it is asked what is due before another
_NEVER = 1e9  # seconds of a monotonic clock
_WORTH = 4  # a batch that lasts this part of what it may is worth running


class Group(NamedTuple):
    """What rows have in common that may share a batch; where they run alone, that may wait in one line."""

    graph: str
    length: int  # tokens, padded
    alone: bool = False  # each is a batch of its own


@dataclass(slots=True, eq=False)
class Job:
    """The rows of one request at one graph; done when all of them are."""

    graph: str
    rows: Sequence[Countable]
    deadline: float  # time.monotonic() seconds
    lane: Lane
    done: asyncio.Future[list[Arrays]]
    submitted: float
    results: list[Arrays] = field(default_factory=list)
    missing: int = 0
    waiting: dict[int, Group] = field(default_factory=dict)  # of each row, by number, that is neither run nor given up
    started: float = 0.0  # when its first row began to run; 0 = not yet
    failure: Exception | None = None

    @property
    def is_over(self) -> bool:
        """Nobody wants the rows that are left."""
        return self.done.cancelled() or self.failure is not None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to run together, and jobs that failed instead of giving any."""

    group: Group
    rows: list[tuple[int, Job]]  # (number in the job, job)
    dropped: list[Job]
    lane: Lane
    seconds: float  # that it will take, as far as is known


class Backlog:
    """Rows of jobs, by what they may share a batch with."""

    def __init__(self, costs: Mapping[str, BatchCost], *, max_batch_tokens: int) -> None:
        """`costs`: of every graph that jobs name; may grow."""
        self._costs, self._budget = costs, max_batch_tokens
        self._groups: dict[Group, list[tuple[Lane, float, int, int, Job]]] = {}
        self._order = itertools.count()
        self._waiting: Counter[tuple[Group, Lane]] = Counter()  # rows
        # Seconds by lane, as `wait` found them since the last change: under load it is asked more often than that.
        self._waits: dict[Lane, float] = {}
        self._dead: Counter[Group] = Counter()  # entries of each group whose rows were given up
        # Padded tokens of the foreground by when they are due, in steps of `_DUE_STEP`; those that are expected a step later.
        self._due: Counter[int] = Counter()
        self.rows = dict.fromkeys(Lane, 0)  # that wait

    def __len__(self) -> int:
        return sum(self.rows.values())

    def add(self, job: Job, groups: Sequence[Group]) -> None:
        """All rows of a job, with the group of each."""
        for number, group in enumerate(groups):
            self._enter(job, number, group)

    def put_back(self, group: Group, rows: Iterable[tuple[int, Job]]) -> None:
        """Rows of a batch that failed, whichever it was of: each is to run alone, if somebody wants it still."""
        for number, job in rows:
            if not job.is_over:
                self._enter(job, number, group._replace(alone=True))

    def _enter(self, job: Job, number: int, group: Group) -> None:
        heapq.heappush(self._groups.setdefault(group, []), (job.lane, job.deadline, next(self._order), number, job))
        job.waiting[number] = group
        self.rows[job.lane] += 1
        self._waiting[group, job.lane] += 1
        if job.lane is Lane.FOREGROUND:
            self._due[_step(job.deadline)] += group.length
        self._waits.clear()

    def expect(self, group: Group, rows: int, deadline: float) -> None:
        """Rows of the foreground are yet to come, and whoever is due after them waits as if they were here; below 0 take them back."""
        _take_off(self._waiting, (group, Lane.FOREGROUND), -rows)
        _take_off(self._due, _step(deadline) + 1, -rows * group.length)  # not for the job that they follow, which is due when they are
        self._waits.clear()

    def jobs(self, graph: str) -> list[Job]:
        """Those that wait for rows of a graph."""
        waiting = [job for group, heap in self._groups.items() if group.graph == graph for *_, number, job in heap if number in job.waiting]
        return list(dict.fromkeys(waiting))

    def give_up(self, job: Job) -> None:
        """Nobody wants the rows of a job that still wait: from now on they take no room and keep nobody waiting."""
        groups = set(job.waiting.values())
        for group in job.waiting.values():
            self._leave(job, group)
            self._dead[group] += 1
        job.waiting.clear()
        for group in groups:
            heap = self._groups[group]
            if 2 * self._dead[group] > len(heap):  # so that each costs little, and there are never more of them than of those that live
                heap[:] = [entry for entry in heap if entry[3] in entry[4].waiting]
                heapq.heapify(heap)
                del self._dead[group]
            self._settle(group)

    def _settle(self, group: Group) -> None:
        """The head of a group is a row that somebody wants; a group without one is none."""
        heap = self._groups[group]
        while heap and heap[0][3] not in heap[0][4].waiting:
            heapq.heappop(heap)
            self._dead[group] -= 1
        if not heap:
            del self._groups[group]
            del self._dead[group]

    def _leave(self, job: Job, group: Group) -> None:
        self.rows[job.lane] -= 1
        _take_off(self._waiting, (group, job.lane), 1)
        if job.lane is Lane.FOREGROUND:
            _take_off(self._due, _step(job.deadline), group.length)
        self._waits.clear()

    def wait(self, lane: Lane, deadline: float = math.inf) -> float:
        """Seconds until everything is done that goes before a new job of a lane; in the background, whatever its deadline."""
        if lane not in self._waits:
            self._waits[lane] = self.predict(self._waiting, lane)
        if lane is Lane.BACKGROUND or not self._due:
            return self._waits[lane]
        last = _step(deadline)
        return self._waits[lane] * sum([tokens for step, tokens in self._due.items() if step <= last]) / self._due.total()

    def predict(self, rows: Counter[tuple[Group, Lane]], lane: Lane) -> float:
        """Seconds until those of the rows are done that run before anything of a lane below."""
        seconds = 0.0
        for (group, row_lane), count in rows.items():
            if row_lane <= lane:
                cost = self._costs[group.graph]
                size = max(1, min(self._most(row_lane, group), cost.rows_within(_LONGEST, group.length)))
                seconds += cost.predict(-(-count // size), count, group.length)
        return seconds

    def take(self, now: float, *, free: int = 1, unknown: Collection[str] = ()) -> Batch:
        """The group whose head is most urgent gives rows; what is too late is dropped, and its whole job with it. There must be a row.

        Args:
            free: sessions that could run a batch now; what waits in the lane is shared out among them.
            unknown: graphs whose costs may no longer be what was learned.
        """
        group = min(self._groups, key=lambda name: self._groups[name][0][:3])
        heap, cost, length = self._groups[group], self._costs[group.graph], group.length
        batch: list[tuple[int, Job]] = []
        dropped: dict[int, Job] = {}
        first = heap[0][0]
        share = limit = -(-self.rows[first] // free) if free > 1 else sys.maxsize
        while heap and len(batch) < min(limit, self._most(heap[0][0], group)):
            lane, deadline, _, number, job = heapq.heappop(heap)
            if job.waiting.pop(number, None) is None:
                self._dead[group] -= 1
                continue
            self._leave(job, group)
            if job.is_over:
                continue
            if not batch:
                worth = cost.rows_within(min(_LONGEST, deadline - job.submitted) / _WORTH, length)
                rows = max(1, min(1 + len(heap), self._most(lane, group), worth))
                spared = 0.0 if group.graph in unknown else cost.predict(1, rows, length)
            if now + spared >= deadline:
                job.failure = _too_late(now - job.submitted, deadline - now, spared)
                dropped[id(job)] = job
                continue
            if not batch:
                limit = min(share, max(1, cost.rows_within(min(_LONGEST, deadline - now), length)))
            job.started = job.started or now
            batch.append((number, job))
        self._settle(group)
        for job in dropped.values():
            self.give_up(job)
        return Batch(group, batch, list(dropped.values()), first, cost.predict(bool(batch), len(batch), length))

    def _most(self, lane: Lane, group: Group) -> int:
        """Rows of a group that a lane's batch may hold."""
        return 1 if group.alone else max(1, self._budget // _SHARE[lane] // group.length)


class Expected:
    """What one request will yet bring: rows of one group in the foreground, none at first."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._rows: tuple[Group, int, float] | None = None  # as `Backlog.expect` was told

    @property
    def expects(self) -> bool:
        """Whether `set` was called since `clear`."""
        return self._rows is not None

    def set(self, group: Group, rows: int, deadline: float) -> None:
        """So many, in place of what was expected before."""
        self.clear()
        self._rows = (group, rows, deadline)
        self._backlog.expect(*self._rows)

    def clear(self) -> None:
        """Nothing any more."""
        if self._rows is not None:
            group, rows, deadline = self._rows
            self._backlog.expect(group, -rows, deadline)
            self._rows = None


def tell(jobs: Iterable[Job]) -> None:
    """Wake the waiting callers, once for all that share an event loop: a wake-up costs more than a result."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        by_loop.setdefault(job.done.get_loop(), []).append(job)
    for loop, group in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, group)


def _too_late(waited: float, left: float, spared: float) -> DeadlineExceeded:
    if left <= 0:
        return DeadlineExceeded(f"after {waited:.3f} s in the queue the deadline has passed, {-left:.3f} s ago; allow more time")
    return DeadlineExceeded(f"after {waited:.3f} s in the queue {left:.3f} s are left, and a batch takes {spared:.3f} s; allow more time")


def _resolve(jobs: list[Job]) -> None:
    for job in jobs:
        if job.done.done():
            continue  # the caller hung up
        if job.failure is not None:
            job.done.set_exception(job.failure)
        else:
            job.done.set_result(job.results)


def _take_off(counter: Counter[K], key: K, count: int) -> None:
    counter[key] -= count
    if not counter[key]:
        del counter[key]


def _step(deadline: float) -> int:
    return math.floor(min(deadline, _NEVER) / _DUE_STEP)

"""The engine: it owns the device and feeds it batches from a deadline-ordered queue, a thread for each session that runs one.

Promises
- No timer: while batches run the queue grows; a session that is free takes what fits the padded-token budget, and no more than its
  share where others are free too. A text that arrives alone waits for nobody.
- Rows share a batch only with rows of the same graph and the same padded length, so that a row's result does not depend on its
  neighbours where the graph allows it (`invariance`); where it does not, whoever wants the same bytes has rows run `alone`.
- Earliest deadline first, the foreground lane before the background lane (`backlog`). A row whose caller hung up or that would be too late
  is never run. A job whose predicted finish (see `costs`) misses its deadline is refused at once (`admission`).
- One job fills at most half of the queue: of a larger one the others follow when these are done, if the deadline can still be met.
- Background rows run in batches of an eighth of the budget and fill at most half of the queue, so that whoever waits for an
  answer never waits long for them, and keep out of the way in between (`background`).
- Every awaiting caller hears of every failure; a row that breaks its batch fails alone, for all of it wait again, each to run alone.

It knows nothing of texts, questions or gRPC: rows in that say how many tokens they are, rows of outputs out. Searches have one of their own
(`searching`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from openbook_server.admission import Admission
from openbook_server.background import Background
from openbook_server.backlog import Arrays, Backlog, Expected, Group, Job, Lane, tell
from openbook_server.buckets import Buckets
from openbook_server.costs import BatchCost
from openbook_server.errors import InferenceFailed, NotServing
from openbook_server.priority import give_way
from openbook_server.rows import Countable

log = logging.getLogger(__name__)


class Runnable(Protocol):
    """An onnxruntime graph, as far as the engine cares; its rows are of one kind, which only it looks into."""

    @property
    def buckets(self) -> Buckets: ...

    def run_rows(self, rows: Sequence[Any], length: int) -> Arrays:
        """One batch of rows of the same padded length; outputs by name, the first axis being the rows."""


Expect = Callable[[str, int, int, float], None]  # of a graph, with the tokens of a row, how many rows, and when they are due


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished job gives its caller: per row the graph's outputs, and how long the job waited."""

    rows: list[Arrays]
    queued_seconds: float


class Engine:
    """Runs graphs on one device; `submit` from the event loop, everything else happens on the engine's own threads."""

    def __init__(
        self,
        graphs: Mapping[str, Runnable],
        *,
        max_batch_tokens: int,
        max_queued: int,
        sessions: int = 1,
        gives_way: bool = False,
        name: str = "engine",
        observe: Callable[[str, int, int, float], None] = lambda graph, rows, tokens, seconds: None,
    ) -> None:
        """Args:
        sessions: batches that the device runs at once.
        gives_way: whether other threads go first, where batches are computed by the processor that they need.
        name: of its threads.
        observe: told of every batch, for metrics: graph, rows, padded tokens, seconds; from several threads.
        """
        self._graphs: dict[str, Runnable] = {}
        self._costs: dict[str, BatchCost] = {}
        self._backlog = Backlog(self._costs, max_batch_tokens=max_batch_tokens)
        self._admission = Admission(self._backlog, self._costs, max_queued=max_queued, sessions=sessions)
        self._gives_way, self._observe = gives_way, observe
        self._idle = 0  # sessions that wait for work
        self._background = Background(sessions)
        self._wake = threading.Condition()
        self._closed = False
        self.add(graphs)
        self._threads = [
            threading.Thread(target=self._loop, args=(number,), name=f"{name}-{number}", daemon=True) for number in range(sessions)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, graphs: Mapping[str, Runnable]) -> None:
        """Run these as well, from now on."""
        with self._wake:
            self._graphs |= graphs
            self._costs.update({name: BatchCost() for name in graphs})

    def remove(self, names: Iterable[str]) -> None:
        """Let go of graphs whose callers are gone, and of what is known of them; rows that are still queued fail unheard."""
        with self._wake:
            for name in names:
                self._fail(self._backlog.jobs(name), InferenceFailed(f"{name} was removed"))
                del self._graphs[name]
                self._admission.forget(name)

    @property
    def queued(self) -> int:
        """Rows waiting."""
        return len(self._backlog)

    async def submit(
        self,
        graph: str,
        rows: Sequence[Countable],
        *,
        deadline: float,
        lane: Lane = Lane.FOREGROUND,
        alone: bool = False,
        begun: bool = False,
    ) -> Outcome:
        """Run `rows` through a graph and wait for them; cancelling the wait withdraws them.

        Args:
            deadline: time.monotonic() seconds after which nobody wants the result.
            alone: each row is a batch of its own.
            begun: work was done for them already: they are refused where they would be too late, not where they might be.

        Raises:
            Overloaded: the queue is full, or the predicted finish misses the deadline.
            DeadlineExceeded: the deadline passed before the rows ran, or even an idle device would miss it.
            InferenceFailed: onnxruntime failed on one of the rows.
            NotServing: the engine is closed.
        """
        found, queued, later = list[Arrays](), 0.0, Expected(self._backlog)
        groups = self._grouped(graph, (row.tokens for row in rows), alone)
        try:
            while len(found) < len(rows):
                job = self._enqueue(graph, rows, groups, len(found), later, deadline, lane, begun)
                try:
                    found += await job.done
                except asyncio.CancelledError:
                    with self._wake:
                        self._backlog.give_up(job)
                    raise
                queued += job.started - job.submitted
        finally:
            if later.expects:  # hardly ever
                with self._wake:
                    later.clear()
        return Outcome(found, queued)

    def _enqueue(
        self,
        graph: str,
        rows: Sequence[Countable],
        groups: Sequence[Group],
        done: int,
        later: Expected,
        deadline: float,
        lane: Lane,
        begun: bool,
    ) -> Job:
        """Those that are next when the first ones are done as a job in the queue; the others come `later`, and whoever is due after them
        waits as if they were there."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        with self._wake:
            self._open()
            part = rows[done : done + self._admission.most_at_once(graph, lane, now)]
            end = done + len(part)
            job = Job(graph, part, deadline, lane, loop.create_future(), now, [{}] * len(part), len(part))
            self._admission.admit(groups[done:], deadline, lane, now, room=0 if done else len(part), begun=begun or done > 0)
            self._backlog.add(job, groups[done:end])
            if lane is Lane.FOREGROUND:
                self._background.asked = now
                if len(rows) > len(part):
                    later.set(max(groups), len(rows) - end, deadline)
            self._wake.notify()
        return job

    @contextmanager
    def attended(self) -> Iterator[Expect]:
        """Within, somebody waits who needs the device more than once: background work keeps out of the way in between.

        Gives a function that says how many rows are yet to come, in place of what it said before: they are time that whoever is due after
        them does not have. Else all would be let in for a first step, and most refused at the next one.
        """
        expected = Expected(self._backlog)

        def expect(graph: str, tokens: int, rows: int, deadline: float) -> None:
            with self._wake:
                [group] = self._grouped(graph, [tokens])
                expected.set(group, rows, deadline)

        with self._wake:
            self._background.attended += 1
        try:
            yield expect
        finally:
            with self._wake:
                expected.clear()
                self._background.attended -= 1
                self._wake.notify()

    def check(self, graph: str, lengths: Sequence[int], *, deadline: float, begun: bool = False) -> None:
        """Refuse rows that are yet to come, before work is spent on them, where `submit` would refuse them now.

        Args:
            lengths: tokens of each row, at least one; too small a guess refuses too little, never too much.

        Raises:
            Overloaded, DeadlineExceeded, NotServing: as `submit`.
        """
        with self._wake:
            self._open()
            groups, now = self._grouped(graph, lengths), time.monotonic()
            room = min(len(groups), self._admission.most_at_once(graph, Lane.FOREGROUND, now))
            self._admission.admit(groups, deadline, Lane.FOREGROUND, now, room=room, begun=begun)

    def _grouped(self, graph: str, lengths: Iterable[int], alone: bool = False) -> list[Group]:
        return [Group(graph, self._graphs[graph].buckets.padded_length(length), alone) for length in lengths]

    def _open(self) -> None:
        if self._closed:
            raise NotServing("the server is shutting down", retry_after_seconds=1.0)

    def crowded(self, left: float) -> float:
        """The seconds of queue for which a question due in `left` seconds is refused, whatever its rows are; 0.0 where it may be taken."""
        with self._wake:
            return self._admission.crowded(left, time.monotonic())

    def close(self) -> None:
        """Finish what is queued, then end the threads. Later submissions are refused as NotServing."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _loop(self, number: int) -> None:
        if self._gives_way:
            give_way()
        while True:
            with self._wake:
                while not self._closed and (not self.queued or self._pause()):
                    self._idle += 1
                    self._wake.wait(self._pause() if self.queued else None)
                    self._idle -= 1
                if not self.queued:
                    return
                now = time.monotonic()
                unknown = [name for name in self._graphs if not self._admission.is_known(name, now)]
                batch = self._backlog.take(now, free=1 + self._idle, unknown=unknown)
                self._admission.busy_until[number] = now + batch.seconds
                if batch.lane is Lane.BACKGROUND:
                    self._background.begin(now + batch.seconds)
                if self.queued:
                    self._wake.notify()  # whoever is free as well; a wake-up for each row would be too many
            try:
                tell(batch.dropped)
                if batch.rows:
                    self._run(batch.group, batch.rows)
            except Exception as error:  # a defect; the session must go on, and whoever waits must hear of it
                log.exception("graph %s: its batch was lost", batch.group.graph)
                self._fail({id(job): job for _, job in batch.rows}.values(), InferenceFailed(f"{batch.group.graph} failed: {error}"))
            with self._wake:
                self._admission.busy_until[number] = 0.0
                if batch.lane is Lane.BACKGROUND:
                    self._background.end(time.monotonic())

    def _pause(self) -> float:
        """Seconds that background work still keeps out of the way."""
        return 0.0 if self._backlog.rows[Lane.FOREGROUND] else self._background.pause(time.monotonic())

    def _run(self, group: Group, batch: Sequence[tuple[int, Job]]) -> None:
        began, (graph, length, _) = time.monotonic(), group
        try:
            outputs = self._graphs[graph].run_rows([job.rows[number] for number, job in batch], length)
            rows = [{name: values[at] for name, values in outputs.items()} for at in range(len(batch))]
        except Exception as error:  # onnxruntime raises plain Exceptions; every caller must hear of it
            with self._wake:
                if len(batch) > 1 and graph in self._graphs:  # it may have been removed meanwhile
                    self._backlog.put_back(group, batch)
                    return
            log.error("graph %s failed on a row of %d tokens: %s", graph, length, error)
            self._fail({id(job): job for _, job in batch}.values(), InferenceFailed(f"{graph} failed: {error}"))
            return
        seconds = time.monotonic() - began
        finished = []
        with self._wake:
            self._admission.learn(graph, len(batch), length, began, seconds)
            for (number, job), result in zip(batch, rows, strict=True):
                job.results[number] = result
                job.missing -= 1
                if not job.missing:
                    finished.append(job)
        tell(finished)
        self._observe(graph, len(batch), len(batch) * length, seconds)

    def _fail(self, jobs: Collection[Job], failure: Exception) -> None:
        with self._wake:
            lost = [job for job in jobs if job.missing]  # whoever has all results is told of these, though what follows a batch fails
            for job in lost:
                job.failure = job.failure or failure
                self._backlog.give_up(job)
        tell(lost)

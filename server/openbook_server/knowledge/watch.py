"""Live quality: a sample of the searches that users really make is made again exactly, and `ef` follows what that shows.

Runs in a thread of its own and takes a fiftieth of one core at most: after each look at all rows it rests fifty times as
long. Nothing of a question is kept but its vector, until it was looked at.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook_server.priority import give_way

log = logging.getLogger(__name__)

NEAREST = 10  # recall is of so many neighbours
_AT_ONCE = 32  # searches made again in one look at all rows
_WINDOW = 1_000  # latest samples that the estimate is of
_REST = 50  # times as long as a look took
_ENOUGH = 50  # samples since ef was last moved, before it is moved again
_Z = 1.96  # 95 %
LEAST_EF, MOST_EF = 32, 1_024

Vectors = NDArray[np.float32]


class Watched(Protocol):
    """An index whose searches are watched."""

    ef: int

    def rows(self) -> Iterable[tuple[Sequence[int], Vectors]]:
        """All live rows, some at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of shares with a 95 % interval (Wilson 1927, a share counted as one trial: on the safe side)."""

    mean: float
    low: float
    high: float
    samples: int


def interval(shares: Sequence[float]) -> Estimate:
    """The estimate from some shares, at least one; recall is the mean of each sampled search's share of true neighbours found."""
    n, mean = len(shares), sum(shares) / len(shares)
    centre, spread = mean + _Z**2 / (2 * n), _Z * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return Estimate(mean, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), n)


@dataclass(slots=True)
class _Search:
    vector: Vectors
    found: frozenset[int]
    horizon: int  # rows stored since have higher labels
    near: list[tuple[float, int]] = field(default_factory=list)  # the true neighbours among the rows looked at so far


class RecallWatch:
    """Samples searches, makes them again exactly, moves the index's `ef` to hold a target."""

    def __init__(self, index: Watched, *, share: float, target: float, rest: float = _REST) -> None:
        """`share` of the searches are sampled (0 to 1); `target` is the recall@10 to hold (0 to 1)."""
        self._index, self._share, self._target, self._rest = index, share, target, rest
        self._random = random.Random(0)
        self._waiting: deque[_Search] = deque(maxlen=_AT_ONCE)
        self._shares: deque[float] = deque(maxlen=_WINDOW)
        self._since_move = 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recall", daemon=True)
        self._thread.start()

    def offer(self, vectors: Vectors, found: Sequence[dict[int, float]], horizon: int) -> None:
        """Tell of some searches: (searches, dim) vectors, the NEAREST or more that each found, best first, and the last label stored
        before."""
        for vector, row in zip(vectors, found, strict=True):
            if self._random.random() < self._share:
                self._waiting.append(_Search(np.array(vector), frozenset(list(row)[:NEAREST]), horizon))
                self._wake.set()

    def recall(self) -> Estimate | None:
        """The present estimate; None before the first sample."""
        shares = list(self._shares)
        return interval(shares) if shares else None

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        give_way()
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closed.is_set():
                return
            began = time.monotonic()
            try:
                self.look()
            except Exception:  # the watch must never take the server down; the next look starts afresh
                log.exception("a look at live recall failed")
            if self._closed.wait(self._rest * (time.monotonic() - began)):
                return
            if self._waiting:
                self._wake.set()

    def look(self) -> None:
        """Make every waiting search again over all rows, and draw the conclusions."""
        searches = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not searches:
            return
        queries = np.stack([search.vector for search in searches])
        alive: set[int] = set()
        for labels, vectors in self._index.rows():
            if self._closed.is_set():
                return
            alive.update(labels)
            numbers = np.asarray(labels)
            for search, scores in zip(searches, queries @ vectors.T, strict=True):
                scores[numbers > search.horizon] = -np.inf
                best = np.argpartition(-scores, min(NEAREST, len(scores)) - 1)[:NEAREST]
                here = [(float(scores[at]), labels[at]) for at in best if scores[at] > -np.inf]
                search.near = sorted([*search.near, *here], reverse=True)[:NEAREST]
        for search in searches:
            if search.near and search.found <= alive:  # of a search whose hits are gone by now nothing can be said
                true = {label for _, label in search.near}
                self._shares.append(len(true & search.found) / len(true))
                self._since_move += 1
        self._move()

    def _move(self) -> None:
        recall = self.recall()
        if recall is None or self._since_move < _ENOUGH:
            return
        ef = self._index.ef
        if recall.high < self._target:
            ef = min(MOST_EF, math.ceil(1.5 * ef))
        elif recall.low > self._target:
            ef = max(LEAST_EF, int(ef / 1.25))
        if ef != self._index.ef:
            log.info(
                "recall@%d is %.4f (%.4f to %.4f): ef goes from %d to %d", NEAREST, recall.mean, recall.low, recall.high, self._index.ef, ef
            )
            self._index.ef = ef
            self._shares.clear()  # what follows is of another ef
            self._since_move = 0

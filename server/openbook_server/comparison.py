"""Shadow comparison: a sample of the questions that people ask is answered by another pair as well, and the two are compared.

Only ever beside the answer: what was answered is on its way before the other pair is asked, in the background lane, one
question at a time. Questions are held in memory until they were compared, or dropped when more come than can be, and then
forgotten: only the figures stay.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from openbook_server.bundle import Bundle
from openbook_server.errors import OpenBookError
from openbook_server.knowledge import SearchOptions
from openbook_server.knowledge.watch import Estimate, interval
from openbook_server.pipeline import Pipeline, QuestionAnswered
from openbook_server.ranking import normalise
from openbook_server.tokenization import TextEncoder
from openbook_server.work import Work

log = logging.getLogger(__name__)

_WAITING = 32  # questions; the oldest are dropped first
_WINDOW = 1_000  # latest comparisons that the figures are of
_PATIENCE = 60.0  # seconds that one question waits for the device


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it was answered."""

    question: str
    options: SearchOptions
    passages: tuple[str, ...]  # ids of the hits
    answer: str | None  # the best one's text; None = no answer was found
    read: bool  # whether an answer was asked for, or only passages
    read_all: bool = False  # whether it was to rest on every passage


class Comparison:
    """Of the live pair and another one."""

    def __init__(self, bundle: Bundle, encoder: TextEncoder, pipeline: Pipeline, *, share: float) -> None:
        """The other pair's parts. `share` of the questions offered are compared, 0 to 1."""
        self._bundle, self._encoder, self._pipeline, self._share = bundle, encoder, pipeline, share
        self._random = random.Random()
        self._waiting: deque[Asked] = deque(maxlen=_WAITING)
        self._wake = asyncio.Event()
        self._overlaps: deque[float] = deque(maxlen=_WINDOW)
        self._agreements: deque[float] = deque(maxlen=_WINDOW)

    def offer(self, asked: Asked) -> None:
        """Tell of a question that was answered."""
        if self._random.random() < self._share:
            self._waiting.append(asked)
            self._wake.set()

    @property
    def overlap(self) -> Estimate | None:
        """Mean share of the hits that both pairs found, see `overlap`; None before the first."""
        return interval(list(self._overlaps)) if self._overlaps else None

    @property
    def agreement(self) -> Estimate | None:
        """Share of the questions to which both pairs gave the same best answer, or none; None before the first."""
        return interval(list(self._agreements)) if self._agreements else None

    async def run(self) -> None:
        """Compare what is offered, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                try:
                    await self._compare(self._waiting.popleft())
                except OpenBookError:  # the device has no time for it; the next question is as good
                    continue
                except Exception:  # a defect of ours, which must not end what is being built
                    log.exception("a question was not compared")

    async def _compare(self, asked: Asked) -> None:
        bundle, pipeline = self._bundle, self._pipeline
        rows = self._encoder.texts([asked.question])
        if len(rows[0].ids) > bundle.embedder.max_tokens:  # it would be refused; there is nothing to compare
            return
        work = Work(time.monotonic() + _PATIENCE)
        if asked.read and bundle.reader is not None:
            [outcome] = await pipeline.answer([asked.question], rows, asked.options, 1, work, settle=not asked.read_all)
            hits = outcome.hits
            self._agreements.append(float(_same(asked.answer, best_answer(outcome))))
        else:
            [hits] = await pipeline.search([asked.question], rows, asked.options, work)
        self._overlaps.append(overlap(asked.passages, [hit.passage.id for hit in hits]))


def overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """overlap@k of two rankings, of passages without regard to their order: those in both, of the longer one's length; of two empty
    ones 1."""
    longest = max(len(one), len(other))
    return len({*one} & {*other}) / longest if longest else 1.0


def best_answer(outcome: QuestionAnswered) -> str | None:
    """The text of the most probable answer; None where there is none, or "no answer" is more probable."""
    if not outcome.answers or outcome.answers[0].probability < outcome.no_answer_probability:
        return None
    return outcome.answers[0].text


def _same(one: str | None, other: str | None) -> bool:
    return one is None and other is None if one is None or other is None else normalise(one) == normalise(other)

"""The learned cost law against laws that are known, and against the seconds-a-token average that it replaced."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from openbook_server.buckets import FINE
from openbook_server.costs import BatchCost
from openbook_server.engine import Engine
from openbook_server.errors import DeadlineExceeded, Overloaded
from openbook_server.rows import Row, collate

BUDGET = 2_048
LENGTHS = (4, 8, 12, 20, 32, 64, 128, 200, 384)
Law = Callable[[int, int], float]


def processor(rows: int, length: int) -> float:
    """About MiniLM on two cores."""
    return 1e-3 + 9e-5 * rows * length + 1.5e-7 * rows * length**2


def accelerator(rows: int, length: int) -> float:
    """Launching costs more than running, until a batch is large."""
    return 2e-3 + 1e-6 * rows * length + 2e-9 * rows * length**2


def by_token_alone(rows: int, length: int) -> float:
    return 9e-5 * rows * length


def batches(count: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[tuple[int, int]]:
    """(rows, length) as a server sees them: many of one row, some of a few, some full."""
    rng = random.Random(seed)
    drawn = [(rng.choice([1, 1, 1, 4, BUDGET // length]), length) for length in rng.choices(lengths, k=count)]
    return [(min(rows, BUDGET // length), length) for rows, length in drawn]


def errors(law: Law, predict: Callable[[int, int], float]) -> list[float]:
    return [abs(predict(rows, length) / law(rows, length) - 1) for length in LENGTHS for rows in (1, 4, BUDGET // length)]


@pytest.mark.parametrize("law", [processor, accelerator, by_token_alone])
def test_a_known_law_is_found_within_fifty_batches_of_a_noisy_machine(law: Law) -> None:
    rng, cost, average = random.Random(1), BatchCost(), 0.0
    for rows, length in batches(50):
        seconds = law(rows, length) * rng.uniform(0.9, 1.1)
        cost.learn(rows, length, seconds)
        average = 0.9 * average + 0.1 * seconds / (rows * length) if average else seconds / (rows * length)
    learned = errors(law, lambda rows, length: cost.predict(1, rows, length))
    replaced = errors(law, lambda rows, length: average * rows * length)
    assert max(learned) < 0.15
    if law is not by_token_alone:
        assert statistics.median(learned) < statistics.median(replaced) / 5


def test_what_waits_is_predicted_right_on_a_disturbed_machine() -> None:
    rng, cost, predicted, actual = random.Random(3), BatchCost(), 0.0, 0.0
    for number, (rows, length) in enumerate(batches(400)):
        seconds = processor(rows, length) * rng.uniform(0.5, 3.0)
        if number >= 100:
            predicted, actual = predicted + cost.predict(1, rows, length), actual + seconds
        cost.learn(rows, length, seconds)
    assert predicted == pytest.approx(actual, rel=0.1)


def test_a_stall_changes_little() -> None:
    cost = BatchCost()
    for rows, length in batches(100):
        cost.learn(rows, length, processor(rows, length))
    cost.learn(1, 32, 1_000 * processor(1, 32))
    assert max(errors(processor, lambda rows, length: cost.predict(1, rows, length))) < 0.2


def test_a_machine_that_became_slower_is_followed() -> None:
    cost = BatchCost()
    for rows, length in batches(200):
        cost.learn(rows, length, processor(rows, length))
    for rows, length in batches(300, seed=1):
        cost.learn(rows, length, 2 * processor(rows, length))
    assert max(errors(processor, lambda rows, length: cost.predict(1, rows, length) / 2)) < 0.05


def test_nothing_is_predicted_before_anything_ran_and_never_a_negative_time() -> None:
    cost = BatchCost()
    assert cost.predict(1, 8, 128) == 0.0
    rng = random.Random(2)
    for rows, length in batches(200, lengths=(10, 11, 12)):
        cost.learn(rows, length, rng.uniform(0.001, 0.1))  # no law at all
        assert min(cost.predict(1, rows, length) for rows in (1, 500) for length in LENGTHS) >= 0.0


class Clock:
    """Time that passes only while a graph runs."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


class TimedGraph:
    buckets = FINE

    def __init__(self, clock: Clock, law: Law) -> None:
        self._clock, self._law = clock, law

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, NDArray[np.int64]]:
        inputs = collate(rows, length)
        rows, length = inputs["input_ids"].shape
        self._clock.now += self._law(rows, length)
        return {"total": inputs["input_ids"].sum(axis=1)}


@pytest.mark.parametrize("law", [processor, accelerator])
async def test_a_hopeless_deadline_is_refused_at_once_and_a_feasible_one_met(monkeypatch: pytest.MonkeyPatch, law: Law) -> None:
    clock = Clock()
    monkeypatch.setattr("openbook_server.engine.time", clock)
    engine = Engine({"embedder": TimedGraph(clock, law)}, max_batch_tokens=BUDGET, max_queued=10_000)
    for rows, length in batches(60):
        await engine.submit("embedder", [Row([1] * length)] * rows, deadline=clock.now + 60)
    for rows, length in ((1, 8), (64, 32), (20, 384), (1, 384)):
        whole, rest = divmod(rows, BUDGET // length)
        takes = whole * law(BUDGET // length, length) + (law(rest, length) if rest else 0.0)
        with pytest.raises(DeadlineExceeded, match=f"{rows} rows take about"):
            await engine.submit("embedder", [Row([1] * length)] * rows, deadline=clock.now + 0.9 * takes)
        began = clock.now
        await engine.submit("embedder", [Row([1] * length)] * rows, deadline=clock.now + 1.1 * takes)
        assert clock.now - began == pytest.approx(takes, rel=0.01)  # a batch lasts a quarter of a second at most
    await asyncio.to_thread(engine.close)


async def test_what_waits_is_counted_in_batches_not_in_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("openbook_server.engine.time", clock)
    engine = Engine({"embedder": TimedGraph(clock, accelerator)}, max_batch_tokens=BUDGET, max_queued=10_000)
    for rows, length in batches(60):
        await engine.submit("embedder", [Row([1] * length)] * rows, deadline=clock.now + 60)
    waiting = [Row([1] * length) for length in range(4, 24)]  # twenty batches of a row: 40 ms to launch, hardly a token
    queued = asyncio.create_task(engine.submit("embedder", waiting, deadline=clock.now + 0.05))
    with engine._wake:  # the engine cannot take anything meanwhile
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="the queue needs about 0.04"):
            await engine.submit("embedder", [Row([1] * 8)], deadline=clock.now + 0.06)
    await queued
    await asyncio.to_thread(engine.close)

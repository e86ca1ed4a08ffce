"""The engine's promises, with a graph whose runs are opened and closed by hand: no sleeps, no timing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from openbook_server.backlog import Lane
from openbook_server.buckets import FINE
from openbook_server.costs import BatchCost
from openbook_server.engine import Engine, Outcome
from openbook_server.errors import DeadlineExceeded, InferenceFailed, NotServing, Overloaded
from openbook_server.rows import Row, collate

POISON = 666


class GatedGraph:
    """Echoes the sum of each row's ids; each run waits until the test lets it go."""

    buckets = FINE

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, NDArray[np.int64]]:
        inputs = collate(rows, length)
        self.batches.append(inputs["input_ids"][:, 0].tolist())
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        if (inputs["input_ids"] == POISON).any():
            raise RuntimeError("poisoned row")
        return {"total": inputs["input_ids"].sum(axis=1)}

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)

    def let(self, runs: int) -> None:
        self.gate.release(runs)


@pytest.fixture
def graph() -> GatedGraph:
    return GatedGraph()


@pytest.fixture
async def engine(graph: GatedGraph) -> AsyncIterator[Engine]:
    engine = Engine({"embedder": graph}, max_batch_tokens=64, max_queued=20)
    yield engine
    graph.let(1000)
    await asyncio.to_thread(engine.close)


def row(first: int, length: int = 4) -> Row:
    return Row([first] + [1] * (length - 1))


def soon() -> float:
    return time.monotonic() + 60


async def start(engine: Engine, *rows: Row, deadline: float | None = None, lane: Lane = Lane.FOREGROUND) -> asyncio.Task[Outcome]:
    """Submit and let the submission reach the queue."""
    task = asyncio.create_task(engine.submit("embedder", rows, deadline=deadline or soon(), lane=lane))
    await asyncio.sleep(0)
    return task


async def test_a_row_that_arrives_alone_is_run_at_once(engine: Engine, graph: GatedGraph) -> None:
    task = await start(engine, row(5))
    await graph.wait_entered()
    graph.let(1)
    assert (await task).rows == [{"total": 8}]


async def test_requests_that_arrive_while_the_device_is_busy_share_the_next_batch(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    others = [await start(engine, row(number)) for number in (2, 3, 4)]
    graph.let(2)
    await asyncio.gather(first, *others)
    assert graph.batches == [[1], [2, 3, 4]]


async def test_a_batch_holds_only_rows_of_one_padded_length_and_at_most_the_token_budget(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    mixed = await start(engine, *(row(number, length=16 if number % 2 else 32) for number in range(2, 10)))
    graph.let(100)
    await asyncio.gather(first, mixed)
    assert all(len(batch) * (16 if batch[0] % 2 else 32) <= 64 for batch in graph.batches[1:])
    assert all(len({number % 2 for number in batch}) == 1 for batch in graph.batches)
    assert sorted(number for batch in graph.batches[1:] for number in batch) == list(range(2, 10))


async def test_rows_that_run_alone_never_share_a_batch_and_others_still_do(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    before = await start(engine, row(2), row(3))
    alone = asyncio.create_task(engine.submit("embedder", [row(4), row(5), row(6, 8)], deadline=soon(), alone=True))
    await asyncio.sleep(0)
    after = await start(engine, row(7), row(8))
    graph.let(100)
    await asyncio.gather(first, before, after)
    assert [int(result["total"]) for result in (await alone).rows] == [7, 8, 13]
    assert sorted(graph.batches) == [[1], [2, 3, 7, 8], [4], [5], [6]]


async def test_results_come_back_in_the_order_of_the_rows(engine: Engine, graph: GatedGraph) -> None:
    graph.let(100)
    lengths = [3, 40, 7, 16, 25, 4]
    outcome = await engine.submit("embedder", [row(10 * at, length) for at, length in enumerate(lengths)], deadline=soon())
    assert [int(result["total"]) for result in outcome.rows] == [10 * at + length - 1 for at, length in enumerate(lengths)]


async def test_the_earliest_deadline_goes_first_and_the_background_lane_last(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    now = time.monotonic()
    tasks = [
        await start(engine, *[row(2, 60)], deadline=now + 20, lane=Lane.BACKGROUND),
        await start(engine, *[row(3, 60)], deadline=now + 50),
        await start(engine, *[row(4, 60)], deadline=now + 40),
    ]
    graph.let(4)
    await asyncio.gather(first, *tasks)
    assert graph.batches == [[1], [4], [3], [2]]


async def test_a_caller_that_hangs_up_is_not_inferred(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    gone = await start(engine, row(2))
    kept = await start(engine, row(3))
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    graph.let(2)
    await asyncio.gather(first, kept)
    assert graph.batches == [[1], [3]]


async def test_a_row_whose_deadline_passed_in_the_queue_is_told_and_never_run(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    deadline = time.monotonic() + 0.05
    late = await start(engine, row(2), deadline=deadline)
    while time.monotonic() <= deadline:
        await asyncio.sleep(0.01)
    graph.let(2)
    with pytest.raises(DeadlineExceeded, match="in the queue"):
        await late
    await first
    assert graph.batches == [[1]]


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    waiting = await start(engine, *[row(2)] * 20)
    with pytest.raises(Overloaded, match="limit of 20") as refused:
        await engine.submit("embedder", [row(3)], deadline=soon())
    assert refused.value.retry_after_seconds > 0
    graph.let(100)
    await asyncio.gather(first, waiting)


async def test_rows_yet_to_come_are_refused_as_those_that_are_there(engine: Engine, graph: GatedGraph) -> None:
    engine.check("embedder", [4] * 20, deadline=soon())
    first = await start(engine, row(1))
    await graph.wait_entered()
    waiting = await start(engine, *[row(2)] * 19)
    engine.check("embedder", [4], deadline=soon())
    with pytest.raises(Overloaded, match="limit of 20"):
        engine.check("embedder", [4] * 2, deadline=soon())
    with pytest.raises(DeadlineExceeded):
        engine.check("embedder", [4], deadline=time.monotonic())
    assert engine.queued == 19
    graph.let(100)
    await asyncio.gather(first, waiting)


async def test_a_queue_is_crowded_for_those_whom_it_would_refuse_whatever_they_ask(engine: Engine, graph: GatedGraph) -> None:
    for rows in [1, 2, 4, 8] * 50:
        engine._costs["embedder"].learn(rows, 4, 1.0 * rows)
    assert engine.crowded(0.001) == 0.0  # nothing waits
    first = await start(engine, row(1))
    await graph.wait_entered()
    assert engine.crowded(0.001) > 0.0  # a batch runs that is known to take a second
    waiting = await start(engine, *[row(2)] * 10, deadline=time.monotonic() + 600)
    assert engine.crowded(601.0) == 0.0  # it can wait
    assert engine.crowded(10.0) == 0.0  # it would go before those that wait
    hurried = await start(engine, *[row(3)] * 5, deadline=time.monotonic() + 8)
    assert 4.0 < engine.crowded(9.0) < 7.0  # not before these, which take five seconds and what is left of the one that runs
    full = await start(engine, *[row(4)] * 5)
    assert engine.queued == 20
    assert engine.crowded(1e6) > 0.0  # there is no room
    graph.let(100)
    await asyncio.gather(first, waiting, hurried, full)


async def test_a_deadline_in_the_past_is_refused_before_the_queue(engine: Engine) -> None:
    with pytest.raises(DeadlineExceeded):
        await engine.submit("embedder", [row(1)], deadline=time.monotonic() - 1)
    assert engine.queued == 0


async def test_a_graph_that_ran_nothing_lately_is_tried_whatever_it_was_known_to_take(
    graph: GatedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled = BatchCost()
    stalled.learn(1, 4, 1_000.0)
    monkeypatch.setattr("openbook_server.engine.BatchCost", lambda: stalled)
    engine = Engine({"embedder": graph}, max_batch_tokens=64, max_queued=20)
    graph.let(100)
    monkeypatch.setattr("openbook_server.admission._KNOWN", 1e12)
    with pytest.raises(DeadlineExceeded, match="1 rows take about 1000"):
        await engine.submit("embedder", [row(1)], deadline=soon())
    monkeypatch.setattr("openbook_server.admission._KNOWN", 0.0)
    assert (await engine.submit("embedder", [row(1), row(2)], deadline=soon())).rows == [{"total": 4}, {"total": 5}]
    monkeypatch.setattr("openbook_server.admission._KNOWN", 1e12)
    assert (await engine.submit("embedder", [row(3)], deadline=soon())).rows == [{"total": 6}]  # which was learned from
    await asyncio.to_thread(engine.close)


async def test_whoever_is_told_to_try_again_is_not_told_at_once(graph: GatedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_server.admission._CAUTION", 1e12)  # the shortest wait is too long
    monkeypatch.setattr("openbook_server.admission._KNOWN", 1e12)
    quick = BatchCost()
    quick.learn(1, 4, 1e-6)
    monkeypatch.setattr("openbook_server.engine.BatchCost", lambda: quick)
    engine = Engine({"embedder": graph}, max_batch_tokens=4, max_queued=20)
    running = await start(engine, row(1))
    await graph.wait_entered()
    waiting = await start(engine, row(2))
    with pytest.raises(Overloaded, match="try again in 0.01 s") as refused:
        await engine.submit("embedder", [row(3)], deadline=soon())
    assert refused.value.retry_after_seconds == 0.01
    graph.let(100)
    await asyncio.gather(running, waiting)
    await asyncio.to_thread(engine.close)


async def test_a_row_that_breaks_its_batch_fails_alone(engine: Engine, graph: GatedGraph) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    good, bad = await start(engine, row(2)), await start(engine, row(POISON))
    graph.let(100)
    assert (await good).rows == [{"total": 5}]
    with pytest.raises(InferenceFailed, match="poisoned row"):
        await bad
    await first


async def test_of_a_batch_that_broke_nothing_runs_that_nobody_waits_for_and_who_is_due_first_runs_first(
    engine: Engine, graph: GatedGraph
) -> None:
    first = await start(engine, row(1))
    await graph.wait_entered()
    bad, gone, good = await start(engine, row(POISON)), await start(engine, row(2)), await start(engine, row(3))
    graph.let(1)
    await graph.wait_entered()
    gone.cancel()
    hurried = await start(engine, row(4, length=30), deadline=soon() - 30)
    with pytest.raises(asyncio.CancelledError):
        await gone
    graph.let(100)
    await asyncio.gather(first, bad, good, hurried, return_exceptions=True)
    assert graph.batches == [[1], [POISON, 2, 3], [4], [POISON], [3]]
    assert engine.queued == 0


async def test_what_callers_gave_up_takes_no_room_and_keeps_nobody_waiting(engine: Engine, graph: GatedGraph) -> None:
    busy = await start(engine, row(1))
    await graph.wait_entered()
    gone = [await start(engine, *[row(number)] * 4, deadline=soon() + 500) for number in range(2, 7)]
    assert engine.queued == 20
    with pytest.raises(Overloaded):
        await engine.submit("embedder", [row(9)], deadline=soon())
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    assert engine.queued == 0
    last = await start(engine, row(9))
    graph.let(2)
    await asyncio.gather(busy, last)
    assert graph.batches == [[1], [9]]


async def test_a_row_that_fails_takes_those_of_its_job_that_still_wait_out_of_the_queue(engine: Engine, graph: GatedGraph) -> None:
    failing = await start(engine, row(POISON), *[row(2)] * 3, *[row(3, length=30)] * 6)
    await graph.wait_entered()
    graph.let(5)
    with pytest.raises(InferenceFailed):
        await failing
    assert engine.queued == 0


async def test_a_session_outlives_an_observer_that_fails_and_a_graph_that_gives_too_little(caplog: pytest.LogCaptureFixture) -> None:
    class Short(GatedGraph):
        def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, NDArray[np.int64]]:
            return {"total": np.array([row.ids[0] for row in rows if row.ids[0] != POISON])}

    failures = [RuntimeError("no metrics today")]

    def observe(graph: str, rows: int, tokens: int, seconds: float) -> None:
        if failures:
            raise failures.pop()

    engine = Engine({"embedder": Short()}, max_batch_tokens=64, max_queued=20, observe=observe)
    try:
        assert (await engine.submit("embedder", [row(5)], deadline=soon())).rows == [{"total": 5}]
        with pytest.raises(InferenceFailed):
            await engine.submit("embedder", [row(POISON)], deadline=soon())
        assert (await engine.submit("embedder", [row(7), row(8)], deadline=soon())).rows == [{"total": 7}, {"total": 8}]
    finally:
        await asyncio.to_thread(engine.close)
    assert "its batch was lost" in caplog.text


async def test_nothing_is_kept_of_graphs_that_are_removed_and_their_rows_fail(
    engine: Engine, graph: GatedGraph, caplog: pytest.LogCaptureFixture
) -> None:
    engine.add({"old": graph})
    for name in ("old", "embedder"):
        ran = asyncio.create_task(engine.submit(name, [row(1)], deadline=soon()))
        graph.let(1)
        await ran
    running = asyncio.create_task(engine.submit("old", [row(2)], deadline=soon()))
    await asyncio.gather(*[graph.wait_entered() for _ in range(3)])
    queued = asyncio.create_task(engine.submit("old", [row(3), row(4, 40)], deadline=soon()))
    other = await start(engine, row(5))
    engine.remove(["old"])
    with pytest.raises(InferenceFailed, match="old was removed"):
        await queued
    assert engine.queued == 1
    graph.let(2)
    await asyncio.gather(running, other)
    assert graph.batches == [[1], [1], [2], [5]]
    assert engine._costs.keys() == engine._admission.ran.keys() == {"embedder"}
    assert caplog.messages == []


async def test_closing_finishes_what_is_queued_and_refuses_what_comes_later(graph: GatedGraph) -> None:
    engine = Engine({"embedder": graph}, max_batch_tokens=64, max_queued=20)
    first = await start(engine, row(1))
    graph.let(100)
    await asyncio.to_thread(engine.close)
    assert (await first).rows == [{"total": 4}]
    with pytest.raises(NotServing):
        await engine.submit("embedder", [row(2)], deadline=soon())


@pytest.fixture
async def pair(graph: GatedGraph) -> AsyncIterator[Engine]:
    engine = Engine({"embedder": graph}, max_batch_tokens=64, max_queued=40, sessions=2)
    yield engine
    graph.let(1000)
    await asyncio.to_thread(engine.close)


async def test_two_sessions_run_two_batches_at_once_and_share_what_waits(pair: Engine, graph: GatedGraph) -> None:
    task = await start(pair, *(row(number) for number in range(1, 6)))
    await graph.wait_entered()
    await graph.wait_entered()  # before the first has ended
    assert sorted(map(len, graph.batches)) == [2, 3]
    graph.let(2)
    assert [int(result["total"]) for result in (await task).rows] == [4, 5, 6, 7, 8]


async def test_a_row_that_arrives_alone_has_a_session_while_another_is_busy(pair: Engine, graph: GatedGraph) -> None:
    first = await start(pair, row(1))
    await graph.wait_entered()
    second = await start(pair, row(2))
    await graph.wait_entered()
    graph.let(2)
    await asyncio.gather(first, second)
    assert sorted(graph.batches) == [[1], [2]]


async def test_a_session_that_alone_is_free_takes_all_that_fits(pair: Engine, graph: GatedGraph) -> None:
    first = [await start(pair, row(number)) for number in (1, 2)]
    await graph.wait_entered()
    await graph.wait_entered()
    others = [await start(pair, row(number)) for number in (3, 4, 5, 6)]
    graph.let(1)
    await graph.wait_entered()
    assert graph.batches[2] == [3, 4, 5, 6]
    graph.let(2)
    await asyncio.gather(*first, *others)


async def test_as_long_as_people_ask_one_session_is_kept_free_of_background_work(
    pair: Engine, graph: GatedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook_server.background.ASKING", 1e6)
    asked = await start(pair, row(1))
    await graph.wait_entered()
    bulk = await start(pair, *(row(number, length=60) for number in (2, 3, 4)), lane=Lane.BACKGROUND)
    await graph.wait_entered()  # beside the question
    graph.let(1)
    await asked
    again = await start(pair, row(5))
    await graph.wait_entered()  # at once, though bulk was queued before
    assert [one[0] for one in graph.batches] == [1, 2, 5]
    monkeypatch.setattr("openbook_server.background.ASKING", 0.0)  # nobody asks any more
    graph.let(100)
    await asyncio.gather(bulk, again)
    assert sorted(one[0] for one in graph.batches) == [1, 2, 3, 4, 5]


async def test_rows_of_one_job_fail_it_once_in_whichever_session(pair: Engine, graph: GatedGraph) -> None:
    task = await start(pair, row(POISON), row(POISON), row(3))
    graph.let(10)
    with pytest.raises(InferenceFailed, match="poisoned row"):
        await task
    assert (await pair.submit("embedder", [row(4)], deadline=soon())).rows == [{"total": 7}]


async def test_closing_ends_every_session_once_the_queue_is_empty(graph: GatedGraph) -> None:
    engine = Engine({"embedder": graph}, max_batch_tokens=4, max_queued=40, sessions=3)
    tasks = [await start(engine, row(number)) for number in range(1, 8)]
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    graph.let(100)
    assert sorted(int(outcome.rows[0]["total"]) for outcome in await asyncio.gather(*tasks)) == [4, 5, 6, 7, 8, 9, 10]
    await closing
    with pytest.raises(NotServing):
        await engine.submit("embedder", [row(1)], deadline=soon())


def test_collated_rows_are_padded_on_the_right_and_masked() -> None:
    inputs = collate([Row([7, 8, 9], [0, 1, 1]), Row([5])], 4)
    assert inputs["input_ids"].tolist() == [[7, 8, 9, 0], [5, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


async def test_background_rows_wait_for_whoever_came_later_and_never_count_against_them(engine: Engine, graph: GatedGraph) -> None:
    running = asyncio.create_task(engine.submit("embedder", [row(1)], deadline=soon()))
    await graph.wait_entered()
    bulk = asyncio.create_task(engine.submit("embedder", [row(10 + n) for n in range(10)], deadline=soon(), lane=Lane.BACKGROUND))
    await asyncio.sleep(0)
    asked = asyncio.create_task(engine.submit("embedder", [row(2), row(3)], deadline=soon()))
    await asyncio.sleep(0)
    graph.let(100)
    await asyncio.gather(running, bulk, asked)
    assert graph.batches[0] == [1]
    assert graph.batches[1][:2] == [2, 3]
    background = [first for batch in graph.batches[1:] for first in batch if first >= 10]
    assert background == [10 + n for n in range(10)]
    assert all(len(batch) <= 2 for batch in graph.batches[2:])  # an eighth of 64 tokens, in rows of 4


async def test_background_rows_keep_out_of_the_way_of_whoever_needs_the_device_again(
    engine: Engine, graph: GatedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook_server.background.PATIENCE", 3_600.0)
    graph.let(100)
    await engine.submit("embedder", [row(1)], deadline=soon(), lane=Lane.BACKGROUND)
    with engine.attended():
        bulk = asyncio.create_task(engine.submit("embedder", [row(2, 8)], deadline=soon(), lane=Lane.BACKGROUND))
        for first in (3, 4):  # one need after the other, with nothing queued between them
            await asyncio.sleep(0.05)
            await engine.submit("embedder", [row(first)], deadline=soon())
        assert graph.batches == [[1], [3], [4]]
    await bulk
    assert graph.batches[-1] == [2]


async def test_rows_that_are_yet_to_come_are_time_that_others_do_not_have(graph: GatedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_server.admission._KNOWN", 1e12)
    slow = BatchCost()
    slow.learn(1, 4, 10.0)
    monkeypatch.setattr("openbook_server.engine.BatchCost", lambda: slow)
    engine = Engine({"embedder": graph}, max_batch_tokens=4, max_queued=20)
    mine, later = time.monotonic() + 60, time.monotonic() + 65
    with engine.attended() as expect:
        expect("embedder", 4, 9, mine)
        expect("embedder", 4, 4, mine)  # in place of the nine
        engine.check("embedder", [4], deadline=mine)  # whose they are does not wait for them
        with pytest.raises(Overloaded, match="the queue needs about 40"):
            engine.check("embedder", [4], deadline=later)
        engine.check("embedder", [4], deadline=later, begun=True)  # 40 s and 10: not twice 40
        assert engine.crowded(65) == pytest.approx(40)
    engine.check("embedder", [4], deadline=later)
    assert engine.crowded(65) == 0.0
    await asyncio.to_thread(engine.close)


async def test_background_rows_are_run_now_and_then_whoever_waits(
    engine: Engine, graph: GatedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook_server.background.PATIENCE", 0.01)
    graph.let(100)
    with engine.attended():
        for first in range(3):
            await engine.submit("embedder", [row(first)], deadline=soon(), lane=Lane.BACKGROUND)
    assert graph.batches == [[0], [1], [2]]


async def test_an_engine_that_is_closed_finishes_background_rows_at_once(graph: GatedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_server.background.PATIENCE", 3_600.0)
    engine = Engine({"embedder": graph}, max_batch_tokens=64, max_queued=20)
    graph.let(100)
    await engine.submit("embedder", [row(1)], deadline=soon(), lane=Lane.BACKGROUND)
    with engine.attended():
        bulk = asyncio.create_task(engine.submit("embedder", [row(2)], deadline=soon(), lane=Lane.BACKGROUND))
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
    await bulk


async def test_background_rows_fill_at_most_half_of_the_queue(engine: Engine, graph: GatedGraph) -> None:
    running = asyncio.create_task(engine.submit("embedder", [row(1)], deadline=soon()))
    await graph.wait_entered()
    bulk = asyncio.create_task(engine.submit("embedder", [row(2)] * 10, deadline=soon(), lane=Lane.BACKGROUND))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="limit of 10"):
        await engine.submit("embedder", [row(3)], deadline=soon(), lane=Lane.BACKGROUND)
    asked = asyncio.create_task(engine.submit("embedder", [row(4)] * 10, deadline=soon()))
    await asyncio.sleep(0)
    graph.let(100)
    await asyncio.gather(running, bulk, asked)


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows of one job wait, of the fixture's twenty."""
    monkeypatch.setattr("openbook_server.admission._PART", 1)


@pytest.mark.usefixtures("few_at_once")
async def test_a_request_larger_than_the_queue_keeps_nobody_out(engine: Engine, graph: GatedGraph) -> None:
    large = await start(engine, *(row(number, 16) for number in range(100, 145)), deadline=soon() + 600)
    await graph.wait_entered()
    assert engine.queued == 10 - 4  # a batch of four runs
    hurried = await start(engine, row(1))
    others = await start(engine, *(row(number, 16) for number in range(200, 230)), deadline=soon() + 500)
    assert engine.queued == 10 - 4 + 1 + 10
    with pytest.raises(Overloaded, match="17 rows are queued and 4 more exceed the limit of 20"):
        await engine.submit("embedder", [row(2)] * 4, deadline=soon())
    graph.let(1_000)
    assert [int(result["total"]) for result in (await hurried).rows] == [4]
    assert graph.batches.index([1]) == 1  # before what was there and has more time
    assert [int(result["total"]) for result in (await large).rows] == list(range(115, 160))
    assert [int(result["total"]) for result in (await others).rows] == list(range(215, 245))
    assert engine.queued == 0


@pytest.mark.usefixtures("few_at_once")
async def test_a_large_request_that_hangs_up_takes_the_rest_with_it(engine: Engine, graph: GatedGraph) -> None:
    large = await start(engine, *(row(number, 16) for number in range(100, 145)))
    await graph.wait_entered()
    large.cancel()
    await asyncio.sleep(0)
    assert engine.queued == 0
    graph.let(1_000)
    await engine.submit("embedder", [row(1)], deadline=soon())
    assert graph.batches == [[100, 101, 102, 103], [1]]


@pytest.mark.usefixtures("few_at_once")
async def test_a_large_request_that_proves_too_slow_is_told_before_its_deadline(
    engine: Engine, graph: GatedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = BatchCost()
    monkeypatch.setattr(learned, "learn", lambda *_: None)
    monkeypatch.setattr(learned, "predict", lambda batches, rows, length: 10.0 * rows)  # so it turns out
    engine._costs["embedder"] = learned
    monkeypatch.setattr(learned, "rows_within", lambda seconds, length: 100)
    large = await start(engine, *(row(number, 16) for number in range(100, 145)), deadline=soon() + 240)
    graph.let(1_000)
    with pytest.raises(DeadlineExceeded, match=r"35 rows take about 350\.000 s, the deadline is in (299|300)"):
        await large
    assert sum(map(len, graph.batches)) == 10


async def test_a_full_queue_tells_when_there_will_be_room(engine: Engine, graph: GatedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._costs["embedder"], "predict", lambda batches, rows, length: 2.0 * rows)
    first = await start(engine, row(1))
    await graph.wait_entered()
    waiting = [await start(engine, row(number), deadline=soon() + 1_000) for number in range(2, 21)]
    engine._admission.busy_until[0] = 0.0
    with pytest.raises(Overloaded, match=r"19 rows are queued and 5 more exceed the limit of 20; try again in 8\.00 s"):
        await engine.submit("embedder", [row(30)] * 5, deadline=soon() + 1_000)  # four of nineteen, two seconds each
    graph.let(100)
    await asyncio.gather(first, *waiting)


async def test_a_few_rows_tell_what_those_of_a_graph_cost_that_ran_nothing_lately(engine: Engine, graph: GatedGraph) -> None:
    large = await start(engine, *(row(number) for number in range(100, 200)))
    await graph.wait_entered()
    assert (engine.queued, len(graph.batches[0])) == (16, 16)  # of 32
    graph.let(1_000)
    assert [int(result["total"]) for result in (await large).rows] == list(range(103, 203))
    again = await start(engine, *(row(number) for number in range(100, 200)))
    assert engine.queued + 16 >= 84  # now it is known, and all of them may wait
    await again

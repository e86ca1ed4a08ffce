"""What runs next, on a clock that the test moves."""

from __future__ import annotations

import asyncio

import pytest
from openbook_server.backlog import Backlog, Group, Job, Lane
from openbook_server.costs import BatchCost
from openbook_server.errors import DeadlineExceeded
from openbook_server.rows import Row

A_ROW = 0.01  # seconds, of 16 tokens


def known(seconds_a_row: float = A_ROW) -> BatchCost:
    """The law of a processor that takes so long for a row of 16 tokens, whatever else is in the batch."""
    cost = BatchCost()
    for rows in (1, 2, 4, 8) * 20:
        cost.learn(rows, 16, rows * seconds_a_row)
    return cost


def job(deadline: float, *, rows: int = 1, submitted: float = 0.0, lane: Lane = Lane.FOREGROUND) -> Job:
    done: asyncio.Future[list[object]] = asyncio.get_running_loop().create_future()
    return Job("embedder", [Row([1] * 16)] * rows, deadline, lane, done, submitted, [{}] * rows, rows)  # type: ignore[arg-type]


def groups(lengths: list[int], *, alone: bool = False) -> list[Group]:
    return [Group("embedder", length, alone) for length in lengths]


def backlog(cost: BatchCost | None = None, tokens: int = 2_048) -> Backlog:
    return Backlog({"embedder": cost or known()}, max_batch_tokens=tokens)


async def test_before_anything_is_known_a_batch_is_what_the_budget_holds() -> None:
    waiting = backlog(BatchCost(), tokens=16 * 5)
    waiting.add(job(60.0, rows=12), groups([16] * 12))
    assert [len(waiting.take(0.0).rows) for _ in range(3)] == [5, 5, 2]
    assert len(waiting) == 0


async def test_a_batch_lasts_a_quarter_of_a_second_at_most() -> None:
    waiting = backlog()
    waiting.add(job(60.0, rows=100), groups([16] * 100))
    batch = waiting.take(0.0)
    assert len(batch.rows) == 25
    assert batch.seconds == pytest.approx(0.25, rel=0.05)
    assert waiting.wait(Lane.FOREGROUND) == pytest.approx(0.75, rel=0.05)


async def test_a_batch_lasts_no_longer_than_its_most_urgent_row_has_left() -> None:
    waiting = backlog()
    urgent = job(0.105)
    waiting.add(urgent, groups([16]))
    waiting.add(job(60.0, rows=100), groups([16] * 100))
    batch = waiting.take(0.0)
    assert len(batch.rows) == 10
    assert batch.rows[0][1] is urgent


async def test_a_row_that_leaves_too_little_time_fails_and_the_batch_is_filled_by_others() -> None:
    waiting = backlog()
    late, in_time = job(1.0), job(1.5, rows=30)
    waiting.add(late, groups([16]))
    waiting.add(in_time, groups([16] * 30))
    batch = waiting.take(0.95)  # a quarter of 0.25 s is what a batch worth running takes
    assert batch.dropped == [late]
    assert isinstance(late.failure, DeadlineExceeded)
    assert str(late.failure).startswith("after 0.950 s in the queue 0.050 s are left, and a batch takes 0.")
    assert [one for _, one in batch.rows] == [in_time] * 25


async def test_a_row_whose_deadline_has_passed_is_told_so() -> None:
    waiting, late = backlog(), job(1.0)
    waiting.add(late, groups([16]))
    waiting.take(1.25)
    assert str(late.failure) == "after 1.250 s in the queue the deadline has passed, 0.250 s ago; allow more time"


async def test_a_lone_row_is_run_with_hardly_more_left_than_it_takes() -> None:
    waiting = backlog()
    alone = job(0.012)
    waiting.add(alone, groups([16]))
    assert [one for _, one in waiting.take(0.0).rows] == [alone]


async def test_of_a_graph_whose_cost_is_not_known_any_more_only_what_is_due_already_is_too_late() -> None:
    waiting = backlog(known(100.0))
    due, in_time = job(1.0), job(1.5)
    waiting.add(due, groups([16]))
    waiting.add(in_time, groups([16]))
    batch = waiting.take(1.0, unknown=["embedder"])
    assert batch.dropped == [due]
    assert [one for _, one in batch.rows] == [in_time]


async def test_short_deadlines_are_served_in_short_batches() -> None:
    waiting, served, now = backlog(), 0, 0.0
    for _ in range(40):
        waiting.add(job(0.08), groups([16]))
    while len(waiting):
        batch = waiting.take(now)
        now += A_ROW * len(batch.rows)
        served += len(batch.rows) if now <= 0.08 else 0
    assert served >= 6  # of the eight that can be


async def test_what_waits_in_a_lane_is_shared_out_among_the_sessions_that_are_free() -> None:
    waiting = backlog()
    waiting.add(job(60.0, rows=6), groups([16] * 6))
    waiting.add(job(60.0, rows=100, lane=Lane.BACKGROUND), groups([16] * 100))
    batches = [waiting.take(0.0, free=free) for free in (3, 2, 1)]
    assert [len(batch.rows) for batch in batches] == [2, 2, 16]  # the last one has room for what waits in the background
    assert [batch.lane for batch in batches] == [Lane.FOREGROUND] * 3


async def test_a_job_waits_for_what_is_due_before_it_and_for_no_more() -> None:
    waiting = backlog()
    assert waiting.wait(Lane.FOREGROUND, 1.0) == 0.0
    waiting.add(job(60.0, rows=300), groups([16] * 300))
    waiting.add(job(5.0, rows=100), groups([16] * 100))
    waiting.add(job(0.5, rows=1_000, lane=Lane.BACKGROUND), groups([16] * 1_000))
    for deadline, seconds in ((1.0, 0.0), (5.0, 1.0), (59.0, 1.0), (60.0, 4.0), (90.0, 4.0)):
        assert waiting.wait(Lane.FOREGROUND, deadline) == pytest.approx(seconds, rel=0.05)
    assert waiting.wait(Lane.BACKGROUND, 0.1) == waiting.wait(Lane.BACKGROUND)  # goes after the foreground, and has waited long
    while waiting.rows[Lane.FOREGROUND]:
        waiting.take(0.0)
    waiting.add(job(3.0, rows=10), groups([16] * 10))
    assert waiting.wait(Lane.FOREGROUND, 2.0) == 0.0
    assert waiting.wait(Lane.FOREGROUND, 3.0) == pytest.approx(0.1, rel=0.05)


async def test_urgent_jobs_are_served_while_patient_ones_fill_the_queue() -> None:
    """Bulk with a minute's time keeps four seconds of work waiting; a caller in a hurry comes by now and then."""
    cost = known()
    waiting, now, admitted, in_time, bulk = backlog(cost), 0.0, 0, 0, 0
    while now < 30.0:
        if waiting.wait(Lane.FOREGROUND) < 4.0:
            waiting.add(job(now + 60.0, rows=100, submitted=now), groups([16] * 100))
        if 2 * waiting.wait(Lane.FOREGROUND, now + 1.0) + cost.predict(1, 1, 16) < 1.0:
            admitted += 1
            waiting.add(job(now + 1.0, submitted=now), groups([16]))
        batch = waiting.take(now)
        now += A_ROW * len(batch.rows)
        in_time += sum(now <= one.deadline and one.deadline - one.submitted == 1.0 for _, one in batch.rows)
        bulk += sum(one.deadline - one.submitted == 60.0 for _, one in batch.rows)
    assert in_time == admitted > 100
    assert bulk > 2_000


@pytest.mark.parametrize("factor", [2.0, 10.0])
@pytest.mark.parametrize("slowdown", [1.0, 3.0])
async def test_what_can_be_done_in_time_is_done_in_time_however_much_is_asked_for(factor: float, slowdown: float) -> None:
    """Arrivals at a multiple of what the machine can do, a second for each; it becomes slower than it was known to be."""
    cost = known()
    waiting, now, in_time, due, ends = backlog(cost), 0.0, 0, 0.0, 30.0
    each = A_ROW * slowdown / factor  # seconds between arrivals
    while now < ends:
        while due <= now:
            if 2 * waiting.wait(Lane.FOREGROUND) + cost.predict(1, 1, 16) < 1.0:  # the engine's admission
                waiting.add(job(due + 1.0, submitted=due), groups([16]))
            due += each
        if not len(waiting):
            now = due
            continue
        batch = waiting.take(now)
        seconds = A_ROW * slowdown * len(batch.rows)
        now += seconds
        if batch.rows:
            cost.learn(len(batch.rows), 16, seconds)
        in_time += sum(now <= one.deadline for _, one in batch.rows)
    assert in_time > 0.9 * ends / (A_ROW * slowdown)


async def test_what_is_expected_keeps_those_waiting_who_are_due_after_it_until_it_is_taken_back() -> None:
    waiting = backlog()
    waiting.add(job(5.0, rows=100), groups([16] * 100))
    waiting.expect(Group("embedder", 16), 50, 3.0)
    waited = [waiting.wait(Lane.FOREGROUND, deadline) for deadline in (1.0, 3.0, 4.0, 5.0, 9.0)]
    assert waited == pytest.approx([0.0, 0.0, 0.5, 1.5, 1.5], rel=0.05)  # not for the job that it follows
    assert len(waiting) == 100
    waiting.expect(Group("embedder", 16), -50, 3.0)
    assert [waiting.wait(Lane.FOREGROUND, deadline) for deadline in (4.0, 5.0)] == pytest.approx([0.0, 1.0], rel=0.05)
    while len(waiting):
        waiting.take(0.0)
    assert waiting.wait(Lane.FOREGROUND) == 0.0


@pytest.mark.parametrize("factor", [2.0, 10.0])
async def test_who_is_let_in_for_a_first_step_has_time_for_the_second(factor: float) -> None:
    """A question of a millisecond, then its reading of twenty; a second for both, and many times more questions than can be read."""
    costs, per_row = {"embedder": known(0.001), "reader": known(A_ROW)}, {"embedder": 0.001, "reader": A_ROW}
    waiting, reading, read = Backlog(costs, max_batch_tokens=2_048), Group("reader", 16), 2
    now, due, ends, in_time, begun = 0.0, 0.0, 30.0, 0, 0
    seconds_each = per_row["embedder"] + read * A_ROW
    while now < ends:
        while due <= now:
            if 2 * waiting.wait(Lane.FOREGROUND, due + 1.0) + per_row["embedder"] < 1.0:  # the engine's admission
                begun += 1
                waiting.add(job(due + 1.0, submitted=due), groups([16]))
                waiting.expect(reading, read, due + 1.0)
            due += seconds_each / factor
        if not len(waiting):
            now = due
            continue
        batch = waiting.take(now)
        now += per_row[batch.group.graph] * len(batch.rows)
        for _, one in batch.rows:
            one.missing -= 1
            if batch.group.graph == "reader":
                in_time += not one.missing and now <= one.deadline
                continue
            waiting.expect(reading, -read, one.deadline)
            if waiting.wait(Lane.FOREGROUND, one.deadline) + read * A_ROW < one.deadline - now:
                waiting.add(job(one.deadline, rows=read, submitted=now), [reading] * read)
        for one in batch.dropped:
            if one.rows and len(one.rows) == 1:
                waiting.expect(reading, -read, one.deadline)
    assert in_time > 0.9 * ends / seconds_each
    assert begun < 1.2 * in_time


async def test_a_job_that_is_given_up_leaves_nothing_behind_and_others_keep_their_order() -> None:
    waiting = backlog()
    gone, first, second = job(1.0, rows=6), job(2.0, rows=2), job(3.0, rows=2)
    for one, lengths in ((gone, [16, 16, 32, 32, 16, 16]), (second, [16, 32]), (first, [16, 32])):
        waiting.add(one, groups(lengths))
    waiting.give_up(gone)
    assert len(waiting) == 4
    assert waiting.wait(Lane.FOREGROUND) == pytest.approx(0.04, rel=0.6)
    assert waiting.wait(Lane.FOREGROUND, 1.5) == 0.0
    taken = [waiting.take(0.0) for _ in range(2)]
    assert [[one for _, one in batch.rows] for batch in taken] == [[first, second]] * 2
    assert not waiting._groups
    assert not waiting._dead


async def test_whoever_comes_and_goes_at_once_does_not_make_the_backlog_grow() -> None:
    waiting = backlog()
    stays = job(1.0, rows=3)
    waiting.add(stays, groups([16] * 3))
    for number in range(1_000):
        gone = job(60.0 + number, rows=2)
        waiting.add(gone, groups([16, 48]))
        waiting.give_up(gone)
    assert len(waiting) == 3
    assert sum(map(len, waiting._groups.values())) <= 6
    assert [one for _, one in waiting.take(0.0).rows] == [stays] * 3
    assert not waiting._groups


async def test_background_rows_are_run_once_those_before_them_are_given_up() -> None:
    waiting = backlog()
    gone, late = job(1.0), job(60.0, rows=3, lane=Lane.BACKGROUND)
    waiting.add(gone, groups([16]))
    waiting.add(late, groups([16] * 3))
    waiting.give_up(gone)
    batch = waiting.take(0.0, free=2)
    assert batch.lane is Lane.BACKGROUND
    assert [one for _, one in batch.rows] == [late] * 2


async def test_of_a_job_that_is_too_late_nothing_waits_any_longer() -> None:
    waiting = backlog()
    late = job(1.0, rows=4)
    waiting.add(late, groups([16, 16, 32, 32]))
    assert waiting.take(2.0).dropped == [late]
    assert len(waiting) == 0
    assert not waiting._groups


async def test_rows_that_run_alone_share_a_batch_with_nobody_and_others_still_do() -> None:
    waiting = backlog()
    first, alone, last = job(1.0, rows=3), job(2.0, rows=3), job(3.0, rows=3)
    waiting.add(last, groups([16] * 3))
    waiting.add(alone, groups([16] * 3, alone=True))
    waiting.add(first, groups([16] * 3))
    batches = [waiting.take(0.0) for _ in range(4)]
    assert [[one for _, one in batch.rows] for batch in batches] == [[first] * 3 + [last] * 3, [alone], [alone], [alone]]
    assert [number for batch in batches[1:] for number, _ in batch.rows] == [0, 1, 2]
    assert batches[1].seconds == pytest.approx(A_ROW, rel=0.05)
    assert len(waiting) == 0
    assert not waiting._groups


async def test_rows_that_run_alone_are_predicted_to_take_a_batch_each() -> None:
    """On a device that takes 10 ms a batch, however many rows are in it."""
    cost = BatchCost()
    for rows in (1, 2, 4, 8, 16) * 20:
        cost.learn(rows, 16, 0.01)
    for alone, seconds in ((False, 0.01), (True, 0.16)):
        waiting = backlog(cost)
        waiting.add(job(60.0, rows=16), groups([16] * 16, alone=alone))
        assert waiting.wait(Lane.FOREGROUND) == pytest.approx(seconds, rel=0.1)
        while len(waiting):
            waiting.take(0.0)
        assert waiting.wait(Lane.FOREGROUND) == 0.0

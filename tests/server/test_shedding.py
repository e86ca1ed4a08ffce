"""Which calls are refused at sight."""

from __future__ import annotations

import pytest
from openbook_server.shedding import MANY, Shedding


def test_nobody_is_late_until_most_calls_come_too_late_and_for_a_while_after_it() -> None:
    shedding = Shedding()
    assert not shedding.is_late(1.0, 0.9, now=100.0)
    for _ in range(100):
        assert not shedding.is_late(0.001, 0.0, now=100.0)  # who comes with so little time is not too late because of us
    assert not shedding.is_late(1.0, 0.9, now=100.0)
    assert any(shedding.is_late(0.001, 0.1, now=100.0) for _ in range(30))
    assert shedding.is_late(1.0, 0.06, now=101.0)
    assert not shedding.is_late(1.0, 0.04, now=101.0)  # it lay unread for less than a twentieth of its time
    assert not shedding.is_late(1.0, 0.0, now=101.0)  # the loop keeps up
    assert not shedding.is_late(1.0, 0.9, now=106.0)


def test_a_caller_that_allows_next_to_no_time_makes_nobody_else_late() -> None:
    shedding = Shedding()
    for number in range(1_000):
        shedding.is_late(0.004, 0.5, now=100.0 + number / 1_000)
        assert not shedding.is_late(30.0, 2.0, now=100.0 + number / 1_000)
        assert not shedding.is_late(1.0, 0.5, now=100.0 + number / 1_000)


def test_hopeless_calls_are_refused_at_sight_only_while_many_are_refused() -> None:
    shedding = Shedding()
    asked: list[float] = []

    def crowded(left: float) -> float:
        asked.append(left)
        return 3.0

    shedding.crowded = crowded
    for _ in range(int(MANY)):
        shedding.count(now=50.0)
    assert shedding.wait(1.0, now=50.0) == 0.0
    assert not asked
    shedding.count(now=50.0)
    assert shedding.wait(1.0, now=50.0) == 3.0
    assert shedding.wait(1.0, now=50.1) == 0.0  # the older a refusal, the less it counts


@pytest.mark.parametrize("rate", [50, 90, 110, 1_000])
def test_the_rate_of_refusals_is_that_of_the_last_second_or_so(rate: int) -> None:
    shedding = Shedding()
    shedding.crowded = lambda left: 1.0
    for number in range(5 * rate):
        shedding.count(now=10.0 + number / rate)
    assert (shedding.wait(0.5, now=15.0) > 0.0) == (rate > MANY)

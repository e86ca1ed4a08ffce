"""Which calls are read: by how late they came, and by what became of those before them."""

from __future__ import annotations

import pytest
from openbook_server import triage
from openbook_server.triage import Triage


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(triage, "time", clock)
    return clock


def test_calls_are_let_go_for_a_while_once_one_came_too_late(clock: Clock) -> None:
    calls = Triage()
    assert not calls.comes_too_late(0.0, 0.0)  # its caller gave it no time; the loop is not behind
    assert not calls.comes_too_late(1.0, 60.0)  # none came too late
    assert calls.comes_too_late(0.0, 60.0)
    assert calls.comes_too_late(1.0, 0.06)
    assert not calls.comes_too_late(1.0, 0.04)
    assert not calls.comes_too_late(30.0, 1.0)
    clock.now += 5.1
    assert not calls.comes_too_late(1.0, 60.0)


def flood(calls: Triage, method: str, count: int, *, answered: bool = False, seconds: float = 0.01) -> int:
    """How many of so many calls, all of which seem hopeless, are read."""
    read = 0
    for _ in range(count):
        wait, is_read = calls.looks(method, 1.0)
        assert wait == 0.4
        if is_read:
            read += 1
            calls.was_read(method, wait, seconds, answered=answered)
    return read


def test_hopeless_calls_are_read_until_sixteen_were_read_in_vain_and_then_one_in_sixteen(clock: Clock) -> None:
    calls = Triage(lambda deadline: 0.4 if deadline < clock.now + 2.0 else 0.0)
    assert flood(calls, "Embed", 16) == 16
    assert flood(calls, "Embed", 160) == 10
    assert calls.looks("Embed", 5.0) == (0.0, True)  # there is time enough for it
    assert flood(calls, "Search", 5) == 5  # another method, of which few were


def test_one_that_is_answered_before_its_turn_has_all_read_again(clock: Clock) -> None:
    """From the cache, say: whoever waits for the models in vain tells nothing of it."""
    calls = Triage(lambda deadline: 0.4)
    flood(calls, "Embed", 64)
    calls.was_read("Embed", 0.4, 0.39, answered=True)  # it fitted in by chance, and waited for its turn
    assert flood(calls, "Embed", 32) == 2
    calls.was_read("Embed", 0.4, 0.01, answered=True)
    assert flood(calls, "Embed", 32, answered=True) == 32

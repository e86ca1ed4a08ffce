"""What is usual: a mean that follows."""

from __future__ import annotations

import pytest
from openbook_server.usual import AMONG, Usual


def test_it_is_the_mean_at_first_and_follows_what_comes_later() -> None:
    usual = Usual()
    assert usual.mean == 0.0
    for value in (1, 2, 6):
        usual.learn(value)
    assert usual.mean == pytest.approx(3.0)
    for _ in range(5 * AMONG):
        usual.learn(7)
    assert usual.mean == pytest.approx(7.0, abs=0.05)

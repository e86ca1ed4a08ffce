"""The bounded memory behind every cache, against a slow one that is a list."""

from __future__ import annotations

import random

import pytest
from openbook_server.recency import Recent


def size(key: str, value: str) -> int:
    return len(key) + len(value)


@pytest.mark.parametrize("at_least", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_it_keeps_what_a_list_ordered_by_use_keeps(seed: int, at_least: int) -> None:
    rng = random.Random(seed)
    capacity = rng.randrange(5, 40)
    recent: Recent[str, str] = Recent(capacity, size, at_least=at_least)
    expected: list[tuple[str, str]] = []  # the one used last at the end
    for _ in range(300):
        key = rng.choice("abcdefghij")
        known = [pair for pair in expected if pair[0] == key]
        if rng.random() < 0.5:
            assert recent.get(key) == (known[0][1] if known else None)
            expected = [pair for pair in expected if pair[0] != key] + known
        elif rng.random() < 0.02:
            recent.clear()
            expected = []
        else:
            value = "v" * rng.randrange(0, capacity + 5)
            recent.put(key, value)
            expected = [pair for pair in expected if pair[0] != key]
            if size(key, value) <= capacity or at_least:
                expected.append((key, value))
            while sum(size(*pair) for pair in expected) > capacity and len(expected) > at_least:
                expected = expected[1:]
        assert recent.bytes == sum(size(*pair) for pair in expected)
    for key in "abcdefghij":
        assert recent.get(key) == dict(expected).get(key)


def test_an_object_whose_size_grows_while_it_is_kept_leaves_with_the_size_that_it_came_with() -> None:
    sizes = {"a": 10, "b": 10, "c": 10}
    recent: Recent[str, str] = Recent(25, lambda key, value: sizes[key])
    for key in "ab":
        recent.put(key, key)
    sizes["a"] = sizes["b"] = 1_000
    recent.put("c", "c")
    assert recent.bytes == 20
    recent.put("b", "again")
    assert (recent.get("b"), recent.get("c"), recent.bytes) == (None, "c", 10)

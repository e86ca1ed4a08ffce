from __future__ import annotations

from dataclasses import replace

import pytest
from openbook_server.buckets import COARSE, FINE, Buckets


@pytest.mark.parametrize("buckets", [FINE, COARSE])
def test_every_length_has_one_bucket_that_holds_it_and_longer_ones_no_shorter(buckets: Buckets) -> None:
    padded = [buckets.padded_length(tokens) for tokens in range(1, 513)]
    assert all(length >= tokens for tokens, length in enumerate(padded, start=1))
    assert padded == sorted(padded)
    assert all(buckets.padded_length(length) == length for length in padded)
    assert buckets.padded_lengths(512) == sorted(set(padded))


def test_little_of_what_runs_is_padding_where_padding_costs() -> None:
    waste = [FINE.padded_length(tokens) / tokens - 1 for tokens in range(1, 513)]
    assert max(waste) <= 1 / 8


def test_rows_are_batched_by_bucket_within_the_budget_and_none_is_lost() -> None:
    lengths = [7, 9, 16, 100, 12, 400, 8, 15]
    batches = COARSE.batches(lengths, 48)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        [padded] = {COARSE.padded_length(lengths[row]) for row in batch}
        assert len(batch) == 1 or len(batch) * padded <= 48
    assert [1, 2, 4] in batches  # 9, 16 and 12 tokens share one


def test_no_row_is_padded_to_more_than_a_model_has_positions() -> None:
    buckets = replace(COARSE, longest=100)
    assert [buckets.padded_length(tokens) for tokens in (1, 64, 96, 97, 100)] == [8, 64, 96, 100, 100]
    assert buckets.padded_lengths(100) == [8, 16, 24, 32, 48, 64, 80, 96, 100]

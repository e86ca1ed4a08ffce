"""kNN-LM against brute force written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from openbook_training import knn_lm
from openbook_training.knn_lm import Datastore, Mixture, mixed, neighbours, tune


@pytest.mark.parametrize("block", [7, 1000])
def test_neighbours_are_those_of_an_exhaustive_search_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(knn_lm, "BLOCK_KEYS", block)
    rng = np.random.default_rng(0)
    keys, queries, tokens = rng.normal(size=(50, 6)), rng.normal(size=(9, 6)), rng.integers(20, size=50)
    store = Datastore(torch.tensor(keys, dtype=torch.float32), torch.tensor(tokens))
    distances, followed = neighbours(torch.tensor(queries, dtype=torch.float32), store, 8)
    for row, query in enumerate(queries):
        every = [sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) for key in keys]
        order = np.argsort(every)[:8]
        assert distances[row].numpy() == pytest.approx(np.array(every)[order], rel=1e-4)
        assert followed[row].tolist() == tokens[order].tolist()
    assert neighbours(torch.tensor(queries, dtype=torch.float32), store, 99)[0].shape == (9, 50)


def mixture_of(right_share: float) -> tuple[Mixture, float, float]:
    """Tuned where the nearest neighbour was followed by the target in a share of the cases; surprise of the model, and of both."""
    rng = np.random.default_rng(1)
    targets = rng.integers(50, size=400)
    followed = rng.integers(50, size=(400, 8))
    right = rng.random(400) < right_share
    followed[right, 0] = targets[right]
    distances = np.sort(rng.random((400, 8)) + np.array([0, *[2] * 7]), axis=1)
    model = torch.full((400,), float(np.log(1 / 50)))
    given = (torch.tensor(distances), torch.tensor(followed), torch.tensor(targets))
    chosen = tune(model, *given)
    return chosen, -float(model.mean()), -float(mixed(model, *given, chosen).mean())


def test_tuning_trusts_neighbours_as_far_as_they_are_right() -> None:
    trusted, alone, both = mixture_of(0.8)
    assert 0.6 < trusted.share < 0.9
    assert both < 0.5 * alone
    useless, alone, both = mixture_of(0.0)
    assert useless.share <= 0.05
    assert both <= alone

"""Rows drawn at random: what a search finds that chooses nothing, the baseline that shows what choosing adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw(question: str, rows: Sequence[int], count: int) -> dict[int, float]:
    """`count` of the rows (all, where there are fewer), each with the number in [0, 1) that drew it, the largest first.

    A question gives a row the same number always, whatever other rows there are and whenever it is asked: a draw of few is the
    beginning of a draw of more, and a write moves nothing but what it adds and removes.

    Args:
        rows: non-negative, each once.
    """
    if not rows:  # as in every mode but the random one
        return {}
    labels = np.array(rows, np.int64)
    numbers = np.random.default_rng(list(question.encode())).random(labels.max(initial=-1) + 1)[labels]
    best = np.argsort(-numbers)[:count]
    return dict(zip(labels[best].tolist(), numbers[best].tolist(), strict=True))

"""Which token comes next: the most probable one, or one drawn by temperature and nucleus."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def choose(logits: NDArray[np.floating], *, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """The next token.

    Args:
        logits: (vocabulary,) of the model.
        temperature: logits are divided by it; 0 = the most probable token, of equals the first.
        top_p: above 0, up to 1: drawn is among the fewest most probable tokens whose probabilities sum to it (nucleus sampling,
            Holtzman et al. 2020, section 3.1).
        random: one number is taken from it where `temperature` is above 0.
    """
    if not temperature:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64) / temperature
    ranked = np.sort(scores)[::-1]  # without their tokens: that is forty times as fast, and only one token is asked for
    weights = np.exp(ranked - ranked[0])
    weights /= weights.sum()
    summed = np.cumsum(weights)
    nucleus = int(np.searchsorted(summed, top_p * summed[-1])) + 1
    drawn = np.searchsorted(summed[:nucleus], random.random() * summed[min(nucleus, len(summed)) - 1], side="right")
    rank = min(int(drawn), len(ranked) - 1)
    equals = np.flatnonzero(scores == ranked[rank])  # of which the first token ranks first
    return int(equals[rank - np.count_nonzero(scores > ranked[rank])])

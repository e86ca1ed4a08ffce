"""How much of a question stands in a passage, word by word: the last step of the hybrid ranking, pure.

BM25 adds up a word's every occurrence and knows no order. Two things it leaves out tell good candidates from the best:
how much of the question is there at all, and whether its words stand side by side as they do in the question (Metzler &
Croft 2005, "A Markov random field model for term dependencies", there as ordered pairs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress, pairwise

from openbook_server.knowledge.lexical import content_words, words

# Chosen on SQuAD training questions, not on the benchmark: docs/search.md.
COVERAGE_WEIGHT = 0.3  # of a passage that holds every content word of the question
PAIR_WEIGHT = 0.04  # of each two neighbouring words of the question that are neighbours in the passage too


def overlaps(question: str, passages: Sequence[str]) -> list[float]:
    """A bonus for each passage, 0 and up, on the scale of the cosine.

    COVERAGE_WEIGHT · Σ_w idf(w) / Σ idf + PAIR_WEIGHT · pairs, where w runs over the question's content words that the
    passage holds, and idf(w) = log((n + 1) / (n_w + 1/2)) with n_w of the n given passages holding w: a word that all
    candidates share tells nothing.

    Args:
        passages: the words of each, as `word_line` puts them.
    """
    asked = words(question)
    content = [f" {word} " for word in content_words(asked)]
    pairs = {f" {one} {other} " for one, other in pairwise(asked)}
    held = [[word in line for word in content] for line in passages]
    weights = [math.log((len(passages) + 1) / (sum(column) + 0.5)) for column in zip(*held, strict=True)]
    total = sum(weights) or 1.0
    return [
        COVERAGE_WEIGHT * sum(compress(weights, row)) / total + PAIR_WEIGHT * sum(pair in line for pair in pairs)
        for row, line in zip(held, passages, strict=True)
    ]

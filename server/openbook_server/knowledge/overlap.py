"""How much of a question stands in a passage, word by word: the last step of the hybrid ranking, pure.

BM25 adds up a word's every occurrence, wherever it is in the passage. Two things it leaves out tell good candidates from
the best: how much of the question one sentence holds, for that is where an answer stands, and whether the question's words
stand side by side as they do in the question (Metzler & Croft 2005, "A Markov random field model for term dependencies",
there as ordered pairs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress, pairwise

from openbook_server.knowledge.lexical import content_words, stems, words

# Fitted on SQuAD training questions, not on the benchmark: docs/search.md.
COVERAGE_WEIGHT = 0.29  # of a passage with a sentence that holds every content word of the question
PAIR_WEIGHT = 0.046  # of each two neighbouring words of the question that are neighbours in one sentence too


def overlaps(question: str, passages: Sequence[str]) -> list[float]:
    """A bonus for each passage, 0 and up, on the scale of the cosine: COVERAGE_WEIGHT · coverage + PAIR_WEIGHT · pairs.

    Args:
        passages: the stems of each, as `stem_lines` puts them.
    """
    return [COVERAGE_WEIGHT * coverage + PAIR_WEIGHT * pairs for coverage, pairs in shared(question, passages)]


def shared(question: str, passages: Sequence[str]) -> list[tuple[float, int]]:
    """(coverage, pairs) of each passage, its best sentence's.

    Coverage, 0 to 1, is max_s Σ_w idf(w) / Σ idf, where s runs over the passage's sentences, w over the stems of the question's content
    words that s holds, and idf(w) = log((n + 1) / (n_w + 1/2)) with n_w of the n given passages holding w: a word that all candidates
    share tells nothing. Pairs are the neighbouring stems of the question that are neighbours in s, of the s that has most of them.
    """
    content = [f" {stem} " for stem in dict.fromkeys(stems(" ".join(content_words(words(question)))))]
    pairs = {f" {one} {other} " for one, other in pairwise(stems(question))}
    held = [[word in lines for word in content] for lines in passages]
    weights = [math.log((len(passages) + 1) / (sum(column) + 0.5)) for column in zip(*held, strict=True)]
    total = sum(weights) or 1.0
    found = []
    for row, lines in zip(held, passages, strict=True):
        there, paired = list(compress(zip(content, weights, strict=True), row)), [pair for pair in pairs if pair in lines]
        sentences = lines.split("\n")
        coverage = max([sum([weight for word, weight in there if word in line]) for line in sentences]) / total
        found.append((coverage, max([sum([pair in line for pair in paired]) for line in sentences]) if len(paired) > 1 else len(paired)))
    return found

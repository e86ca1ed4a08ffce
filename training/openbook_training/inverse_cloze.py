"""Queries from passages that nobody has asked about: a sentence asks for the passage that it was taken from.

Lee et al. 2019 ("Latent retrieval for weakly supervised open domain question answering", section 4): like a question, the sentence lacks
context and shares meaning with its passage more than words, for in most cases it no longer stands there.
"""

from __future__ import annotations

from collections.abc import Sequence

from openbook_training.sentences import sentence_spans

# Words of a query at least. The paper takes every sentence; shorter pieces are mostly what an abbreviation or a heading left.
SHORTEST = 4


def query_spans(passage: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence that may ask for the passage; none where the passage would be left without a sentence."""
    spans = list(sentence_spans(passage))
    return [span for span in spans if len(passage[slice(*span)].split()) >= SHORTEST] if len(spans) > 1 else []


def block(passage: str, span: tuple[int, int]) -> str:
    """The passage without the sentence at `span`."""
    return (passage[: span[0]] + passage[span[1] :]).strip()


def folded(text: str) -> str:
    """The text as copies are told by: without case, and with single spaces."""
    return " ".join(text.casefold().split())


def also_right(queries: Sequence[str], blocks: Sequence[str], passages: Sequence[str]) -> list[tuple[int, int]]:
    """(query, block) of a batch that are no negatives although they are not of one passage, all texts `folded`, one each a passage.

    Such a block equals the query's own, or its passage holds the query's sentence too, be it that just there it was taken out.
    """
    pairs = []
    for i, query in enumerate(queries):
        for j, passage in enumerate(passages):
            if i != j and (blocks[i] == blocks[j] or query in passage):
                pairs.append((i, j))
    return pairs

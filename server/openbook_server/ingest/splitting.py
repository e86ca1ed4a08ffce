"""Documents into passages: whole sentences, up to a number of tokens, neighbours sharing their last sentences.

A passage's text is exactly a slice of its document's text, so offsets hold; every character that is not white space is
in at least one passage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from openbook_server.knowledge import Document, Passage

# A sentence ends at ., ! or ? (with closing quotes or brackets) before white space and something that can begin one;
# a blank line always ends it. Initials and common abbreviations do not.
_BOUNDARY = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[^\Wa-z_])|\n\s*\n", re.UNICODE)
_ABBREVIATION = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|No|Fig|approx|Inc|Ltd|Jr|Sr))\.$")

Unit = tuple[int, int, int]  # start, end in characters, and how many tokens


def split(documents: Sequence[Document], tokenizer: Tokenizer, *, passage_tokens: int, overlap: int) -> list[list[Passage]]:
    """The passages of each document, in order; a document without text has none.

    Args:
        tokenizer: of the bundle; counts without special tokens.
        passage_tokens: longest passage.
        overlap: neighbouring passages share whole sentences of up to this many tokens.
    """
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [
        [
            Passage(
                id=f"{document.id}#{number}",
                document_id=document.id,
                text=document.text[start:end],
                start=start,
                title=document.title,
                source=document.source,
                metadata=document.metadata,
            )
            for number, (start, end) in enumerate(
                _windows(_units(document.text, encoding.offsets, passage_tokens), passage_tokens, overlap)
            )
        ]
        for document, encoding in zip(documents, encodings, strict=True)
    ]


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, without the white space around it; together they hold every other character."""
    spans = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        closing = len(match.group()) - len(match.group().lstrip("\"'”’)]"))
        end = match.start() + closing
        if "\n\n" not in match.group() and _ABBREVIATION.search(text, max(0, end - 8), end):
            continue
        spans.append((start, end))
        start = match.end()
    spans.append((start, len(text)))
    trimmed = []
    for begin, end in spans:
        body = text[begin:end]
        if stripped := body.strip():
            begin += len(body) - len(body.lstrip())
            trimmed.append((begin, begin + len(stripped)))
    return trimmed


def _units(text: str, offsets: Sequence[tuple[int, int]], limit: int) -> list[Unit]:
    """Sentences with their token counts; one over the limit is cut between tokens."""
    units: list[Unit] = []
    token = 0
    for start, end in sentences(text):
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        if token - first <= limit:
            units.append((start, end, token - first))
            continue
        cuts = list(range(first, token, limit))
        for at, cut in enumerate(cuts):
            begin = start if at == 0 else offsets[cut][0]
            stop = offsets[cuts[at + 1]][0] if at + 1 < len(cuts) else end
            units.append((begin, begin + len(text[begin:stop].rstrip()), min(limit, token - cut)))
    return units


def _windows(units: Sequence[Unit], limit: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of runs of units that keep to the limit; each run begins with the last units of the one before."""
    windows = []
    first = 0
    while first < len(units):
        last, total = first, units[first][2]
        while last + 1 < len(units) and total + units[last + 1][2] <= limit:
            last += 1
            total += units[last][2]
        windows.append((units[first][0], units[last][1]))
        if last + 1 == len(units):
            break
        following, shared = last + 1, 0
        while following > first + 1 and shared + units[following - 1][2] <= overlap:
            following -= 1
            shared += units[following][2]
        if shared + units[last + 1][2] > limit:  # the shared sentences would leave no room for a new one
            following = last + 1
        first = following
    return windows

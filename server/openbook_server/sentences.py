"""Where the sentences of a text begin and end, by rules for English and its like: pure.

Stricter than `openbook_training.sentences`, where an abbreviation may end one: passages are cut here, and words compared within.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A sentence ends at ., ! or ? (with closing quotes or brackets) before white space and something that can begin one;
# a blank line always ends it. Initials and common abbreviations do not.
_BOUNDARY = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[^\Wa-z_])|\n\s*\n", re.UNICODE)
_BLANK_LINE = re.compile(r"\n\s*\n")
_ABBREVIATION = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|No|Fig|approx|Inc|Ltd|Jr|Sr))\.$")

LONGEST_SENTENCE = 4_000  # characters; what goes on without an end (a table, a base64 blob) is cut


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, without the white space around it; together they hold every other character."""
    spans = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        closing = len(match.group()) - len(match.group().lstrip("\"'”’)]"))
        end = match.start() + closing
        if not _BLANK_LINE.search(match.group()) and _ABBREVIATION.search(text, max(0, end - 8), end):
            continue
        spans.append((start, end))
        start = match.end()
    spans.append((start, len(text)))
    trimmed = []
    for begin, end in (part for span in spans for part in _cut(text, *span)):
        body = text[begin:end]
        if stripped := body.strip():
            begin += len(body) - len(body.lstrip())
            trimmed.append((begin, begin + len(stripped)))
    return trimmed


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A span in parts of at most `LONGEST_SENTENCE` characters, cut at white space where there is some."""
    while end - start > LONGEST_SENTENCE:
        stop = next((at for at in range(start + LONGEST_SENTENCE, start, -1) if text[at].isspace()), start + LONGEST_SENTENCE)
        yield start, stop
        start = stop
    yield start, end

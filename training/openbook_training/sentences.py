"""Where the sentences of a text begin and end: by full stops, question and exclamation marks before a capital letter or a digit.

An abbreviation before a name ("Dr. Smith") ends a sentence too: what is made of sentences here tolerates a short one.
`openbook_server.sentences` has a stricter rule, which knows abbreviations; training and server share no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each, the white space behind it included; together they are the text."""
    start = 0
    for match in _SENTENCE_END.finditer(text):
        yield start, match.end()
        start = match.end()
    if start < len(text):
        yield start, len(text)

"""Documents into passages: whole sentences, up to a number of tokens, and of characters where tokens say little.

Neighbours share their last sentences.

A passage's text is exactly a slice of its document's text, so offsets hold; every character that is not white space is
in at least one passage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer

from openbook_server.ingest.parts import Parts
from openbook_server.knowledge import Document, Passage
from openbook_server.sentences import LONGEST_SENTENCE, sentences

_PART_CHARACTERS = 100_000  # tokenised at a time, in some tenths of a second
_CHARACTERS_A_TOKEN = 20  # of a passage on average, at most: text has four or five, a word of megabytes is one [UNK], white space is none

Unit = tuple[int, int, int]  # start, end in characters, and how many tokens


def split(documents: Sequence[Document], tokenizer: Tokenizer, *, passage_tokens: int, overlap: int) -> Parts[list[list[Passage]]]:
    """The passages of each document, in order; a document without text has none.

    Args:
        tokenizer: of the bundle; counts without special tokens.
        passage_tokens: longest passage.
        overlap: neighbouring passages share whole sentences of up to this many tokens.
    """
    measured = yield from _measured(documents, tokenizer, passage_tokens)
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
            for number, (start, end) in enumerate(_windows(units, passage_tokens, overlap))
        ]
        for document, units in zip(documents, measured, strict=True)
    ]


def _measured(documents: Sequence[Document], tokenizer: Tokenizer, limit: int) -> Parts[list[list[Unit]]]:
    """The units of each document. Texts are tokenised in parts of whole sentences: the tokens of a huge one never exist at once."""
    units: list[list[Unit]] = [[] for _ in documents]
    waiting: list[tuple[int, list[tuple[int, int]]]] = []
    characters = 0

    def finish() -> None:
        nonlocal characters
        texts = [documents[at].text[spans[0][0] : spans[-1][1]] for at, spans in waiting]
        for (at, spans), encoding in zip(waiting, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            units[at] += _units(documents[at].text, spans, encoding.offsets, limit)
        waiting.clear()
        characters = 0

    for at, document in enumerate(documents):
        part: list[tuple[int, int]] = []
        for span in sentences(document.text):
            part.append(span)
            characters += span[1] - span[0]
            if characters >= _PART_CHARACTERS:
                waiting.append((at, part))
                part = []
                finish()
                yield
        if part:
            waiting.append((at, part))
    finish()
    return units


def _units(text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], limit: int) -> list[Unit]:
    """Sentences with their token counts; one over the limit is cut between tokens, but not within a character. `offsets` count from the
    first sentence."""
    base = spans[0][0]
    offsets = [(start + base, end + base) for start, end in offsets]
    units: list[Unit] = []
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        begin = start
        while begin == start or first < token:
            cut = _cut(offsets, first, token, limit)
            stop = offsets[cut][0] if cut < token else end
            units.append((begin, begin + len(text[begin:stop].rstrip()), cut - first))
            begin, first = stop, cut
    return units


def _cut(offsets: Sequence[tuple[int, int]], first: int, end: int, limit: int) -> int:
    """The token before which a unit ends that begins with token `first` of a sentence, which goes up to `end`: as late as the limit allows
    where no character is cut. One may be of several tokens, as a syllable of Hangul is; one of more than the limit is a unit by itself."""
    if end - first <= limit:
        return end
    places = chain(range(first + limit, first, -1), range(first + limit + 1, end))
    return next((at for at in places if offsets[at - 1][1] <= offsets[at][0]), end)


def _windows(units: Sequence[Unit], limit: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of runs of units that keep to the limit; each run begins with the last units of the one before."""
    longest = max(_CHARACTERS_A_TOKEN * limit, LONGEST_SENTENCE)  # characters; no unit has more
    windows = []
    first = 0
    while first < len(units):
        last, total = first, units[first][2]
        while last + 1 < len(units) and total + units[last + 1][2] <= limit and units[last + 1][1] - units[first][0] <= longest:
            last += 1
            total += units[last][2]
        windows.append((units[first][0], units[last][1]))
        if last + 1 == len(units):
            break
        following, shared = last + 1, 0
        while following > first + 1 and shared + units[following - 1][2] <= overlap:
            following -= 1
            shared += units[following][2]
        if shared + units[last + 1][2] > limit or units[last + 1][1] - units[following][0] > longest:  # no room for a new one
            following = last + 1
        first = following
    return windows

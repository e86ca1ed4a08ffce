"""Salient spans of a text by rules: dates, numbers and capitalised names, what knowledge of the world is needed for.

Guu et al. 2020 (section 3.4) find them by a tagger of named entities and a regular expression for dates. Rules miss names that are
written without capitals and take some words for names that are none; neither needs a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from openbook_training.recurring import FUNCTION_WORDS

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"(?:Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec)\.)"
)
_YEAR = r"(?:1\d{3}|20\d{2})"
_DATE = re.compile(
    rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:,? {_YEAR})?|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?\b(?:,? {_YEAR}\b)?|"
    rf"{_MONTH},? {_YEAR}|\d{{1,4}} (?:BCE?|CE|AD)|{_YEAR}s?|\d{{1,2}}(?:st|nd|rd|th) century)(?!\w)"
)
_NUMBER = re.compile(r"(?<![\w.,])[$€£¥]?\d+(?:[.,]\d+)*(?:%|(?:st|nd|rd|th)\b| (?:percent|thousand|million|billion|trillion)\b)?(?!\w)")
_WORD = re.compile(r"[^\W\d_](?:[\w’]|['\-&](?=\w)|\.(?=[^\W\d_]\b))*")
_INSIDE = frozenset("of the de la le du del der den van von bin".split())  # words that a name may have between capitals
_JOINT = re.compile(r"\.? ")  # a full stop stays inside only after an initial


def salient_spans(text: str, familiar: frozenset[str] = frozenset()) -> list[tuple[int, int]]:
    """(start, end) of every salient span of a sentence, in order; none overlaps another.

    Args:
        text: one sentence.
        familiar: words known to be written with a capital inside sentences (`capitalised`). The first word of a sentence has
            a capital anyway, and alone is a name only where it is one of them.
    """
    found: list[tuple[int, int]] = []
    for spans in (_matches(_DATE, text), _matches(_NUMBER, text), _names(text, familiar)):
        taken = list(found)
        found += [(a, b) for a, b in spans if all(b <= start or end <= a for start, end in taken)]
    return sorted(found)


def capitalised(sentences: list[str]) -> frozenset[str]:
    """Words that begin with a capital inside one of the sentences."""
    return frozenset(match[0] for text in sentences for match in list(_WORD.finditer(text))[1:] if match[0][0].isupper())


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in pattern.finditer(text))


def _names(text: str, familiar: frozenset[str]) -> Iterator[tuple[int, int]]:
    words = list(_WORD.finditer(text))
    at = 0
    while at < len(words):
        end = at
        if words[at][0][0].isupper() and (_is_acronym(words[at][0]) or words[at][0].casefold() not in FUNCTION_WORDS):
            end = _end_of_name(text, words, at)
        if end > at and (end - at > 1 or at or words[at][0] in familiar or _is_acronym(words[at][0])):
            yield words[at].start(), words[end - 1].end()
        at = max(end, at + 1)


def _end_of_name(text: str, words: list[re.Match[str]], at: int) -> int:
    """The word behind the name that begins with word `at`."""
    end = probe = at + 1
    while probe < len(words):
        gap = text[words[probe - 1].end() : words[probe].start()]
        if not _JOINT.fullmatch(gap) or (gap[0] == "." and len(words[probe - 1][0]) > 1):
            break
        if words[probe][0][0].isupper():
            end = probe + 1
        elif words[probe][0] not in _INSIDE or probe - end > 1:
            break
        probe += 1
    return end


def _is_acronym(word: str) -> bool:
    return sum(character.isupper() for character in word) > 1

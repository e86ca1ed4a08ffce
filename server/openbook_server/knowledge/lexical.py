"""Which words of a question are looked for, and in what."""

from __future__ import annotations

import re

MAX_TERMS = 32  # of a question; the rest of a longer one is left out, rare words are not known to come first
_WORD = re.compile(r"\w+")
# Words that nearly every passage holds: they cost time and move no ranking.
_STOP_WORDS = frozenset(
    "a an and are as at be but by can could did do does for from had has have he her his how i in into is it its me my of on or "
    "our she should so than that the their them then there these they this to was we were what when where which while who "
    "whom whose why will with would you your".split()
)


def searched_text(title: str, text: str) -> str:
    """Of a passage, what words are looked for in."""
    return f"{title}\n{text}"


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case."""
    return _WORD.findall(text.casefold())


def word_line(text: str) -> str:
    """The words of a text in order, each between two spaces: what a phrase's words are found in as they would be in a string."""
    return f" {' '.join(words(text))} "


def content_words(asked: list[str]) -> list[str]:
    """The different words of a question without stop words, unless it has no others."""
    different = list(dict.fromkeys(asked))
    return [word for word in different if word not in _STOP_WORDS] or different


def question_words(question: str) -> list[str]:
    """The words of a question that are looked for."""
    return content_words(words(question))[:MAX_TERMS]

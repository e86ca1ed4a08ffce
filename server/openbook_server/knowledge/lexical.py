"""Which words of a question are looked for, and in what."""

from __future__ import annotations

import re
from typing import Any

import tantivy

from openbook_server.sentences import sentences

MAX_TERMS = 32  # of a question; the rest of a longer one is left out, rare words are not known to come first
_LONGEST_WORD = 128  # bytes; a longer one is no word
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


def analyser() -> Any:
    """Texts to words without case and accents, as English stems (Snowball's Porter2)."""
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.remove_long(_LONGEST_WORD))
    builder = builder.filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.ascii_fold())
    return builder.filter(tantivy.Filter.stemmer("english")).build()


_analyser = analyser()


def stems(text: str) -> list[str]:
    """The stems of a text's words in order."""
    found: list[str] = _analyser.analyze(text)
    return found


def stem_lines(text: str) -> str:
    """A line for each sentence of a text: its stems, each between two spaces, so that a phrase's stems are found as a string is."""
    return "\n".join(f" {' '.join(stems(text[start:end]))} " for start, end in sentences(text))


def content_words(asked: list[str]) -> list[str]:
    """The different words of a question without stop words, unless it has no others."""
    different = list(dict.fromkeys(asked))
    return [word for word in different if word not in _STOP_WORDS] or different


def question_words(question: str) -> list[str]:
    """The words of a question that are looked for."""
    return content_words(words(question))[:MAX_TERMS]

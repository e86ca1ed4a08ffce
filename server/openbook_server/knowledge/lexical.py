"""Words: of a question, which are looked for; of a passage, what they are looked for in. Both are cut out and compared alike."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import tantivy

from openbook_server.sentences import sentences

MAX_TERMS = 32  # of a question; the rest of a longer one is left out, rare words are not known to come first
_LONGEST_WORD = 128  # bytes; a longer one is no word
# Words that nearly every passage holds: they cost time and move no ranking.
_STOP_WORDS = frozenset(
    "a an and are as at be but by can could did do does for from had has have he her his how i in into is it its me my of on or "
    "our she should so than that the their them then there these they this to was we were what when where which while who "
    "whom whose why will with would you your".split()
)
# Letters, digits, and the marks that belong to them, without which Indic words come in pieces. tantivy's simple tokenizer takes half the
# time and leaves out some of the marks, so it cuts texts without characters of the blocks in which there are marks.
_WORD = r"[\p{Alphabetic}\p{M}\p{N}]+"
_MAY_BE_MARKED = re.compile(r"[\u0300-\u1dff\u20d0-\u20ff\u2c00-\U0010ffff]")


def _cutter(tokenizer: Any) -> Any:
    return tantivy.TextAnalyzerBuilder(tokenizer).filter(tantivy.Filter.remove_long(_LONGEST_WORD))


def _stemmer(tokenizer: Any) -> Any:
    """Without accents before lower case: the other way round "İ" keeps its dot, and some accented letters come out as capitals."""
    return (
        _cutter(tokenizer).filter(tantivy.Filter.ascii_fold()).filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.stemmer("english"))
    )


_cutters = _cutter(tantivy.Tokenizer.simple()).build(), _cutter(tantivy.Tokenizer.regex(_WORD)).build()
_stemmers = _stemmer(tantivy.Tokenizer.simple()).build(), _stemmer(tantivy.Tokenizer.regex(_WORD)).build()


def _analysed(text: str, analysers: tuple[Any, Any]) -> list[str]:
    found: list[str] = analysers[_MAY_BE_MARKED.search(text) is not None].analyze(text)
    return found


def searched_text(title: str, text: str) -> str:
    """Of a passage, what words are looked for in."""
    return f"{title}\n{text}"


def words(text: str) -> list[str]:
    """The words of a text in order, as they stand in it, but with letters and their marks composed (Unicode's NFC)."""
    return _analysed(unicodedata.normalize("NFC", text), _cutters)


def stems(text: str) -> list[str]:
    """The same words as English stems (Snowball's Porter2), without case and accents."""
    return _analysed(unicodedata.normalize("NFC", text).replace("ς", "σ"), _stemmers)  # the lower case of Σ is σ wherever it stands


def stem_lines(text: str) -> str:
    """A line for each sentence of a text: its stems, each between two spaces, so that a phrase's stems are found as a string is."""
    return "\n".join(f" {' '.join(stems(text[start:end]))} " for start, end in sentences(text))


def content_words(asked: list[str]) -> list[str]:
    """The different words of a question without stop words, unless it has no others."""
    different = {word.lower(): word for word in asked}
    return [word for lower, word in different.items() if lower not in _STOP_WORDS] or list(different.values())


def question_words(question: str) -> list[str]:
    """The words of a question that are looked for."""
    return content_words(words(question))[:MAX_TERMS]

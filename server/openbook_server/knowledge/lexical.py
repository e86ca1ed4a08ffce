"""BM25 over words by SQLite's FTS5: the same file and the same transaction as the passages, so never out of step."""

from __future__ import annotations

import itertools
import re
import sqlite3

MAX_TERMS = 32  # of a question; the rest of a longer one is left out, rare words are not known to come first
_WORD = re.compile(r"\w+")
# Words that nearly every passage holds: they cost time and move no ranking.
_STOP_WORDS = frozenset(
    "a an and are as at be but by can could did do does for from had has have he her his how i in into is it its me my of on or "
    "our she should so than that the their them then there these they this to was we were what when where which while who "
    "whom whose why will with would you your".split()
)

SCHEMA = "CREATE VIRTUAL TABLE words USING fts5(title, text, content='passages', content_rowid='number', tokenize='porter unicode61')"


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case."""
    return _WORD.findall(text.casefold())


def content_words(asked: list[str]) -> list[str]:
    """The different words of a question without stop words, unless it has no others."""
    different = list(dict.fromkeys(asked))
    return [word for word in different if word not in _STOP_WORDS] or different


def question_words(question: str) -> list[str]:
    """The words of a question that are looked for."""
    return content_words(words(question))[:MAX_TERMS]


def match_expression(question: str) -> str | None:
    """The question as an FTS5 query: its content words, each quoted, OR-ed; None where it has no word at all.

    Quoting makes every character of the question harmless.
    """
    return " OR ".join(f'"{word}"' for word in question_words(question)) or None


def search_words(connection: sqlite3.Connection, question: str, limit: int, allowed: frozenset[int] | None = None) -> dict[int, float]:
    """Passage number -> BM25 (k1 1.2, b 0.75, Porter stems) of at most `limit` passages, higher is better, best first.

    Args:
        allowed: only these passages; None = all.
    """
    expression = match_expression(question)
    if expression is None:
        return {}
    query = "SELECT rowid, -rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?"
    rows = connection.execute(query, (expression, limit if allowed is None else -1))  # a negative limit is none
    wanted = rows if allowed is None else (row for row in rows if row[0] in allowed)
    return {number: max(score, 0.0) for number, score in itertools.islice(wanted, limit)}

"""BM25 over words by SQLite's FTS5: the same file and the same transaction as the passages, so never out of step."""

from __future__ import annotations

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


def match_expression(question: str) -> str | None:
    """The question as an FTS5 query: its words, each quoted, OR-ed; None where it has no word at all.

    Stop words count only where there is nothing else. Quoting makes every character of the question harmless.
    """
    words = list(dict.fromkeys(_WORD.findall(question.casefold())))
    chosen = [word for word in words if word not in _STOP_WORDS] or words
    return " OR ".join(f'"{word}"' for word in chosen[:MAX_TERMS]) or None


def search_words(connection: sqlite3.Connection, question: str, limit: int) -> dict[int, float]:
    """Passage number -> BM25 (k1 1.2, b 0.75, Porter stems), higher is better, best first."""
    expression = match_expression(question)
    if expression is None:
        return {}
    rows = connection.execute("SELECT rowid, -rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?", (expression, limit))
    return {number: max(score, 0.0) for number, score in rows}

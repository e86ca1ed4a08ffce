"""BM25 over words: a buffer in memory for the fresh rows, tantivy for the many.

It is derived, as the vectors' graph is: a row is searchable when `add` returns; what is on the disk is looked at only when an
index is opened, is then compared with the store by row numbers, and built again where it is damaged. Both halves score by the
statistics of all rows: tantivy's stems are boosted by what the buffer changes in their idf. Rows are never deleted inside
tantivy: they are left out of what it finds, until most are gone and it is built again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge import saved_words
from openbook_server.knowledge.lexical import question_words, stems
from openbook_server.knowledge.word_buffer import WordBuffer, idf

log = logging.getLogger(__name__)

FOLDER = "words"
BUFFER_LIMIT = 2_000  # rows that are kept in memory before they move into tantivy
_ROWS_AT_ONCE = 1_000  # read from the store

Texts = Callable[[Sequence[int]], Mapping[int, str]]


class WordIndex:
    """Rows with the words of their texts; safe to use from several threads."""

    def __init__(self, folder: Path, texts: Texts, live: frozenset[int], last: int, *, buffer_limit: int = BUFFER_LIMIT) -> None:
        """Open what is saved and bring it up to the store.

        Args:
            folder: of the knowledge base.
            texts: of those rows that are stored.
            live: every row that is stored.
            last: number of the row that was stored last, whether it still is or not.
        """
        self._folder, self._buffer_limit = folder / FOLDER, buffer_limit
        self._writing = threading.RLock()  # of who adds, deletes or saves
        self._lock = threading.Lock()  # of the two halves
        self._buffer = WordBuffer()
        self._fresh: dict[int, str] = {}  # texts of the buffer's rows
        self._saved = saved_words.load(self._folder, last)
        self._gone = set(self._saved.rows - live) if self._saved else set[int]()
        self._torn = False  # what is on the disk is no longer what `_saved` is
        self._full = buffer_limit  # rows of the buffer with which it is saved
        missing = sorted(live - self._saved.rows if self._saved else live)
        for at in range(0, len(missing), _ROWS_AT_ONCE):
            found = texts(missing[at : at + _ROWS_AT_ONCE])
            self.add(list(found), list(found.values()))
            self.settle(texts)

    @property
    def saved_rows(self) -> int:
        """Live rows in tantivy; the others are in memory."""
        return len(self._saved.rows) - len(self._gone) if self._saved else 0

    def add(self, rows: Sequence[int], texts: Sequence[str]) -> None:
        """Make rows searchable at once, in memory; none of them may be in the index. `settle` is to be called afterwards."""
        analysed = [stems(text) for text in texts]
        with self._writing, self._lock:
            for row, text, found in zip(rows, texts, analysed, strict=True):
                self._buffer.add(row, found)
                self._fresh[row] = text

    def settle(self, texts: Texts) -> None:
        """After rows were added: move a full buffer into tantivy. Searches go on meanwhile. `texts` as `flush` takes them."""
        with self._writing:
            if len(self._buffer) < self._full:
                return
            try:
                if self._torn:
                    self._rebuild(texts)
                else:
                    self._move()
            except KnowledgeBaseDamaged as error:  # the rows stay searchable, in memory
                self._full = len(self._buffer) + self._buffer_limit
                log.warning("%s; it is tried again with the next snapshot, or %d passages", error, self._buffer_limit)

    def delete(self, rows: Iterable[int]) -> None:
        """Take rows out of every later search; unknown ones are ignored."""
        with self._writing, self._lock:
            for row in rows:
                if row in self._buffer:
                    self._buffer.remove(row)
                    del self._fresh[row]
                elif self._saved and row in self._saved.rows:
                    self._gone.add(row)

    def search(self, question: str, limit: int, allowed: frozenset[int] | None = None) -> dict[int, float]:
        """Row -> BM25 (k1 1.2, b 0.75, English stems) of at most `limit` rows that share a word with the question, best first.

        Args:
            allowed: only these rows; None = all.
        """
        asked = list(dict.fromkeys(stems(" ".join(question_words(question)))))
        with self._lock:  # a row that moves from one half to the other is in exactly one of them
            saved, gone, buffer = self._saved, self._gone, self._buffer
            rows, held = len(buffer) + (len(saved.rows) if saved else 0), {}
            if saved:
                held = {stem: count for stem in asked if (count := saved.holding(stem))}
            weights = {stem: idf(held.get(stem, 0) + buffer.holding(stem), rows) for stem in asked}
            average = (buffer.stems + (saved.stems if saved else 0)) / max(rows, 1)
            found = buffer.scores(weights.items(), average, allowed)
        if saved and held:
            boosts = {stem: weights[stem] / idf(count, len(saved.rows)) for stem, count in held.items()}
            found |= saved.search(boosts, limit, gone, allowed)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:limit])

    def flush(self, texts: Texts) -> None:
        """Save everything, where something is saved already or the buffer is large; build again what is mostly gone.

        Args:
            texts: of those rows that are stored.

        Raises:
            KnowledgeBaseDamaged: the disk is full or the folder cannot be written; every row stays searchable.
        """
        with self._writing:
            if self._torn or len(self._gone) > self.saved_rows:
                self._rebuild(texts)
            elif len(self._buffer) and (self._saved or len(self._buffer) >= self._buffer_limit):
                self._move()

    def _move(self) -> None:
        """The buffer's rows into tantivy, beside those that are there."""
        self._save(self._saved, self._fresh.items(), self._gone)

    def _rebuild(self, texts: Texts) -> None:
        rows = sorted((self._saved.rows if self._saved else frozenset()) - self._gone | self._fresh.keys())
        log.info("building the index of words of %d passages again", len(rows))
        batches = (texts(rows[at : at + _ROWS_AT_ONCE]) for at in range(0, len(rows), _ROWS_AT_ONCE))
        self._save(None, (item for batch in batches for item in batch.items()), set())

    def _save(self, base: saved_words.SavedWords | None, texts: Iterable[tuple[int, str]], gone: set[int]) -> None:
        self._torn = True
        saved = saved_words.save(self._folder, base, texts)
        self._torn = False
        with self._lock:
            self._saved, self._gone, self._buffer, self._fresh = saved, gone, WordBuffer(), {}
        self._full = self._buffer_limit

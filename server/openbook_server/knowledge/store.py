"""The truth: documents, passages and vectors in one SQLite file.

Every write is one transaction, fsynced before it returns (WAL, synchronous=FULL), so what was acknowledged survives
`kill -9` and a power cut. Passage numbers are never used twice, which is what lets derived indexes be compared with the
store by number alone.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge import filters
from openbook_server.knowledge.records import Counts, Document, Passage

FORMAT = 2  # raised whenever an older server would misread the file; 1 had an index of words in it
FILE = "knowledge.sqlite"

_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE documents (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, "
    "source TEXT NOT NULL, metadata TEXT NOT NULL)",
    "CREATE TABLE passages (number INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents (number), "
    "id TEXT NOT NULL UNIQUE, start INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, vector BLOB NOT NULL)",
    "CREATE INDEX passages_by_document ON passages (document)",
)
_FILTERS_REMEMBERED = 64  # with what they match
_ROWS_AT_ONCE = 500  # of a query that could return any number
_PASSAGE = """
SELECT p.number, p.id, d.id, p.text, p.start, p.title, d.source, d.metadata
FROM passages p JOIN documents d ON d.number = p.document WHERE p.number IN ({marks})
"""


class Store:
    """One open SQLite file. A writer and a reader may use it from different threads at once."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Open the store of a knowledge base, creating it where there is none (unless `read_only`).

        Raises:
            KnowledgeBaseDamaged: the file is missing, damaged, or of a newer format, or the folder cannot be written.
        """
        self.path = folder / FILE
        with self._explained():
            if read_only:
                self._writer = self._reader = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, check_same_thread=False)
            else:
                self._writer = self._connect()
                self._reader = self._connect()
            if self._writer.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
        self._lock = threading.Lock()  # of the writer
        self._matched: dict[filters.Filter, tuple[int, frozenset[int]]] = {}
        version = self.meta("format")
        if version is not None and int(version) > FORMAT:
            raise KnowledgeBaseDamaged(f"{self.path} has format {version}, this server reads {FORMAT}; upgrade it: pip install -U openbook")
        if version is not None and int(version) < FORMAT and not read_only:
            self._upgrade()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        filters.add_functions(connection)
        return connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors with the file's name and the way out."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise KnowledgeBaseDamaged(
                f"{self.path}: {error}; check that it exists, that the folder can be written and that the disk has room"
            ) from error
        except sqlite3.DatabaseError as error:
            raise KnowledgeBaseDamaged(
                f"{self.path} is damaged ({error}); recover what is left with "
                f"`sqlite3 {self.path} .recover | sqlite3 recovered.sqlite`, or index the sources again into a new folder"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("UPDATE meta SET value = value + 1 WHERE key = 'sequence'")
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # on a full disk SQLite may have rolled back by itself
                    self._writer.execute("ROLLBACK")
                raise

    def initialise(self, meta: dict[str, str]) -> None:
        """Create the tables of an empty store and record what it is for."""
        with self._lock, self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                self._writer.execute(statement)
            self._writer.executemany("INSERT INTO meta VALUES (?, ?)", {"format": str(FORMAT), "sequence": "0", **meta}.items())
            self._writer.execute("COMMIT")

    def _upgrade(self) -> None:
        """From format 1, whose index of words moved out of the file."""
        with self._transaction() as connection:
            connection.execute("DROP TABLE IF EXISTS words")
            connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (str(FORMAT),))

    def meta(self, key: str) -> str | None:
        """A recorded fact about the store; None where the store is still empty."""
        with self._explained():
            if not self._reader.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                return None
            row = self._reader.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def record(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the store, beside those of `initialise`."""
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())

    def sequence(self) -> int:
        """Number of the last write."""
        return int(self.meta("sequence") or 0)

    def counts(self) -> Counts:
        with self._explained():
            [documents] = self._reader.execute("SELECT count(*) FROM documents").fetchone()
            [passages] = self._reader.execute("SELECT count(*) FROM passages").fetchone()
        return Counts(documents=documents, passages=passages)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """Digests of those documents that are stored."""
        with self._explained():
            return dict(self._reader.execute(f"SELECT id, digest FROM documents WHERE id IN ({_marks(ids)})", ids))  # noqa: S608

    def replace(
        self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> tuple[list[int], list[int]]:
        """Store documents (each with its digest) and all their passages, in place of what they had; one transaction.

        Returns:
            The passage numbers that were removed, and the new ones in the order of `passages`.
        """
        with self._transaction() as connection:
            removed = self._remove(connection, [document.id for document, _ in documents])
            numbers = {}
            for document, digest in documents:
                cursor = connection.execute(
                    "INSERT INTO documents (id, digest, source, metadata) VALUES (?, ?, ?, ?)",
                    (document.id, digest, document.source, json.dumps(dict(document.metadata))),
                )
                numbers[document.id] = cursor.lastrowid
            added = []
            for passage, vector in zip(passages, vectors, strict=True):
                row = (numbers[passage.document_id], passage.id, passage.start, passage.title, passage.text)
                cursor = connection.execute(
                    "INSERT INTO passages (document, id, start, title, text, vector) VALUES (?, ?, ?, ?, ?, ?)",
                    (*row, vector.astype("<f4").tobytes()),
                )
                added.append(int(cursor.lastrowid or 0))
        return removed, added

    def delete(self, ids: Sequence[str]) -> list[int]:
        """Remove documents; returns the numbers of the passages that went with them."""
        with self._transaction() as connection:
            return self._remove(connection, ids)

    def _remove(self, connection: sqlite3.Connection, ids: Sequence[str]) -> list[int]:
        query = f"SELECT p.number FROM passages p JOIN documents d ON d.number = p.document WHERE d.id IN ({_marks(ids)})"  # noqa: S608
        rows = connection.execute(query, ids).fetchall()
        connection.executemany("DELETE FROM passages WHERE number = ?", rows)
        connection.executemany("DELETE FROM documents WHERE id = ?", [(id_,) for id_ in ids])
        return [number for (number,) in rows]

    def passages(self, numbers: Sequence[int]) -> dict[int, Passage]:
        """Those of the passages that are stored, by number."""
        with self._explained():
            rows = self._reader.execute(_PASSAGE.format(marks=_marks(numbers)), numbers).fetchall()
        return {
            number: Passage(id=id_, document_id=document, text=text, start=start, title=title, source=source, metadata=json.loads(metadata))
            for number, id_, document, text, start, title, source, metadata in rows
        }

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """The passages, in order, of those documents that are stored and have any."""
        with self._explained():
            query = f"SELECT p.number FROM passages p JOIN documents d ON d.number = p.document WHERE d.id IN ({_marks(ids)})"  # noqa: S608
            numbers = [number for (number,) in self._reader.execute(query, ids)]
        found: dict[str, list[Passage]] = {}
        for at in range(0, len(numbers), _ROWS_AT_ONCE):
            for _, passage in sorted(self.passages(numbers[at : at + _ROWS_AT_ONCE]).items()):
                found.setdefault(passage.document_id, []).append(passage)
        return found

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        """(number, id, source, passages) of at most `size` documents whose numbers are above `after`, in order."""
        query = (
            "SELECT d.number, d.id, d.source, (SELECT count(*) FROM passages p WHERE p.document = d.number) "
            "FROM documents d WHERE d.number > ? ORDER BY d.number LIMIT ?"
        )
        with self._explained():
            return self._reader.execute(query, (after, size)).fetchall()

    def numbers(self) -> frozenset[int]:
        """Every passage's number."""
        with self._explained():
            return frozenset(number for (number,) in self._reader.execute("SELECT number FROM passages"))

    def last_number(self) -> int:
        """Of the passage stored last; later ones have higher numbers."""
        with self._explained():
            [number] = self._reader.execute("SELECT max(number) FROM passages").fetchone()
        return int(number or 0)

    def vectors(self, numbers: Sequence[int], dim: int, batch: int = _ROWS_AT_ONCE) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Stored vectors, `batch` rows at a time."""
        for at in range(0, len(numbers), batch):
            part = numbers[at : at + batch]
            with self._explained():
                query = f"SELECT number, vector FROM passages WHERE number IN ({_marks(part)})"  # noqa: S608
                rows = self._reader.execute(query, part).fetchall()
            data = b"".join(vector for _, vector in rows)
            yield [number for number, _ in rows], np.frombuffer(data, "<f4").reshape(len(rows), dim).astype(np.float32)

    def texts(self, numbers: Sequence[int]) -> dict[int, str]:
        """What words are looked for in: title and text of those passages that are stored."""
        with self._explained():
            rows = self._reader.execute(f"SELECT number, title, text FROM passages WHERE number IN ({_marks(numbers)})", numbers)  # noqa: S608
            return {number: f"{title}\n{text}" for number, title, text in rows}

    def matching(self, condition: filters.Filter) -> frozenset[int]:
        """Numbers of the passages whose documents match; remembered until the next write."""
        sequence = self.sequence()
        if self._matched.get(condition, (-1, None))[0] != sequence:
            expression, parameters = filters.sql(condition)
            query = f"SELECT p.number FROM passages p JOIN documents d ON d.number = p.document WHERE {expression}"  # noqa: S608
            with self._explained():
                numbers = frozenset(number for (number,) in self._reader.execute(query, parameters))
            if len(self._matched) >= _FILTERS_REMEMBERED:
                self._matched.clear()
            self._matched[condition] = sequence, numbers
        return self._matched[condition][1]

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))

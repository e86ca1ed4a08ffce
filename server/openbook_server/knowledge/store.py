"""The truth: documents, passages, and the vectors of every generation, in one SQLite file.

Passage numbers are never used twice, which is what lets derived indexes be compared with the store by number alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from sqlite3 import Connection

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge import filters, generations
from openbook_server.knowledge.database import Database
from openbook_server.knowledge.generations import Generation, Generations, marks
from openbook_server.knowledge.lexical import searched_text
from openbook_server.knowledge.recent_matches import RecentMatches
from openbook_server.knowledge.recent_passages import RecentPassages
from openbook_server.knowledge.records import BundlePlace, Counts, Document, Passage

log = logging.getLogger(__name__)

FORMAT = 4  # raised whenever the tables change; see `_upgrade`
FILE = "knowledge.sqlite"

_TOKENS = "tokens BLOB NOT NULL DEFAULT x''"  # of the text, see `Passage`
_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE documents (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, "
    "source TEXT NOT NULL, metadata TEXT NOT NULL)",
    "CREATE TABLE passages (number INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents (number), "
    "id TEXT NOT NULL UNIQUE, start INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, "
    f"{_TOKENS})",
    "CREATE INDEX passages_by_document ON passages (document)",
    generations.SCHEMA,
)
_ROWS_AT_ONCE = 500  # of a query that could return any number
_PASSAGE = """
SELECT p.number, p.id, d.id, p.text, p.start, p.title, p.tokens, d.source, d.metadata
FROM passages p JOIN documents d ON d.number = p.document WHERE p.number IN ({marks})
"""


class Store:
    """One open SQLite file. A writer and a reader may use it from different threads at once."""

    def __init__(self, folder: Path, *, create: bool = False, read_only: bool = False, checked: bool = False) -> None:
        """Open the store of a knowledge base.

        Args:
            create: an empty one where there is none, or the making of one was cut off; see `initialise`.
            checked: do not look through the whole file: this process did or will do so.

        Raises:
            KnowledgeBaseDamaged: the file is missing, damaged, no knowledge base, or of another format that is not read here, or
                the folder cannot be written. It is as it was then.
        """
        self.path = folder / FILE
        _check_tables(self.path, create=create)
        self._database = Database(self.path, read_only=read_only, checked=checked)
        self.generations = Generations(self._database)
        self.recent = RecentPassages(self.passages)
        self._matches = RecentMatches(self._find)
        version = int(self.meta("format") or FORMAT)
        if version > FORMAT:
            raise KnowledgeBaseDamaged(f"{self.path} has format {version}, this server reads {FORMAT}; update openbook")
        if version < FORMAT and read_only:
            raise KnowledgeBaseDamaged(
                f"{self.path} has format {version}, of an earlier version; `openbook serve` and `openbook index` bring it to {FORMAT}"
            )
        if version < FORMAT:
            log.info("%s has format %d: bringing it to %d, in one transaction", self.path, version, FORMAT)
            with self._database.transaction(counted=False) as connection:
                _upgrade(connection, version)

    def initialise(self, *, fingerprint: str, dim: int, graph_dims: int, bundle: BundlePlace) -> None:
        """Create the tables of an empty store, and its first generation, which is the live one."""
        with self._database.transaction(counted=False) as connection:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [("format", str(FORMAT)), ("sequence", "0")])
            first = generations.add(connection, fingerprint=fingerprint, dim=dim, graph_dims=graph_dims, bundle=bundle)
            generations.publish(connection, first)

    def meta(self, key: str) -> str | None:
        """A recorded fact about the store; None where the store is still empty."""
        return self._database.meta(key)

    def record(self, facts: Mapping[str, str]) -> None:
        """Keep facts about the store."""
        self._database.record(facts)

    def sequence(self) -> int:
        """Number of the last write."""
        return self._database.sequence()

    def size_bytes(self) -> int:
        """Of the file, whether it still has its name or not."""
        return self._database.size_bytes()

    def standstill(self) -> AbstractContextManager[None]:
        """Within, all that this thread reads is of one moment, whatever is written meanwhile."""
        return self._database.standstill()

    def counts(self) -> Counts:
        with self._database.read() as connection:
            [documents] = connection.execute("SELECT count(*) FROM documents").fetchone()
            [passages] = connection.execute("SELECT count(*) FROM passages").fetchone()
        return Counts(documents=documents, passages=passages)

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """Digests of those documents that are stored."""
        with self._database.read() as connection:
            return dict(connection.execute(f"SELECT id, digest FROM documents WHERE id IN ({marks(ids)})", ids))  # noqa: S608

    def replace(
        self,
        documents: Sequence[tuple[Document, str]],
        passages: Sequence[Passage],
        vectors: NDArray[np.float32],
        windows: Sequence[bytes],
        generation: Generation,
    ) -> tuple[list[int], list[int]]:
        """Store documents (each with its digest) and all their passages, in place of what they had; one transaction.

        Args:
            generation: whose vectors they are; the others lack these passages until they are filled.

        Returns:
            The passage numbers that were removed, and the new ones in the order of `passages`.
        """
        with self._database.transaction() as connection:
            removed = self._remove(connection, [document.id for document, _ in documents])
            numbers = {}
            for document, digest in documents:
                cursor = connection.execute(
                    "INSERT INTO documents (id, digest, source, metadata) VALUES (?, ?, ?, ?)",
                    (document.id, digest, document.source, json.dumps(dict(document.metadata))),
                )
                numbers[document.id] = cursor.lastrowid
            added = []
            for passage in passages:
                row = (numbers[passage.document_id], passage.id, passage.start, passage.title, passage.text, passage.tokens)
                cursor = connection.execute(
                    "INSERT INTO passages (document, id, start, title, text, tokens) VALUES (?, ?, ?, ?, ?, ?)", row
                )
                added.append(int(cursor.lastrowid or 0))
            generations.insert(connection, generation, added, vectors, windows)
        return removed, added

    def delete(self, ids: Sequence[str]) -> list[int]:
        """Remove documents; returns the numbers of the passages that went with them."""
        with self._database.transaction() as connection:
            return self._remove(connection, ids)

    def _remove(self, connection: Connection, ids: Sequence[str]) -> list[int]:
        query = f"SELECT p.number FROM passages p JOIN documents d ON d.number = p.document WHERE d.id IN ({marks(ids)})"  # noqa: S608
        rows = connection.execute(query, ids).fetchall()
        numbers = [number for (number,) in rows]
        generations.delete(connection, numbers)
        connection.executemany("DELETE FROM passages WHERE number = ?", rows)
        connection.executemany("DELETE FROM documents WHERE id = ?", [(id_,) for id_ in ids])
        return numbers

    def passages(self, numbers: Sequence[int]) -> dict[int, Passage]:
        """Those of the passages that are stored, by number."""
        found = {}
        for at in range(0, len(numbers), _ROWS_AT_ONCE):
            part = numbers[at : at + _ROWS_AT_ONCE]
            with self._database.read() as connection:
                rows = connection.execute(_PASSAGE.format(marks=marks(part)), part).fetchall()
            for number, id_, document, text, start, title, tokens, source, metadata in rows:
                facts = {} if metadata == "{}" else _facts(metadata, document)
                found[number] = Passage(
                    id=id_, document_id=document, text=text, start=start, title=title, source=source, metadata=facts, tokens=tokens
                )
        return found

    def documents(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """The passages, in order, of those documents that are stored and have any."""
        with self._database.read() as connection:
            query = f"SELECT p.number FROM passages p JOIN documents d ON d.number = p.document WHERE d.id IN ({marks(ids)})"  # noqa: S608
            numbers = [number for (number,) in connection.execute(query, ids)]
        found: dict[str, list[Passage]] = {}
        for _, passage in sorted(self.passages(numbers).items()):
            found.setdefault(passage.document_id, []).append(passage)
        return found

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        """(number, id, source, passages) of at most `size` documents whose numbers are above `after`, in order."""
        query = (
            "SELECT d.number, d.id, d.source, (SELECT count(*) FROM passages p WHERE p.document = d.number) "
            "FROM documents d WHERE d.number > ? ORDER BY d.number LIMIT ?"
        )
        with self._database.read() as connection:
            return connection.execute(query, (after, size)).fetchall()

    def last_number(self) -> int:
        """Of the passage stored last, whether it still is or not; later ones have higher numbers."""
        with self._database.read() as connection:
            row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'passages'").fetchone()
        return int(row[0]) if row else 0

    def numbers(self) -> frozenset[int]:
        """Every passage's number."""
        with self._database.read() as connection:
            return frozenset(number for (number,) in connection.execute("SELECT number FROM passages"))

    def texts(self, numbers: Sequence[int]) -> dict[int, str]:
        """What words are looked for in: title and text of those passages that are stored."""
        with self._database.read() as connection:
            rows = connection.execute(f"SELECT number, title, text FROM passages WHERE number IN ({marks(numbers)})", numbers)  # noqa: S608
            return {number: searched_text(title, text) for number, title, text in rows}

    def matching(self, condition: filters.Filter) -> frozenset[int]:
        """Numbers of the passages whose documents match; remembered until the next write."""
        return self._matches(condition, self.sequence())

    def _find(self, condition: filters.Filter) -> frozenset[int]:
        expression, parameters = filters.sql(condition)
        query = f"SELECT p.number FROM passages p JOIN documents d ON d.number = p.document WHERE {expression}"  # noqa: S608
        with self._database.read() as connection:
            return frozenset(number for (number,) in connection.execute(query, parameters))

    def close(self) -> None:
        self._database.close()


def is_there(folder: Path) -> bool:
    """Whether a folder has the file of a store.

    Raises:
        KnowledgeBaseDamaged: it is no folder, or one that this user may not look into.
    """
    try:
        if FILE not in os.listdir(folder):
            return False
        (folder / FILE).stat()
        return True
    except FileNotFoundError as error:
        if folder.exists() or not folder.is_symlink():
            return False
        raise KnowledgeBaseDamaged(f"{folder} is no folder: it is a link to nothing; name another, or mend the link") from error
    except NotADirectoryError as error:
        raise KnowledgeBaseDamaged(f"{folder} is no folder; name one, it is made where there is none") from error
    except OSError as error:
        raise KnowledgeBaseDamaged(f"{folder} cannot be read: {error.strerror}; give this user the right to read it") from error


def _check_tables(path: Path, *, create: bool) -> None:
    """Before a file is opened to be written, which changes it. One of 0 bytes is not opened at all: SQLite would remove the log beside
    it, in which there may be something to recover.

    Raises:
        KnowledgeBaseDamaged: it is empty, unless `create`, or has the tables of something else.
    """
    if create and not path.exists():
        return
    tables = set[str]()
    if not path.is_file() or path.stat().st_size:
        database = Database(path, read_only=True, checked=True)
        try:
            with database.read() as connection:
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        finally:
            database.close()
    if not {"meta", "documents", "passages"} <= tables and (tables or not create):
        raise KnowledgeBaseDamaged(
            f"{path} holds no generation: it is {'no knowledge base' if tables else 'empty'}; restore a backup, or make a new knowledge "
            f"base: openbook index BUNDLE ANOTHER-FOLDER SOURCES..."
        )


def _upgrade(connection: Connection, version: int) -> None:
    if version < 2:
        _to_format_2(connection)
    if version < 3:
        connection.execute(f"ALTER TABLE passages ADD COLUMN {_TOKENS}")  # those that are stored stay without
    generations.add_windows(connection)  # nor have they windows: only a graph of a later export gives any
    connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (str(FORMAT),))


def _to_format_2(connection: Connection) -> None:
    """Format 1 had one generation: its facts among those of the store, its vectors in the rows of the passages; and it had an
    index of words, which is now beside it."""
    connection.execute("DROP TABLE IF EXISTS words")
    facts = dict(connection.execute("SELECT key, value FROM meta"))
    connection.execute(generations.SCHEMA)
    first = generations.add(
        connection,
        fingerprint=facts["fingerprint"],
        dim=int(facts["dim"]),
        graph_dims=int(facts.get("graph_dims", 0)),
        bundle=BundlePlace(),
    )
    generations.publish(connection, first)
    connection.execute(f"INSERT INTO {first.table} (passage, vector) SELECT number, vector FROM passages")  # noqa: S608
    connection.execute("ALTER TABLE passages DROP COLUMN vector")
    connection.execute("DELETE FROM meta WHERE key IN ('fingerprint', 'dim', 'graph_dims', 'generation')")


def _facts(metadata: str, document: str) -> dict[str, str]:
    """A byte that the disk changed costs one document its metadata; raised, it would cost every request that meets it."""
    with suppress(ValueError):
        facts = json.loads(metadata)
        if isinstance(facts, dict):
            return facts
    log.warning("the metadata of document %r is damaged and read as none; delete it and write it again", document)
    return {}

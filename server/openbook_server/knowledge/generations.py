"""The generations of a knowledge base in a folder: which there are, which one is live, and the vectors of each.

A generation is an embedder with the parameters of its graph, and the bundle that goes with it. Passages belong to all of
them; vectors are kept once an embedder, in a table of its own, so that generations of one embedder share them. What a generation
lacks are the passages without a vector in its table: that is all that building one, going on after a stop, and bringing an
older one up to date mean. Live is the one that was published last, so publishing is one statement: a crash leaves the one
before or this one, never a mixture.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge.database import Database
from openbook_server.knowledge.graph import EF_CONSTRUCTION
from openbook_server.knowledge.graph import M as LINKS
from openbook_server.knowledge.records import BundlePlace
from openbook_server.knowledge.vectors import check_vectors
from openbook_server.knowledge.windows import Nearness, Signs, nearness

SCHEMA = (
    "CREATE TABLE generations (number INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL, dim INTEGER NOT NULL, "
    "graph_dims INTEGER NOT NULL, bundle_id TEXT NOT NULL, bundle TEXT NOT NULL, published INTEGER NOT NULL)"
)
_PREFIX = "vectors_"  # of the tables of vectors
_WINDOWS = "windows_"  # of those of windows, see `PassageVectors`
_ROWS_AT_ONCE = 500  # of a query that could return any number


@dataclass(frozen=True, slots=True)
class Generation:
    number: int  # grows, and is never used twice
    fingerprint: str  # of its embedder
    dim: int  # of its vectors
    graph_dims: int  # dimensions of what its graph holds; 0 = as few as the data allow
    bundle: BundlePlace  # that it is served with
    published: int  # grows with every publication: the highest is live; 0 = it never was

    @property
    def name(self) -> str:
        """<number>-<digest of embedder and parameters>"""
        parameters = f"{self.fingerprint}/{self.dim}/{LINKS}/{EF_CONSTRUCTION}/{self.graph_dims}"
        return f"{self.number}-{hashlib.sha256(parameters.encode()).hexdigest()[:12]}"

    @property
    def table(self) -> str:
        """Of its vectors."""
        return _PREFIX + hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]

    @property
    def windows_table(self) -> str:
        """Of its passages' windows: a table of its own, for they are read without the vectors, and those without them."""
        return _windows_of(self.table)


class Generations:
    """Those of one store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[Generation]:
        """By number; none in a store that is still empty."""
        if self._database.meta("format") is None:
            return []
        with self._database.read() as connection:
            return _read(connection)

    def live(self) -> Generation | None:
        """The one that answers; None in a store that is still empty."""
        return max((generation for generation in self.all() if generation.published), key=lambda found: found.published, default=None)

    def previous(self) -> Generation | None:
        """The one that was live before; None where there was none, or it was removed."""
        published = sorted((generation for generation in self.all() if generation.published), key=lambda found: found.published)
        return published[-2] if len(published) > 1 else None

    def add(self, *, fingerprint: str, dim: int, graph_dims: int, bundle: BundlePlace) -> Generation:
        """A new one, not yet published; it lacks every passage unless another generation has its embedder."""
        with self._database.transaction(counted=False) as connection:
            return add(connection, fingerprint=fingerprint, dim=dim, graph_dims=graph_dims, bundle=bundle)

    def change(self, generation: Generation) -> None:
        """Record its parameters and its bundle as they are given."""
        row = (generation.graph_dims, generation.bundle.id, generation.bundle.folder, generation.number)
        with self._database.transaction(counted=False) as connection:
            connection.execute("UPDATE generations SET graph_dims = ?, bundle_id = ?, bundle = ? WHERE number = ?", row)

    def publish(self, generation: Generation) -> bool:
        """Make it the live one, unless it lacks a passage; returns whether it is the live one now."""
        with self._database.transaction() as connection:
            if _lacking(connection, generation, 0, 1):
                return False
            publish(connection, generation)
            return True

    def remove(self, generation: Generation) -> None:
        """Forget it for good, and its vectors where no other generation has its embedder."""
        with self._database.transaction(counted=False) as connection:
            connection.execute("DELETE FROM generations WHERE number = ?", (generation.number,))
            if all(other.table != generation.table for other in _read(connection)):
                connection.execute(f"DROP TABLE {generation.table}")
                connection.execute(f"DROP TABLE {generation.windows_table}")
        self._database.shrink()

    def numbers(self, generation: Generation) -> frozenset[int]:
        """Of the passages that it has vectors of."""
        with self._database.read() as connection:
            return frozenset(number for (number,) in connection.execute(f"SELECT passage FROM {generation.table}"))  # noqa: S608

    def bytes_a_passage(self, generation: Generation) -> float:
        """Of a passage's vector and its windows, as many as those of the first ones take on average: to add up all is to read all."""
        first = f"SELECT length(vectors) AS size FROM {generation.windows_table} LIMIT {_ROWS_AT_ONCE}"  # noqa: S608
        with self._database.read() as connection:
            [windows] = connection.execute(f"SELECT coalesce(avg(size), 0) FROM ({first})").fetchone()  # noqa: S608
        return 4 * generation.dim + float(windows)

    def count(self, generation: Generation) -> int:
        """Passages that it has vectors of."""
        with self._database.read() as connection:
            [rows] = connection.execute(f"SELECT count(*) FROM {generation.table}").fetchone()  # noqa: S608
        return int(rows)

    def vectors(self, generation: Generation, numbers: Sequence[int]) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Its vectors of those passages that it has, some at a time."""
        for at in range(0, len(numbers), _ROWS_AT_ONCE):
            part = numbers[at : at + _ROWS_AT_ONCE]
            query = f"SELECT passage, vector FROM {generation.table} WHERE passage IN ({marks(part)})"  # noqa: S608
            with self._database.read() as connection:
                rows = connection.execute(query, part).fetchall()
            try:
                vectors = _unpacked([vector for _, vector in rows], generation.dim)
            except ValueError as error:
                raise KnowledgeBaseDamaged(
                    f"{self._database.path}: {self._damaged(rows, generation.dim)}; restore a backup, "
                    "or index the documents into a new folder"
                ) from error
            yield [number for number, _ in rows], vectors

    def _damaged(self, rows: Sequence[tuple[int, bytes]], dim: int) -> str:
        """Which of the rows' vectors the disk changed."""
        for number, vector in rows:
            try:
                _unpacked([vector], dim)
            except ValueError:
                with self._database.read() as connection:
                    named = connection.execute("SELECT id FROM passages WHERE number = ?", (number,)).fetchone()
                return f"the vector of passage {named[0] if named else number!r} is damaged"
        return "vectors are damaged"

    def nearness(
        self, generation: Generation, question: NDArray[np.float32] | None, tokens: Signs | None, numbers: Sequence[int]
    ) -> dict[int, Nearness]:
        """See `windows.nearness`."""
        query = f"SELECT passage, vectors FROM {generation.windows_table} WHERE passage IN ({marks(numbers)})"  # noqa: S608
        with self._database.read() as connection:
            return nearness(question, tokens, numbers, dict(connection.execute(query, numbers).fetchall()))

    def lacking(self, generation: Generation, *, after: int, limit: int) -> list[int]:
        """Numbers above `after`, in order, of the first passages that it has no vector of."""
        with self._database.read() as connection:
            return _lacking(connection, generation, after, limit)

    def fill(self, generation: Generation, numbers: Sequence[int], vectors: NDArray[np.float32], windows: Sequence[bytes]) -> list[int]:
        """Store its vectors of passages; returns the places in `numbers` of those that it lacked and that are still stored."""
        query = (
            f"SELECT number FROM passages WHERE number IN ({marks(numbers)}) "  # noqa: S608
            f"AND number NOT IN (SELECT passage FROM {generation.table})"
        )
        with self._database.transaction(counted=False) as connection:
            lacked = {number for (number,) in connection.execute(query, numbers)}
            places = [at for at, number in enumerate(numbers) if number in lacked]
            insert(connection, generation, [numbers[at] for at in places], vectors[places], [windows[at] for at in places])
        return places


def add(connection: sqlite3.Connection, *, fingerprint: str, dim: int, graph_dims: int, bundle: BundlePlace) -> Generation:
    """As `Generations.add`, as a part of a transaction."""
    cursor = connection.execute(
        "INSERT INTO generations (fingerprint, dim, graph_dims, bundle_id, bundle, published) VALUES (?, ?, ?, ?, ?, 0)",
        (fingerprint, dim, graph_dims, bundle.id, bundle.folder),
    )
    generation = Generation(int(cursor.lastrowid or 0), fingerprint, dim, graph_dims, bundle, 0)
    if generation.table not in _tables(connection):
        connection.execute(f"CREATE TABLE {generation.table} (passage INTEGER PRIMARY KEY, vector BLOB NOT NULL)")
        # Which passages are in it is asked at every start; without this that would read every vector.
        connection.execute(f"CREATE INDEX {generation.table}_passages ON {generation.table} (passage)")
        add_windows(connection)
    return generation


def publish(connection: sqlite3.Connection, generation: Generation) -> None:
    """Make it the live one, as a part of a transaction; nothing changes where it is."""
    connection.execute(
        "UPDATE generations SET published = 1 + (SELECT max(published) FROM generations) "
        "WHERE number = ? AND (published = 0 OR published < (SELECT max(published) FROM generations))",
        (generation.number,),
    )


def insert(
    connection: sqlite3.Connection,
    generation: Generation,
    numbers: Sequence[int],
    vectors: NDArray[np.float32],
    windows: Sequence[bytes],
) -> None:
    """Its vectors of passages that it lacks, and their windows, as a part of a transaction."""
    rows = [(number, vector.astype("<f4").tobytes()) for number, vector in zip(numbers, vectors, strict=True)]
    connection.executemany(f"INSERT INTO {generation.table} (passage, vector) VALUES (?, ?)", rows)  # noqa: S608
    pooled = [(number, packed) for number, packed in zip(numbers, windows, strict=True) if packed]
    connection.executemany(f"INSERT INTO {generation.windows_table} (passage, vectors) VALUES (?, ?)", pooled)  # noqa: S608


def add_windows(connection: sqlite3.Connection) -> None:
    """A table of windows, empty, for each of vectors that has none, as a part of a transaction."""
    for table in _tables(connection):
        connection.execute(f"CREATE TABLE IF NOT EXISTS {_windows_of(table)} (passage INTEGER PRIMARY KEY, vectors BLOB NOT NULL)")


def delete(connection: sqlite3.Connection, numbers: Sequence[int]) -> None:
    """Vectors of passages that are being deleted, of every embedder, as a part of a transaction."""
    for table in (*_tables(connection), *_tables(connection, _WINDOWS)):
        connection.executemany(f"DELETE FROM {table} WHERE passage = ?", [(number,) for number in numbers])  # noqa: S608


def marks(values: Sequence[object]) -> str:
    """Placeholders of a query, one a value."""
    return ",".join("?" * len(values))


def _read(connection: sqlite3.Connection) -> list[Generation]:
    query = "SELECT number, fingerprint, dim, graph_dims, bundle_id, bundle, published FROM generations ORDER BY number"
    return [
        Generation(number, fingerprint, dim, graph_dims, BundlePlace(bundle_id, bundle), published)
        for number, fingerprint, dim, graph_dims, bundle_id, bundle, published in connection.execute(query).fetchall()
    ]


def _windows_of(table: str) -> str:
    """The table of windows that goes with one of vectors."""
    return table.replace(_PREFIX, _WINDOWS)


def _tables(connection: sqlite3.Connection, prefix: str = _PREFIX) -> list[str]:
    """Every table of vectors, or of those of windows."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB ?"
    return [name for (name,) in connection.execute(query, (prefix + "*",))]


def _lacking(connection: sqlite3.Connection, generation: Generation, after: int, limit: int) -> list[int]:
    query = (
        f"SELECT number FROM passages WHERE number > ? AND number NOT IN (SELECT passage FROM {generation.table}) "  # noqa: S608
        "ORDER BY number LIMIT ?"
    )
    return [number for (number,) in connection.execute(query, (after, limit))]


def _unpacked(blobs: Sequence[bytes], dim: int) -> NDArray[np.float32]:
    """Raises ValueError where one is no unit vector of that dimension."""
    vectors = np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), dim).astype(np.float32)
    check_vectors(vectors, len(blobs), dim)
    return vectors

"""One SQLite file, opened so that what is acknowledged stays: transactions, facts, and errors that name the way out.

Every write is one transaction, fsynced before it returns (WAL, synchronous=FULL), so what was acknowledged survives
`kill -9` and a power cut.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseUnavailable, NotServing, OpenBookError
from openbook_server.knowledge import filters

_PAGES_AT_ONCE = 1_000  # given back to the disk in one transaction, about 4 MB
_WAYS_OUT = {  # of SQLite's errors, by the first word of their names
    "FULL": "the disk is full; nothing of this write is stored; make room and write again",
    "READONLY": "it cannot be written; give this user the right to write it and its folder",
    "CANTOPEN": "it cannot be opened; check that it exists, that this user may write its folder and that the disk has room",
    "IOERR": "the disk failed to read or write it; check that the disk has room, and what the system's log says",
}


class Database:
    """An open file; any number of threads may use it at once.

    Each thread reads through a connection of its own. On a shared one a read that is under way makes every other see what it
    sees, an old state; and one that calls Python back for a row (`filters.as_number`) waits for the interpreter's lock with
    the connection's held, while who has the first waits for the second.

    A thread goes on reading when nobody waits for it any more, and SQLite crashes where a connection is closed that is in use: so
    closing waits for every use.
    """

    def __init__(self, path: Path, *, read_only: bool = False, checked: bool = False) -> None:
        """Open it, creating an empty one where there is none (unless `read_only`).

        Args:
            checked: do not look through the whole file: this process did or will do so.

        Raises:
            KnowledgeBaseDamaged: the file is missing or damaged, or the folder cannot be written.
        """
        self.path = path
        self._own = threading.local()  # of each thread, the connection that it reads through
        self._opened: list[sqlite3.Connection] = []
        self._uses, self._closed = 0, False
        self._unused = threading.Condition()
        with self._using():
            self._writer = self._connect() if read_only else self._connect_writer()
            if not checked and self._writer.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            self._file = _identity(path)
        self._lock = threading.Lock()  # of the writer

    def _connect(self, mode: str = "ro") -> sqlite3.Connection:
        """Open the file once more; whoever only reads needs no pragma, some of which wait for the writer or for room on the disk."""
        address = f"{self.path.resolve().as_uri()}?mode={mode}"
        connection = sqlite3.connect(address, uri=True, check_same_thread=False, isolation_level=None)
        connection.text_factory = _text
        filters.add_functions(connection)
        self._opened.append(connection)
        return connection

    def _connect_writer(self) -> sqlite3.Connection:
        connection = self._connect("rwc")
        if connection.execute("PRAGMA page_count").fetchone() == (0,):
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file: what is dropped can be given back to the disk
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Within, no connection is closed, and SQLite's errors get the file's name and the way out.

        Raises:
            NotServing: it was closed before.
            KnowledgeBaseUnavailable: another process has it locked.
            KnowledgeBaseDamaged: every other error.
        """
        with self._unused:
            if self._closed:
                raise NotServing(f"{self.path} was closed; try again, or another server", retry_after_seconds=1.0)
            self._uses += 1
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise _explained(self.path, error) from error
        finally:
            with self._unused:
                self._uses -= 1
                self._unused.notify_all()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Within, errors are explained."""
        with self._using():
            if not hasattr(self._own, "connection"):
                self._check_place()
                self._own.connection = self._connect()
            yield self._own.connection

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """Within, all that this thread reads is of one moment, whatever is written meanwhile."""
        with self.read() as connection:
            connection.execute("BEGIN")
            try:
                yield
            finally:
                connection.execute("COMMIT")

    @contextmanager
    def transaction(self, *, counted: bool = True) -> Iterator[sqlite3.Connection]:
        """All of it is durable after the block, or nothing. `counted` ones raise the sequence number: they change what is found."""
        with self._lock, self._using():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                if counted:
                    self._writer.execute("UPDATE meta SET value = value + 1 WHERE key = 'sequence'")
                self._check_place()
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # on a full disk SQLite may have rolled back by itself
                    self._writer.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        """SQLite goes on writing to a file that has no name any more, where no start would find it, and would read another in its place."""
        if _identity(self.path) != self._file:
            raise KnowledgeBaseDamaged(
                f"{self.path} was moved, deleted or replaced while it is open; put it back or restart, nothing more is stored until then"
            )

    def size_bytes(self) -> int:
        with self.read() as connection:
            [size] = connection.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()
        return int(size)

    def shrink(self) -> None:
        """Give the disk what was dropped; a file that was made without `auto_vacuum` keeps it for what is stored next."""
        while self._free_pages():
            with self._lock, self._using():
                self._writer.execute(f"PRAGMA incremental_vacuum({_PAGES_AT_ONCE})").fetchall()

    def _free_pages(self) -> int:
        with self._using():
            [mode] = self._writer.execute("PRAGMA auto_vacuum").fetchone()
            [pages] = self._writer.execute("PRAGMA freelist_count").fetchone()
        return int(pages) if mode == 2 else 0

    def meta(self, key: str) -> str | None:
        """A recorded fact; None where the file is still empty."""
        with self.read() as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                return None
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def record(self, facts: Mapping[str, str]) -> None:
        """Keep facts."""
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", facts.items())

    def sequence(self) -> int:
        """Number of the last counted transaction."""
        return int(self.meta("sequence") or 0)

    def close(self) -> None:
        """Let go of the file once nobody uses it; who comes from now on is refused."""
        with self._unused:
            self._closed = True
            self._unused.wait_for(lambda: not self._uses)
        for connection in reversed(self._opened):  # the writer last: it moves the log into the file, which those that read cannot
            connection.close()


def _text(stored: bytes) -> str:
    """A byte that the disk changed costs a character; refused, it would cost every request that meets it, or the start."""
    return stored.decode("utf-8", "replace")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _may_open() -> bool:
    """Whether there is a descriptor left; SQLite does not tell."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def _explained(path: Path, error: sqlite3.DatabaseError) -> OpenBookError:
    """What an error of SQLite's means to whoever meets it."""
    kind = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT").split("_")[1]  # SQLITE_BUSY_SNAPSHOT is a BUSY
    if kind in ("BUSY", "LOCKED"):
        return KnowledgeBaseUnavailable(f"{path}: another process has it locked, perhaps for a backup ({error}); try again")
    if kind == "CANTOPEN" and not _may_open():
        way_out = "raise the limit (ulimit -n), and look at who keeps connections open"
        return KnowledgeBaseUnavailable(f"{path}: too many files are open in this process or machine; {way_out} ({error})")
    if kind in _WAYS_OUT:
        return KnowledgeBaseDamaged(f"{path}: {_WAYS_OUT[kind]} ({error})")
    if isinstance(error, sqlite3.OperationalError):
        return KnowledgeBaseDamaged(f"{path}: {error}; check that it exists, that the folder can be written and that the disk has room")
    return KnowledgeBaseDamaged(
        f"{path} is damaged ({error}); recover what is left with "
        f"`sqlite3 {path} .recover | sqlite3 recovered.sqlite`, or index the sources again into a new folder"
    )

"""A folder that this process holds: one process at a time, with any number of the folder's generations open in it.

Generations of one embedder share their vectors, so an index must hear of every row that is stored in its table, not only of those that
its own generation stores.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseLocked
from openbook_server.knowledge.precedence import Precedence
from openbook_server.knowledge.projection import Vectors
from openbook_server.knowledge.snapshots import remove_lost
from openbook_server.knowledge.store import Store
from openbook_server.knowledge.vectors import VectorIndex
from openbook_server.knowledge.words import WordIndex

_LOCK = "lock"

T = TypeVar("T")
Change = Callable[[VectorIndex, str], None]  # made in an index of a table of vectors


class Resident:
    """The index of an open generation, which hears of every change in the store, by whichever generation's doing; of what changes while
    it is being opened, once it is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[VectorIndex, str] | None = None
        self._waiting: list[Change] = []

    def open(self, index: VectorIndex, table: str) -> None:
        """`index` holds what the store's table of vectors held at some moment since this was made."""
        with self._lock:
            self._open = index, table
            for change in self._waiting:
                change(index, table)
            self._waiting.clear()

    def hear(self, change: Change) -> None:
        with self._lock:
            if self._open is not None:
                change(*self._open)
            else:
                self._waiting.append(change)

    def close(self) -> None:
        """The index hears of nothing from now on, so what it reads may be closed."""
        with self._lock:
            self._open = None


class Home:
    """The folder's lock, its index of words, and the open generations' indexes: all of them hear of every change, and let searches go
    first."""

    def __init__(self, folder: Path) -> None:
        """Make the folder where there is none, and hold it until the last resident left or the process ends.

        Raises:
            KnowledgeBaseLocked: another process holds it.
            KnowledgeBaseDamaged: it cannot be written.
        """
        self._handle, self._folder = _lock(folder), folder
        self._words: WordIndex | None = None
        self.precedence = Precedence()
        self._residents: tuple[Resident, ...] = ()  # another one each time that one comes or goes: who goes through it sees all of one
        self._coming_and_going = threading.Lock()
        self._replacing = threading.Lock()
        self._replaced = 0  # how often it was held

    def words(self, store: Store) -> WordIndex:
        """The index of words that all generations share; opened for the first of them, when what is derived from lost states goes."""
        if self._words is None:
            remove_lost(self._folder, store.sequence())
            self._words = WordIndex(self._folder, store.texts, store.numbers(), store.last_number())
        return self._words

    def enter(self) -> Resident:
        """From now on it hears of changes."""
        resident = Resident()
        with self._coming_and_going:
            self._residents = *self._residents, resident
        return resident

    def leave(self, resident: Resident) -> None:
        with self._coming_and_going:
            self._residents = tuple(other for other in self._residents if other is not resident)
            if not self._residents:
                self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        self._handle.close()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """While passages take the place of others: from before they are stored until all indexes heard of it."""
        with self._replacing:
            try:
                yield
            finally:
                self._replaced += 1

    def whole(self, look: Callable[[], T]) -> T:
        """What `look` finds where nothing is replaced meanwhile. It looks at the store and the indexes one after the other; if something
        was replaced, it may have missed both what was there and what is there now, so it looks again, and who replaces waits."""
        before = self._replaced
        found = look()
        if not self._replacing.locked() and self._replaced == before:  # in this order: what ends between the two was counted
            return found
        with self._replacing:
            return look()

    def forget(self, numbers: Sequence[int]) -> None:
        """Passages are gone from the store, with the vectors of every table."""
        if self._words is not None:
            self._words.delete(numbers)
        self._tell(lambda index, _: index.delete(numbers))

    def add(self, table: str, numbers: Sequence[int], vectors: Vectors) -> None:
        """Vectors of passages were stored in a table."""

        def add(index: VectorIndex, its_table: str) -> None:
            if its_table == table:
                index.add(numbers, vectors)

        self._tell(add)

    def settle(self, store: Store) -> None:
        """After changes, when all have heard of them: it may take long."""
        if self._words is not None:
            self._words.settle(store.texts)
        self._tell(lambda index, _: index.settle())

    def _tell(self, change: Change) -> None:
        for resident in self._residents:
            resident.hear(change)


def _lock(folder: Path) -> IO[str]:
    """Hold the folder's lock until the returned file is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / _LOCK).open("a+")
        try:
            _claim(folder, handle)
        except BaseException:
            with suppress(OSError):  # closing writes what a full disk did not take
                handle.close()
            raise
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}; check that this user may write it and that the disk has room"
        raise KnowledgeBaseDamaged(f"{problem} (a server that takes no writes needs it, too)") from error
    return handle


def _claim(folder: Path, handle: IO[str]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        raise KnowledgeBaseLocked(
            f"{folder} is open in another process (pid {owner}); stop it first, or use a copy of the folder"
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()

"""A folder that this process holds: one process at a time, with any number of the folder's generations open in it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Protocol

from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseLocked
from openbook_server.knowledge.precedence import Precedence
from openbook_server.knowledge.store import Store
from openbook_server.knowledge.words import WordIndex

_LOCK = "lock"


class Resident(Protocol):
    """An open generation."""

    def forget(self, numbers: list[int]) -> None:
        """Passages are gone from the store."""


class Home:
    """The folder's lock, its index of words, and what is open of the folder: all of it hears of every passage that is deleted, and lets
    searches go first."""

    def __init__(self, folder: Path) -> None:
        """Make the folder where there is none, and hold it until the last resident left or the process ends.

        Raises:
            KnowledgeBaseLocked: another process holds it.
            KnowledgeBaseDamaged: it cannot be written.
        """
        self._handle, self._folder = _lock(folder), folder
        self._words: WordIndex | None = None
        self.precedence = Precedence()
        self._residents: list[Resident] = []

    def words(self, store: Store) -> WordIndex:
        """The index of words that all generations share; opened for the first of them."""
        if self._words is None:
            self._words = WordIndex(self._folder, store.texts, store.numbers())
        return self._words

    def enter(self, resident: Resident) -> None:
        self._residents.append(resident)

    def leave(self, resident: Resident) -> None:
        self._residents = [other for other in self._residents if other is not resident]
        if not self._residents:
            self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        self._handle.close()

    def forget(self, numbers: list[int]) -> None:
        """Tell the index of words and every resident."""
        if self._words is not None:
            self._words.delete(numbers)
        for resident in self._residents:
            resident.forget(numbers)


def _lock(folder: Path) -> IO[str]:
    """Hold the folder's lock until the returned file is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / _LOCK).open("a+")
    except OSError as error:
        raise KnowledgeBaseDamaged(f"{folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise KnowledgeBaseLocked(
            f"{folder} is open in another process (pid {owner}); stop it first, or use a copy of the folder"
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle

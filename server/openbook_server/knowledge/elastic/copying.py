"""One generation of an alias brought up to date with the live one: what it lacks is embedded again and copied, what is gone is removed.

Nothing is remembered of how far that went: what differs between the two indexes (`difference`) is all there is to do, whoever did what
before and however it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.difference import LISTED, Difference, differences
from openbook_server.knowledge.elastic.documents import Documents, Part
from openbook_server.knowledge.elastic.entries import Record
from openbook_server.knowledge.interface import Gap

Vectors = NDArray[np.float32]


class Copying:
    """From the live index, whichever that is, into one that is not live."""

    def __init__(self, connection: Connection, live: Documents, own: Documents) -> None:
        self._connection, self._live, self._own = connection, live, own
        self._reached = 0  # documents with lower numbers were copied; what changed since is looked for after what is new

    def gap(self, limit: int) -> Gap | None:
        """See `KnowledgeBase.lacking`."""
        for low in sorted({0, self._reached}, reverse=True):
            wanted: dict[str, Record] = {}
            gone: dict[str, int] = {}
            passages = 0
            for ours, theirs in self._changes(low):
                gone |= theirs
                for record in ours:
                    if passages < limit:
                        wanted[record.key] = record
                        passages += _count(record)
                if passages >= limit or len(gone) >= LISTED:
                    break
            if wanted or gone:
                return self._gap(wanted, gone)
        return None

    def lacking(self) -> int:
        """How many passages of the live index the other one has not."""
        lacking = 0
        for part in differences(self._connection, self._live.index, self._own.index):
            if not part.other.documents:
                lacking += int(part.one.passages)
            elif part.one.documents:
                lacking += sum(_count(record) for ours, _ in self._between(part) for record in ours)
        return lacking

    def _gap(self, wanted: Mapping[str, Record], gone: Mapping[str, int]) -> Gap:
        passages = self._live.passages(wanted.values())
        for record in self._live.stored(wanted.keys() - passages.keys()).values():
            if record.live is not None and record.number == wanted[record.key].number:  # else it was replaced or deleted meanwhile
                raise KnowledgeBaseDamaged(f"{self._connection.name}: passages of document {record.id!r} are gone; write it again")

        def fill(vectors: Vectors, windows: Sequence[bytes]) -> None:
            parts: dict[str, Part] = {}
            first = 0
            for key, rows in passages.items():
                parts[key] = rows, vectors[first : first + len(rows)], windows[first : first + len(rows)]
                first += len(rows)
            self._own.copy([wanted[key] for key in passages], parts)
            self._own.drop(gone)
            self._reached = max((record.number + 1 for record in wanted.values()), default=0)

        return Gap([passage for rows in passages.values() for passage in rows], fill)

    def _changes(self, low: int) -> Iterator[tuple[list[Record], dict[str, int]]]:
        """Documents that only the live index has, and keys and numbers of those that only the other has; some at a time."""
        for part in differences(self._connection, self._live.index, self._own.index, low):
            yield from self._between(part)

    def _between(self, part: Difference) -> Iterator[tuple[list[Record], dict[str, int]]]:
        for ours, theirs in self._listed(part):
            both = {(record.key, record.number) for record in ours} & {(record.key, record.number) for record in theirs}
            yield (
                [record for record in ours if (record.key, record.number) not in both],
                {record.key: record.number for record in theirs if (record.key, record.number) not in both},
            )

    def _listed(self, part: Difference) -> Iterator[tuple[list[Record], list[Record]]]:
        if part.one.documents and part.other.documents:
            ours = self._live.numbered(part.low, part.high, LISTED)
            high = ours[-1].number + 1 if len(ours) == LISTED else part.high  # more may have been written meanwhile
            yield ours, self._own.numbered(part.low, high, LISTED)
            return
        documents = self._live if part.one.documents else self._own
        low = part.low
        while found := documents.numbered(low, part.high, LISTED):
            yield (found, []) if documents is self._live else ([], found)
            low = found[-1].number + 1


def _count(record: Record) -> int:
    return record.live.count if record.live is not None else 0

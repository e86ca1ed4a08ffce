"""The one entry that counts the writes of a knowledge base, hands out numbers, and keeps what is recorded about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from openbook_server.errors import KnowledgeBaseUnavailable
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.publication import Entrance

_TRIES = 200  # while other writers count too
_NEW: Mapping[str, Any] = {"kind": "state", "sequence": 0, "next_number": 1, "facts": {}}
_TARGET = {"_id": schema.STATE, "routing": schema.STATE}


class State:
    """Of one index; thread-safe, and beside writers in other processes."""

    def __init__(self, connection: Connection, index: str, entrance: Entrance | None = None) -> None:
        """`index` may be an alias; `entrance` is the way to write to it, and not needed to read."""
        self._connection, self._index, self._entrance = connection, index, entrance

    @property
    def sequence(self) -> int:
        """Number of the last write that began."""
        return int(self._entry(self._read())["sequence"])

    def facts(self) -> dict[str, str]:
        return dict(self._entry(self._read())["facts"])

    def record(self, facts: Mapping[str, str]) -> None:
        """Keep facts; durable when this returns."""
        self._change(lambda entry: {"facts": entry["facts"] | dict(facts)})

    def take_numbers(self, count: int) -> int:
        """Count a write and reserve numbers that nobody else gets; returns the first."""
        return int(self._change(lambda entry: {"next_number": entry["next_number"] + count})["next_number"])

    def go_on_from(self, before: State) -> None:
        """Count writes and numbers on where another index is now, and know what is recorded there."""
        entry = before._entry(before._read())
        self._change(lambda own: entry | {"next_number": max(own["next_number"], entry["next_number"])})

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Compare and set, again where another writer was faster; returns the entry before."""
        if self._entrance is None:
            raise RuntimeError(f"{self._index} was opened to read")
        for _ in range(_TRIES):
            found = self._read()
            entry = self._entry(found)
            after = entry | change(entry)
            after["sequence"] += 1
            if found is None:
                action: dict[str, Any] = {"create": _TARGET}
            else:
                action = {"index": {**_TARGET, "if_seq_no": found["_seq_no"], "if_primary_term": found["_primary_term"]}}
            [result] = self._entrance.bulk([(action, after)])
            if result is not None:
                return entry
        raise KnowledgeBaseUnavailable(f"{self._connection.name}: too many others write at the same time; try again later")

    def _read(self) -> Mapping[str, Any] | None:
        """The entry as it was found, with its place in the history of writes."""
        found: Mapping[str, Any] | None = self._connection.call(
            lambda client: client.get(index=self._index, id=schema.STATE, routing=schema.STATE), accept=[404]
        )
        return found

    def _entry(self, found: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(_NEW if found is None else found["_source"])

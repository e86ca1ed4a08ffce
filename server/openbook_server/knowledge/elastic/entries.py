"""Records and passages as they stand in the index."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.connection import Action
from openbook_server.knowledge.records import Passage

PASSAGE_FIELDS = ["number", "id", "start", "title", "text", "tokens"]  # that `parse_passage` needs
LIVE_FIELDS = ["live", "first", "passages"]  # that `parse_live` needs
_PASSAGE_KEY = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]*)")

Key = tuple[int, str]  # a passage's number, and its document's key


@dataclass(frozen=True, slots=True)
class Range:
    """Passage numbers `first` to `first + count - 1`."""

    first: int
    count: int
    since: float = 0.0  # seconds of the epoch, by the clock of who wrote it

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A document as the index knows it."""

    key: str
    id: str
    number: int = 0
    digest: str = ""
    source: str = ""
    metadata: str = "{}"
    mark: int = 0  # see `schema.mark`; 0 where an older version wrote it
    live: Range | None = None
    stale: tuple[Range, ...] = ()
    seen: tuple[int, int] | None = None  # sequence number and primary term of the entry when it was read; None = there was none

    def holds(self, number: int) -> bool:
        """Whether a passage of that number is the document's now."""
        return self.live is not None and number in self.live.numbers

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to do for the document."""
        return self.live is not None and not self.stale

    def entry(self) -> dict[str, Any]:
        return {
            "kind": "document",
            "number": self.number,
            "id": self.id,
            "digest": self.digest,
            "source": self.source,
            "metadata": self.metadata,
            "mark": self.mark,
            "live": self.live is not None,
            "first": self.live.first if self.live else 0,
            "passages": self.live.count if self.live else 0,
            "stale": [[part.first, part.count, part.since] for part in self.stale],
            "unsettled": not self.settled,
        }


def record_action(record: Record) -> Action:
    """Writes a record if nobody has changed it since it was read."""
    if record.seen is None:
        return {"create": {"_id": record.key, "routing": record.key}}, record.entry()
    return {"index": {"_id": record.key, "routing": record.key, **_unchanged(record.seen)}}, record.entry()


def forget_action(record: Record) -> Action:
    """Deletes a record if nobody has changed it since it was read."""
    return {"delete": {"_id": record.key, "routing": record.key, **(_unchanged(record.seen) if record.seen else {})}}, None


def passage_action(
    key: str, number: int, passage: Passage, metadata: Mapping[str, str], vector: NDArray[np.float32], windows: bytes
) -> Action:
    """Writes a passage of the document that `key` names, with the document's metadata."""
    entry = {
        "kind": "passage",
        "number": number,
        "id": passage.id,
        "start": passage.start,
        "title": passage.title,
        "text": passage.text,
        "tokens": b64encode(passage.tokens).decode(),
        "windows": b64encode(windows).decode(),
        "vector": vector.astype(np.float64).round(9).tolist(),  # shorter, and the same float32 but for its last bit
        **schema.terms(metadata),
    }
    return {"index": {"_id": schema.passage_key(key, number), "routing": key}}, entry


def removal_action(key: str, number: int) -> Action:
    """Deletes a passage, if it is there."""
    return {"delete": {"_id": schema.passage_key(key, number), "routing": key}}, None


def _unchanged(seen: tuple[int, int]) -> dict[str, int]:
    return {"if_seq_no": seen[0], "if_primary_term": seen[1]}


def parse_record(entry: Mapping[str, Any]) -> Record:
    """An entry that was read, with its place in the history of writes."""
    row = entry["_source"]
    return Record(
        key=entry["_id"],
        id=row["id"],
        number=row["number"],
        digest=row["digest"],
        source=row["source"],
        metadata=row["metadata"],
        mark=row.get("mark", 0),
        live=Range(row["first"], row["passages"]) if row["live"] else None,
        stale=tuple(Range(*part) for part in row["stale"]),
        seen=(entry["_seq_no"], entry["_primary_term"]),
    )


def parse_live(entry: Mapping[str, Any]) -> Range | None:
    """The live passages that a record names; None where there are none, or there is no record."""
    row = entry.get("_source", {})
    return Range(row["first"], row["passages"]) if row.get("live") and "first" in row and row.get("passages") else None


def parse_passage_key(entry: Mapping[str, Any]) -> Key | None:
    """Of an entry that a search found; None where it is no passage that this package wrote."""
    name = _PASSAGE_KEY.fullmatch(entry["_id"])
    return (int(name[2]), name[1]) if name is not None and name[1] == entry["_routing"] else None


def parse_windows(entry: Mapping[str, Any]) -> bytes:
    return b64decode(entry["_source"].get("windows", ""))  # an earlier version stored none


def parse_passage(entry: Mapping[str, Any], record: Record) -> Passage:
    row = entry["_source"]
    return Passage(
        id=row["id"],
        document_id=record.id,
        text=row["text"],
        start=row["start"],
        title=row["title"],
        source=record.source,
        metadata=json.loads(record.metadata),
        tokens=b64decode(row.get("tokens", "")),  # an earlier version stored none
    )

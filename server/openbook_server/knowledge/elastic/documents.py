"""What is stored, and writes that replace a document whole, whatever stops them.

Elasticsearch makes one entry durable at a time, so one entry decides: a document's record says which passage numbers are
live. A write of a document is

    1  its record gains the range of numbers that the new passages will have, as a stale one: an intent
    2  the new passages are written
    3  the record's live range becomes the new one; what was live before is stale         <- here the write has happened
    4  the passages of stale ranges are deleted
    5  the record forgets the stale ranges

and a deletion is 3 with no live range, 4, and then the record itself goes. Whoever stops in between leaves passages that
no record calls live: no search returns them, and as their range stands in the record, the next write of the document or
`sweep` removes them. Steps 1, 3 and 5 are compare-and-set: of two writers of one document the slower one sees that
the record has changed and begins again, so the document is always whole and from one of them. (A writer that is killed
just after it lost such a race may leave passages that no record lists: they take room and are never returned.)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import KnowledgeBaseUnavailable
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.entries import (
    PASSAGE_FIELDS,
    Range,
    Record,
    forget_action,
    parse_passage,
    parse_record,
    passage_action,
    record_action,
    removal_action,
)
from openbook_server.knowledge.elastic.publication import Entrance
from openbook_server.knowledge.elastic.state import State
from openbook_server.knowledge.records import Counts, Document, Passage

SWEEP_AFTER = 600.0  # seconds after which a write that is not complete is taken for one that was stopped
_SWEEP_EVERY = 60.0  # seconds
_TRIES = 20  # of a write whose documents others write at the same time
_AT_ONCE = 1_000  # entries read by one request

_T = TypeVar("_T")
Vectors = NDArray[np.float32]
Part = tuple[Sequence[Passage], Vectors, Sequence[bytes]]  # of a document: passages, their vectors, and their windows


class Documents:
    """Reads and writes of one index; thread-safe, and beside writers in other processes."""

    def __init__(self, connection: Connection, index: str, state: State, entrance: Entrance) -> None:
        """`entrance` is the way to write to `index`."""
        self.index = index
        self._connection, self._state, self._entrance = connection, state, entrance
        self._swept = -math.inf  # when, on the monotonic clock

    def replace(
        self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: Vectors, windows: Sequence[bytes]
    ) -> None:
        """Store documents and all their passages in place of what they had; durable and searchable when this returns."""
        self.sweep_if_due()
        rows: dict[str, list[int]] = {document.id: [] for document, _ in documents}
        for row, passage in enumerate(passages):
            rows[passage.document_id].append(row)
        left = {schema.document_key(document.id): (document, digest) for document, digest in documents}
        lost: dict[str, tuple[Range, ...]] = {}  # ranges of tries that another writer beat
        for _ in range(_TRIES):
            number = self._state.take_numbers(len(left) + sum(len(rows[document.id]) for document, _ in left.values()))
            now, first = time.time(), number + len(left)
            wanted: dict[str, Record] = {}
            for at, (key, (document, digest)) in enumerate(left.items()):
                live = Range(first, len(rows[document.id]), now)
                metadata = json.dumps(dict(document.metadata), ensure_ascii=False)
                wanted[key] = Record(
                    key=key,
                    id=document.id,
                    number=number + at,
                    digest=digest,
                    source=document.source,
                    metadata=metadata,
                    mark=schema.mark(number + at),
                    live=live,
                )
                first += live.count
            parts: dict[str, Part] = {}
            for key, record in wanted.items():
                own = rows[record.id]
                parts[key] = [passages[row] for row in own], vectors[own], [windows[row] for row in own]
            stored = self._switch(wanted, self.stored(wanted), parts, lost)
            for key in wanted.keys() - stored.keys():
                lost[key] = (*lost.get(key, ()), _range(wanted[key]))
            left = {key: document for key, document in left.items() if key not in stored}
            if not left:
                self._connection.refresh(self.index)
                return
        raise self._outrun(len(left))

    def copy(self, records: Sequence[Record], parts: Mapping[str, Part]) -> None:
        """Store documents as they stand in another index, each with the number that it has there; its passages get numbers of their own.

        What is here already stays; what others write at the same time is left to a next time.

        Args:
            parts: of each record, by key.
        """
        before = self.stored(record.key for record in records)
        wanted = {record.key: record for record in records if not _same_write(before.get(record.key), record)}
        now, first = time.time(), self._state.take_numbers(sum(len(parts[key][0]) for key in wanted))
        for key, record in wanted.items():
            wanted[key] = replace(record, live=Range(first, len(parts[key][0]), now), stale=())
            first += len(parts[key][0])
        self._switch(wanted, before, parts, {})
        self._connection.refresh(self.index)

    def _switch(
        self,
        wanted: Mapping[str, Record],
        before: Mapping[str, Record],
        parts: Mapping[str, Part],
        lost: Mapping[str, tuple[Range, ...]],
    ) -> dict[str, Record]:
        """Steps 1 to 5; returns the records of those documents that got through.

        Args:
            wanted: records as they shall be; `before`: as they are.
            parts: of each.
            lost: ranges of earlier tries.
        """
        intents = []
        for key, record in wanted.items():
            known = before.get(key) or Record(key=key, id=record.id)
            # a commit whose answer got lost looks like a lost race, and what it wrote is live
            beaten = [part for part in lost.get(key, ()) if known.live is None or part.first != known.live.first]
            intents.append(replace(known, stale=(*known.stale, *beaten, _range(record))))
        intended = self._write(intents)
        self._entrance.bulk(
            passage_action(key, _range(wanted[key]).first + at, passage, json.loads(wanted[key].metadata), vectors[at], windows[at])
            for key, (passages, vectors, windows) in ((key, parts[key]) for key in intended)
            for at, passage in enumerate(passages)
        )
        now = time.time()
        stored = self._write(
            [replace(wanted[key], stale=_others(intent, _range(wanted[key]), now), seen=intent.seen) for key, intent in intended.items()]
        )
        self._settle(stored)
        return stored

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents; returns how many passages went with them."""
        self.sweep_if_due()
        left = {schema.document_key(id_) for id_ in ids}
        removed: dict[str, int] = {}
        self._state.take_numbers(0)
        for _ in range(_TRIES):
            records = self.stored(left)
            removed |= {key: record.live.count for key, record in records.items() if record.live is not None}
            left = records.keys() - self._remove(records)
            if not left:
                self._connection.refresh(self.index)
                return sum(removed.values())
        raise self._outrun(len(left))

    def drop(self, numbers: Mapping[str, int]) -> None:
        """Remove those documents, by key, that still have these numbers; what others write at the same time is left to a next time."""
        self._remove({key: record for key, record in self.stored(numbers).items() if record.number == numbers[key]})
        self._connection.refresh(self.index)

    def _remove(self, records: Mapping[str, Record]) -> set[str]:
        """Returns the keys of those that are removed; others changed them meanwhile."""
        now = time.time()
        marked = self._write([replace(record, live=None, stale=_others(record, None, now)) for record in records.values()])
        self._settle(marked)
        return {*marked}

    def sweep_if_due(self) -> int:
        """`sweep`, unless that was done lately."""
        return self.sweep() if time.monotonic() - self._swept > _SWEEP_EVERY else 0

    def sweep(self) -> int:
        """Remove what stopped writes left behind; returns how many documents had such leftovers."""
        self._swept = time.monotonic()
        total = 0
        while True:
            hits = self._search(query=schema.UNSETTLED, size=_AT_ONCE, source=False)["hits"]["hits"]
            until = time.time() - SWEEP_AFTER
            records = self.stored(hit["_id"] for hit in hits).values()
            stopped = [record for record in records if not record.settled and all(part.since < until for part in record.stale)]
            swept = self._write(stopped)  # a writer that is slow rather than stopped sees that the record has changed, and begins again
            self._settle(swept)
            if swept:
                self._connection.refresh(self.index)
            total += len(swept)
            if len(hits) < _AT_ONCE or not swept:
                return total

    def _outrun(self, documents: int) -> KnowledgeBaseUnavailable:
        return KnowledgeBaseUnavailable(
            f"{self._connection.name}: others write {documents} of the same documents all the time; try again later"
        )

    def _settle(self, records: Mapping[str, Record]) -> None:
        """Steps 4 and 5, for records as they were just written."""
        unsettled = [record for record in records.values() if not record.settled]
        removals = (removal_action(record.key, number) for record in unsettled for part in record.stale for number in part.numbers)
        self._entrance.bulk(removals)
        self._write([replace(record, stale=()) for record in unsettled if record.live is not None])
        self._entrance.bulk([forget_action(record) for record in unsettled if record.live is None])

    def _write(self, records: Sequence[Record]) -> dict[str, Record]:
        """Write records that nobody has changed since they were read; returns those, as they are now."""
        results = self._entrance.bulk([record_action(record) for record in records])
        return {
            record.key: replace(record, seen=(result["_seq_no"], result["_primary_term"]))
            for record, result in zip(records, results, strict=True)
            if result is not None
        }

    def stored(self, keys: Iterable[str]) -> dict[str, Record]:
        """Records as they are, searchable already or not."""
        found: dict[str, Record] = {}
        for part in _parts(keys, _AT_ONCE):
            found |= {entry["_id"]: parse_record(entry) for entry in self._get([{"_id": key, "routing": key} for key in part])}
        return found

    def _get(self, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        body = self._connection.call(lambda client: client.mget(index=self.index, docs=wanted))
        return [entry for entry in body["docs"] if entry["found"]]

    def records(self, ids: Iterable[str]) -> dict[str, Record]:
        """Of those documents that are stored, by id."""
        return {record.id: record for record in self.stored({schema.document_key(id_) for id_ in ids}).values() if record.live is not None}

    def documents(self, ids: Iterable[str]) -> dict[str, list[Passage]]:
        """The passages of those documents that are stored."""
        left = {*ids}
        found: dict[str, list[Passage]] = {}
        for _ in range(_TRIES):  # what others replace at the same time is read again
            records = self.records(left)
            passages = self.passages(records.values())
            found |= {id_: passages[record.key] for id_, record in records.items() if record.key in passages}
            left = records.keys() - found.keys()
            if not left:
                return found
        raise self._outrun(len(left))

    def passages(self, records: Iterable[Record]) -> dict[str, list[Passage]]:
        """Of documents that are stored, by key and in order; without those that were replaced since the records were read."""
        known = {record.key: record for record in records if record.live is not None}
        found: dict[str, list[Passage]] = {key: [] for key in known}
        wanted = ((key, number) for key, record in known.items() for number in _range(record).numbers)
        for part in _parts(wanted, _AT_ONCE):
            targets = [{"_id": schema.passage_key(*each), "routing": each[0], "_source": PASSAGE_FIELDS} for each in part]
            for entry in self._get(targets):
                key = entry["_id"].rpartition(".")[0]
                found[key].append(parse_passage(entry, known[key]))
        return {key: passages for key, passages in found.items() if len(passages) == _range(known[key]).count}

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        """See `KnowledgeBase.page`."""
        found = self.numbered(after + 1, None, size)
        return [(record.number, record.id, record.source, _range(record).count) for record in found]

    def numbered(self, low: int, high: int | None, size: int) -> list[Record]:
        """The first `size` documents, by number, whose numbers are from `low` to `high - 1`; only what the last refresh made visible."""
        numbers = {"gte": low} | ({} if high is None else {"lt": high})
        query = {"bool": {"filter": [*schema.STORED, {"range": {"number": numbers}}]}}
        body = self._search(query=query, size=size, sort=[{"number": "asc"}], seq_no_primary_term=True)
        return [parse_record(hit) for hit in body["hits"]["hits"]]

    def counts(self) -> Counts:
        query = {"bool": {"filter": schema.STORED}}
        body = self._search(query=query, size=0, track_total_hits=True, aggregations={"passages": {"sum": {"field": "passages"}}})
        return Counts(documents=body["hits"]["total"]["value"], passages=int(body["aggregations"]["passages"]["value"]))

    def _search(self, **request: Any) -> Any:
        return self._connection.call(lambda client: client.search(index=self.index, allow_partial_search_results=False, **request))


def _range(record: Record) -> Range:
    """Of a document that is stored."""
    assert record.live is not None  # noqa: S101
    return record.live


def _same_write(here: Record | None, there: Record) -> bool:
    return here is not None and here.live is not None and here.number == there.number


def _others(record: Record, but: Range | None, now: float) -> tuple[Range, ...]:
    """All ranges that a record knows, live or stale, but one."""
    live = () if record.live is None else (replace(record.live, since=now),)
    return tuple(part for part in (*record.stale, *live) if part.count and (but is None or part.first != but.first))


def _parts(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part

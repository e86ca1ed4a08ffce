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
from openbook_server.knowledge.elastic.state import State
from openbook_server.knowledge.records import Counts, Document, Passage

SWEEP_AFTER = 600.0  # seconds after which a write that is not complete is taken for one that was stopped
_TRIES = 20  # of a write whose documents others write at the same time
_AT_ONCE = 1_000  # entries read by one request

_T = TypeVar("_T")


class Documents:
    """Reads and writes of one index; thread-safe, and beside writers in other processes."""

    def __init__(self, connection: Connection, index: str, state: State) -> None:
        self._connection, self._index, self._state = connection, index, state
        self._swept = -math.inf  # when, on the monotonic clock

    def replace(self, documents: Sequence[tuple[Document, str]], passages: Sequence[Passage], vectors: NDArray[np.float32]) -> None:
        """Store documents and all their passages in place of what they had; durable and searchable when this returns."""
        self._sweep_if_due()
        rows: dict[str, list[int]] = {document.id: [] for document, _ in documents}
        for row, passage in enumerate(passages):
            rows[passage.document_id].append(row)
        left = {schema.document_key(document.id): (document, digest) for document, digest in documents}
        lost: dict[str, tuple[Range, ...]] = {}  # ranges of tries that another writer beat
        for _ in range(_TRIES):
            stored, written = self._replace_once(left, rows, passages, vectors, lost)
            self._settle(stored)
            for key in stored.keys() & left.keys():
                del left[key]
            for key in left:
                lost[key] = (*lost.get(key, ()), written[key])
            if not left:
                self._connection.refresh(self._index)
                return
        raise self._outrun(len(left))

    def _replace_once(
        self,
        documents: Mapping[str, tuple[Document, str]],
        rows: Mapping[str, Sequence[int]],
        passages: Sequence[Passage],
        vectors: NDArray[np.float32],
        lost: Mapping[str, tuple[Range, ...]],
    ) -> tuple[dict[str, Record], dict[str, Range]]:
        """Steps 1 to 3; returns the records of those that got through, and the range that each had."""
        now = time.time()
        number = self._state.take_numbers(len(documents) + sum(len(rows[document.id]) for document, _ in documents.values()))
        first = number + len(documents)
        fresh: dict[str, Range] = {}
        for key, (document, _) in documents.items():
            fresh[key] = Range(first, len(rows[document.id]), now)
            first += fresh[key].count
        records = self._read(documents)
        intents = []
        for key, (document, _) in documents.items():
            record = records.get(key) or Record(key=key, id=document.id)
            # a commit whose answer got lost looks like a lost race, and what it wrote is live
            beaten = [part for part in lost.get(key, ()) if record.live is None or part.first != record.live.first]
            intents.append(replace(record, stale=(*record.stale, *beaten, fresh[key])))
        intended = self._write(intents)
        self._connection.bulk(
            self._index,
            (
                passage_action(key, fresh[key].first + at, documents[key][0], passages[row], vectors[row])
                for key in intended
                for at, row in enumerate(rows[documents[key][0].id])
            ),
        )
        commits = []
        for at, (key, (document, digest)) in enumerate(documents.items()):
            if key not in intended:
                continue
            intent = intended[key]
            commits.append(
                replace(
                    intent,
                    number=number + at,
                    digest=digest,
                    source=document.source,
                    metadata=json.dumps(dict(document.metadata), ensure_ascii=False),
                    live=fresh[key],
                    stale=_others(intent, fresh[key], now),
                )
            )
        return self._write(commits), fresh

    def delete(self, ids: Iterable[str]) -> int:
        """Remove documents; returns how many passages went with them."""
        self._sweep_if_due()
        left = {schema.document_key(id_) for id_ in ids}
        removed: dict[str, int] = {}
        self._state.take_numbers(0)
        for _ in range(_TRIES):
            records = self._read(left)
            removed |= {key: record.live.count for key, record in records.items() if record.live is not None}
            now = time.time()
            marked = self._write([replace(record, live=None, stale=_others(record, None, now)) for record in records.values()])
            self._settle(marked)
            left = records.keys() - marked.keys()
            if not left:
                self._connection.refresh(self._index)
                return sum(removed.values())
        raise self._outrun(len(left))

    def _sweep_if_due(self) -> None:
        if time.monotonic() - self._swept > SWEEP_AFTER:
            self.sweep()

    def sweep(self) -> int:
        """Remove what stopped writes left behind; returns how many documents had such leftovers."""
        self._swept = time.monotonic()
        query = {"bool": {"filter": [{"term": {"kind": "document"}}, {"term": {"unsettled": True}}]}}
        total = 0
        while True:
            hits = self._search(query=query, size=_AT_ONCE, source=False)["hits"]["hits"]
            until = time.time() - SWEEP_AFTER
            records = self._read(hit["_id"] for hit in hits).values()
            stopped = [record for record in records if not record.settled and all(part.since < until for part in record.stale)]
            swept = self._write(stopped)  # a writer that is slow rather than stopped sees that the record has changed, and begins again
            self._settle(swept)
            if swept:
                self._connection.refresh(self._index)
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
        removals = (
            removal_action(record.key, number)
            for record in unsettled
            for part in record.stale
            for number in range(part.first, part.first + part.count)
        )
        self._connection.bulk(self._index, removals)
        self._write([replace(record, stale=()) for record in unsettled if record.live is not None])
        self._connection.bulk(self._index, [forget_action(record) for record in unsettled if record.live is None])

    def _write(self, records: Sequence[Record]) -> dict[str, Record]:
        """Write records that nobody has changed since they were read; returns those, as they are now."""
        results = self._connection.bulk(self._index, [record_action(record) for record in records])
        return {
            record.key: replace(record, seen=(result["_seq_no"], result["_primary_term"]))
            for record, result in zip(records, results, strict=True)
            if result is not None
        }

    def _read(self, keys: Iterable[str]) -> dict[str, Record]:
        """Records as they are, searchable already or not."""
        found: dict[str, Record] = {}
        for part in _parts(keys, _AT_ONCE):
            found |= {entry["_id"]: parse_record(entry) for entry in self._get([{"_id": key, "routing": key} for key in part])}
        return found

    def _get(self, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        body = self._connection.call(lambda client: client.mget(index=self._index, docs=wanted))
        return [entry for entry in body["docs"] if entry["found"]]

    def records(self, ids: Iterable[str]) -> dict[str, Record]:
        """Of those documents that are stored, by id."""
        return {record.id: record for record in self._read({schema.document_key(id_) for id_ in ids}).values() if record.live is not None}

    def passages(self, record: Record) -> list[Passage]:
        """Of a document that is stored, in order."""
        if record.live is None:
            return []
        found = []
        for numbers in _parts(range(record.live.first, record.live.first + record.live.count), _AT_ONCE):
            target = {"routing": record.key, "_source": PASSAGE_FIELDS}
            entries = self._get([{"_id": schema.passage_key(record.key, number), **target} for number in numbers])
            found += [parse_passage(entry, record) for entry in entries]
        return found

    def page(self, after: int, size: int) -> list[tuple[int, str, str, int]]:
        """See `KnowledgeBase.page`."""
        query = {"bool": {"filter": [{"term": {"kind": "document"}}, {"term": {"live": True}}, {"range": {"number": {"gt": after}}}]}}
        body = self._search(query=query, size=size, sort=[{"number": "asc"}], source=["number", "id", "source", "passages"])
        rows = [hit["_source"] for hit in body["hits"]["hits"]]
        return [(row["number"], row["id"], row["source"], row["passages"]) for row in rows]

    def counts(self) -> Counts:
        query = {"bool": {"filter": [{"term": {"kind": "document"}}, {"term": {"live": True}}]}}
        body = self._search(query=query, size=0, track_total_hits=True, aggregations={"passages": {"sum": {"field": "passages"}}})
        return Counts(documents=body["hits"]["total"]["value"], passages=int(body["aggregations"]["passages"]["value"]))

    def _search(self, **request: Any) -> Any:
        return self._connection.call(lambda client: client.search(index=self._index, allow_partial_search_results=False, **request))


def _others(record: Record, but: Range | None, now: float) -> tuple[Range, ...]:
    """All ranges that a record knows, live or stale, but one."""
    live = () if record.live is None else (replace(record.live, since=now),)
    return tuple(part for part in (*record.stale, *live) if part.count and (but is None or part.first != but.first))


def _parts(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part

"""Where two indexes hold different documents, without reading what they have in common.

Every write of a document gives it a number that no other write gets, and a copy keeps it: two indexes hold the same where they hold the
same numbers. Ranges of numbers are compared by how many documents are in them, how many passages those have, and the sums of their
numbers and of their marks (`schema.mark`); a range that differs is divided, until what is left of it can be listed. One document of a
million that was deleted is found by four requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.elastic.connection import Connection

LISTED = 1_000  # documents of a range that are listed rather than divided again
_WAYS = 64  # into which a range is divided
_SUMS = ("passages", "number", "mark")


@dataclass(frozen=True, slots=True)
class Sums:
    """Of the documents of one index whose numbers are in a range; two that are equal are taken to be of the same documents."""

    documents: int
    passages: int
    numbers: float
    marks: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A range of document numbers, `low` to `high - 1`, in which two indexes differ."""

    low: int
    high: int
    one: Sums
    other: Sums


def differences(connection: Connection, one: str, other: str, low: int = 0) -> Iterator[Difference]:
    """In the order of numbers, from `low` on, ranges that differ: of at most `LISTED` documents in either index, or of none in one."""
    tops = _answers(connection, [(index, _query(low, None, {"top": {"max": {"field": "number"}}})) for index in (one, other)])
    top = max(int(answer["aggregations"]["top"]["value"] or 0) for answer in tops)
    yield from _within(connection, one, other, low, top + 1)


def _within(connection: Connection, one: str, other: str, low: int, high: int) -> Iterator[Difference]:
    if low >= high:
        return
    edges = [*range(low, high, -(-(high - low) // _WAYS)), high]
    ranges = {"field": "number", "ranges": [{"from": start, "to": end} for start, end in itertools.pairwise(edges)]}
    sums = {"parts": {"range": ranges, "aggregations": {name: {"sum": {"field": name}} for name in _SUMS}}}
    answers = _answers(connection, [(index, _query(low, high, sums)) for index in (one, other)])
    parts = [[_sums(bucket) for bucket in answer["aggregations"]["parts"]["buckets"]] for answer in answers]
    for (start, end), ours, theirs in zip(itertools.pairwise(edges), *parts, strict=True):
        if ours == theirs:
            continue
        if min(ours.documents, theirs.documents) and max(ours.documents, theirs.documents) > LISTED:
            yield from _within(connection, one, other, start, end)
        else:
            yield Difference(start, end, ours, theirs)


def _query(low: int, high: int | None, aggregations: dict[str, Any]) -> dict[str, Any]:
    numbers = {"gte": low} | ({} if high is None else {"lt": high})
    stored = [*schema.STORED, {"range": {"number": numbers}}]
    return {"query": {"bool": {"filter": stored}}, "size": 0, "aggregations": aggregations}


def _answers(connection: Connection, searches: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    lines = [line for index, query in searches for line in ({"index": index, "allow_partial_search_results": False}, query)]
    answers: list[dict[str, Any]] = connection.call(lambda client: client.msearch(searches=lines))["responses"]
    return answers


def _sums(bucket: dict[str, Any]) -> Sums:
    return Sums(bucket["doc_count"], *(bucket[name]["value"] for name in _SUMS))

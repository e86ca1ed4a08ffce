"""Documents that have passages which are not live: a write is under way, or was stopped. Searches look for their live passages alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from openbook_server.errors import KnowledgeBaseUnavailable
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.entries import LIVE_FIELDS, Range, parse_live
from openbook_server.knowledge.elastic.schema import UNSETTLED

_MOST = 10_000  # unsettled documents that are read at once: Elasticsearch's own limit; a search meets the others itself
_SPANS = 256  # conditions of one query that name a first and a last number; Elasticsearch allows 1,024 of all kinds, or more
_NUMBERS = 65_536  # that one condition may name: Elasticsearch's own limit

Doubt = Mapping[str, Range | None]  # by document's key, the numbers that are live; None where none is


def look(connection: Connection, index: str, preference: str, met: Iterable[str]) -> Doubt:
    """What is live of some documents, and of all whose writes are not complete: whoever met one of a write's will meet the others.

    Args:
        preference: names the copies of the shards that are read, as they were at their last refresh.
        met: routing values; what is no document's key has nothing that is live.
    """
    unsettled = connection.call(
        lambda client: client.search(
            index=index,
            query=UNSETTLED,
            size=_MOST,
            source_includes=LIVE_FIELDS,
            preference=preference,
            allow_partial_search_results=False,
            track_total_hits=False,
        )
    )["hits"]["hits"]
    wanted = [{"_id": key, "routing": key, "_source": LIVE_FIELDS} for key in met]
    known = connection.call(lambda client: client.mget(index=index, docs=wanted, realtime=False, preference=preference))["docs"]
    return {entry["_id"]: parse_live(entry) for entry in [*unsettled, *known]}


def live_query(doubt: Doubt, name: str) -> dict[str, Any]:
    """What is of other documents, or live.

    Raises:
        KnowledgeBaseUnavailable: Elasticsearch takes no query that names so many passages.
    """
    live = sorted((part for part in doubt.values() if part is not None), key=lambda part: -part.count)
    numbers = [number for part in live[_SPANS:] for number in part.numbers]
    if len(numbers) > _NUMBERS:
        raise KnowledgeBaseUnavailable(
            f"{name}: {len(live)} documents with too many passages for one search are being written at this moment; try again later"
        )
    others = {"bool": {"must_not": [{"terms": {"_routing": [*doubt]}}]}}
    spans = [{"range": {"number": {"gte": part.first, "lt": part.first + part.count}}} for part in live[:_SPANS]]
    return {"bool": {"should": [others, *spans, {"terms": {"number": numbers}}]}}

"""What an index holds: one state, a record a document, an entry a passage; and conditions on metadata as its queries.

A document's record and passages share a routing value, so they share a shard. Passages are numbered across the whole
knowledge base and never twice; a passage is live while its document's record says so: the record's `first` and
`passages` are the range of live numbers. That is what makes a write to several entries one write: see `documents`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from openbook_server.knowledge import filters
from openbook_server.knowledge.graph import EF_CONSTRUCTION, M

FORMAT = 1  # raised whenever an older server would misread an index
STATE = "state"  # id and routing of the one entry that counts writes and numbers

_STORED = {"type": "keyword", "index": False, "doc_values": False}  # only given back, of any length
_WORDS = {"type": "custom", "tokenizer": "standard", "filter": ["lowercase", "asciifolding", "porter_stem"]}


def settings(*, shards: int, replicas: int, active_copies: str) -> dict[str, Any]:
    return {
        "number_of_shards": shards,
        "number_of_replicas": replicas,
        "write.wait_for_active_shards": active_copies,
        "translog.durability": "request",  # on disk before it is acknowledged; Elasticsearch's default, but not to be left to a template
        "analysis": {"analyzer": {"words": _WORDS}},
    }


ADDED: Mapping[str, Any] = {  # to an index since its format was fixed; an earlier version left them out
    "mark": {"type": "long", "index": False},  # of a document, see `mark`
    "tokens": {"type": "binary"},  # of a passage's text, see `Passage`; only given back
    "windows": {"type": "binary"},  # of a passage, see `PassageVectors`; only given back
}
OVERSAMPLE = 2.0  # candidates that are compared exactly, for each one that is wanted


def mappings(dim: int, facts: Mapping[str, str]) -> dict[str, Any]:
    """Of an index of vectors of `dim` dimensions that records `facts` about itself."""
    # The graph holds a byte a dimension, a quarter of the memory; what it proposes is compared by the float32 vectors, so scores are exact.
    graph = {"type": "int8_hnsw", "m": M, "ef_construction": EF_CONSTRUCTION, "rescore_vector": {"oversample": OVERSAMPLE}}
    return {
        "dynamic": "strict",
        "_meta": {"openbook": {"format": str(FORMAT), **facts}},
        "_routing": {"required": True},
        "properties": {
            "kind": {"type": "keyword"},  # state, document or passage
            "number": {"type": "long"},  # of a document or passage, in the order of storing
            "id": _STORED,
            # of the state
            "sequence": {"type": "long", "index": False},
            "next_number": {"type": "long", "index": False},
            "facts": {"type": "object", "enabled": False},
            # of a document
            "digest": _STORED,
            "source": _STORED,
            "metadata": _STORED,  # JSON
            "live": {"type": "boolean"},  # false: not stored yet, or being deleted
            "first": {"type": "long", "index": False},
            "passages": {"type": "long", "index": False},
            "stale": {"type": "object", "enabled": False},  # ranges of numbers that may have entries and are not live
            "unsettled": {"type": "boolean"},  # it has stale ranges, or is not live
            # of a passage
            "document": _STORED,
            "start": {"type": "long", "index": False, "doc_values": False},
            "title": {**_STORED, "copy_to": "words"},
            "text": {**_STORED, "copy_to": "words"},
            "words": {"type": "text", "analyzer": "words", "index_options": "freqs"},
            "pairs": {"type": "keyword"},  # of the document's metadata, see `pair`
            "numbers": {"type": "keyword"},  # of the document's metadata, see `sortable`
            "vector": {"type": "dense_vector", "dims": dim, "index": True, "similarity": "max_inner_product", "index_options": graph},
            **ADDED,
        },
    }


_RECORD: list[dict[str, Any]] = [{"term": {"kind": "document"}}, {"exists": {"field": "first"}}]  # and not what was put in by hand
STORED = [*_RECORD, {"term": {"live": True}}]  # filters: the records of documents that are stored
UNSETTLED = {"bool": {"filter": [*_RECORD, {"term": {"unsettled": True}}]}}  # query: those whose writes are under way, or were stopped


def document_key(id_: str) -> str:
    """Names a document in the index, whatever its id is made of."""
    return hashlib.sha256(id_.encode()).hexdigest()[:32]


def passage_key(document: str, number: int) -> str:
    return f"{document}.{number}"


def mark(number: int) -> int:
    """32 bits that look random, of a document's number: sums of them tell sets of documents apart that sums of numbers do not."""
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:4])


def inner_product(score: float) -> float:
    """Of a score that `max_inner_product` gave: 1 + x for x >= 0, else 1 / (1 - x)."""
    return score - 1 if score >= 1 else 1 - 1 / score


def pair(key: str, value: str) -> str:
    """A metadata entry as one term; hashed, for a term has at most 32,766 bytes."""
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()[:32]


def sortable(key: str, number: float) -> str:
    """A metadata entry with a number as one term: terms of one key are ordered as their numbers are."""
    [bits] = struct.unpack(">Q", struct.pack(">d", number + 0.0))  # -0.0 becomes 0.0
    ordered = bits ^ (0xFFFF_FFFF_FFFF_FFFF if bits >> 63 else 1 << 63)
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{ordered:016x}"


def terms(metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """The fields of a passage that conditions look at."""
    numbers = {key: filters.as_number(value) for key, value in metadata.items()}
    return {
        "pairs": [pair(key, value) for key, value in metadata.items()],
        "numbers": [sortable(key, number) for key, number in numbers.items() if number is not None],
    }


def condition_query(condition: filters.Filter) -> dict[str, Any]:
    """The passages whose documents match; means what `filters.sql` means."""
    match condition:
        case filters.OneOf(key, values):
            return {"terms": {"pairs": [pair(key, value) for value in dict.fromkeys(values)]}}
        case filters.Range(key, at_least, at_most):
            return {"range": {"numbers": {"gte": sortable(key, at_least), "lte": sortable(key, at_most)}}}
        case filters.All(parts):
            return {"bool": {"filter": [condition_query(part) for part in parts]}} if parts else {"match_all": {}}
        case filters.Any(parts):
            return (
                {"bool": {"should": [condition_query(part) for part in parts], "minimum_should_match": 1}} if parts else {"match_none": {}}
            )
        case filters.Not(inner):
            return {"bool": {"must_not": [condition_query(inner)]}}

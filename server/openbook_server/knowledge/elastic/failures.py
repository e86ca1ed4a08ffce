"""What Elasticsearch answers in place of a result: whether it may heal, and what a user is told of it.

Elasticsearch's own reasons are never repeated, for they may hold whole entries, with the texts, ids and metadata of documents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import elastic_transport
import elasticsearch

from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseRefused, KnowledgeBaseUnavailable, OpenBookError
from openbook_server.knowledge.elastic.address import API_KEY

HELD = "held"  # our own word for an index that is closed to writes and will be open again
PARTIAL = "partial_answer"  # and for an answer from some of the shards, whose reason is ours, too
_MAY_HEAL = frozenset({408, 429, 502, 503, 504})
_GONE = "index_not_found_exception"
_BLOCK = re.compile(r"/index (read|metadata) \(api\)")
_SHARDS = re.compile(r"currently has \[(\d+)\]/\[(\d+)\] maximum")
_CLOSED_TO = {"read": "searches", "metadata": "requests about its settings"}  # blocks of operators; other ones keep writes out


class Failed(Exception):
    """What Elasticsearch answered in place of a result."""

    def __init__(self, status: int, cause: Mapping[str, Any]) -> None:
        """`cause` as Elasticsearch tells it: `type`, `reason`, and where it is about one the name of an `index`."""
        self.status, self.kind = status, str(cause.get("type", ""))
        self.reason, self.index = str(cause.get("reason", "")), str(cause.get("index", ""))
        super().__init__(self.kind)


def failure_of(error: Exception) -> Failed | None:
    """What the server said, where it said something."""
    if isinstance(error, Failed):
        return error
    if not isinstance(error, elasticsearch.ApiError):
        return None
    body = error.body.get("error") if isinstance(error.body, Mapping) else None
    cause = (body.get("root_cause") or [body])[0] if isinstance(body, Mapping) else {}
    return Failed(error.meta.status, cause)


def may_heal(error: Exception) -> bool:
    failure = failure_of(error)
    if failure is None:
        lost = isinstance(error, elastic_transport.ConnectionError | elastic_transport.ConnectionTimeout)
        return lost and not isinstance(error, elastic_transport.TlsError)
    return failure.status in _MAY_HEAL and not _disk_is_full(failure)


def is_closed(error: Exception) -> bool:
    """To writes: the index has not the name that they use, or the block that `publication` and operators use."""
    failure = failure_of(error)
    return failure is not None and (
        failure.kind == _GONE or (failure.kind == "cluster_block_exception" and "index write" in failure.reason)
    )


def _disk_is_full(failure: Failed) -> bool:
    return failure.kind == "cluster_block_exception" and "read-only-allow-delete" in failure.reason


def explained(name: str, error: Exception) -> OpenBookError:
    """What went wrong and the way out."""
    failure = failure_of(error)
    if isinstance(error, elastic_transport.TlsError):
        return KnowledgeBaseRefused(f"{name}: no trust in its certificate ({error.message}); name the file of its authority: ?ca=FILE")
    if isinstance(error, elastic_transport.ConnectionTimeout):
        return KnowledgeBaseUnavailable(f"{name} did not answer in time; look at its load, or raise ?timeout=SECONDS")
    if isinstance(error, elasticsearch.UnsupportedProductError | elastic_transport.SerializationError):
        return KnowledgeBaseRefused(f"{name} is no Elasticsearch 9 or newer; give the address of one")
    if failure is None:
        detail = type(error.errors[-1]).__name__ if isinstance(error, elastic_transport.TransportError) and error.errors else ""
        return KnowledgeBaseUnavailable(
            f"{name} cannot be reached{f' ({detail})' if detail else ''}; is it running, and is the address right?"
        )
    if failure.status in (401, 403) and failure.kind != "cluster_block_exception":
        return KnowledgeBaseRefused(
            f"{name} refuses this user ({failure.status}); give elasticsearch://USER:PASSWORD@HOST/ALIAS, or a key that may read, write "
            f"and manage the alias and its indices in {API_KEY}"
        )
    if _disk_is_full(failure):
        return KnowledgeBaseRefused(
            f"{name} takes no writes: a node's disk is over its flood-stage watermark; free space or add a node, then it takes them again"
        )
    if failure.kind == "cluster_block_exception" and (block := _BLOCK.search(failure.reason)):
        return KnowledgeBaseRefused(
            f"{name}: an operator closed the index to {_CLOSED_TO[block[1]]}; see its setting index.blocks.{block[1]}"
        )
    if failure.kind == "cluster_block_exception" and failure.status == 403:
        return KnowledgeBaseRefused(f"{name} takes no writes: an operator made the index read-only; see its setting index.blocks")
    if failure.kind == "index_closed_exception":
        return KnowledgeBaseRefused(f"{name}: the index is closed; POST {failure.index}/_open opens it")
    if failure.kind == "validation_exception" and (shards := _SHARDS.search(failure.reason)):
        return KnowledgeBaseRefused(
            f"{name}: the cluster has {shards[1]} shards and copies, and its setting cluster.max_shards_per_node allows {shards[2]}; "
            "remove indices or generations, ask for fewer (?shards=1&replicas=0), add a node, or raise the setting"
        )
    if failure.kind == "media_type_header_exception":
        return KnowledgeBaseRefused(f"{name} is older than Elasticsearch 9; upgrade it")
    if failure.kind == _GONE:
        return KnowledgeBaseDamaged(f"{name}: the index that this process opened is gone; restart it to follow the alias")
    if failure.kind == HELD:
        return KnowledgeBaseUnavailable(
            f"{name}: writes wait for a generation that is being published, for too long by now; try again later"
        )
    if failure.status in _MAY_HEAL:
        what = failure.reason if failure.kind == PARTIAL else failure.kind or failure.status
        return KnowledgeBaseUnavailable(
            f"{name}: {what}; nothing is answered from a part of the knowledge base. GET _cluster/allocation/explain says what is missing"
        )
    return KnowledgeBaseDamaged(f"{name} refused a request: {failure.kind or failure.status}")

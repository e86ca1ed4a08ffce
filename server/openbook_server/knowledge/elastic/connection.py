"""Requests to Elasticsearch: another host or a later moment where one fails, and failures explained.

What may heal by itself (no answer, a node that is gone, a queue that is full) is tried again until `patience` seconds have
passed and is then KnowledgeBaseUnavailable; what an operator must mend is KnowledgeBaseRefused at once. An answer from
only some of the shards counts as no answer. Every request that is sent more than once may have been done: callers send
only what may be done twice.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import elastic_transport
import elasticsearch
from elasticsearch import Elasticsearch

from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseRefused, KnowledgeBaseUnavailable, OpenBookError
from openbook_server.knowledge.elastic.address import API_KEY, Address

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds for which a question is asked again
WRITING_PATIENCE = 60.0  # seconds for which a write is tried again: longer than it takes to replace a node that is gone
_BULK_BYTES = 4_000_000  # of one bulk request, about
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 3.0  # seconds between two tries
_MAY_HEAL = frozenset({408, 429, 502, 503, 504})
_CONFLICT = 409
_GONE = "index_not_found_exception"
_HELD = "held"  # our own word for an index that is closed to writes and will be open again
_OLDEST = 9  # version of Elasticsearch
_CONNECTIONS = 32  # to one node, kept: one for each thread that may search or write at the same time

Action = tuple[dict[str, Any], dict[str, Any] | None]  # a bulk operation, and the entry that it writes


class _Failed(Exception):
    """What Elasticsearch answered in place of a result."""

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(kind)
        self.status, self.kind, self.reason = status, kind, reason


class Connection:
    """Thread-safe."""

    def __init__(self, address: Address) -> None:
        logging.getLogger("elastic_transport.transport").setLevel(logging.WARNING)  # it logs every request
        logging.getLogger("elastic_transport.node_pool").setLevel(logging.ERROR)  # and every try to reach a node that is gone
        self.name = address.name
        self._timeout = address.timeout
        login: dict[str, Any] = {}
        if address.user:
            login["basic_auth"] = (address.user, address.password)
        elif address.api_key:
            login["api_key"] = address.api_key
        if address.ca:
            login["ca_certs"] = address.ca
        scheme = "https" if address.tls else "http"
        self._client = Elasticsearch(
            [{"scheme": scheme, "host": host, "port": port} for host, port in address.hosts],
            request_timeout=address.timeout,
            max_retries=0,  # `call` retries, with pauses
            connections_per_node=_CONNECTIONS,
            **login,
        )
        # What a node that hangs is given of a question before another one is asked.
        self._first = self._client.options(request_timeout=min(address.timeout, PATIENCE / 2)) if len(address.hosts) > 1 else self._client

    def check_version(self) -> None:
        """Raises KnowledgeBaseRefused where no Elasticsearch 9 or newer answers, and as `call` does where nothing answers."""
        version = str(self.call(lambda client: client.info())["version"]["number"])
        if int(version.partition(".")[0]) < _OLDEST:
            raise KnowledgeBaseRefused(f"{self.name} is Elasticsearch {version}, {_OLDEST} or newer is needed; upgrade it")

    def call(self, request: Callable[[Elasticsearch], Any], *, patience: float | None = None, accept: Collection[int | str] = ()) -> Any:
        """The answer's body. `request` may be made several times.

        Args:
            patience: seconds for which to try again; by default `PATIENCE`, and somebody waits: the next host is asked early.
            accept: HTTP statuses and kinds of error that are an answer too: None.

        Raises:
            KnowledgeBaseUnavailable, KnowledgeBaseRefused, KnowledgeBaseDamaged: see the module.
        """
        until = time.monotonic() + (PATIENCE if patience is None else patience)
        for attempt in itertools.count():
            client = self._first if patience is None and not attempt else self._client
            try:
                return _checked(request(client).body)
            except (elasticsearch.ApiError, elastic_transport.TransportError, _Failed) as error:
                failure = _failure(error)
                if failure is not None and (failure.status in accept or failure.kind in accept):
                    return None
                self._pause_or_raise(error, attempt, until)
        raise AssertionError("the loop ends by returning or raising")

    def bulk(self, alias: str, actions: Iterable[Action], *, will_open: Callable[[], bool]) -> list[dict[str, Any] | None]:
        """Write entries; returns what Elasticsearch says of each, None where another writer was faster (HTTP 409).

        Args:
            alias: so that nothing is written into an index that Elasticsearch makes up because this one is gone.
            actions: taken one by one, and held only as many as are sent together.
            will_open: asked where no index has the alias, or the index is blocked: whether to try again; it may raise, too.

        Raises:
            KnowledgeBaseUnavailable and others: some of the entries may be written.
        """
        results: list[dict[str, Any] | None] = []
        for chunk in _chunks(actions):
            results += self._bulk(alias, chunk, will_open)
        return results

    def refresh(self, index: str) -> None:
        """Make everything written searchable."""
        self.call(lambda client: client.indices.refresh(index=index), patience=WRITING_PATIENCE)

    def _bulk(self, alias: str, actions: Sequence[Action], will_open: Callable[[], bool]) -> list[dict[str, Any] | None]:
        """Only what failed in a way that may heal is sent again."""
        results: dict[int, dict[str, Any] | None] = {}
        until = time.monotonic() + WRITING_PATIENCE
        for attempt in itertools.count():
            waiting = [at for at in range(len(actions)) if at not in results]
            if not waiting:
                break
            lines = [line for at in waiting for line in actions[at] if line is not None]
            failed: Exception | None = None
            try:
                wait = f"{max(1, int(self._timeout / 2))}s"  # for shards that are not there; shorter than the client waits
                body = self._client.bulk(index=alias, operations=lines, require_alias=True, timeout=wait).body
                for at, item in zip(waiting, body["items"], strict=True):
                    [answer] = item.values()
                    status, problem = answer["status"], answer.get("error")
                    if status == _CONFLICT:
                        results[at] = None
                    elif problem is None:  # also where what was to be deleted is not there
                        results[at] = answer
                    else:
                        refused = _Failed(status, problem.get("type", ""), problem.get("reason", ""))
                        failed = refused if failed is None or not _may_heal(refused) else failed
            except (elasticsearch.ApiError, elastic_transport.TransportError) as error:
                failed = error
            if failed is not None:
                held = _is_closed(failed) and will_open()
                self._pause_or_raise(_Failed(503, _HELD, "") if held else failed, attempt, until)
        return [results[at] for at in range(len(actions))]

    def _pause_or_raise(self, error: Exception, attempt: int, until: float) -> None:
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
        if not _may_heal(error) or time.monotonic() + wait > until:
            raise _explained(self.name, error) from error
        log.debug("%s: %s; trying again in %.1f s", self.name, type(error).__name__, wait)
        time.sleep(wait)

    def close(self) -> None:
        self._client.close()


def _chunks(actions: Iterable[Action]) -> Iterator[list[Action]]:
    chunk: list[Action] = []
    size = 0
    for action in actions:
        entry = action[1] or {}
        size += 200 + sum(len(entry.get(field, "")) for field in ("text", "tokens", "metadata")) + 12 * len(entry.get("vector", ()))
        chunk.append(action)
        if size >= _BULK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _checked(body: Any) -> Any:
    """A result from all shards, or `_Failed`: several searches or reads in one answer have a status each."""
    if not isinstance(body, Mapping):
        return body
    for part in (body, *body.get("responses", ()), *body.get("docs", ())):
        error, shards = part.get("error"), part.get("_shards", {})
        if isinstance(error, Mapping):
            cause = (error.get("root_cause") or [error])[0]
            kind = cause.get("type") or error.get("type", "")
            raise _Failed(int(part.get("status", 503)), kind, cause.get("reason") or error.get("reason", ""))
        if shards.get("failed") or (part.get("timed_out") and "hits" in part):
            raise _Failed(503, "partial_answer", f"{shards.get('failed', 0)} of {shards.get('total', 0)} shards did not answer")
    return body


def _failure(error: Exception) -> _Failed | None:
    """What the server said, where it said something."""
    if isinstance(error, _Failed):
        return error
    if not isinstance(error, elasticsearch.ApiError):
        return None
    body = error.body.get("error") if isinstance(error.body, Mapping) else None
    cause = (body.get("root_cause") or [body])[0] if isinstance(body, Mapping) else {}
    return _Failed(error.meta.status, cause.get("type", ""), cause.get("reason", "") or str(body or ""))


def _may_heal(error: Exception) -> bool:
    failure = _failure(error)
    if failure is None:
        lost = isinstance(error, elastic_transport.ConnectionError | elastic_transport.ConnectionTimeout)
        return lost and not isinstance(error, elastic_transport.TlsError)
    return failure.status in _MAY_HEAL and not _disk_is_full(failure)


def _is_closed(error: Exception) -> bool:
    """To writes: the index has not the name that they use, or the block that `publication` and operators use."""
    failure = _failure(error)
    return failure is not None and (
        failure.kind == _GONE or (failure.kind == "cluster_block_exception" and "index write" in failure.reason)
    )


def _disk_is_full(failure: _Failed) -> bool:
    return failure.kind == "cluster_block_exception" and "read-only-allow-delete" in failure.reason


def _explained(name: str, error: Exception) -> OpenBookError:
    """What went wrong and the way out. Elasticsearch's own words are repeated only where they cannot hold a user's text."""
    failure = _failure(error)
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
    if failure.kind == "cluster_block_exception" and failure.status == 403:
        return KnowledgeBaseRefused(f"{name} takes no writes: an operator made the index read-only; see its setting index.blocks")
    if failure.kind == "media_type_header_exception":
        return KnowledgeBaseRefused(f"{name} is older than Elasticsearch 9; upgrade it")
    if failure.kind == _GONE:
        return KnowledgeBaseDamaged(f"{name}: the index that this process opened is gone; restart it to follow the alias")
    if failure.kind == _HELD:
        return KnowledgeBaseUnavailable(
            f"{name}: writes wait for a generation that is being published, for too long by now; try again later"
        )
    if failure.status in _MAY_HEAL:
        return KnowledgeBaseUnavailable(
            f"{name}: {failure.reason or failure.kind or failure.status}; nothing is answered from a part of the knowledge base. "
            "GET _cluster/allocation/explain says what is missing"
        )
    return KnowledgeBaseDamaged(f"{name} refused a request: {failure.kind or failure.status}")

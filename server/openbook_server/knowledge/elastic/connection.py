"""Requests to Elasticsearch: another host or a later moment where one fails.

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
from copy import copy
from typing import Any

import elastic_transport
import elasticsearch
from elasticsearch import Elasticsearch

from openbook_server.errors import KnowledgeBaseRefused
from openbook_server.knowledge.elastic.address import Address
from openbook_server.knowledge.elastic.failures import HELD, PARTIAL, Failed, explained, failure_of, is_closed, may_heal

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds for which a question is asked again
WRITING_PATIENCE = 60.0  # seconds for which a write is tried again: longer than it takes to replace a node that is gone
_BULK_BYTES = 4_000_000  # of one bulk request, about
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 3.0  # seconds between two tries
_CONFLICT = 409
_OLDEST = 9  # version of Elasticsearch
_CONNECTIONS = 32  # to one node, kept: one for each thread that may search or write at the same time

Action = tuple[dict[str, Any], dict[str, Any] | None]  # a bulk operation, and the entry that it writes


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
        self._hasty = self._client.options(request_timeout=min(address.timeout, PATIENCE / 2))
        self._first = self._hasty if len(address.hosts) > 1 else self._client

    def hasty(self) -> Connection:
        """This one, for what every cluster that is well answers at once: it waits no longer for one that hangs."""
        hasty = copy(self)
        hasty._client = hasty._first = self._hasty
        return hasty

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
            except (elasticsearch.ApiError, elastic_transport.TransportError, Failed) as error:
                failure = failure_of(error)
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
                        refused = Failed(status, problem)
                        failed = refused if failed is None or not may_heal(refused) else failed
            except (elasticsearch.ApiError, elastic_transport.TransportError) as error:
                failed = error
            if failed is not None:
                held = is_closed(failed) and will_open()
                self._pause_or_raise(Failed(503, {"type": HELD}) if held else failed, attempt, until)
        return [results[at] for at in range(len(actions))]

    def _pause_or_raise(self, error: Exception, attempt: int, until: float) -> None:
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
        if not may_heal(error) or time.monotonic() + wait > until:
            raise explained(self.name, error) from failure_of(error) or error  # not from what Elasticsearch said: it may hold texts
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
    """A result from all shards, or `Failed`: several searches or reads in one answer have a status each."""
    if not isinstance(body, Mapping):
        return body
    for part in (body, *body.get("responses", ()), *body.get("docs", ())):
        error, shards = part.get("error"), part.get("_shards", {})
        if isinstance(error, Mapping):
            cause = (error.get("root_cause") or [error])[0]
            raise Failed(int(part.get("status", 503)), {**error, **cause})
        if shards.get("failed") or (part.get("timed_out") and "hits" in part):
            reason = f"{shards.get('failed', 0)} of {shards.get('total', 0)} shards did not answer"
            raise Failed(503, {"type": PARTIAL, "reason": reason})
    return body

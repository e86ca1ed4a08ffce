"""What Prometheus scrapes: one registry a server, numbers only, never a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from openbook_server.models import model_of
from openbook_server.scraping import ScrapeServer

if TYPE_CHECKING:
    from openbook_server.comparison import Comparison
    from openbook_server.embedder import Embedder
    from openbook_server.engine import Engine
    from openbook_server.frontends.relay import Relay
    from openbook_server.knowledge import KnowledgeBase
    from openbook_server.work import Work

_Family = TypeVar("_Family", Counter, Histogram)

_STAGES = [(stage, f"{stage}_ms") for stage in ("tokenise", "embed", "search", "read", "rank", "queue")]  # labels, and fields of `Work`
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_READ = (0, 1, 3, 5, 10, 20, 50, 100)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server; each server has its own registry, so tests may run several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._children: dict[tuple[object, ...], Counter | Histogram] = {}
        self._requests = Counter("openbook_requests", "Requests by outcome", ["method", "status"], registry=self.registry)
        self._latency = Histogram("openbook_request_seconds", "Whole request", ["method"], buckets=_SECONDS, registry=self.registry)
        self._stages = Histogram("openbook_stage_seconds", "One stage", ["method", "stage"], buckets=_SECONDS, registry=self.registry)
        self._batch_rows = Histogram("openbook_batch_rows", "Rows a batch", ["graph"], buckets=_ROWS, registry=self.registry)
        self._batch_tokens = Counter("openbook_batch_tokens", "Padded tokens run", ["graph"], registry=self.registry)
        self._batch_seconds = Counter("openbook_batch_seconds", "Time the device was busy", ["graph"], registry=self.registry)
        self._read = Histogram("openbook_question_passages", "Passages that reading took", buckets=_READ, registry=self.registry)
        self._cache = Counter("openbook_cache_lookups", "Texts looked up, by what came of it", ["result"], registry=self.registry)
        self._cached = Gauge("openbook_cache_bytes", "Vectors kept, with their keys", registry=self.registry)
        self._queued = Gauge("openbook_queued_rows", "Rows waiting for the device", registry=self.registry)

    def count_request(self, method: str, status: str) -> None:
        """One that was refused unread: it took no time worth a place among those that were served."""
        self._child(self._requests, method, status).inc()

    def observe_request(self, method: str, status: str, seconds: float, work: Work) -> None:
        self.count_request(method, status)
        self._child(self._latency, method).observe(seconds)
        for stage, field in _STAGES:
            spent = getattr(work, field)
            if spent:
                self._child(self._stages, method, stage).observe(spent / 1000)

    def _child(self, family: _Family, *labels: str) -> _Family:
        """`family.labels(...)`, looked up once: it validates and locks at every call."""
        key = (family, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = family.labels(*labels)
        return cast(_Family, child)

    def observe_batch(self, graph: str, rows: int, tokens: int, seconds: float) -> None:
        graph = model_of(graph)
        self._batch_rows.labels(graph).observe(rows)
        self._batch_tokens.labels(graph).inc(tokens)
        self._batch_seconds.labels(graph).inc(seconds)

    def observe_calls(self, calls: Collection[object]) -> None:
        """Report how many there are whenever a scrape asks."""
        Gauge("openbook_calls", "Calls under way", registry=self.registry).set_function(lambda: len(calls))

    def observe_front_ends(self, relay: Relay, restarts: Callable[[], Mapping[str, int]]) -> None:
        """Report on the front ends, and on how often processes were started again, whenever a scrape asks."""
        for name, meaning, value in (
            ("openbook_front_ends", "Front ends that are connected", lambda: relay.front_ends),
            ("openbook_front_end_waiting_bytes", "Replies that front ends have not read", lambda: relay.waiting_bytes),
            ("openbook_front_end_refused_calls", "Calls that front ends ended without the engine", lambda: relay.refused),
        ):
            Gauge(name, meaning, registry=self.registry).set_function(value)
        gauge = Gauge("openbook_process_restarts", "Processes started again after they ended", ["process"], registry=self.registry)
        gauge.labels("engine").set_function(lambda: restarts()["engine"])
        gauge.labels("frontend").set_function(lambda: restarts()["frontend"])

    def observe_knowledge(self, live: Callable[[], KnowledgeBase | None]) -> None:
        """Report on the knowledge base that is live whenever a scrape asks."""

        def read(of: Callable[[KnowledgeBase], float]) -> float:
            knowledge_base = live()
            return of(knowledge_base) if knowledge_base is not None else math.nan

        def recall(bound: str) -> float:
            return read(lambda base: float(getattr(base.recall, bound, math.nan)))

        gauge = Gauge("openbook_recall", "Recall@10 of dense searches, 95 % interval", ["bound"], registry=self.registry)
        for bound in ("mean", "low", "high"):
            gauge.labels(bound).set_function(functools.partial(recall, bound))
        samples = Gauge("openbook_recall_samples", "Searches that the recall is of", registry=self.registry)
        samples.set_function(lambda: read(lambda base: base.recall.samples if base.recall else 0.0))
        Gauge("openbook_ef", "Candidates a dense search keeps", registry=self.registry).set_function(lambda: read(lambda base: base.ef))

    def observe_comparison(self, current: Callable[[], Comparison | None]) -> None:
        """Report on the comparison with a generation that is being built, while there is one, whenever a scrape asks."""
        for measure, meaning in (("overlap", "hits that both found"), ("agreement", "same best answers")):
            title = f"Live pair and the one that follows: {meaning}"
            gauge = Gauge(f"openbook_shadow_{measure}", f"{title}, 95 % interval", ["bound"], registry=self.registry)
            samples = Gauge(f"openbook_shadow_{measure}_samples", "Questions that it is of", registry=self.registry)

            def read(field: str, measure: str = measure) -> float:
                estimate = getattr(current(), measure, None)
                return float(getattr(estimate, field, 0.0 if field == "samples" else math.nan))

            for bound in ("mean", "low", "high"):
                gauge.labels(bound).set_function(functools.partial(read, bound))
            samples.set_function(functools.partial(read, "samples"))

    def observe_reading(self, passages: int) -> None:
        self._read.observe(passages)

    def observe_cache(self, hits: int, joined: int, misses: int) -> None:
        for result, count in (("hit", hits), ("joined", joined), ("miss", misses)):
            self._cache.labels(result).inc(count)

    def observe_engine(self, engine: Engine, embedder: Callable[[], Embedder]) -> None:
        """Report what waits and what is kept whenever a scrape asks."""
        self._queued.set_function(lambda: engine.queued)
        self._cached.set_function(lambda: embedder().cached_bytes)

    def serve(self, host: str, port: int) -> None:
        """Answer scrapes on http://host:port/metrics for as long as the process lives.

        Raises:
            OSError: the port is taken.
        """
        ScrapeServer(self.registry, host, port).start()

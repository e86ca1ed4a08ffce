"""Nearest vectors: an hnswlib graph for the many, an exact scan for the fresh and the few.

New rows go into a flat buffer that is scanned exactly; once it holds more than `flat_limit` rows they move into the
graph. A small knowledge base therefore is all buffer: exact, and without any graph to build or load. hnswlib must never
search while it adds, so one lock guards both; adding takes it chunk by chunk, and only when no search waits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import hnswlib
import numpy as np
from numpy.typing import NDArray

M = 16  # links a row and layer
EF_CONSTRUCTION = 100
EF = 64  # candidates kept while searching, unless a request says otherwise; recall 0.99 and more at 100k rows
FLAT_LIMIT = 10_000  # rows that are scanned exactly: about 0.5 ms on one core at 384 dimensions
SCAN_LIMIT = 5_000  # rows that a filter allows and that are scanned exactly rather than searched for
_CHUNK = 64  # rows added at a time: what a search may have to wait for, about 40 ms on one core
_SEED = 42

Vectors = NDArray[np.float32]


class VectorIndex:
    """Labels with unit vectors; thread-safe."""

    def __init__(
        self, dim: int, *, flat_limit: int = FLAT_LIMIT, graph: hnswlib.Index | None = None, live: frozenset[int] = frozenset()
    ) -> None:
        """`graph`, where given, was loaded from a verified snapshot; its rows that are not `live` are deleted ones."""
        self.dim, self._flat_limit = dim, flat_limit
        self._lock = threading.Lock()
        self._searches = 0  # running or waiting
        self._idle = threading.Condition()  # no search runs or waits
        self._graph = graph
        loaded = frozenset(graph.get_ids_list()) if graph is not None else frozenset()
        self._in_graph: set[int] = set(loaded & live)
        self._deleted = len(loaded - live)  # rows of the graph that are marked deleted
        if graph is not None:
            for label in loaded - live:
                with contextlib.suppress(RuntimeError):  # marked already when the snapshot was taken
                    graph.mark_deleted(label)
        self._flat: dict[int, Vectors] = {}
        self._scan: tuple[NDArray[np.int64], Vectors] | None = None  # the buffer as arrays, built when first searched

    def __len__(self) -> int:
        return len(self._in_graph) + len(self._flat)

    @property
    def labels(self) -> frozenset[int]:
        """Every live row."""
        with self._lock:
            return frozenset(self._in_graph) | self._flat.keys()

    @property
    def graph_rows(self) -> int:
        """Live rows that the graph holds; 0 = there is no graph to save."""
        return len(self._in_graph)

    def add(self, labels: Sequence[int], vectors: Vectors) -> None:
        """Make rows searchable at once.

        Args:
            labels: non-negative, none of them in the index.
            vectors: (labels, dim) unit vectors.

        Raises:
            ValueError: wrong shape, or a vector that is not of unit length (NaN included).
        """
        self.check(vectors, len(labels))
        with self._lock:
            self._flat.update(zip(labels, vectors, strict=True))
            self._scan = None
        if len(self._flat) > self._flat_limit:
            self._move_to_graph()

    def check(self, vectors: Vectors, rows: int) -> None:
        """Raises ValueError for vectors that `add` would not take."""
        if vectors.shape != (rows, self.dim):
            raise ValueError(f"vectors of shape {vectors.shape} for {rows} rows of {self.dim} dimensions")
        if not np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-2):
            raise ValueError("vectors must have unit length")

    def delete(self, labels: Sequence[int]) -> None:
        """Take rows out of every later search; unknown labels are ignored."""
        with self._lock:
            for label in labels:
                if label in self._in_graph and self._graph is not None:
                    self._graph.mark_deleted(label)
                    self._in_graph.discard(label)
                    self._deleted += 1
                elif self._flat.pop(label, None) is not None:
                    self._scan = None

    def search(self, queries: Vectors, k: int, *, ef: int | None = None, allowed: frozenset[int] | None = None) -> list[dict[int, float]]:
        """For each query label -> inner product of the k nearest rows, best first, ties by label.

        Args:
            queries: (batch, dim) unit vectors.
            k: rows a query, fewer where the index is smaller.
            ef: candidates the graph keeps; at least k is used.
            allowed: only these rows; None = all.
        """
        if allowed is not None:
            return self._search_among(queries, k, allowed, ef)
        with self._first(), self._lock:
            found: list[dict[int, float]] = [{} for _ in queries]
            if self._graph is not None and self._in_graph:
                found = self._search_graph(self._graph, queries, k, max(ef or EF, k))
            labels, vectors = self._buffer()
        if len(labels):
            scores = queries @ vectors.T
            depth = min(k, len(labels))
            for row, best in enumerate(np.argpartition(-scores, depth - 1, axis=1)[:, :depth]):
                found[row].update(zip(labels[best].tolist(), scores[row, best].tolist(), strict=True))
        return [dict(sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k]) for row in found]

    def _search_among(self, queries: Vectors, k: int, allowed: frozenset[int], ef: int | None) -> list[dict[int, float]]:
        """Few rows are scanned exactly; of many, so many neighbours are searched that k of them should be allowed ones, and
        where they are not, the rows are scanned after all. (A filter function inside hnswlib costs a hundred times as much.)
        """
        if len(allowed) > SCAN_LIMIT:
            width = min(len(self), int(1.5 * k * len(self) / len(allowed)) + 10)
            found = [{label: score for label, score in row.items() if label in allowed} for row in self.search(queries, width, ef=ef)]
            if all(len(row) >= k for row in found):
                return [dict(list(row.items())[:k]) for row in found]
        stored = self.vectors(sorted(allowed))
        if not stored:
            return [{} for _ in queries]
        labels = np.fromiter(stored, np.int64, len(stored))
        scores = queries @ np.stack(list(stored.values())).T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [dict(zip(labels[best].tolist(), scores[row, best].tolist(), strict=True)) for row, best in enumerate(order)]

    def vectors(self, labels: Sequence[int]) -> dict[int, Vectors]:
        """Stored vectors of those labels that are live."""
        with self._first(), self._lock:
            found = {label: self._flat[label] for label in labels if label in self._flat}
            stored = [label for label in labels if label in self._in_graph]
            if stored and self._graph is not None:
                found.update(zip(stored, self._graph.get_items(stored), strict=True))
            return found

    def save_graph(self, file: Path) -> list[int]:
        """Write the graph to `file`; returns the labels it holds alive. hnswlib reports no error: check what it wrote."""
        with self._lock:
            if self._graph is None:
                raise ValueError("there is no graph to save")
            self._graph.save_index(str(file))
            return sorted(self._in_graph)

    def flush(self) -> None:
        """Move the buffer into the graph, where there is one or the buffer is large enough for one."""
        if self._graph is not None or len(self._flat) > self._flat_limit:
            self._move_to_graph()

    def _move_to_graph(self) -> None:
        if self._graph is None:
            self._graph = hnswlib.Index("ip", self.dim)
            self._graph.init_index(max_elements=2 * len(self._flat), M=M, ef_construction=EF_CONSTRUCTION, random_seed=_SEED)
        waiting = list(self._flat)
        for at in range(0, len(waiting), _CHUNK):
            with self._idle:
                self._idle.wait_for(lambda: not self._searches)
            with self._lock:
                labels = [label for label in waiting[at : at + _CHUNK] if label in self._flat]
                if not labels:
                    continue
                needed = self._graph.get_current_count() + len(labels)
                if needed > self._graph.get_max_elements():
                    self._graph.resize_index(max(needed, 2 * self._graph.get_max_elements()))
                self._graph.add_items(np.array([self._flat[label] for label in labels]), labels)
                for label in labels:
                    del self._flat[label]
                self._in_graph.update(labels)
                self._scan = None

    @contextlib.contextmanager
    def _first(self) -> Iterator[None]:
        """Within, adding waits; without this a thread that adds takes the lock again before a search wakes up."""
        with self._idle:
            self._searches += 1
        try:
            yield
        finally:
            with self._idle:
                self._searches -= 1
                self._idle.notify_all()

    def _search_graph(self, graph: hnswlib.Index, queries: Vectors, k: int, ef: int) -> list[dict[int, float]]:
        k = min(k, len(self._in_graph))
        # Deleted rows take up candidates too; asking for all of them is the last resort before asking for fewer.
        for width in (ef, min(2 * (ef + self._deleted), graph.get_current_count())):
            graph.set_ef(max(width, k))
            try:
                labels, distances = graph.knn_query(queries, k=k)
            except RuntimeError:  # fewer than k rows reached
                continue
            return [dict(zip(a.tolist(), (1 - b).tolist(), strict=True)) for a, b in zip(labels, distances, strict=True)]
        return self._search_all(graph, queries, k)

    def _search_all(self, graph: hnswlib.Index, queries: Vectors, k: int) -> list[dict[int, float]]:
        """Exact scan of the graph's rows: for a graph whose links no longer reach k live rows."""
        labels = sorted(self._in_graph)
        scores = queries @ np.array(graph.get_items(labels), np.float32).T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [{labels[at]: float(scores[row, at]) for at in best} for row, best in enumerate(order)]

    def _buffer(self) -> tuple[NDArray[np.int64], Vectors]:
        if self._scan is None:
            labels = np.fromiter(self._flat, np.int64, len(self._flat))
            vectors = np.array(list(self._flat.values()), np.float32) if self._flat else np.empty((0, self.dim), np.float32)
            self._scan = labels, vectors
        return self._scan

"""Nearest vectors: an exact scan of the fresh and the few, a graph that proposes candidates for the many.

New rows go into a flat buffer that is scanned exactly; once it holds more than `flat_limit` rows they move into the
graph. A small knowledge base therefore is all buffer: exact, and without any graph to build or load. What the graph
proposes, by shadows (see `projection`) or by whole vectors with a little noise, is compared by the vectors themselves,
which the store keeps: scores are always exact, and equal for equal vectors. One lock guards buffer and graph; adding
takes it chunk by chunk, and only when no search waits.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.graph import EF, Graph, inner_products
from openbook_server.knowledge.precedence import Precedence
from openbook_server.knowledge.projection import Vectors, learn

log = logging.getLogger(__name__)

FLAT_LIMIT = 10_000  # rows that are scanned exactly: about 0.5 ms on one core at 384 dimensions
SCAN_LIMIT = 5_000  # rows that a filter allows and that are scanned one by one rather than searched for
_CHUNK = 64  # rows added at a time: what a search may have to wait for, about 40 ms on one core
_ROWS_AT_ONCE = 1_000  # of a graph that nobody searches yet, or of all rows
_SAMPLE = 10_000  # rows that a projection is learned from
_CHECKED = 1_000  # rows that tell whether it still fits
_GROWTH = 1.25  # how much a graph grows before that is asked again
_ROUNDING = 1e-5  # of an inner product of unit vectors in a product of matrices, more than ever

Truth = Callable[[Sequence[int]], Mapping[int, Vectors]]


def check_vectors(vectors: Vectors, rows: int, dim: int) -> None:
    """Raises ValueError for vectors that no index takes: a wrong shape, or one that is not of unit length (NaN included)."""
    if vectors.shape != (rows, dim):
        raise ValueError(f"vectors of shape {vectors.shape} for {rows} rows of {dim} dimensions")
    with np.errstate(over="ignore", invalid="ignore"):  # of what a disk changed: no warning, for it is told
        lengths = np.linalg.norm(vectors, axis=1)
    if not np.all(np.abs(lengths - 1) < 1e-2):
        raise ValueError("vectors must have unit length")


class VectorIndex:
    """Labels with unit vectors; thread-safe."""

    def __init__(
        self,
        dim: int,
        truth: Truth,
        *,
        flat_limit: int = FLAT_LIMIT,
        graph_dims: int = 0,
        precedence: Precedence | None = None,
        graph: Graph | None = None,
        live: frozenset[int] = frozenset(),
    ) -> None:
        """Args:
        truth: loads the vectors of those labels that are stored.
        graph_dims: dimensions of what the graph holds; 0 = as few as the data allow.
        precedence: shared with other indexes whose searches go first as well.
        graph: loaded from a verified snapshot; its rows that are not `live` are deleted ones.
        """
        self.dim, self._truth, self._flat_limit, self._graph_dims = dim, truth, flat_limit, graph_dims
        self._lock = threading.Lock()
        self._precedence = precedence or Precedence()
        self.ef = EF  # of searches that name none
        self._graph = graph
        self._checked_rows = len(graph.live) if graph else 0  # of the graph, when it was last asked whether it is fit
        if graph is not None:
            graph.keep(live)
        self._flat: dict[int, Vectors] = {}
        self._scan: tuple[NDArray[np.int64], Vectors] | None = None  # the buffer as arrays, built when first searched

    def __len__(self) -> int:
        return self.graph_rows + len(self._flat)

    @property
    def labels(self) -> frozenset[int]:
        """Every live row."""
        with self._lock:
            return frozenset(self._graph.live if self._graph else ()) | self._flat.keys()

    @property
    def graph_rows(self) -> int:
        """Live rows that the graph holds; 0 = there is no graph to save."""
        return len(self._graph.live) if self._graph else 0

    @property
    def graph_width(self) -> int:
        """Dimensions of what the graph holds; 0 = there is none."""
        return self._graph.width if self._graph else 0

    def add(self, labels: Sequence[int], vectors: Vectors) -> None:
        """Make rows searchable at once, in the buffer: whoever adds or deletes calls `settle` afterwards.

        Args:
            labels: non-negative; those that the index has stay as they are, for a row's vector never changes.
            vectors: (labels, dim) unit vectors.

        Raises:
            ValueError: wrong shape, or a vector that is not of unit length (NaN included).
        """
        check_vectors(vectors, len(labels), self.dim)
        with self._lock:
            known = self._graph.live if self._graph else frozenset[int]()
            self._flat.update((label, vector) for label, vector in zip(labels, vectors, strict=True) if label not in known)
            self._scan = None

    def delete(self, labels: Sequence[int]) -> None:
        """Take rows out of every later search; unknown labels are ignored."""
        with self._lock:
            for label in labels:
                if self._graph is not None and label in self._graph.live:
                    self._graph.delete(label)
                elif self._flat.pop(label, None) is not None:
                    self._scan = None

    def settle(self) -> None:
        """After a change: move a full buffer into the graph, and build again a graph that no longer suits its rows. Searches go on
        meanwhile."""
        if len(self._flat) > self._flat_limit:
            self._move_to_graph()
        if self._graph is not None and (self._mostly_deleted(self._graph) or self.graph_rows > _GROWTH * self._checked_rows):
            self.optimise()

    def search(self, queries: Vectors, k: int, *, ef: int | None = None, allowed: frozenset[int] | None = None) -> list[dict[int, float]]:
        """For each query label -> inner product of the k nearest rows, best first.

        Args:
            queries: (batch, dim) unit vectors.
            k: rows a query, fewer where the index is smaller.
            ef: candidates the graph keeps, by default `self.ef`; at least k is used.
            allowed: only these rows; None = all.
        """
        if allowed is not None:
            return self._search_among(queries, k, allowed, ef)
        with self._precedence.search(), self._lock:
            graph = self._graph
            proposed: list[dict[int, float]] = [{} for _ in queries] if graph is None else graph.candidates(queries, k, ef or self.ef)
            labels, vectors = self._buffer()
        found = self._rescored(queries, proposed)
        _add_nearest(found, queries, labels, vectors, k)
        return [_best(row, k) for row in found]

    def _search_among(self, queries: Vectors, k: int, allowed: frozenset[int], ef: int | None) -> list[dict[int, float]]:
        """Few rows are compared one by one; of many, so many neighbours are searched that k of them should be allowed ones, and
        where they are not, the rows are compared after all. (A filter function inside hnswlib costs a hundred times as much.)
        """
        if len(allowed) > SCAN_LIMIT:
            width = min(len(self), int(1.5 * k * len(self) / len(allowed)) + 10)
            found = [{label: score for label, score in row.items() if label in allowed} for row in self.search(queries, width, ef=ef)]
            if all(len(row) >= k for row in found):
                return [_best(row, k) for row in found]
        with self._precedence.search(), self._lock:
            graph = self._graph
            inside = sorted(allowed & graph.live) if graph is not None else []
            # Of many, shadows tell which to compare. Whole vectors are the store's: hnswlib keeps the interpreter while it copies its own.
            chosen = graph is not None and graph.projection is not None and len(allowed) > SCAN_LIMIT
            proposed = graph.among(queries, inside, k) if graph is not None and chosen else [{} for _ in queries]
            compared = {label: self._flat[label] for label in sorted(allowed & self._flat.keys())}
        found = self._rescored(queries, proposed)
        if not chosen:
            compared |= self._truth(inside)
        vectors = np.array(list(compared.values()), np.float32).reshape(len(compared), self.dim)
        _add_nearest(found, queries, np.fromiter(compared, np.int64, len(compared)), vectors, k)
        return [_best(row, k) for row in found]

    def _rescored(self, queries: Vectors, proposed: Sequence[Mapping[int, float]]) -> list[dict[int, float]]:
        """The same rows by their own vectors; those deleted meanwhile are left out."""
        stored = self._truth(sorted({label for row in proposed for label in row}))
        found = []
        for query, row in zip(queries, proposed, strict=True):
            labels = [label for label in row if label in stored]
            rows = np.array([stored[label] for label in labels], np.float32).reshape(len(labels), self.dim)
            found.append(dict(zip(labels, inner_products(rows, query), strict=True)))
        return found

    def vectors(self, labels: Sequence[int]) -> dict[int, Vectors]:
        """Vectors of those labels that are live."""
        with self._precedence.search(), self._lock:
            found = {label: self._flat[label] for label in labels if label in self._flat}
            inside = [label for label in labels if self._graph is not None and label in self._graph.live]
        return found | dict(self._truth(inside)) if inside else found

    def compare(self, query: Vectors, labels: Sequence[int]) -> dict[int, float]:
        """Inner products of the (dim,) query with those labels that are live."""
        found = self.vectors(labels)
        rows = np.array(list(found.values()), np.float32).reshape(len(found), self.dim)
        return dict(zip(found, inner_products(rows, query), strict=True))

    def rows(self) -> Iterator[tuple[list[int], Vectors]]:
        """All rows that are live when it begins, some at a time; those deleted meanwhile are left out."""
        labels = sorted(self.labels)
        for at in range(0, len(labels), _ROWS_AT_ONCE):
            found = self._truth(labels[at : at + _ROWS_AT_ONCE])  # not from hnswlib, see `_search_among`
            if found:
                yield list(found), np.array(list(found.values()), np.float32)

    def save_graph(self, file: Path) -> Graph:
        """Write the graph to `file`, and return it. Raises OSError: it was written only in part."""
        with self._lock:
            if self._graph is None:
                raise ValueError("there is no graph to save")
            self._graph.save(file)
            return self._graph

    def flush(self) -> None:
        """Move the buffer into the graph, where there is one or the buffer is large enough for one."""
        if self._graph is not None or len(self._flat) > self._flat_limit:
            self._move_to_graph()

    def optimise(self) -> bool:
        """Build the graph again where it no longer suits its rows: more are deleted than alive, or they have become others than
        those that its projection was learned from; without rows there is none. Searches go on meanwhile. Returns whether it changed."""
        if self._graph is None:
            return False
        self._checked_rows = len(self._graph.live)
        if self._mostly_deleted(self._graph):
            self._rebuild("most of its rows are deleted")
        elif self._graph.projection is not None and not self._graph.projection.fits(self._sample(_CHECKED)):
            self._rebuild("its rows have become others than its projection was made for")
        else:
            return False
        return True

    @staticmethod
    def _mostly_deleted(graph: Graph) -> bool:
        return graph.deleted > len(graph.live)

    def _sample(self, rows: int) -> Vectors:
        """Vectors of some rows: of the buffer before there is a graph, then of the graph."""
        labels = sorted(self._graph.live if self._graph else self._flat)
        chosen = random.Random(0).sample(labels, min(rows, len(labels)))
        if self._graph is None:
            return np.array([self._flat[label] for label in chosen], np.float32)
        stored = self._truth(chosen)
        return np.array(list(stored.values()), np.float32).reshape(len(stored), self.dim)

    def _rebuild(self, reason: str) -> None:
        """Only the thread that adds and deletes comes here, so rows stay as they are; of those that the store has lost meanwhile it is
        still to hear."""
        assert self._graph is not None  # noqa: S101
        labels, sample, graph = sorted(self._graph.live), self._sample(_SAMPLE), None
        if len(sample):
            log.info("building the graph of %d passages again: %s", len(labels), reason)
            graph = Graph(self.dim, learn(sample, self._graph_dims), capacity=2 * len(labels))
            for at in range(0, len(labels), _ROWS_AT_ONCE):
                self._precedence.wait_for_searches()
                stored = self._truth(labels[at : at + _ROWS_AT_ONCE])
                if stored:
                    graph.add(list(stored), np.array(list(stored.values()), np.float32))
        with self._lock:
            self._graph = graph

    def _move_to_graph(self) -> None:
        if self._graph is None:
            self._graph = Graph(self.dim, learn(self._sample(_SAMPLE), self._graph_dims), capacity=2 * len(self._flat))
            self._checked_rows = len(self._flat)
        waiting = list(self._flat)
        for at in range(0, len(waiting), _CHUNK):
            self._precedence.wait_for_searches()
            with self._lock:
                labels = [label for label in waiting[at : at + _CHUNK] if label in self._flat]
                if labels:
                    self._graph.add(labels, np.array([self._flat[label] for label in labels]))
                for label in labels:
                    del self._flat[label]
                self._scan = None

    def _buffer(self) -> tuple[NDArray[np.int64], Vectors]:
        if self._scan is None:
            labels = np.fromiter(self._flat, np.int64, len(self._flat))
            vectors = np.array(list(self._flat.values()), np.float32) if self._flat else np.empty((0, self.dim), np.float32)
            self._scan = labels, vectors
        return self._scan


def _add_nearest(found: Sequence[dict[int, float]], queries: Vectors, labels: NDArray[np.int64], vectors: Vectors, k: int) -> None:
    """Add to each query's rows the k nearest of these, and what is as near as the last of them: which of those that are equally near
    come first is for `_best` to tell, by exact scores."""
    if len(labels):
        scores = queries @ vectors.T
        least = np.partition(scores, -min(k, len(labels)), axis=1)[:, -min(k, len(labels))] - _ROUNDING
        for row, near in enumerate(scores >= least[:, None]):
            best = np.flatnonzero(near)
            found[row].update(zip(labels[best].tolist(), inner_products(vectors[best], queries[row]), strict=True))


def _best(row: Mapping[int, float], k: int) -> dict[int, float]:
    return dict(sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k])

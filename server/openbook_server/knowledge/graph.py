"""hnswlib's graph over vectors or their shadows: proposes candidates, knows which rows are deleted, grows by itself.

Not thread-safe: hnswlib must never search while it adds. `vectors.VectorIndex` holds the lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import hnswlib
import numpy as np
from numpy.typing import NDArray

from openbook_server.knowledge.projection import Projection, Vectors

M = 16  # links a row and layer
EF_CONSTRUCTION = 100
EF = 64  # candidates kept while searching, at first; recall 0.99 and more at 100k rows
RESCORED = 100  # candidates a shadow graph proposes, at least; their stored vectors decide
_SEED = 42
# Added to each dimension of what is held, at random: rows that are the same to the bit link to nothing but each other, and take whole
# regions out of reach (300 copies among 10,000 rows: recall 0.88). Far below what sets two passages apart.
_JITTER = 1e-6


class Graph:
    """Labels with their vectors, or with the shadows that `projection` casts."""

    def __init__(self, dim: int, projection: Projection | None, *, capacity: int = 1_000) -> None:
        self.dim, self.projection = dim, projection
        self._index = hnswlib.Index("ip", self.width)
        self._index.init_index(capacity, M=M, ef_construction=EF_CONSTRUCTION, random_seed=_SEED, allow_replace_deleted=True)
        self.live: set[int] = set()
        self.deleted = 0  # rows that take up room and are never found

    @property
    def width(self) -> int:
        """Dimensions of what it holds."""
        return self.dim if self.projection is None else self.projection.matrix.shape[1]

    @classmethod
    def load(cls, file: Path, dim: int, projection: Projection | None, *, rows: int) -> Graph:
        """A graph of `rows` rows that `save` wrote, whose digest was checked: a damaged file can crash hnswlib.

        Raises:
            RuntimeError: hnswlib refuses it.
        """
        graph = cls(dim, projection, capacity=1)
        graph._index = hnswlib.Index("ip", graph.width)
        graph._index.load_index(str(file), max_elements=2 * rows + 1_000, allow_replace_deleted=True)
        graph.live = set(graph._index.get_ids_list())
        return graph

    def keep(self, live: frozenset[int]) -> None:
        """Delete every row but these; some may have been deleted when the graph was saved."""
        for label in self.live - live:
            with contextlib.suppress(RuntimeError):  # it was
                self._index.mark_deleted(label)
            self.deleted += 1
        self.live &= live

    def add(self, labels: Sequence[int], vectors: Vectors) -> None:
        """Add rows; the place of a deleted one is used again. Labels must be new: hnswlib would keep both vectors of a live one."""
        needed = self._index.get_current_count() + max(0, len(labels) - self.deleted)
        if needed > self._index.get_max_elements():
            self._index.resize_index(max(needed, 2 * self._index.get_max_elements()))
        shadows = vectors if self.projection is None else self.projection(vectors)
        noise = np.random.default_rng([_SEED, *labels[:1]]).normal(scale=_JITTER, size=shadows.shape)
        self._index.add_items((shadows + noise).astype(np.float32), labels, replace_deleted=self.deleted > 0)
        self.deleted -= min(self.deleted, len(labels))
        self.live.update(labels)

    def delete(self, label: int) -> None:
        self._index.mark_deleted(label)
        self.live.discard(label)
        self.deleted += 1

    def candidates(self, queries: Vectors, k: int, ef: int) -> list[dict[int, float]]:
        """For each query label -> inner product, of shadows where it holds those, of at least k rows (fewer where there are fewer)."""
        if not self.live:
            return [{} for _ in queries]
        if self.projection is not None:
            queries, k = self.projection(queries), max(k, RESCORED, ef)
        k, ef = min(k, len(self.live)), max(ef, k)
        # Deleted rows take up candidates too; asking for all of them is the last resort before looking at every row.
        for width in (ef, min(2 * (ef + self.deleted), self._index.get_current_count())):
            self._index.set_ef(max(width, k))
            try:
                labels, distances = self._index.knn_query(queries, k=k)
            except RuntimeError:  # fewer than k rows reached
                continue
            return [dict(zip(*row, strict=True)) for row in zip(labels.tolist(), (1 - distances).tolist(), strict=True)]
        return self._nearest(queries, sorted(self.live), k)

    def among(self, queries: Vectors, labels: Sequence[int], k: int) -> list[dict[int, float]]:
        """As `candidates`, of these live labels only, by comparing all of them."""
        if not labels:
            return [{} for _ in queries]
        if self.projection is not None:
            queries, k = self.projection(queries), max(k, RESCORED)
        return self._nearest(queries, labels, k)

    def _nearest(self, shadows: Vectors, labels: Sequence[int], k: int) -> list[dict[int, float]]:
        stored = self.stored(labels)
        order = np.argsort(-(shadows @ stored.T), axis=1, kind="stable")[:, :k]
        return [
            dict(zip([labels[at] for at in best], inner_products(stored[best], shadow), strict=True))
            for shadow, best in zip(shadows, order, strict=True)
        ]

    def stored(self, labels: Sequence[int]) -> NDArray[np.float32]:
        """(labels, width) what it holds of live rows."""
        return np.asarray(self._index.get_items(labels), np.float32)

    def save(self, file: Path) -> None:
        """Write it.

        Raises:
            OSError: it was written only in part, of which hnswlib reports nothing.
        """
        self._index.save_index(str(file))
        if file.stat().st_size != self._index.index_file_size():
            raise OSError(f"{file} was written only in part; is the disk full?")


def inner_products(rows: NDArray[np.float32], query: NDArray[np.float32]) -> list[float]:
    """Of (n, dim) rows with one (dim,) query, the same bits whatever rows and queries there are beside: a product of matrices adds in
    another order for one query than for several."""
    found: list[float] = np.einsum("nd,d->n", rows, query).tolist()
    return found

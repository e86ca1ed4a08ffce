"""Fewer dimensions for the graph: the directions in which a knowledge base's own vectors differ most.

The graph only proposes candidates, which are then compared by their stored vectors; so it may hold a shadow of each
vector, and a third of the dimensions is a third of the memory. How few are enough depends on the data, so it is measured
on them, and where no fewer are enough the graph holds the vectors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARES = (1 / 4, 1 / 3, 1 / 2)  # of the dimensions, tried in this order
LEAST_DIMS = 64  # embedders of so few dimensions are not projected
# Of a sample's ten nearest rows, so many must be among so many of its nearest shadows. A sample of a few thousand rows is
# easier than a million; so fewer candidates are allowed here than a search compares (graph.RESCORED).
RECALL, NEAREST, PROPOSED = 0.99, 10, 40
_QUERIES = 256  # rows of the sample that recall is measured with
_DRIFT = 0.05  # more of the squared length lost than when it was learned: the rows have become others

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map that keeps inner products as well as so few dimensions can: uncentred principal components."""

    matrix: Vectors  # (dim, fewer), orthonormal columns
    lost: float  # mean share of the squared length that it loses on the sample it was learned from

    def __call__(self, vectors: Vectors) -> Vectors:
        """(rows, dim) to (rows, fewer)."""
        return np.asarray(vectors @ self.matrix, np.float32)

    def fits(self, sample: Vectors) -> bool:
        """Whether it still loses about as little of these unit vectors as of those it was learned from."""
        return _lost(sample, self.matrix) <= self.lost + _DRIFT


def learn(sample: Vectors, dims: int = 0) -> Projection | None:
    """The projection for rows like these.

    Args:
        sample: (rows, dim) unit vectors.
        dims: how many it keeps; 0 = the fewest of SHARES that reach RECALL on the sample.

    Returns:
        None where the vectors are best kept whole.
    """
    dim = sample.shape[1]
    if dims >= dim or (not dims and dim <= LEAST_DIMS):
        return None
    _, directions = np.linalg.eigh(sample.T.astype(np.float64) @ sample)  # ascending
    directions = directions[:, ::-1].astype(np.float32)
    for share in [dims / dim] if dims else SHARES:
        matrix = np.ascontiguousarray(directions[:, : round(share * dim)])
        if dims or _recall(sample, matrix) >= RECALL:
            return Projection(matrix, _lost(sample, matrix))
    return None


def _lost(sample: Vectors, matrix: Vectors) -> float:
    return 1 - float(np.square(sample @ matrix).sum(axis=1).mean())


def _recall(sample: Vectors, matrix: Vectors) -> float:
    """Share of each query's NEAREST true neighbours that are among its PROPOSED nearest shadows."""
    if len(sample) <= PROPOSED + 1:
        return 1.0
    rows = np.linspace(0, len(sample) - 1, min(_QUERIES, len(sample))).astype(int)
    shadows = sample @ matrix
    true, proposed = sample[rows] @ sample.T, shadows[rows] @ shadows.T
    for scores in (true, proposed):
        scores[np.arange(len(rows)), rows] = -np.inf  # a row is no neighbour of its own
    nearest = np.argpartition(-true, NEAREST, axis=1)[:, :NEAREST]
    among = np.argpartition(-proposed, PROPOSED, axis=1)[:, :PROPOSED]
    return float(np.mean([len(np.intersect1d(a, b)) / NEAREST for a, b in zip(nearest, among, strict=True)]))

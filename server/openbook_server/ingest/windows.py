"""The embedder's graph as passages see it: beside the vector of a passage come those of its windows, at no inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook_server.buckets import Buckets
from openbook_server.embedder import OUTPUT
from openbook_server.knowledge import PassageVectors, pack
from openbook_server.rows import Row, collate
from openbook_server.runtime import HIDDEN_STATES, Graph

GRAPH = "embedder.passages"  # what models call it; no head has a dot in its name
WINDOW_TOKENS = 24  # of a window, about; in docs/search.md is why
_WINDOWS = "windows"


class PassageGraph:
    """A `Runnable` over the embedder's graph; of a graph that gives no states, an earlier export's, passages have no windows."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    @property
    def buckets(self) -> Buckets:
        return self._graph.buckets

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, Any]:
        outputs: dict[str, Any] = self._graph.run(collate(rows, length), states=self._graph.gives_states)
        states = outputs.pop(HIDDEN_STATES, None)
        packed = [b"" if states is None else pack(pooled(states[at], spans_of(row))) for at, row in enumerate(rows)]
        return {OUTPUT: outputs[OUTPUT], _WINDOWS: packed}


def joined(parts: Sequence[PassageVectors]) -> PassageVectors:
    """The vectors of passages that were embedded some at a time; one part at least, though it be empty."""
    return PassageVectors(np.concatenate([part.whole for part in parts]), [windows for part in parts for windows in part.windows])


def vectors_of(rows: Sequence[Mapping[str, Any]], dim: int) -> PassageVectors:
    """What the graph gave for each of some passages."""
    whole = np.array([row[OUTPUT] for row in rows], np.float32).reshape(-1, dim)
    return PassageVectors(whole, [row[_WINDOWS] for row in rows])


def spans_of(row: Row) -> list[tuple[int, int]]:
    """The windows of a passage's row: all of its text between title and closing special token, in even parts of about WINDOW_TOKENS."""
    first, last = min(row.text_from, len(row.ids) - 2), len(row.ids) - 1
    count = max(1, round((last - first) / WINDOW_TOKENS))
    edges = [first + (last - first) * part // count for part in range(count + 1)]
    return list(pairwise(edges))


def pooled(states: NDArray[np.float32], spans: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """The mean of the (length, dim) states in each span, (spans, dim)."""
    return np.stack([states[start:end].mean(axis=0) for start, end in spans])

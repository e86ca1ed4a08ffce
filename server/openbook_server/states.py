"""The embedder's graph as passages and questions see it: beside a text's vector come, at no inference, what its states are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook_server.buckets import Buckets
from openbook_server.embedder import OUTPUT, TOKENS
from openbook_server.knowledge import QUESTION_TOKENS, PassageVectors, edges, pack, signs
from openbook_server.rows import Row, collate
from openbook_server.runtime import HIDDEN_STATES, Graph

PASSAGES = "embedder.passages"  # what models call the graph that passages see; no head has a dot in its name
_WINDOWS = "windows"


class PassageGraph:
    """A `Runnable` that gives passages' vectors and windows; of a graph that gives no states, an earlier export's, there are none."""

    def __init__(self, graph: Graph, token_dims: int) -> None:
        """`token_dims` are those of a state whose signs are kept, as the bundle says; 0 = tokens are not compared one by one."""
        self._graph, self._token_dims = graph, token_dims

    @property
    def buckets(self) -> Buckets:
        return self._graph.buckets

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, Any]:
        outputs: dict[str, Any] = self._graph.run(collate(rows, length), states=self._graph.gives_states)
        states = outputs.pop(HIDDEN_STATES, None)
        packed = [b"" if states is None else self._packed(row, states[at]) for at, row in enumerate(rows)]
        return {OUTPUT: outputs[OUTPUT], _WINDOWS: packed}

    def _packed(self, row: Row, states: NDArray[np.float32]) -> bytes:
        spans = spans_of(row)
        tokens = signs(states[spans[0][0] : spans[-1][1]], self._token_dims) if self._token_dims else None
        return pack(pooled(states, spans), tokens)


class QuestionGraph:
    """A `Runnable` that gives questions' vectors and the signs of their first tokens; none where passages have none."""

    def __init__(self, graph: Graph, token_dims: int) -> None:
        """`token_dims` as in `PassageGraph`."""
        self._graph, self._token_dims = graph, token_dims if graph.gives_states else 0

    @property
    def buckets(self) -> Buckets:
        return self._graph.buckets

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, Any]:
        outputs: dict[str, Any] = self._graph.run(collate(rows, length), states=self._token_dims > 0)
        states = outputs.pop(HIDDEN_STATES, None)
        ends = [min(len(row.ids) - 1, 1 + QUESTION_TOKENS) for row in rows]
        tokens = [None if states is None else signs(states[at, 1:end], self._token_dims) for at, end in enumerate(ends)]
        return {OUTPUT: outputs[OUTPUT], TOKENS: tokens}


def joined(parts: Sequence[PassageVectors]) -> PassageVectors:
    """The vectors of passages that were embedded some at a time; one part at least, though it be empty."""
    return PassageVectors(np.concatenate([part.whole for part in parts]), [windows for part in parts for windows in part.windows])


def vectors_of(rows: Sequence[Mapping[str, Any]], dim: int) -> PassageVectors:
    """What the graph gave for each of some passages."""
    whole = np.array([row[OUTPUT] for row in rows], np.float32).reshape(-1, dim)
    return PassageVectors(whole, [row[_WINDOWS] for row in rows])


def spans_of(row: Row) -> list[tuple[int, int]]:
    """The windows of a passage's row: all of its text between title and closing special token."""
    first, last = min(row.text_from, len(row.ids) - 2), len(row.ids) - 1
    return list(pairwise(first + edge for edge in edges(last - first)))


def pooled(states: NDArray[np.float32], spans: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """The mean of the (length, dim) states in each span, (spans, dim)."""
    return np.stack([states[start:end].mean(axis=0) for start, end in spans])

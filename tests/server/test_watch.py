"""Live recall: what is sampled is compared with an exact search, and ef follows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openbook_server.knowledge import Document, Passage, SearchOptions
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.watch import LEAST_EF, RecallWatch, interval

DIM, ROWS = 16, 400


class Rows:
    """An index that is only looked at."""

    def __init__(self) -> None:
        vectors = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.ef = 64
        self.gone: set[int] = set()

    def rows(self) -> Iterator[tuple[list[int], np.ndarray]]:
        for at in range(0, ROWS, 150):
            labels = [label for label in range(at, min(at + 150, ROWS)) if label not in self.gone]
            yield labels, self.vectors[labels]

    def nearest(self, query: np.ndarray, among: int = ROWS) -> dict[int, float]:
        scores = self.vectors[:among] @ query
        return {int(label): float(scores[label]) for label in np.argsort(-scores)[:20]}


@pytest.fixture
def index() -> Rows:
    return Rows()


@pytest.fixture
def watch(index: Rows) -> Iterator[RecallWatch]:
    watch = RecallWatch(index, share=1.0, target=0.9, rest=1e6)  # it looks when the test says so
    yield watch
    watch.close()


def offer(watch: RecallWatch, vectors: np.ndarray, found: list[dict[int, float]], horizon: int = ROWS) -> None:
    """As `offer` does, without waking the thread."""
    wake, watch._wake = watch._wake, type(watch._wake)()
    watch.offer(vectors, found, horizon)
    watch._wake = wake


def test_the_share_of_true_neighbours_that_were_found_is_the_recall(index: Rows, watch: RecallWatch) -> None:
    assert watch.recall() is None
    for query in index.vectors[:10]:
        best = list(index.nearest(query).items())
        offer(watch, query[None], [dict(best[:7] + best[10:20])])  # three of the ten nearest are missing
    watch.look()
    recall = watch.recall()
    assert recall is not None
    assert (recall.mean, recall.samples) == (pytest.approx(0.7), 10)


def test_rows_stored_since_do_not_count_and_searches_whose_hits_are_gone_are_left_out(index: Rows, watch: RecallWatch) -> None:
    query = index.vectors[:1]
    offer(watch, query, [index.nearest(query[0], among=200)], horizon=199)
    watch.look()
    recall = watch.recall()
    assert recall is not None
    assert recall.mean == 1.0
    offer(watch, query, [index.nearest(query[0])])
    index.gone = {0}
    watch.look()
    assert watch.recall() == recall


def test_ef_goes_up_while_recall_is_surely_too_low_and_down_while_it_is_surely_high(index: Rows, watch: RecallWatch) -> None:
    def searches(count: int, kept: int) -> None:
        for number in range(count):
            query = index.vectors[number % ROWS]
            best = list(index.nearest(query).items())
            offer(watch, query[None], [dict(best[:kept] + best[10:20])])
            watch.look()

    searches(49, kept=5)
    assert index.ef == 64  # too few to say
    searches(1, kept=5)
    assert index.ef == 96
    searches(60, kept=10)
    assert index.ef == 76
    searches(1_000, kept=10)
    assert index.ef == LEAST_EF


def test_the_interval_is_wilsons() -> None:
    shares = [1.0] * 80 + [0.5] * 20
    recall = interval(shares)
    n, p, z = 100, 0.9, 1.96
    root = (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert recall.mean == pytest.approx(p)
    assert recall.low == pytest.approx((p + z * z / (2 * n) - z * root) / (1 + z * z / n))
    assert recall.high == pytest.approx((p + z * z / (2 * n) + z * root) / (1 + z * z / n))
    assert interval([1.0]).low < 0.3


@pytest.mark.parametrize("top_k", [1, 10])
def test_a_knowledge_base_watches_its_own_searches_however_few_passages_they_ask_for(
    tmp_path: Path, index: Rows, caplog: pytest.LogCaptureFixture, top_k: int
) -> None:
    knowledge_base = EmbeddedKnowledgeBase(tmp_path, fingerprint="f" * 64, dim=DIM, create=True, flat_limit=50)
    documents = [(Document(id=f"d{n}", text="x"), "d") for n in range(ROWS)]
    passages = [Passage(id=f"d{n}#0", document_id=f"d{n}", text="x", start=0) for n in range(ROWS)]
    knowledge_base.replace_documents(documents, passages, index.vectors)
    knowledge_base.watch(share=1.0, target=0.9)
    assert knowledge_base.recall is None
    with caplog.at_level(logging.ERROR):
        found = knowledge_base.search([""] * 20, index.vectors[:20], SearchOptions(top_k=top_k, mode="dense"))
        assert [len(row) for row in found] == [top_k] * 20
        end = time.monotonic() + 30
        while knowledge_base.recall is None and time.monotonic() < end:
            time.sleep(0.01)
        knowledge_base.close()
    assert not caplog.records
    assert knowledge_base.recall is not None
    assert knowledge_base.recall.mean >= 0.9

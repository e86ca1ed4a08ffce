"""What does the knowledge base add to hnswlib? Batches of dense searches in process against raw hnswlib, in one run.

    python benchmarks/nearest.py [--passages 100000] [--dim 384] [--batches 1 32 256] [--rounds 3] [--seconds 2]

`Search` over gRPC embeds its questions, which costs far more than finding their neighbours; so that this is no measurement of the
embedder, the knowledge base's own `search` is called with vectors at hand, mode dense, top 10, in batches. It returns
passages with their texts, from SQLite, ranked by exact scores; raw hnswlib (M 16, ef_construction 100, whole vectors, all
threads) returns row numbers. hnswlib gets the smallest ef that finds as much as the knowledge base does, of those in steps
from 16 to 512. Passages and vectors are those of growth.py. Reported are medians over rounds and the ratio round by
round for each size of batch, with recall@10 of both against comparing every vector. Warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import hnswlib
import numpy as np
from growth import CLUSTER, DEPTH, FINGERPRINT, QUESTION_WORDS, row_numbers, texts, unit_vectors, write
from growth import nearest as exact_nearest
from numpy.typing import NDArray
from openbook_server.knowledge import SearchOptions
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.graph import EF_CONSTRUCTION, M
from openbook_server.knowledge.records import Hit
from raw import passes_per_second
from report import add_results_arguments, publish, run_benchmark

EFS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
QUERIES = 512  # asked in turn; a batch holds at most so many
OPTIONS = SearchOptions(top_k=DEPTH, mode="dense")

Vectors = NDArray[np.float32]


def recall(found: Sequence[Sequence[int]], exact: NDArray[np.int64]) -> float:
    """Share of the exact neighbours that were found."""
    return sum(len(set(a) & set(b)) for a, b in zip(found, exact.tolist(), strict=True)) / exact.size


def smallest_ef(index: hnswlib.Index, queries: Vectors, exact: NDArray[np.int64], needed: float) -> tuple[int, float]:
    """The first of EFS at which hnswlib's recall is `needed`, or the last where it is at none, and that recall."""
    for ef in EFS:
        index.set_ef(ef)
        reached = recall(index.knn_query(queries, k=DEPTH)[0].tolist(), exact)
        if reached >= needed:
            break
    return ef, reached


def in_batches(search: Callable[[slice], object], size: int) -> Callable[[], None]:
    """One pass over all queries."""

    def one_pass() -> None:
        for at in range(0, QUERIES, size):
            search(slice(at, at + size))

    return one_pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="of the vectors (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256], help="searches a call (default: 1 32 256)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a measurement (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    if not all(1 <= size <= QUERIES for size in arguments.batches):
        parser.error(f"--batches takes 1 to {QUERIES}")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, arguments.passages // CLUSTER), arguments.dim), dtype=np.float32)
    vectors = unit_vectors(arguments.passages + QUERIES, centres, rng)
    stored, asked = vectors[: arguments.passages], vectors[arguments.passages :]
    questions, exact = texts(QUERIES, QUESTION_WORDS, rng), exact_nearest(asked, stored, DEPTH)
    index = hnswlib.Index("ip", arguments.dim)
    index.init_index(arguments.passages, M=M, ef_construction=EF_CONSTRUCTION, random_seed=42)
    index.add_items(stored)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "kb"
        write(folder, stored, rng)
        knowledge_base = EmbeddedKnowledgeBase(folder, fingerprint=FINGERPRINT, dim=arguments.dim)

        def search(part: slice) -> list[list[Hit]]:
            return knowledge_base.search(questions[part], asked[part], OPTIONS)

        own_recall = recall([row_numbers(hits) for hits in search(slice(0, QUERIES))], exact)
        ef, raw_recall = smallest_ef(index, asked, exact, own_recall)
        graph_dims = knowledge_base.graph_width

        def raw_search(part: slice) -> object:
            return index.knn_query(asked[part], k=DEPTH)

        print(f"recall@{DEPTH}: knowledge base {own_recall:.4f} (graph of {graph_dims} dimensions), hnswlib {raw_recall:.4f} at ef {ef}")
        for size in arguments.batches:
            own, raw = [], []
            for _ in range(arguments.rounds):
                raw.append(QUERIES * passes_per_second(in_batches(raw_search, size), arguments.seconds))
                own.append(QUERIES * passes_per_second(in_batches(search, size), arguments.seconds))
            row = {
                "knowledge_base_per_second": statistics.median(own),
                "hnswlib_per_second": statistics.median(raw),
                "ratio": statistics.median(a / b for a, b in zip(own, raw, strict=True)),
            }
            rows[str(size)] = row
            print(
                f"{size} a call: knowledge base {row['knowledge_base_per_second']:.0f}/s, hnswlib {row['hnswlib_per_second']:.0f}/s, "
                f"ratio {row['ratio']:.2f}",
                flush=True,
            )
        knowledge_base.close()
    report = {
        "passages": arguments.passages,
        "dim": arguments.dim,
        "graph_dims": graph_dims,
        "recall_at_10": own_recall,
        "hnswlib_recall_at_10": raw_recall,
        "hnswlib_ef": ef,
        "batches": rows,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    publish(report, arguments, "nearest")


if __name__ == "__main__":
    run_benchmark(main)

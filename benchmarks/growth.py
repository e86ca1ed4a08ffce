"""What does a larger knowledge base cost? Search, start-up and disk at several sizes, without a server.

    python benchmarks/growth.py [--passages 10000 100000] [--dim 384] [--queries 200]

Passages are synthetic: unit vectors in clusters of about a hundred, as texts on one subject are, and sixty words drawn by the
law of Zipf and Mandelbrot, the commonest standing in a fifth of all passages (stop words are not searched for). They are
written through `KnowledgeBase.replace_documents`, as `openbook index` does it, then the folder is closed and opened again.
Measured at each size: passages written a second (SQLite, full-text index, HNSW graph), seconds to open with the saved graph,
bytes a passage on disk and in memory, recall@10 of dense search against comparing every vector, and p50 and p99 of a single
dense and hybrid search, on one thread. Warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from driver import memory_mb, percentile
from numpy.typing import NDArray
from openbook_server.knowledge import Document, Passage, SearchOptions
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.records import SearchMode
from report import add_results_arguments, publish

CHUNK = 1_000  # documents a write
CLUSTER = 100  # passages of one subject
SPREAD = 0.6  # of a passage around its subject's centre, whose length is 1 a dimension
VOCABULARY, SHIFT = 20_000, 50  # words known; the n-th most frequent one comes in proportion to 1 / (n + SHIFT)
PASSAGE_WORDS, QUESTION_WORDS = 60, 8
DEPTH = 10
WARM_UP = 20  # searches
MAX_PASSAGES = 2_000_000
FINGERPRINT = "0" * 64


def unit_vectors(rows: int, centres: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float32]:
    """(rows, dim) unit vectors around centres drawn at random."""
    drawn = centres[rng.integers(len(centres), size=rows)] + SPREAD * rng.normal(size=(rows, centres.shape[1]))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def texts(rows: int, words: int, rng: np.random.Generator) -> list[str]:
    """Texts of so many words each."""
    shares = np.cumsum(1 / (np.arange(VOCABULARY) + SHIFT))
    drawn = np.searchsorted(shares, rng.random((rows, words)) * shares[-1])
    return [" ".join(f"w{word}" for word in row) for row in drawn.tolist()]


def chunks(passages: int, vectors: NDArray[np.float32], rng: np.random.Generator) -> Iterator[tuple[list[Document], NDArray[np.float32]]]:
    for at in range(0, passages, CHUNK):
        part = vectors[at : at + CHUNK]
        yield [Document(id=f"d{at + n}", text=text) for n, text in enumerate(texts(len(part), PASSAGE_WORDS, rng))], part


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(passages: int, dim: int, queries: int) -> dict[str, float]:
    """Everything about one size, in a folder of its own."""
    rng = np.random.default_rng(0)
    vectors = unit_vectors(passages + queries, rng.normal(size=(max(1, passages // CLUSTER), dim)), rng)
    stored, asked = vectors[:passages], vectors[passages:]
    questions = texts(queries, QUESTION_WORDS, rng)
    exact = np.argsort(-(asked @ stored.T), axis=1)[:, :DEPTH]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "kb"
        knowledge_base = EmbeddedKnowledgeBase(folder, fingerprint=FINGERPRINT, dim=dim, create=True)
        began = time.perf_counter()
        for documents, part in chunks(passages, stored, rng):
            rows = [Passage(id=f"{document.id}#0", document_id=document.id, text=document.text, start=0) for document in documents]
            knowledge_base.replace_documents([(document, document.id) for document in documents], rows, part)
        knowledge_base.snapshot()
        written = time.perf_counter() - began
        knowledge_base.close()
        on_disk = folder_bytes(folder)
        before = memory_mb(os.getpid())
        began = time.perf_counter()
        knowledge_base = EmbeddedKnowledgeBase(folder, fingerprint=FINGERPRINT, dim=dim)
        opened = time.perf_counter() - began
        result = {
            "passages": passages,
            "written_per_second": passages / written,
            "open_seconds": opened,
            "disk_bytes_a_passage": on_disk / passages,
            "memory_bytes_a_passage": (memory_mb(os.getpid()) - before) * (1 << 20) / passages,
            "graph_passages": knowledge_base.graph_rows,
        }
        found = 0
        modes: tuple[SearchMode, ...] = ("dense", "hybrid")
        for mode in modes:
            took = []
            for number in range(queries):
                began = time.perf_counter()
                one = slice(number, number + 1)
                [hits] = knowledge_base.search(questions[one], asked[one], SearchOptions(top_k=DEPTH, mode=mode))
                took.append(1000 * (time.perf_counter() - began))
                if mode == "dense":
                    found += len({int(hit.passage.document_id[1:]) for hit in hits} & set(exact[number].tolist()))
            took = sorted(took[WARM_UP:])
            result |= {f"{mode}_p{share}_ms": percentile(took, share) for share in (50, 99)}
        knowledge_base.close()
    return result | {"recall_at_10": found / (queries * DEPTH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000], help="sizes (default: 10000 100000)")
    parser.add_argument("--dim", type=int, default=384, help="of the vectors (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="searches of each kind (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    if not all(1 <= size <= MAX_PASSAGES for size in arguments.passages) or arguments.queries <= WARM_UP:
        parser.error(f"--passages takes 1 to {MAX_PASSAGES}, --queries more than {WARM_UP}")
    sizes = []
    for size in arguments.passages:
        sizes.append(measure(size, arguments.dim, arguments.queries))
        print(", ".join(f"{name} {value:,.4g}" for name, value in sizes[-1].items()))
    publish({"sizes": sizes, "cores": os.cpu_count(), "python": platform.python_version()}, arguments, "growth")


if __name__ == "__main__":
    main()

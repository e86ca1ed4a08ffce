"""What does a larger knowledge base cost? Search, start-up and disk at several sizes, without a server.

    python benchmarks/growth.py [--passages 10000 100000] [--dim 384] [--queries 200]

Passages are synthetic: unit vectors in clusters of about a hundred, as texts on one subject are, and sixty words drawn by the
law of Zipf and Mandelbrot, the commonest standing in a fifth of all passages (stop words are not searched for). They are
written through `KnowledgeBase.replace_documents`, as `openbook index` does it, then the folder is closed, and opened again by another
process. Measured at each size: passages written a second (SQLite, words, HNSW graph), seconds to save graph and words and to
open with them, bytes a passage on disk and in memory (of that process, the indexes and what it keeps), the dimensions that the
graph holds, recall@10 of dense search against comparing every vector, and p50 and p99 of a single dense and hybrid
search, on one thread. Warm-up is left out. A million passages of 384 dimensions take some 10 GB of memory here: the vectors are
made beforehand. The last line is JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from driver import memory_mb, percentile
from numpy.typing import NDArray
from openbook_server.knowledge import Document, Hit, Passage, SearchOptions, Signs, pack
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.records import SearchMode
from openbook_server.knowledge.windows import WINDOW_TOKENS
from report import add_results_arguments, publish, run_benchmark

CHUNK = 1_000  # documents a write
ROWS_AT_ONCE = 50_000  # of vectors made or compared
WINDOWS = 6  # of a passage
TOKENS = WINDOWS * WINDOW_TOKENS  # of a passage
QUESTION_TOKENS = 12
SIGNS = 4  # times 64 of a token
CLUSTER = 100  # passages of one subject
SPREAD = 0.6  # of a passage around its subject's centre, whose length is 1 a dimension
VOCABULARY, SHIFT = 20_000, 50  # words known; the n-th most frequent one comes in proportion to 1 / (n + SHIFT)
PASSAGE_WORDS, QUESTION_WORDS = 60, 8
DEPTH = 10
WARM_UP = 20  # searches
MAX_PASSAGES = 2_000_000
FINGERPRINT = "0" * 64


def unit_vectors(rows: int, centres: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """(rows, dim) unit vectors around centres drawn at random; made part by part, for a million of them are 1.5 GB."""
    vectors = np.empty((rows, centres.shape[1]), np.float32)
    for at in range(0, rows, ROWS_AT_ONCE):
        part = vectors[at : at + ROWS_AT_ONCE]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= SPREAD
        part += centres[rng.integers(len(centres), size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def nearest(queries: NDArray[np.float32], vectors: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """(queries, k) rows of the largest inner products, in no order, by comparing all, part by part."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for at in range(0, len(vectors), ROWS_AT_ONCE):
        found = queries @ vectors[at : at + ROWS_AT_ONCE].T
        scores = np.concatenate([scores, found], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(np.arange(at, at + found.shape[1]), found.shape)], axis=1)
        best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    return rows


def texts(rows: int, words: int, rng: np.random.Generator) -> list[str]:
    """Texts of so many words each."""
    shares = np.cumsum(1 / (np.arange(VOCABULARY) + SHIFT))
    drawn = np.searchsorted(shares, rng.random((rows, words)) * shares[-1])
    return [" ".join(f"w{word}" for word in row) for row in drawn.tolist()]


def signs_of(tokens: int, rng: np.random.Generator) -> Signs:
    """As those of states that have nothing to do with each other."""
    return rng.integers(0, 1 << 64, (tokens, SIGNS), np.uint64)


def write(folder: Path, vectors: NDArray[np.float32], rng: np.random.Generator) -> dict[str, float]:
    """A new knowledge base of these passages; seconds of writing and of saving. Passage `d7#0` has the vector of row 7."""
    knowledge_base = EmbeddedKnowledgeBase(folder, fingerprint=FINGERPRINT, dim=vectors.shape[1], create=True)
    writing = 0.0
    for at in range(0, len(vectors), CHUNK):
        part = vectors[at : at + CHUNK]
        documents = [Document(id=f"d{at + n}", text=text) for n, text in enumerate(texts(len(part), PASSAGE_WORDS, rng))]
        rows = [Passage(id=f"{document.id}#0", document_id=document.id, text=document.text, start=0) for document in documents]
        around = SPREAD / part.shape[1] ** 0.5
        pooled = (row + around * rng.standard_normal((WINDOWS, part.shape[1]), np.float32) for row in part)
        windows = [pack(vectors_, signs_of(TOKENS, rng)) for vectors_ in pooled]
        began = time.perf_counter()
        knowledge_base.replace_documents([(document, document.id) for document in documents], rows, part, windows)
        writing += time.perf_counter() - began
    began = time.perf_counter()
    knowledge_base.snapshot()
    saving = time.perf_counter() - began
    knowledge_base.close()
    return {"write_seconds": writing, "written_per_second": len(vectors) / writing, "save_seconds": saving}


def row_numbers(hits: Sequence[Hit]) -> list[int]:
    """Rows of the vectors that `write` was given."""
    return [int(hit.passage.document_id[1:]) for hit in hits]


def look(folder: Path, questions: Sequence[str], asked: NDArray[np.float32], exact: NDArray[np.int64]) -> dict[str, float]:
    """Open what `write` left and search it; meant for a process of its own, whose memory is that of the knowledge base."""
    before = memory_mb(os.getpid())
    began = time.perf_counter()
    knowledge_base = EmbeddedKnowledgeBase(folder, fingerprint=FINGERPRINT, dim=asked.shape[1])
    result: dict[str, float] = {"open_seconds": time.perf_counter() - began}
    found, tokens = 0, [signs_of(QUESTION_TOKENS, np.random.default_rng(0))]
    modes: tuple[SearchMode, ...] = ("dense", "hybrid")
    for mode in modes:
        took = []
        for number, question in enumerate(questions):
            began = time.perf_counter()
            [hits] = knowledge_base.search([question], asked[number : number + 1], SearchOptions(top_k=DEPTH, mode=mode), tokens)
            took.append(1000 * (time.perf_counter() - began))
            if mode == "dense":
                found += len(set(row_numbers(hits)) & set(exact[number].tolist()))
        took = sorted(took[WARM_UP:])
        result |= {f"{mode}_p{share}_ms": percentile(took, share) for share in (50, 99)}
    result |= {
        "recall_at_10": found / exact.size,
        "graph_passages": knowledge_base.graph_rows,
        "graph_dims": knowledge_base.graph_width,
        "memory_bytes_a_passage": (memory_mb(os.getpid()) - before) * (1 << 20) / knowledge_base.counts().passages,
    }
    knowledge_base.close()
    return result


def measure(passages: int, dim: int, queries: int) -> dict[str, float]:
    """Everything about one size, in a folder of its own."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, passages // CLUSTER), dim), dtype=np.float32)
    vectors = unit_vectors(passages + queries, centres, rng)
    stored, asked = vectors[:passages], vectors[passages:]
    questions = texts(queries, QUESTION_WORDS, rng)
    exact = nearest(asked, stored, DEPTH)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "kb"
        result = {"passages": passages, **write(folder, stored, rng)}
        result["disk_bytes_a_passage"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / passages
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return result | pool.apply(look, (folder, questions, asked.copy(), exact))


def print_table(sizes: Sequence[dict[str, float]]) -> None:
    columns = {
        "passages": ("passages", ",.0f"),
        "written_per_second": ("written/s", ",.0f"),
        "write_seconds": ("write s", ".1f"),
        "save_seconds": ("save s", ".1f"),
        "open_seconds": ("open s", ".1f"),
        "disk_bytes_a_passage": ("disk B", ",.0f"),
        "memory_bytes_a_passage": ("memory B", ",.0f"),
        "graph_dims": ("graph dims", ".0f"),
        "recall_at_10": ("recall@10", ".4f"),
        "dense_p50_ms": ("dense p50", ".2f"),
        "dense_p99_ms": ("p99 ms", ".2f"),
        "hybrid_p50_ms": ("hybrid p50", ".2f"),
        "hybrid_p99_ms": ("p99 ms", ".2f"),
    }
    print("".join(f"{title:>12}" for title, _ in columns.values()))
    for row in sizes:
        print("".join(f"{format(row[key], form):>12}" for key, (_, form) in columns.items()))


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
        print(f"{size:,} passages done", flush=True)
    print_table(sizes)
    publish({"sizes": sizes, "cores": os.cpu_count(), "python": platform.python_version()}, arguments, "growth")


if __name__ == "__main__":
    run_benchmark(main)

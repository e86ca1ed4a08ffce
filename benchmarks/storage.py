"""What does a passage cost in memory, and what does saving cost? Ways to hold vectors, on a knowledge base's own.

    python benchmarks/storage.py BUNDLE KB QUESTIONS.jsonl [--questions 500] [--seconds 2]

Every setting proposes candidates for real questions; those are compared by the whole float32 vectors, as the server does it
(there they come from SQLite, here from memory). Recall@10 is against comparing every vector; a search is one question on one
thread. "graph" settings are the server's own; the scans of int8 and of sign bits have no graph at all and stand for what
could be had for still less memory. Bytes are those of the index a passage, without the stored vectors, texts and words,
which are on disk whatever the index. Warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from openbook_server.bundle import load_bundle
from openbook_server.knowledge.graph import EF, Graph
from openbook_server.knowledge.projection import learn
from openbook_server.knowledge.store import Store
from openbook_server.runtime import Graph as Model
from openbook_server.runtime import choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine, perfect_batches
from report import add_results_arguments, publish, run_benchmark

NEAREST = 10
PROPOSED = 100  # by the scans, as by a graph of few dimensions

Vectors = NDArray[np.float32]
Propose = Callable[[Vectors], NDArray[np.int64]]  # a (1, dim) question to candidates


def stored_vectors(folder: Path) -> Vectors:
    store = Store(folder, read_only=True)
    try:
        live = store.generations.live()
        assert live is not None
        return np.concatenate([vectors for _, vectors in store.generations.vectors(live, sorted(store.generations.numbers(live)))])
    finally:
        store.close()


def graph_of(vectors: Vectors, dims: int) -> tuple[Propose, float, str]:
    """dims 0: as few as the data allow; the embedder's: whole vectors."""
    graph = Graph(
        vectors.shape[1], learn(vectors[np.random.default_rng(0).permutation(len(vectors))[:10_000]], dims), capacity=len(vectors)
    )
    for at in range(0, len(vectors), 1_000):
        graph.add(list(range(at, min(at + 1_000, len(vectors)))), vectors[at : at + 1_000])
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "graph")
        size = (Path(folder) / "graph").stat().st_size / len(vectors)
    return lambda query: np.fromiter(graph.candidates(query, NEAREST, EF)[0], np.int64), size, f"graph of {graph.width} dimensions"


def int8_scan(vectors: Vectors) -> tuple[Propose, float, str]:
    scale = np.abs(vectors).max() / 127
    codes = np.round(vectors / scale).astype(np.int8)

    def propose(query: Vectors) -> NDArray[np.int64]:
        scores = np.concatenate([codes[at : at + 4_096].astype(np.float32) @ query[0] for at in range(0, len(codes), 4_096)])
        return np.argpartition(-scores, PROPOSED)[:PROPOSED]

    return propose, vectors.shape[1], "int8, scanned"


def binary_scan(vectors: Vectors) -> tuple[Propose, float, str]:
    codes = np.packbits(vectors > 0, axis=1).view(np.uint64)

    def propose(query: Vectors) -> NDArray[np.int64]:
        asked = np.packbits(query > 0, axis=1).view(np.uint64)
        return np.argpartition(np.bitwise_count(codes ^ asked).sum(1), PROPOSED)[:PROPOSED]

    return propose, vectors.shape[1] / 8, "sign bits, scanned"


def measured(propose: Propose, vectors: Vectors, queries: Vectors, exact: NDArray[np.int64], seconds: float) -> dict[str, float]:
    def search(query: Vectors) -> NDArray[np.int64]:
        candidates = propose(query)
        return candidates[np.argsort(-(vectors[candidates] @ query[0]))[:NEAREST]]

    found = [search(query[None]) for query in queries]
    recall = float(np.mean([len(np.intersect1d(a, b)) / NEAREST for a, b in zip(found, exact, strict=True)]))
    began, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        search(queries[count % len(queries)][None])
        count += 1
    return {
        "recall_at_10": recall,
        "searches_per_second": count / (time.perf_counter() - began),
        "cpu_ms_a_search": 1_000 * (time.process_time() - used) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path)
    parser.add_argument("questions", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--questions", dest="count", type=int, default=500, help="of them (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a measurement of speed (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device, dim = choose_device("auto"), bundle.embedder.dim
    model = Model(bundle.graph_path("embedder", device.precision), device)
    texts = load_texts(arguments.questions, arguments.count)
    batches = perfect_batches(TextEncoder(load_tokenizer(bundle.tokenizer_path)), texts, bundle.embedder.max_tokens)
    queries = np.concatenate([np.asarray(model.run(batch)["sentence_embedding"], np.float32) for batch in batches])
    vectors = stored_vectors(arguments.knowledge_base)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :NEAREST]
    rows: dict[str, dict[str, float]] = {}
    print(f"{len(vectors)} passages, {len(queries)} questions")
    print(f"{'setting':<36}{'bytes a passage':>16}{'of whole':>10}{'recall@10':>11}{'searches/s':>12}")
    for dims in (dim, dim // 2, dim // 3, dim // 4, 0, -1, -2):
        propose, size, name = graph_of(vectors, dims) if dims >= 0 else (int8_scan if dims == -1 else binary_scan)(vectors)
        name += " (default)" if dims == 0 else ""
        rows[name] = {"bytes_a_passage": size, **measured(propose, vectors, queries, exact, arguments.seconds)}
        whole = next(iter(rows.values()))["bytes_a_passage"]
        row = rows[name]
        print(f"{name:<36}{size:>16.0f}{size / whole:>10.2f}{row['recall_at_10']:>11.4f}{row['searches_per_second']:>12.0f}")
    publish(
        {"passages": len(vectors), "questions": len(queries), "settings": rows, "machine": machine(bundle, device.name)},
        arguments,
        "storage",
    )


if __name__ == "__main__":
    run_benchmark(main)

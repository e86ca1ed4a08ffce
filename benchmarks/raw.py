"""The limits that served numbers are divided by: onnxruntime, hnswlib and tokenizers called directly, nothing in between."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hnswlib
import numpy as np
from openbook_server.bundle import Bundle
from openbook_server.rows import Row, collate
from openbook_server.runtime import Graph
from openbook_server.tokenization import TextEncoder

BATCH_ROWS = 32


def load_texts(file: Path, limit: int) -> list[str]:
    """Texts of a JSON-lines file: `text` or `question` of each row."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [row.get("text") or row["question"] for row in rows][:limit]


def perfect_batches(encoder: TextEncoder, texts: Sequence[str], max_tokens: int) -> list[dict[str, np.ndarray]]:
    """`row_batches` of texts, cut where they are too long."""
    return row_batches([row if len(row.ids) <= max_tokens else encoder.cut(row, max_tokens) for row in encoder.texts(texts)])


def row_batches(rows: Sequence[Row]) -> list[dict[str, np.ndarray]]:
    """Inputs grouped by exact length, up to 32 rows each: no padding at all, the best any scheduler could do."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(len(row.ids), []).append(row)
    return [
        collate(group[at : at + BATCH_ROWS], length) for length, group in sorted(groups.items()) for at in range(0, len(group), BATCH_ROWS)
    ]


def raw_embedding_rate(graph: Graph, batches: Sequence[dict[str, np.ndarray]], seconds: float, *, sessions: int) -> float:
    """Texts a second of onnxruntime alone, over whole passes until `seconds` are over; `sessions` batches at once, as in the server."""
    texts = sum(len(batch["input_ids"]) for batch in batches)
    return texts * passes_per_second(lambda: run_all(graph, batches, sessions), seconds)


def run_all(graph: Graph, batches: Sequence[dict[str, np.ndarray]], sessions: int) -> None:
    with ThreadPoolExecutor(sessions) as threads:
        list(threads.map(graph.run, batches))


def raw_search_rate(rows: int, dim: int, k: int, ef: int, seconds: float) -> dict[str, float]:
    """Queries a second of hnswlib alone on clustered vectors (M 16, ef_construction 100), and its recall against a scan."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, rows // 100), dim))
    points = centres[rng.integers(len(centres), size=rows + 256)] + 0.6 * rng.normal(size=(rows + 256, dim))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    vectors, queries = points[:rows], points[rows:]
    index = hnswlib.Index("ip", dim)
    index.init_index(rows, M=16, ef_construction=100, random_seed=42)
    began = time.perf_counter()
    index.add_items(vectors)
    built = time.perf_counter() - began
    index.set_ef(ef)
    found, _ = index.knn_query(queries, k=k)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    recall = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))
    rate = len(queries) * passes_per_second(lambda: index.knn_query(queries, k=k), seconds)
    return {"rows": rows, "queries_per_second": rate, "recall": recall, "build_seconds": built}


def tokenizer_rate(encoder: TextEncoder, texts: Sequence[str], seconds: float) -> float:
    """Texts a second of the tokenizer alone, 32 at a time."""
    parts = [texts[at : at + BATCH_ROWS] for at in range(0, len(texts), BATCH_ROWS)]

    def one_pass() -> None:
        for part in parts:
            encoder.texts(part)

    return len(texts) * passes_per_second(one_pass, seconds)


def passes_per_second(one_pass: Callable[[], object], seconds: float) -> float:
    """Rate of `one_pass`, repeated until `seconds` are over; the first pass is warm-up and not counted."""
    one_pass()
    passes, began = 0, time.perf_counter()
    while True:
        one_pass()
        passes += 1
        took = time.perf_counter() - began
        if took >= seconds:
            return passes / took


def machine(bundle: Bundle, graph_device: str) -> dict[str, object]:
    """Where and with what numbers were measured."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    versions = {}
    for name in ("onnxruntime", "onnxruntime-openvino", "onnxruntime-gpu", "hnswlib", "tokenizers", "grpcio", "protobuf", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "bundle_id": bundle.id,
        "device": graph_device,
    }

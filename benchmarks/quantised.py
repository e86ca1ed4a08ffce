"""What a graph of one byte a dimension costs and saves in Elasticsearch: recall against exact search, room on the disk, exact scores.

The vectors are those of a knowledge base in a folder, and only the questions, which are real ones, are embedded. Each kind of graph
is measured as it was written, in several segments, and merged into one, where the graph is largest and recall lowest.
`recall_at_10` is of the ten passages with the largest inner products; `score_error` is how far a returned score is from the
float32 inner product at most. Indexes are made under names that begin with openbook-quantised-, and deleted. The last line is JSON.

    python benchmarks/quantised.py bundle kb DATA/squad_open_small/queries.jsonl localhost:9200 --questions 300
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import elasticsearch
import numpy as np
from numpy.typing import NDArray
from openbook_server.bundle import load_bundle
from openbook_server.ingest.embed import PassageEmbedder
from openbook_server.knowledge import Passage
from openbook_server.knowledge.elastic import schema
from openbook_server.knowledge.graph import EF, EF_CONSTRUCTION, M
from openbook_server.knowledge.store import Store
from openbook_server.runtime import Graph, build_device
from openbook_server.tokenization import load_tokenizer
from report import add_results_arguments, publish, run_benchmark

K = 10
AT_ONCE = 500  # vectors of one bulk request
ASKED_AT_ONCE = 50  # questions of one request
GRAPHS: dict[str, dict[str, Any]] = {
    "hnsw": {"type": "hnsw"},
    "int8_hnsw": {"type": "int8_hnsw", "rescore_vector": {"oversample": schema.OVERSAMPLE}},
    "int8_hnsw without rescoring": {"type": "int8_hnsw"},
}
Vectors = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("kb", type=Path, help="folder of a knowledge base that the bundle built")
    parser.add_argument("questions_file", type=Path, help="jsonl with `text` or `question`")
    parser.add_argument("host", help="HOST:PORT of Elasticsearch")
    parser.add_argument("--questions", type=int, default=300)
    add_results_arguments(parser)
    arguments = parser.parse_args()
    passages = stored_vectors(arguments.kb)
    questions = question_vectors(arguments.bundle, arguments.questions_file, arguments.questions)
    exact = np.argsort(-(questions @ passages.T), axis=1, kind="stable")[:, :K]
    results = {}
    with elasticsearch.Elasticsearch(f"http://{arguments.host}", request_timeout=120) as client:
        version = client.info()["version"]["number"]
        for name, options in GRAPHS.items():
            results[name] = measure(client, options, passages, questions, exact)
    facts = {"elasticsearch": version, "machine": platform.machine(), "bundle": load_bundle(arguments.bundle).id}
    sizes = {"passages": len(passages), "dim": passages.shape[1], "questions": len(questions), "candidates": EF}
    publish(facts | sizes | {"graphs": results}, arguments, "quantised")


def stored_vectors(folder: Path) -> Vectors:
    """(passages, dim), of the live generation."""
    store = Store(folder, read_only=True)
    live = store.generations.live()
    if live is None:
        raise SystemExit(f"{folder} is empty")
    batches = [vectors for _, vectors in store.generations.vectors(live, sorted(store.generations.numbers(live)))]
    store.close()
    return np.concatenate(batches)


def question_vectors(folder: Path, file: Path, count: int) -> Vectors:
    bundle = load_bundle(folder)
    graph = Graph(bundle.graph_path("embedder", "fp32"), build_device("cpu", "fp32", 0))
    embed = PassageEmbedder(load_tokenizer(bundle.tokenizer_path), graph, bundle.embedder)
    with file.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return embed([Passage(id="", document_id="", text=row.get("question") or row["text"], start=0) for row in rows]).whole


def measure(
    client: elasticsearch.Elasticsearch, options: dict[str, Any], passages: Vectors, questions: Vectors, exact: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    index = f"openbook-quantised-{options['type'].replace('_', '-')}"
    client.options(ignore_status=404).indices.delete(index=index)
    graph = {**options, "m": M, "ef_construction": EF_CONSTRUCTION}
    field = {
        "type": "dense_vector",
        "dims": passages.shape[1],
        "index": True,
        "similarity": "max_inner_product",
        "index_options": graph,
    }
    settings = {"number_of_shards": 1, "number_of_replicas": 0}
    client.indices.create(index=index, settings=settings, mappings={"properties": {"vector": field}})
    for at in range(0, len(passages), AT_ONCE):
        part = enumerate(passages[at : at + AT_ONCE].astype(np.float64).round(9).tolist(), at)
        lines = [line for number, row in part for line in ({"index": {"_id": str(number)}}, {"vector": row})]
        if client.bulk(index=index, operations=lines)["errors"]:
            raise SystemExit("Elasticsearch refused vectors")
    found = {}
    for name in ("as written", "merged"):
        if name == "merged":
            client.indices.forcemerge(index=index, max_num_segments=1)
        client.indices.refresh(index=index)
        found[name] = look(client, index, passages, questions, exact)
    client.indices.delete(index=index)
    return found


def look(
    client: elasticsearch.Elasticsearch, index: str, passages: Vectors, questions: Vectors, exact: NDArray[np.int64]
) -> dict[str, float]:
    common, error = 0, 0.0
    for at in range(0, len(questions), ASKED_AT_ONCE):
        searches: list[dict[str, Any]] = []
        for vector in questions[at : at + ASKED_AT_ONCE]:
            nearest = {"field": "vector", "query_vector": vector.astype(np.float64).tolist(), "k": K, "num_candidates": EF}
            searches += [{"index": index}, {"knn": nearest, "size": K, "_source": False}]
        for row, reply in enumerate(client.msearch(searches=searches)["responses"], at):
            scores = {int(hit["_id"]): schema.inner_product(hit["_score"]) for hit in reply["hits"]["hits"]}
            common += len(scores.keys() & {*exact[row].tolist()})
            error = max([error, *(abs(score - float(questions[row] @ passages[number])) for number, score in scores.items())])
    primaries = client.indices.stats(index=index, metric=["store", "segments"])["_all"]["primaries"]
    return {
        "recall_at_10": common / K / len(questions),
        "score_error": error,
        "megabytes": primaries["store"]["size_in_bytes"] / 1e6,
        "segments": primaries["segments"]["count"],
    }


if __name__ == "__main__":
    run_benchmark(main)

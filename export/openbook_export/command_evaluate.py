"""`openbook evaluate`: how good a running server's answers are."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask a running server the questions of DATA_DIR and report R@1/5/20, answer-hit@1/5/20, EM, F1 and latency percentiles, for "
        "hybrid search beside BM25 only, dense only and no retrieval. The server's knowledge base must hold the corpus of DATA_DIR."
    )
    parser.epilog = (
        "DATA_DIR is in BEIR's layout: queries.jsonl ({_id, text, metadata: {answers}}), qrels/*.tsv, corpus.jsonl.\n"
        "example: openbook index bundle kb data/corpus.jsonl; openbook serve bundle kb --cache-mb 0 &\n"
        "         openbook evaluate squad-open data --server localhost:50051 --json result.json\n"
        "Questions are asked several times: with a cache, latencies would leave out what embedding them costs.\n"
        "exit status: 0 measured; 1 failed; 2 wrong usage; 3 some questions failed (they count as wrong)"
    )
    parser.add_argument("benchmark", choices=["squad-open"], help="retrieve, then answer")
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with queries.jsonl and qrels/")
    parser.add_argument("--server", metavar="HOST:PORT", help="default: $OPENBOOK_SERVER, or localhost:50051")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="a fixed sample of N questions (default: all)")
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="passages read (default: %(default)s)")
    parser.add_argument(
        "--modes", nargs="+", choices=["hybrid", "lexical", "dense", "none"], default=["hybrid", "lexical", "dense", "none"]
    )
    parser.add_argument("--concurrency", type=int, default=2, metavar="N", help="messages of 32 questions in flight (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")


def run(arguments: argparse.Namespace) -> int:
    from openbook.client import Client
    from openbook.errors import ClientError

    from openbook_export.open_book import InvalidBenchmark, evaluate_mode, load_queries, sample, table

    try:
        queries = sample(load_queries(arguments.data), arguments.limit)
        rows: dict[str, dict[str, float]] = {}
        with Client(arguments.server, timeout_seconds=120) as client:
            described = client.describe()
            for mode in arguments.modes:
                done = 0

                def progress(count: int, mode: str = mode) -> None:
                    nonlocal done
                    done += count
                    if done * 10 // len(queries) != (done - count) * 10 // len(queries):
                        print(f"{mode}: {done} of {len(queries)} questions", file=sys.stderr)

                rows[mode] = evaluate_mode(
                    client, queries, mode, top_k=arguments.top_k, concurrency=arguments.concurrency, progress=progress
                )
        report = {
            "benchmark": arguments.benchmark,
            "bundle_id": described.bundle.id,
            "generation": described.knowledge_base.generation,
            "passages": described.knowledge_base.passages,
            "device": described.device,
            "precision": described.precision,
            "top_k": arguments.top_k,
            "modes": rows,
        }
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    except (InvalidBenchmark, ClientError, OSError) as error:
        print(f"openbook evaluate: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    return 3 if any(row["failed"] for row in rows.values()) else 0

"""How fast could it be? Raw onnxruntime, hnswlib and tokenizers on this machine, without a server.

    python benchmarks/limits.py BUNDLE TEXTS.jsonl [--device cpu] [--seconds 5]

Embedding runs over real texts in perfect length buckets (no padding). Warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openbook_server.bundle import load_bundle
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine, perfect_batches, raw_embedding_rate, raw_search_rate, tokenizer_rate
from report import add_results_arguments, publish, run_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--limit", type=int, default=1024, help="texts used (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=0, help="batches at once; 0 = one a thread, up to 8")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=20_000, help="vectors in the hnswlib index (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device = choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    graph = Graph(bundle.graph_path("embedder", device.precision), device)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path))
    texts = load_texts(arguments.texts, arguments.limit)
    batches = perfect_batches(encoder, texts, bundle.embedder.max_tokens)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    result = {
        "texts": len(texts),
        "tokens_a_text": tokens / len(texts),
        "raw_embedding_texts_per_second": raw_embedding_rate(graph, batches, arguments.seconds, sessions=device.sessions),
        "tokenizer_texts_per_second": tokenizer_rate(encoder, texts, arguments.seconds),
        "hnswlib": raw_search_rate(arguments.rows, bundle.embedder.dim, 10, 64, arguments.seconds),
        "machine": machine(bundle, f"{device.name} {device.precision}"),
    }
    print(f"onnxruntime, perfect buckets: {result['raw_embedding_texts_per_second']:.0f} texts/s of {tokens / len(texts):.1f} tokens")
    print(f"tokenizers: {result['tokenizer_texts_per_second']:.0f} texts/s")
    print(f"hnswlib: {result['hnswlib']}")
    publish(result, arguments, "limits")


if __name__ == "__main__":
    run_benchmark(main)

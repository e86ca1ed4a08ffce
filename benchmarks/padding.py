"""What does sharing a batch gain? Texts of many lengths in one padding-free batch against one batch a length.

    python benchmarks/padding.py BUNDLE TEXTS.jsonl [--device cpu] [--seconds 2]

Takes the first 4, 16 and 64 texts (of each bucket of lengths a batch of its own, as the server does) and runs them both ways in
turn; prints the median µs a token of each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from driver import add_arguments
from openbook_server.buckets import COARSE, Buckets
from openbook_server.bundle import load_bundle
from openbook_server.rows import Row, collate
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine
from report import add_results_arguments, publish, run_benchmark

EXACT = Buckets((), 1)  # a batch a length


def seconds_of(graph: Graph, rows: Sequence[Row], buckets: Buckets) -> float:
    """Wall time of all rows, in batches of one bucket each."""
    lengths = [row.tokens for row in rows]
    batches = [
        collate([rows[at] for at in batch], buckets.padded_length(lengths[batch[0]])) for batch in buckets.batches(lengths, 1_000_000)
    ]
    began = time.perf_counter()
    for batch in batches:
        graph.run(batch)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of texts (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device = choose_device(arguments.device, None, arguments.threads)
    graph = Graph(bundle.graph_path("embedder", device.precision), device)
    texts = TextEncoder(load_tokenizer(bundle.tokenizer_path)).texts(load_texts(arguments.texts, arguments.limit))
    report: dict[str, object] = {"machine": machine(bundle, f"{device.name} {device.precision}")}
    for count in (4, 16, 64):
        rows, took = texts[:count], dict[str, list[float]](together=[], apart=[])
        tokens = sum(len(row.ids) for row in rows)
        ends = time.perf_counter() + arguments.seconds
        while time.perf_counter() < ends or len(took["apart"]) < 5:
            for way, buckets in (("together", COARSE), ("apart", EXACT)):
                took[way].append(1e6 * seconds_of(graph, rows, buckets) / tokens)
        medians = {way: statistics.median(values[1:]) for way, values in took.items()}  # the first run of a shape prepares it
        report[f"{count} texts"] = medians
        lengths = sorted(len(row.ids) for row in rows)
        spread = f"{count} texts of {lengths[0]} to {lengths[-1]} tokens"
        print(f"{spread}, µs a token: {medians['together']:.0f} sharing batches, {medians['apart']:.0f} apart")
    publish(report, arguments, "padding")


if __name__ == "__main__":
    run_benchmark(main)

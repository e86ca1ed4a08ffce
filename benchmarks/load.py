"""What does serving cost? Embed through the server against raw onnxruntime, in one run.

    python benchmarks/load.py BUNDLE TEXTS.jsonl [--device cpu] [--rounds 3] [--seconds 5]

Starts a server on a free port of this machine and drives it from processes of their own, in closed loop (32 texts a message;
single texts at concurrency 64) and in open loop (single texts, Poisson arrivals at a share of the measured capacity).
Each round measures raw onnxruntime (perfect length buckets, same texts, same threads) and then the server in closed loop,
so that a noisy machine disturbs both; reported are medians over rounds, and the ratio served / raw round by round. The
open loop comes after all rounds, once at each share, beside no raw limit. The client is Python's asyncio gRPC client, which
costs about 200 µs a call on the same cores. Bounded in time and number of requests; warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from driver import Clients, Load, Server, add_arguments, percentile, started_server, warn_if_saturated
from openbook_server.bundle import load_bundle
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine, perfect_batches, raw_embedding_rate
from report import add_results_arguments, publish, run_benchmark


@dataclass(frozen=True)
class Outcome:
    texts_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    statuses: dict[str, int]
    client_cpu: float
    server_cpu_ms_a_text: float  # answered; what refusals cost is in it


def measure(clients: Clients, server: Server, texts: Sequence[str], load: Load) -> Outcome:
    driven = clients.drive(server, texts, load)
    warn_if_saturated(driven)
    took = driven.milliseconds.get("OK", ())  # a refusal is quicker than an answer
    answered = load.texts_a_message * len(took)
    return Outcome(
        answered / load.seconds,
        *(percentile(took, at) for at in (50, 95, 99)),
        {status: len(part) for status, part in driven.milliseconds.items()},
        driven.client_cpu,
        1000 * driven.server_cpu_seconds / answered if answered else math.nan,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="a phase (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=1, help="processes that send (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=0, metavar="N", help="as of `openbook serve` (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device = choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    texts = load_texts(arguments.texts, arguments.limit)
    graph = Graph(bundle.graph_path("embedder", device.precision), device)
    batches = perfect_batches(TextEncoder(load_tokenizer(bundle.tokenizer_path)), texts, bundle.embedder.max_tokens)
    closed = {
        "32 texts a message": Load(texts_a_message=32, concurrency=4, seconds=arguments.seconds),
        "unary, concurrency 64": Load(texts_a_message=1, concurrency=64, seconds=arguments.seconds),
    }
    raw: list[float] = []
    served: dict[str, list[Outcome]] = {name: [] for name in closed}
    with (
        started_server(
            arguments.bundle, arguments.device, arguments.threads, front_ends=arguments.frontends, sessions=arguments.sessions
        ) as server,
        Clients(arguments.clients) as clients,
    ):
        for _ in range(arguments.rounds):
            for name, load in closed.items():
                raw.append(raw_embedding_rate(graph, batches, arguments.seconds, sessions=device.sessions))
                served[name].append(measure(clients, server, texts, load))
        capacity = statistics.median(outcome.texts_per_second for outcome in served["unary, concurrency 64"])
        opened = {
            share: measure(clients, server, texts, Load(texts_a_message=1, rate=share * capacity, seconds=arguments.seconds))
            for share in (0.5, 0.8, 2.0)
        }
    report: dict[str, object] = {
        "raw_texts_per_second": statistics.median(raw),
        "machine": machine(bundle, f"{device.name} {device.precision}"),
    }
    print(f"raw onnxruntime {statistics.median(raw):.0f} texts/s (median of {len(raw)}, {min(raw):.0f} to {max(raw):.0f})")
    for number, (name, outcomes) in enumerate(served.items()):
        pairs = zip(outcomes, raw[number :: len(closed)], strict=True)
        ratio = statistics.median(outcome.texts_per_second / limit for outcome, limit in pairs)
        middle = sorted(outcomes, key=lambda outcome: outcome.texts_per_second)[len(outcomes) // 2]
        report[name] = {"served_to_raw": ratio, **asdict(middle)}
        latency = f"p50 {middle.p50_ms:.1f} p99 {middle.p99_ms:.1f} ms"
        print(f"{name}: {middle.texts_per_second:.0f} texts/s, {ratio:.2f} of raw; {latency}; {middle.statuses}")
    for share, outcome in opened.items():
        report[f"open loop, {share} of capacity"] = asdict(outcome)
        print(
            f"open loop at {share:.1f} of capacity: {outcome.texts_per_second:.0f} texts/s; "
            f"p50 {outcome.p50_ms:.1f} p95 {outcome.p95_ms:.1f} p99 {outcome.p99_ms:.1f} ms; {outcome.statuses}"
        )
    publish(report, arguments, "load")


if __name__ == "__main__":
    run_benchmark(main)

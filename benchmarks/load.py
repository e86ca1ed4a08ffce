"""What does serving cost? Embed through the server against raw onnxruntime, in one run.

    python benchmarks/load.py BUNDLE TEXTS.jsonl [--device cpu] [--rounds 3] [--seconds 5]

Starts a server on a free port of this machine and drives it from another process, in closed loop (32 texts a message;
single texts at concurrency 64) and in open loop (single texts, Poisson arrivals at a share of the measured capacity).
Each round measures raw onnxruntime (perfect length buckets, same texts, same threads) and then the server, so that a
noisy machine disturbs both; reported are medians over rounds, and the ratio served / raw round by round. The client is
Python's asyncio gRPC client, which costs about 200 µs a call on the same cores. Bounded in time and number of requests;
warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import grpc.aio
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc
from openbook_server.bundle import load_bundle
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine, perfect_batches, raw_embedding_rate

MAX_REQUESTS = 200_000  # of one phase
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Load:
    """One phase of load."""

    texts_a_message: int
    concurrency: int  # closed loop: callers; open loop: 0
    rate: float  # open loop: messages a second
    seconds: float


@dataclass(frozen=True)
class Outcome:
    texts_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    statuses: dict[str, int]
    server_cpu_ms_a_text: float


def drive(address: str, texts: Sequence[str], load: Load) -> tuple[float, list[float], dict[str, int]]:
    """Run one phase; returns texts a second, latencies in ms, and calls by status. Runs in a process of its own."""
    return asyncio.run(_drive(address, texts, load))


async def _drive(address: str, texts: Sequence[str], load: Load) -> tuple[float, list[float], dict[str, int]]:
    rng = random.Random(1)
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = openbook_pb2_grpc.OpenBookStub(channel)
        began = time.perf_counter() + WARM_UP_SECONDS
        ends = began + load.seconds

        async def call() -> None:
            start = time.perf_counter()
            try:
                await stub.Embed(pb.EmbedRequest(texts=rng.choices(texts, k=load.texts_a_message)), timeout=30)
                status = "OK"
            except grpc.aio.AioRpcError as error:
                status = error.code().name
            now = time.perf_counter()
            if began <= now <= ends:  # by its end, so that as many are counted as were finished
                statuses[status] += 1
                latencies.append(1000 * (now - start))

        async def caller() -> None:
            while time.perf_counter() < ends and sum(statuses.values()) < MAX_REQUESTS:
                await call()

        if load.concurrency:
            await asyncio.gather(*(caller() for _ in range(load.concurrency)))
        else:
            due, tasks = time.perf_counter(), []
            while due < ends and len(tasks) < MAX_REQUESTS:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(call()))
                due += rng.expovariate(load.rate)
            await asyncio.gather(*tasks)
    return load.texts_a_message * statuses["OK"] / load.seconds, latencies, dict(statuses)


@contextmanager
def started_server(bundle: Path, device: str, threads: int, knowledge_base: Path | None = None) -> Iterator[tuple[str, int]]:
    """A server on a free port; yields its address and process id."""
    folders = [str(folder) for folder in (bundle, knowledge_base) if folder is not None]
    options = ["--port", "0", "--device", device, "--threads", str(threads), "--cache-mb", "0"]  # texts repeat here: compute each time
    command = [sys.executable, "-m", "openbook.cli", "serve", *folders, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving .* on (127\.0\.0\.1:\d+)", line):
            break
    else:
        raise SystemExit("the server did not start")
    try:
        yield found.group(1), process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(pool: multiprocessing.pool.Pool, address: str, pid: int, texts: Sequence[str], load: Load) -> Outcome:
    before = cpu_seconds(pid)
    rate, latencies, statuses = pool.apply(drive, (address, texts, load))
    served = max(1, load.texts_a_message * len(latencies))
    ordered = sorted(latencies) or [float("nan")]
    p50, p95, p99 = (ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99))
    share = load.seconds / (load.seconds + WARM_UP_SECONDS)  # of the CPU time that was not warm-up
    return Outcome(rate, p50, p95, p99, statuses, 1000 * share * (cpu_seconds(pid) - before) / served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--limit", type=int, default=1024, help="texts used (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="a phase (default: %(default)s)")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    device = choose_device(arguments.device, None, arguments.threads)
    texts = load_texts(arguments.texts, arguments.limit)
    graph = Graph(bundle.graph_path("embedder", device.precision), device, arguments.threads)
    batches = perfect_batches(TextEncoder(load_tokenizer(bundle.tokenizer_path)), texts, bundle.embedder.max_tokens)
    closed = {"32 texts a message": Load(32, 4, 0.0, arguments.seconds), "unary, concurrency 64": Load(1, 64, 0.0, arguments.seconds)}
    raw: list[float] = []
    served: dict[str, list[Outcome]] = {name: [] for name in closed}
    with (
        started_server(arguments.bundle, arguments.device, arguments.threads) as (address, pid),
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        for _ in range(arguments.rounds):
            for name, load in closed.items():
                raw.append(raw_embedding_rate(graph, batches, arguments.seconds))
                served[name].append(measure(pool, address, pid, texts, load))
        capacity = statistics.median(outcome.texts_per_second for outcome in served["unary, concurrency 64"])
        opened = {share: measure(pool, address, pid, texts, Load(1, 0, share * capacity, arguments.seconds)) for share in (0.5, 0.8, 2.0)}
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
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""What does ingestion cost the people who ask? Latency of Answer with and without a bulk load, in one run.

    python benchmarks/mixed.py BUNDLE KB QUESTIONS.jsonl [--device cpu] [--rounds 3] [--seconds 10]

Works on a copy of KB. Each round asks single questions, one caller after the other has its answer, first alone and then
while another process streams new documents into the same server as fast as it takes them. Reported are p50 and p95 of both
and the ratio, medians over rounds, and how many passages a second were stored beside. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

from driver import add_server_arguments, percentile, started_server
from openbook.client import Client, Document
from openbook_server.bundle import load_bundle
from openbook_server.runtime import choose_device
from raw import load_texts, machine
from report import add_results_arguments, publish, run_benchmark

SENTENCES = 20  # of a document made of questions: about two passages
MAX_DOCUMENTS = 100_000


def documents(texts: Sequence[str], run: str) -> Iterator[Document]:
    """New documents without end, each of other sentences."""
    endless = itertools.cycle(texts)
    for number in range(MAX_DOCUMENTS):
        yield Document(id=f"bulk/{run}/{number}", text=f"Document {number}. " + " ".join(itertools.islice(endless, SENTENCES)))


def ingest(address: str, texts: Sequence[str], run: str, stop: Event) -> int:
    """Upsert until `stop`; returns the passages that were acknowledged. Runs in a process of its own."""
    stored = 0
    with Client(address, timeout_seconds=120) as client:
        for written in client.upsert(documents(texts, run)):
            stored += written.passages
            if stop.is_set():
                break
    return stored


def latencies(client: Client, questions: Sequence[str], seconds: float) -> list[float]:
    """Sorted milliseconds of single questions, one after the other."""
    took, ends = [], time.perf_counter() + seconds
    for question in itertools.cycle(questions):
        began = time.perf_counter()
        if began > ends:
            return sorted(took)
        client.answer([question])
        took.append(1000 * (time.perf_counter() - began))
    raise AssertionError("no questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path)
    parser.add_argument("questions", type=Path, help="JSON lines with `text` or `question`")
    add_server_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="a phase (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    texts = load_texts(arguments.questions, 1024)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(arguments.knowledge_base, Path(folder) / "kb")
        context = multiprocessing.get_context("spawn")
        with (
            started_server(arguments.bundle, arguments.device, arguments.threads, copy, sessions=arguments.sessions) as server,
            Client(server.address, timeout_seconds=120) as client,
            context.Manager() as manager,
            context.Pool(1) as pool,
        ):
            latencies(client, texts, 2.0)  # warm-up
            for number in range(arguments.rounds):
                alone = latencies(client, texts, arguments.seconds)
                stop = manager.Event()
                bulk = pool.apply_async(ingest, (server.address, texts, str(number), stop))
                time.sleep(1.0)  # until the load is there
                beside, began = latencies(client, texts, arguments.seconds), time.perf_counter()
                stop.set()
                stored = bulk.get()
                row = {
                    f"{name}_p{share}_ms": percentile(took, share)
                    for share in (50, 95)
                    for name, took in (("alone", alone), ("beside", beside))
                }
                row["passages_per_second"] = stored / (arguments.seconds + 1.0 + time.perf_counter() - began)
                rounds.append(row | {f"ratio_p{share}": row[f"beside_p{share}_ms"] / row[f"alone_p{share}_ms"] for share in (50, 95)})
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    for name, load in (("alone", "alone"), ("beside", f"beside a bulk load of {medians['passages_per_second']:.0f} passages/s")):
        print(f"Answer {load}: p50 {medians[f'{name}_p50_ms']:.0f} p95 {medians[f'{name}_p95_ms']:.0f} ms")
    print(f"ratio: p50 {medians['ratio_p50']:.2f} p95 {medians['ratio_p95']:.2f}")
    bundle, device = load_bundle(arguments.bundle), choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    publish({"rounds": rounds, **medians, "machine": machine(bundle, f"{device.name} {device.precision}")}, arguments, "mixed")


if __name__ == "__main__":
    run_benchmark(main)

"""What does serving cost an answer? Answer through the server against the raw loops over embedder and reader, in one run.

    python benchmarks/answers.py BUNDLE KB QUESTIONS.jsonl [--device cpu] [--limit 128] [--rounds 3] [--seconds 10]

First every question is answered once by the server; the passages that it read are the pairs of the raw loop. Each round then measures
raw onnxruntime (all questions through the embedder, all pairs through the reader, both in batches of one exact length without
any padding; nothing is tokenised, searched or ranked) and after it the server in closed loop, by questions alone in their message and
by eight a message. Both go through all questions in whole passes, until `--seconds` are over: the same work, whatever comes in which
batch. Reported are medians over rounds, and the ratio served / raw round by round. The client shares the cores. The first pass, in
which the pairs are found, is the warm-up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc.aio
from driver import add_server_arguments, cpu_seconds, percentile, started_server
from openbook.client import Client
from openbook.results import AnswerResult
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc
from openbook_server.bundle import load_bundle
from openbook_server.rows import Row
from openbook_server.runtime import Graph, choose_device
from openbook_server.tokenization import TextEncoder, load_tokenizer
from raw import load_texts, machine, passes_per_second, perfect_batches, row_batches, run_all
from report import add_results_arguments, publish, run_benchmark

LOADS = {"one a message, 32 callers": (1, 32), "8 a message, 4 callers": (8, 4)}
DEADLINE_SECONDS = 300.0


def pairs_read(encoder: TextEncoder, questions: Sequence[str], answered: Sequence[AnswerResult], max_tokens: int) -> Iterator[Row]:
    """What the reader was given for these answers."""
    for question, result in zip(questions, answered, strict=True):
        passages = [hit.text for hit in result.hits[: result.passages_read]]
        yield from (pair.row for pair in encoder.pairs(question, passages, max_tokens))


def answer_all(address: str, questions: Sequence[str], size: int, callers: int, seconds: float) -> tuple[float, list[float]]:
    """All questions in passes until `seconds` are over; answers a second and ms of each message, sorted. For a process of its own."""
    return asyncio.run(_answer_all(address, questions, size, callers, seconds))


async def _answer_all(address: str, questions: Sequence[str], size: int, callers: int, seconds: float) -> tuple[float, list[float]]:
    messages = [questions[at : at + size] for at in range(0, len(questions), size)]
    took: list[float] = []
    began = time.perf_counter()

    def turns() -> Iterator[Sequence[str]]:
        while time.perf_counter() - began < seconds:
            yield from messages

    waiting = turns()  # shared: each caller takes what comes next
    async with grpc.aio.insecure_channel(address) as channel:
        stub = openbook_pb2_grpc.OpenBookStub(channel)

        async def caller() -> None:
            for message in waiting:
                start = time.perf_counter()
                await stub.Answer(pb.AnswerRequest(questions=message), timeout=DEADLINE_SECONDS)
                took.append(1000 * (time.perf_counter() - start))

        await asyncio.gather(*(caller() for _ in range(callers)))
    passes = len(took) // len(messages)
    return passes * len(questions) / (time.perf_counter() - began), sorted(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("knowledge_base", type=Path)
    parser.add_argument("questions", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--limit", type=int, default=128, help="questions used (default: %(default)s)")
    add_server_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a phase (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    if bundle.reader is None:
        parser.error(f"{arguments.bundle} has no reader; export it with --reader")
    device = choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    encoder = TextEncoder(load_tokenizer(bundle.tokenizer_path))
    embedder, reader = (Graph(bundle.graph_path(name, device.precision), device) for name in ("embedder", "reader"))
    questions = load_texts(arguments.questions, arguments.limit)
    asked = perfect_batches(encoder, questions, bundle.embedder.max_tokens)
    raw: list[float] = []
    served: dict[str, list[dict[str, float]]] = {name: [] for name in LOADS}
    with (
        started_server(
            arguments.bundle, arguments.device, arguments.threads, arguments.knowledge_base, sessions=arguments.sessions
        ) as server,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        with Client(server.address, timeout_seconds=600) as client:
            answered = [result for result in client.answer(questions) if isinstance(result, AnswerResult)]
        if len(answered) < len(questions):
            parser.error(f"{len(questions) - len(answered)} questions of {arguments.questions} were refused; use others")
        rows = list(pairs_read(encoder, questions, answered, bundle.reader.max_tokens))
        pairs = row_batches(rows)

        def one_pass() -> None:
            run_all(embedder, asked, device.sessions)
            run_all(reader, pairs, device.sessions)

        for _ in range(arguments.rounds):
            raw.append(len(questions) * passes_per_second(one_pass, arguments.seconds))
            for name, (size, callers) in LOADS.items():
                used = cpu_seconds(server.pid)
                rate, took = pool.apply(answer_all, (server.address, questions, size, callers, arguments.seconds))
                row = {
                    "answers_per_second": rate,
                    "served_to_raw": rate / raw[-1],
                    "p50_ms": percentile(took, 50),
                    "p95_ms": percentile(took, 95),
                    "server_cpu_ms_an_answer": 1000 * (cpu_seconds(server.pid) - used) / (len(took) * size),
                }
                served[name].append(row)
    tokens = sum(len(row.ids) for row in rows) / len(rows)
    print(f"{len(questions)} questions, {len(rows) / len(questions):.2f} passages read for each, {tokens:.0f} tokens a pair")
    print(f"raw embedder and reader: {statistics.median(raw):.2f} answers/s (median of {len(raw)}, {min(raw):.2f} to {max(raw):.2f})")
    loads = {name: {key: statistics.median(row[key] for row in rounds) for key in rounds[0]} for name, rounds in served.items()}
    for name, row in loads.items():
        print(
            f"Answer, {name}: {row['answers_per_second']:.2f} answers/s, {row['served_to_raw']:.2f} of raw; p50 {row['p50_ms']:.0f} "
            f"p95 {row['p95_ms']:.0f} ms; {row['server_cpu_ms_an_answer']:.1f} ms CPU an answer"
        )
    report = {
        "questions": len(questions),
        "passages_a_question": len(rows) / len(questions),
        "tokens_a_pair": tokens,
        "raw_answers_per_second": statistics.median(raw),
        "served": loads,
        "machine": machine(bundle, f"{device.name} {device.precision}"),
    }
    publish(report, arguments, "answers")


if __name__ == "__main__":
    run_benchmark(main)

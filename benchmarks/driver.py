"""A server of its own on this machine, and load on it from another process: what the benchmarks share."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path

import grpc
import grpc.aio
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc

MAX_REQUESTS = 200_000  # of one phase
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """One phase of Embed calls."""

    texts_a_message: int
    seconds: float
    concurrency: int = 0  # closed loop: callers, each with one call at a time
    rate: float = 0.0  # open loop: messages a second, arriving at random (Poisson)
    deadline_seconds: float = 30.0


@dataclass(frozen=True)
class Driven:
    """What a phase came to, warm-up left out."""

    milliseconds: dict[str, list[float]]  # of each call, sorted, by status
    sent: int  # calls begun
    seconds: float

    def count(self, status: str) -> int:
        return len(self.milliseconds.get(status, ()))

    @property
    def calls(self) -> int:
        return sum(map(len, self.milliseconds.values()))


def drive(address: str, texts: Sequence[str], load: Load) -> Driven:
    """Run one phase; meant for a process of its own, so that the client does not hold up whoever measures."""
    return asyncio.run(_drive(address, texts, load))


def drive_and_account(pool: Pool, address: str, pid: int, texts: Sequence[str], load: Load) -> tuple[Driven, float]:
    """Run one phase in the pool's process; also the CPU seconds that the server `pid` used in it, warm-up left out."""
    before = cpu_seconds(pid)
    driven = pool.apply(drive, (address, texts, load))
    return driven, load.seconds / (load.seconds + WARM_UP_SECONDS) * (cpu_seconds(pid) - before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of `Embed` takes."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--limit", type=int, default=1024, help="texts used (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)


async def _drive(address: str, texts: Sequence[str], load: Load) -> Driven:
    rng = random.Random(1)
    milliseconds: dict[str, list[float]] = {}
    sent = 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub = openbook_pb2_grpc.OpenBookStub(channel)
        began = time.perf_counter() + WARM_UP_SECONDS
        ends = began + load.seconds

        async def call() -> None:
            nonlocal sent
            start = time.perf_counter()
            sent += began <= start <= ends
            try:
                await stub.Embed(pb.EmbedRequest(texts=rng.choices(texts, k=load.texts_a_message)), timeout=load.deadline_seconds)
                status = "OK"
            except grpc.aio.AioRpcError as error:
                status = error.code().name
            now = time.perf_counter()
            if began <= now <= ends:  # by its end, so that as many are counted as were finished
                milliseconds.setdefault(status, []).append(1000 * (now - start))

        async def caller() -> None:
            while time.perf_counter() < ends and sent < MAX_REQUESTS:
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
    return Driven({status: sorted(values) for status, values in milliseconds.items()}, sent, load.seconds)


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


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process now; with "VmHWM" the most it ever was."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def percentile(ordered: Sequence[float], share: int) -> float:
    """Of sorted values; NaN where there are none."""
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)] if ordered else float("nan")

"""A server of its own on this machine, and load on it from other processes: what the benchmarks share."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.pool import Pool
from pathlib import Path
from typing import IO, Any, Literal

import grpc
import grpc.aio
from openbook.v1 import openbook_pb2 as pb
from openbook.v1 import openbook_pb2_grpc

MAX_REQUESTS = 200_000  # of one phase and client process
WARM_UP_SECONDS = 1.0
SETTLE_SECONDS = 0.2  # between asking the client processes to begin and the moment at which all of them do
SATURATED = 0.9  # of a core: a client process that uses more may be what limits the rate
ITEM_ERRORS = "ITEM_ERRORS"  # the status of a call of which single texts were refused, whatever became of the others
SAMPLES = 100  # of the server's memory, at most, in a phase
SAMPLE_SECONDS = 0.5  # between two of them, at least


@dataclass(frozen=True, kw_only=True)
class Load:
    """One phase of calls."""

    seconds: float
    texts_a_message: int = 1
    concurrency: int = 0  # closed loop: callers, each with one call at a time
    rate: float = 0.0  # open loop: messages a second, arriving at random (Poisson)
    deadline_seconds: float = 30.0
    method: Literal["Embed", "Answer", "Generate"] = "Embed"  # Generate takes one text a message
    writer: str = ""  # of Generate: the model that writes
    max_tokens: int | None = None  # of Generate: to write at most; None = the server's default


@dataclass(frozen=True, kw_only=True)
class Driven:
    """What a phase came to, warm-up left out."""

    milliseconds: Mapping[str, Sequence[float]]  # of each call, sorted, by status; in open loop from when it was due
    sent: int  # calls begun
    seconds: float
    client_cpu: float  # CPU seconds a second of the busiest client process: near 1, the client may be what limits
    first_ms: Sequence[float] = ()  # of streams: until the first piece, counted as `milliseconds`, sorted
    between_ms: Sequence[float] = ()  # of streams: from each piece to the next, sorted
    server_cpu_seconds: float = 0.0
    memory_mb: Sequence[tuple[float, float]] = ()  # (seconds since the phase began, resident memory of the server)
    probe: Driven | None = None  # what a client that is not busy itself saw meanwhile

    def count(self, status: str) -> int:
        return len(self.milliseconds.get(status, ()))

    @property
    def calls(self) -> int:
        return sum(map(len, self.milliseconds.values()))


@dataclass(frozen=True)
class Server:
    """One that answers."""

    address: str
    pid: int
    startup_seconds: float  # from starting its process until it said SERVING

    def cpu_seconds(self) -> float:
        """Of all its processes, so far."""
        return sum(map(cpu_seconds, self._processes()))

    def memory_mb(self) -> float:
        """Of all its processes; what they share counts in each."""
        return sum(map(memory_mb, self._processes()))

    def _processes(self) -> list[int]:
        """It, and its engine and front ends where it has some."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]


class Clients:
    """Processes that send load, so that neither they nor whoever measures hold up each other; a context manager."""

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self._pool: Pool = multiprocessing.get_context("spawn").Pool(processes + 1)  # one for the probe

    def __enter__(self) -> Clients:
        self._pool.map(_ready, range(self.processes + 1), chunksize=1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def drive(self, server: Server, texts: Sequence[str], load: Load, *, probe: Load | None = None) -> Driven:
        """Run one phase, shared out over the processes, and look at the server meanwhile; `probe` is sent by one process more."""
        start = time.perf_counter() + SETTLE_SECONDS  # the same clock in every process
        loads = shared_out(load, self.processes)
        parts = [(server.address, texts, part, start, seed) for seed, part in enumerate([*loads, *([probe] if probe else [])])]
        waiting = self._pool.starmap_async(_run, parts, chunksize=1)
        began = start + WARM_UP_SECONDS
        time.sleep(max(0.0, began - time.perf_counter()))
        before, memory = server.cpu_seconds(), []
        pause = max(SAMPLE_SECONDS, load.seconds / SAMPLES)
        while (left := began + load.seconds - time.perf_counter()) > 0:
            memory.append((time.perf_counter() - began, server.memory_mb()))
            time.sleep(min(pause, left))
        used = server.cpu_seconds() - before
        driven = waiting.get()
        seen = driven.pop() if probe else None
        return replace(merged(driven), server_cpu_seconds=used, memory_mb=memory, probe=seen)


def shared_out(load: Load, processes: int) -> list[Load]:
    """As many equal parts: independent Poisson arrivals add up to Poisson arrivals. Fewer where there are fewer callers."""
    if load.rate:
        return [replace(load, rate=load.rate / processes)] * processes
    counts = [load.concurrency // processes + (at < load.concurrency % processes) for at in range(processes)]
    return [replace(load, concurrency=count) for count in counts if count]


def merged(parts: Sequence[Driven]) -> Driven:
    """What several client processes came to together."""
    statuses = sorted({status for part in parts for status in part.milliseconds})
    return Driven(
        milliseconds={status: sorted(ms for part in parts for ms in part.milliseconds.get(status, ())) for status in statuses},
        sent=sum(part.sent for part in parts),
        seconds=parts[0].seconds,
        client_cpu=max(part.client_cpu for part in parts),
        first_ms=sorted(ms for part in parts for ms in part.first_ms),
        between_ms=sorted(ms for part in parts for ms in part.between_ms),
    )


def warn_if_saturated(driven: Driven) -> None:
    if driven.client_cpu > SATURATED:
        print(f"  the busiest client process used {driven.client_cpu:.2f} of a core: it may be the limit, raise --clients")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """How the server is started."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=0, help="batches at once, of the raw limit too; 0 = the server's choice")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of `Embed` takes."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, help="JSON lines with `text` or `question`")
    parser.add_argument("--limit", type=int, default=1024, help="texts used (default: %(default)s)")
    add_server_arguments(parser)


def _ready(_: int) -> None:
    """Keeps a new process until the others are there too, so that each has imported what it needs."""
    time.sleep(SETTLE_SECONDS)


def _run(address: str, texts: Sequence[str], load: Load, start: float, seed: int) -> Driven:
    return asyncio.run(_drive(address, texts, load, start, seed))


async def _drive(address: str, texts: Sequence[str], load: Load, start: float, seed: int) -> Driven:
    rng = random.Random(seed)
    milliseconds: dict[str, list[float]] = {}
    first_ms: list[float] = []
    between_ms: list[float] = []
    sent = 0
    began = start + WARM_UP_SECONDS
    ends = began + load.seconds
    used: list[float] = []
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = openbook_pb2_grpc.OpenBookStub(channel)

        async def call(due: float) -> None:
            nonlocal sent
            sent += began <= due <= ends
            chosen, arrivals = rng.choices(texts, k=load.texts_a_message), list[float]()
            status = await called(stub, chosen, load, arrivals)
            now = time.perf_counter()
            if began <= now <= ends:  # by its end, so that as many are counted as were finished
                milliseconds.setdefault(status, []).append(1000 * (now - due))
            for number, (before, arrival) in enumerate(pairwise([due, *arrivals])):
                if began <= arrival <= ends:  # each by itself: the server's time in between went into all of them, whenever their text ends
                    (between_ms if number else first_ms).append(1000 * (arrival - before))

        async def caller() -> None:
            while (now := time.perf_counter()) < ends and sent < MAX_REQUESTS:
                await call(now)

        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        for at in (began, ends):
            loop.call_later(at - time.perf_counter(), lambda: used.append(time.process_time()))
        if load.concurrency:
            await asyncio.gather(*(caller() for _ in range(load.concurrency)))
        else:
            due, tasks = time.perf_counter(), set[asyncio.Task[None]]()
            while due < ends and sent < MAX_REQUESTS:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(call(due))  # a client that is late counts as waiting: what was due is what a user feels
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                due += rng.expovariate(load.rate)
            await asyncio.gather(*tasks)
        await asyncio.sleep(max(0.0, ends - time.perf_counter()) + 0.01)
    return Driven(
        milliseconds={status: sorted(values) for status, values in milliseconds.items()},
        sent=sent,
        seconds=load.seconds,
        client_cpu=(used[1] - used[0]) / load.seconds,
        first_ms=sorted(first_ms),
        between_ms=sorted(between_ms),
    )


async def called(stub: Any, texts: Sequence[str], load: Load, arrivals: list[float]) -> str:
    """What became of one call: the name of its gRPC status, or `ITEM_ERRORS`. `arrivals` takes when each piece of a stream came."""
    try:
        if load.method == "Generate":
            [text] = texts
            request = pb.GenerateRequest(text=text, writer=load.writer, max_tokens=load.max_tokens)
            async for _ in stub.Generate(request, timeout=load.deadline_seconds):
                arrivals.append(time.perf_counter())  # noqa: PERF401 - those before a failure count too
            return "OK"
        if load.method == "Embed":
            reply = await stub.Embed(pb.EmbedRequest(texts=texts), timeout=load.deadline_seconds)
        else:
            reply = await stub.Answer(pb.AnswerRequest(questions=texts), timeout=load.deadline_seconds)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return ITEM_ERRORS if reply.errors else "OK"


@contextmanager
def started_server(
    bundle: Path,
    device: str,
    threads: int,
    knowledge_base: Path | None = None,
    *,
    sessions: int = 0,
    front_ends: int = 0,
    python: str = sys.executable,
) -> Iterator[Server]:
    """A server on a free port of this machine, run by `python`."""
    folders = [str(folder) for folder in (bundle, knowledge_base) if folder is not None]
    options = ["--port", "0", "--device", device, "--threads", str(threads), "--cache-mb", "0"]  # texts repeat here: compute each time
    options += ["--sessions", str(sessions)]
    options += ["--frontends", str(front_ends)] if front_ends else []
    command = [python, "-m", "openbook.cli", "serve", *folders, *options]
    began, said = time.perf_counter(), []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving .* on (127\.0\.0\.1:\d+)", line):  # written once health says SERVING
            break
        said.append(line)
    else:
        raise SystemExit(f"the server did not start: {''.join(said[-5:])}")
    threading.Thread(target=_read_on, args=(process.stderr,), daemon=True).start()
    try:
        yield Server(found.group(1), process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait()


def _read_on(stream: IO[str]) -> None:
    """To its end: a server whose log nobody reads would stop once the pipe is full."""
    with stream:
        for _ in stream:
            pass


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

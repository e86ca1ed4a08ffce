"""Which settings serve a bundle best on this machine: measured, not guessed.

A trial is an engine with one number of threads, of sessions and of tokens a batch, and requests as a server would run them: a question
embedded, then `TOP_K` passages read beside it where the bundle has a reader. First as many as it can do (closed loop), then
at `SHARE` of that, arriving at random, for the latency that somebody who asks would see. Left out is what costs the same
whatever the settings: gRPC, tokenising, search.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from openbook_server.bundle import Bundle
from openbook_server.config import ServerConfig
from openbook_server.engine import Engine, Runnable
from openbook_server.priority import give_way
from openbook_server.rows import Row
from openbook_server.runtime import GPU_SESSIONS, MOST_SESSIONS, Device, Graph, choose_device, cores

TOP_K = 5
CALLERS = 32  # at once, when as many requests as possible are measured
SHARE = 0.8  # of the measured rate, at which latency is measured
BUDGETS = (512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)  # tokens a batch
FIRST_BUDGET = ServerConfig().max_batch_tokens  # of BUDGETS, with which numbers of threads and sessions are compared
QUESTION_TOKENS, PASSAGE_TOKENS = (8, 24), (150, 250)  # what requests are made of, if the models take so many
ENOUGH = 20  # requests behind a p95; of fewer it is the slowest one
_ALIKE = 0.97  # rates closer than this are equal, and latency decides
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Settings, and what they came to."""

    threads: int  # 0 = the device has its own
    sessions: int
    max_batch_tokens: int
    requests_per_second: float
    p95_ms: float  # at SHARE of that rate
    requests: int  # that the p95 is of


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests like those of a server of one bundle."""

    question_tokens: tuple[int, int]  # shortest and longest, special tokens included
    pair_tokens: tuple[int, int] | None  # of a question beside a passage; None = the bundle has no reader

    @classmethod
    def of(cls, bundle: Bundle) -> Workload:
        question = _at_most(QUESTION_TOKENS, bundle.embedder.max_tokens)
        if bundle.reader is None:
            return cls(question, None)
        return cls(question, _at_most((question[0] + PASSAGE_TOKENS[0], question[1] + PASSAGE_TOKENS[1]), bundle.reader.max_tokens))

    async def request(self, engine: Engine, rng: random.Random) -> None:
        deadline = time.monotonic() + 3_600
        await engine.submit("embedder", [_row(rng, self.question_tokens)], deadline=deadline)
        if self.pair_tokens:
            await engine.submit("reader", [_row(rng, self.pair_tokens) for _ in range(TOP_K)], deadline=deadline)


def tune(
    bundle: Bundle, *, device: str, precision: str | None, objective_ms: float | None, seconds: float, report: Callable[[Trial, int], None]
) -> tuple[list[Trial], Trial]:
    """Try numbers of threads and sessions, then token budgets with the best of them.

    Args:
        device, precision: as `runtime.choose_device`.
        objective_ms: p95 that must hold; None = only the rate counts.
        seconds: of measuring, over all trials; loading the graphs, and what is under way when a trial's share is over, come on top.
        report: told of each trial as it ends, and of how many it is one.

    Returns:
        All trials in their order, and the best: see `choose`.

    Raises:
        DeviceUnavailable, BundleInvalid: as `choose_device` and `Graph`.
    """
    workload, trials = Workload.of(bundle), []
    arrangements = thread_arrangements(choose_device(device, precision).name, cores())
    count = len(arrangements) + len(BUDGETS) - 1

    def attempt(threads: int, sessions: int, budgets: Iterable[int]) -> None:
        on = choose_device(device, precision, threads, sessions)
        with ThreadPoolExecutor(1, initializer=give_way) as thread:  # whose priority the threads that they start have, as in a server
            graphs = thread.submit(_graphs, bundle, on, workload).result()
        for budget in budgets:
            rate, took = measure(graphs, workload, on, max_batch_tokens=budget, seconds=seconds / count)
            trials.append(
                Trial(
                    threads=threads,
                    sessions=sessions,
                    max_batch_tokens=budget,
                    requests_per_second=rate,
                    p95_ms=1000 * took[min(len(took) - 1, len(took) * 95 // 100)],
                    requests=len(took),
                )
            )
            report(trials[-1], count)

    for threads, sessions in arrangements:
        attempt(threads, sessions, [FIRST_BUDGET])
    best = choose(trials, objective_ms)
    attempt(best.threads, best.sessions, [budget for budget in BUDGETS if budget != FIRST_BUDGET])
    return trials, choose(trials, objective_ms)


def thread_arrangements(device: str, cores: int) -> list[tuple[int, int]]:
    """(threads, sessions) worth trying: all cores, shared by ever fewer batches at once; then half of the cores, which leaves the others to
    gRPC and to clients. A GPU's work does not depend on processor threads."""
    if device == "cuda":
        return [(0, sessions) for sessions in range(1, GPU_SESSIONS + 1)]
    tried, sessions = [], min(cores, MOST_SESSIONS)
    while sessions:
        tried.append((cores, sessions))
        sessions //= 2
    half = cores // 2
    return [*tried, (half, min(half, MOST_SESSIONS))] if half else tried


def choose(trials: Sequence[Trial], objective_ms: float | None) -> Trial:
    """The highest rate of those that meet the objective, of about equal ones the quickest; the quickest of all where none does."""
    meeting = [trial for trial in trials if objective_ms is None or trial.p95_ms <= objective_ms]
    highest = max((trial.requests_per_second for trial in meeting), default=0.0)
    alike = [trial for trial in meeting if trial.requests_per_second >= _ALIKE * highest]
    return min(alike or trials, key=lambda trial: trial.p95_ms)


def seconds_needed(trials: Sequence[Trial]) -> float:
    """Of measuring, for `ENOUGH` requests in each trial; 0 where each had as many."""
    if all(trial.requests >= ENOUGH for trial in trials):
        return 0.0
    return len(trials) * 2 * ENOUGH / (SHARE * min(trial.requests_per_second for trial in trials))


def measure(
    graphs: Mapping[str, Runnable], workload: Workload, device: Device, *, max_batch_tokens: int, seconds: float
) -> tuple[float, list[float]]:
    """Requests a second in closed loop, and the seconds that each took at SHARE of that, quickest first; either takes about half of the
    time, and at least as long as the requests that it began."""
    engine = Engine(
        graphs,
        max_batch_tokens=max_batch_tokens,
        max_queued=_NO_LIMIT,
        sessions=device.sessions,
        gives_way=device.computes_here,  # as in a server
    )
    try:
        rate = asyncio.run(_closed(engine, workload, seconds / 2))
        took = sorted(asyncio.run(_open(engine, workload, seconds / 2, SHARE * rate)))
    finally:
        engine.close()
    return rate, took


async def _closed(engine: Engine, workload: Workload, seconds: float) -> float:
    rng, done = random.Random(0), 0
    began = time.perf_counter()

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await workload.request(engine, rng)
            done += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / (time.perf_counter() - began)


async def _open(engine: Engine, workload: Workload, seconds: float, rate: float) -> list[float]:
    """Seconds that each request took."""
    rng = random.Random(1)

    async def call() -> float:
        began = time.perf_counter()
        await workload.request(engine, rng)
        return time.perf_counter() - began

    due = time.perf_counter()
    ends, tasks = due + seconds, [asyncio.create_task(call())]
    while due < ends:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(call()))
    return await asyncio.gather(*tasks)


def _graphs(bundle: Bundle, device: Device, workload: Workload) -> dict[str, Graph]:
    """The bundle's graphs, each having run once at every length that it will run at."""
    graphs = {}
    for name, tokens in (("embedder", workload.question_tokens), ("reader", workload.pair_tokens)):
        if tokens:
            graphs[name] = Graph(bundle.graph_path(name, device.precision), device)
            buckets = graphs[name].buckets
            for length in sorted({buckets.padded_length(count) for count in range(tokens[0], tokens[1] + 1)}):
                graphs[name].warm([Row([1] * length)], length)
    return graphs


def _row(rng: random.Random, tokens: tuple[int, int]) -> Row:
    return Row([1] * rng.randint(*tokens))  # which tokens they are costs nothing


def _at_most(tokens: tuple[int, int], limit: int) -> tuple[int, int]:
    return min(tokens[0], limit), min(tokens[1], limit)

"""Which threads give way to which: Linux gives each a priority of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from openbook_server import tuning
from openbook_server.buckets import FINE
from openbook_server.bundle import load_bundle
from openbook_server.engine import Engine
from openbook_server.priority import NICE, give_way, put_loop_first
from openbook_server.rows import Row
from openbook_server.runtime import Device, build_device
from openbook_server.tuning import Workload, measure, tune


def own_priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def may_give_way() -> bool:
    """Whether this is Linux, and no sandbox forbids it."""
    with ThreadPoolExecutor(1, initializer=give_way) as thread:
        return sys.platform == "linux" and thread.submit(own_priority).result() != own_priority()


pytestmark = pytest.mark.skipif(not may_give_way(), reason="nothing changes here")


class Graph:
    """Tells the priority of the thread that runs it."""

    buckets = FINE

    def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, NDArray[np.int64]]:
        return {"priority": np.full(len(rows), own_priority())}


@pytest.mark.parametrize("gives_way", [False, True])
async def test_batches_give_way_where_the_processor_computes_them(gives_way: bool) -> None:
    engine = Engine({"embedder": Graph()}, max_batch_tokens=64, max_queued=20, gives_way=gives_way)
    outcome = await engine.submit("embedder", [Row([1])], deadline=time.monotonic() + 60)
    await asyncio.to_thread(engine.close)
    assert outcome.rows[0]["priority"] == (min(19, own_priority() + NICE) if gives_way else own_priority())


@pytest.mark.parametrize(("device", "gives_way"), [("cpu", True), ("cuda", False)])
def test_batches_are_tuned_with_the_priority_that_they_are_served_with(device: str, gives_way: bool) -> None:
    seen: set[int] = set()

    class Noting(Graph):
        def run_rows(self, rows: Sequence[Row], length: int) -> dict[str, NDArray[np.int64]]:
            seen.add(own_priority())
            return super().run_rows(rows, length)

    measure({"embedder": Noting()}, Workload((4, 8), None), build_device(device, "fp32", 1, 1), max_batch_tokens=512, seconds=0.1)
    assert seen == {min(19, own_priority() + NICE) if gives_way else own_priority()}


def test_the_threads_of_graphs_that_are_tuned_give_way(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: set[int] = set()

    class Loaded(Graph):
        def __init__(self, path: Path, device: Device) -> None:
            loaded.add(own_priority())  # which the threads that it starts have

        def warm(self, rows: Sequence[Row], length: int) -> None:
            pass

    monkeypatch.setattr(tuning, "Graph", Loaded)
    tune(load_bundle(tiny_bundle), device="cpu", precision="fp32", objective_ms=None, seconds=0.2, report=lambda trial, of: None)
    assert loaded == {min(19, own_priority() + NICE)}


def test_what_leaves_the_loop_gives_way_and_so_do_the_threads_it_starts() -> None:
    def started() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(own_priority()))
        thread.start()
        thread.join()
        return found[0]

    async def asked() -> tuple[int, int, int]:
        put_loop_first()
        return own_priority(), await asyncio.to_thread(own_priority), await asyncio.to_thread(started)

    before = own_priority()
    lower = min(19, before + NICE)
    assert asyncio.run(asked()) == (before, lower, lower)


def test_where_it_is_forbidden_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError("by the sandbox")

    before = own_priority()
    monkeypatch.setattr(os, "setpriority", forbidden)
    give_way()
    assert own_priority() == before

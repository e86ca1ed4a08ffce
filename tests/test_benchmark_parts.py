"""What the benchmarks compute with, without servers or clocks: shares of load, exact neighbours, HTTP, medians, results files."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb
from openbook_training.errors import InvalidData

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_load_is_shared_out_among_client_processes_without_loss(part: Any) -> None:
    driver = part("driver")
    opened = driver.shared_out(driver.Load(rate=9.0, seconds=1.0), 3)
    assert [load.rate for load in opened] == [3.0] * 3
    closed = driver.shared_out(driver.Load(concurrency=5, seconds=1.0), 3)
    assert [load.concurrency for load in closed] == [2, 2, 1]
    assert [load.concurrency for load in driver.shared_out(driver.Load(concurrency=2, seconds=1.0), 3)] == [1, 1]  # none is idle


def test_what_client_processes_saw_is_put_together(part: Any) -> None:
    driver = part("driver")
    one = driver.Driven(milliseconds={"OK": [1.0, 5.0]}, sent=3, seconds=2.0, client_cpu=0.2, first_ms=[4.0], between_ms=[1.0, 3.0])
    other = driver.Driven(
        milliseconds={"OK": [2.0], "RESOURCE_EXHAUSTED": [0.5]}, sent=2, seconds=2.0, client_cpu=0.7, first_ms=[2.0], between_ms=[2.0]
    )
    both = driver.merged([one, other])
    assert both.milliseconds == {"OK": [1.0, 2.0, 5.0], "RESOURCE_EXHAUSTED": [0.5]}
    assert (both.sent, both.calls, both.seconds, both.client_cpu) == (5, 4, 2.0, 0.7)
    assert (both.first_ms, both.between_ms) == ([2.0, 4.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("method", ["Embed", "Answer"])
def test_a_call_of_which_single_texts_were_refused_is_not_counted_as_served(part: Any, method: str) -> None:
    driver = part("driver")

    class Stub:
        """Refuses empty texts one by one."""

        async def Embed(self, request: pb.EmbedRequest, **_: float) -> pb.EmbedResponse:  # noqa: N802
            return pb.EmbedResponse(errors=[pb.ItemError(index=at) for at, text in enumerate(request.texts) if not text])

        async def Answer(self, request: pb.AnswerRequest, **_: float) -> pb.AnswerResponse:  # noqa: N802
            return pb.AnswerResponse(errors=[pb.ItemError(index=at) for at, text in enumerate(request.questions) if not text])

    load = driver.Load(seconds=1.0, method=method)
    assert asyncio.run(driver.called(Stub(), ["a", "b"], load, [])) == "OK"
    assert asyncio.run(driver.called(Stub(), ["a", ""], load, [])) == "ITEM_ERRORS"


def test_cpu_is_divided_by_the_texts_that_were_answered(part: Any) -> None:
    driver = part("driver")
    seen = {"OK": [1.0, 2.0], "RESOURCE_EXHAUSTED": [0.1] * 6}
    driven = driver.Driven(milliseconds=seen, sent=8, seconds=1.0, client_cpu=0.0, server_cpu_seconds=0.5)

    class Clients:
        def drive(self, *_: object) -> object:
            return driven

    outcome = part("load").measure(Clients(), None, ["a"], driver.Load(texts_a_message=5, seconds=1.0))
    assert (outcome.texts_per_second, outcome.server_cpu_ms_a_text) == (10.0, 50.0)


def test_pieces_of_a_stream_that_fails_are_noted_until_then(part: Any) -> None:
    driver = part("driver")

    class Stub:
        """Breaks off after two pieces."""

        async def Generate(self, request: pb.GenerateRequest, **_: float) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
            assert (request.text, request.writer) == ("a", "generator")
            for tokens in (1, 2):
                yield pb.GenerateResponse(tokens=tokens)
            raise grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata())

    arrivals: list[float] = []
    load = driver.Load(seconds=1.0, method="Generate", writer="generator")
    assert asyncio.run(driver.called(Stub(), ["a"], load, arrivals)) == "RESOURCE_EXHAUSTED"
    assert len(arrivals) == 2
    assert arrivals == sorted(arrivals)


def test_replies_to_writes_are_one_a_request_in_order_and_lack_no_document(part: Any) -> None:
    check = part("streams").check

    def reply(sequence: int, *ids: str, outcome: kb.Outcome = kb.OUTCOME_CREATED) -> kb.UpsertResponse:
        return kb.UpsertResponse(results=[kb.WriteResult(id=id_, outcome=outcome) for id_ in ids], sequence=sequence)

    ids = [["a", "b"], ["c"]]
    check("Upsert", ids, [reply(1, "a", "b"), reply(2, "c")], kb.OUTCOME_CREATED)
    bad = {
        "missing": [reply(1, "a", "b")],
        "swapped": [reply(1, "c"), reply(2, "a", "b")],
        "one failed": [reply(1, "a", "b"), reply(2, "c", outcome=kb.OUTCOME_UNSPECIFIED)],
        "nothing was written": [reply(1, "a", "b"), reply(1, "c")],
    }
    for replies in bad.values():
        with pytest.raises(SystemExit, match="Upsert: . of 3 documents acknowledged, . replies to 2 requests"):
            check("Upsert", ids, replies, kb.OUTCOME_CREATED)


def test_a_server_that_logs_more_than_a_pipe_holds_is_not_held_up(part: Any, tmp_path: Path) -> None:
    server, done = tmp_path / "server", tmp_path / "done"
    server.write_text(f"""#!{sys.executable}
import os, pathlib, time
os.write(2, b"serving tiny on 127.0.0.1:1: ready\\n")
os.write(2, b"a line\\n" * 100_000)
pathlib.Path({str(done)!r}).touch()
time.sleep(60)
""")
    server.chmod(0o700)
    with part("driver").started_server(tmp_path, "cpu", 1, python=str(server)) as started:
        assert started.address == "127.0.0.1:1"
        deadline = time.monotonic() + 30
        while not done.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_refusals_are_timed_by_the_client_that_is_not_busy(part: Any) -> None:
    driver, overload = part("driver"), part("overload")
    probe = driver.Driven(milliseconds={"RESOURCE_EXHAUSTED": [1.0, 2.0, 3.0]}, sent=3, seconds=1.0, client_cpu=0.0)
    busy = {"OK": [10.0], "RESOURCE_EXHAUSTED": [50.0]}
    driven = driver.Driven(milliseconds=busy, sent=2, seconds=1.0, client_cpu=0.9, server_cpu_seconds=0.5, memory_mb=[(0.0, 7.0)])
    phase = overload.summary(driven, driver.Load(rate=2.0, seconds=1.0), probe)
    assert (phase["refusal_p50_ms"], phase["answer_p50_ms"], phase["memory_peak_mb"]) == (2.0, 10.0, 7.0)
    assert (phase["goodput_texts_per_second"], phase["server_cpu_ms_a_call"]) == (1.0, 250.0)


def test_calls_of_the_probe_that_waited_in_vain_are_reported_beside_its_refusals(part: Any) -> None:
    driver, overload = part("driver"), part("overload")
    driven = driver.Driven(milliseconds={"OK": [10.0]}, sent=1, seconds=1.0, client_cpu=0.9)
    seen = {"RESOURCE_EXHAUSTED": [1.0], "DEADLINE_EXCEEDED": [1000.0] * 2, "OK": [900.0]}
    probe = driver.Driven(milliseconds=seen, sent=5, seconds=1.0, client_cpu=0.0)
    phase = overload.summary(driven, driver.Load(rate=2.0, seconds=1.0), probe)
    assert phase["probe_calls"] == {"RESOURCE_EXHAUSTED": 1, "DEADLINE_EXCEEDED": 2, "OK": 1}
    assert phase["probe_waited_in_vain"] == 0.5
    assert "50.0% waited in vain" in overload.described(phase)
    silent = driver.Driven(milliseconds={}, sent=0, seconds=1.0, client_cpu=0.0)
    assert overload.summary(driven, driver.Load(rate=2.0, seconds=1.0), silent)["probe_waited_in_vain"] == 0.0


def test_goodput_is_a_share_of_the_larger_of_two_capacities(part: Any) -> None:
    overload = part("overload")
    phases: list[dict[str, object]] = [{"goodput_texts_per_second": 50.0}]
    assert overload.against(phases, start=80.0, end=100.0) == {
        "capacity_texts_per_second": 100.0,
        "capacity_at_start": 80.0,
        "capacity_at_end": 100.0,
        "capacity_steady": False,
    }
    assert phases[0]["goodput_to_capacity"] == 0.5
    assert overload.against([], start=100.0, end=90.0)["capacity_steady"]


def test_results_of_several_benchmarks_share_a_file_and_hold_no_nan(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, file = part("report"), tmp_path / "results.json"
    parser = argparse.ArgumentParser()
    report.add_results_arguments(parser)
    report.publish({"p50_ms": 1.0, "points": [(math.nan, math.inf)]}, parser.parse_args(["--results", str(file)]), "curve")
    report.publish({"rate": 2}, parser.parse_args(["--results", str(file), "--key", "load on openvino"]), "load")
    results = json.loads(file.read_text())
    assert results["curve"] == {"p50_ms": 1.0, "points": [[None, None]]}
    assert results["load on openvino"] == {"rate": 2}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rate": 2}


def test_exact_neighbours_are_the_same_in_parts(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = part("growth")
    monkeypatch.setattr(growth, "ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(1)
    vectors = growth.unit_vectors(50, rng.standard_normal((3, 8), dtype=np.float32), rng)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    found = growth.nearest(vectors[:4], vectors, 10)
    expected = np.argsort(-(vectors[:4] @ vectors.T), axis=1)[:, :10]
    assert np.array_equal(np.sort(found), np.sort(expected))
    assert growth.nearest(vectors[:4], vectors[:6], 10).shape == (4, 6)  # fewer where there are fewer


def test_raw_hnswlib_gets_the_smallest_ef_that_finds_as_much(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nearest = part("nearest")

    class Index:
        """Finds the first ef / 16 of the ten neighbours."""

        def set_ef(self, ef: int) -> None:
            self.found = ef // 16

        def knn_query(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, None]:
            return np.array([[row if row < self.found else -1 - row for row in range(k)]] * len(queries)), None

    exact = np.array([range(nearest.DEPTH)] * 2)
    queries = np.zeros((2, 3), np.float32)
    assert nearest.smallest_ef(Index(), queries, exact, 0.35) == (64, 0.4)
    monkeypatch.setattr(nearest, "EFS", (16, 32))
    assert nearest.smallest_ef(Index(), queries, exact, 0.9) == (32, 0.2)


def test_a_peers_answer_is_read_from_the_wire(part: Any) -> None:
    contestants = part("contestants")

    async def read(*parts: bytes) -> tuple[bytes, dict[str, str]]:
        reader = asyncio.StreamReader()
        for one in parts:
            reader.feed_data(one)
        reader.feed_eof()
        result: tuple[bytes, dict[str, str]] = await contestants.reply(reader)
        return result

    vector = np.array([1.5, -2.0], "<f4").tobytes()
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 2\r\nContent-Length: 10\r\n\r\n"
    assert contestants.PEERS["pytriton"].vector(*asyncio.run(read(head, b"{}" + vector))) == vector
    with pytest.raises(ConnectionError, match="503 Busy: no"):
        asyncio.run(read(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno"))
    with pytest.raises(ConnectionError, match="without a length"):
        asyncio.run(read(b"HTTP/1.1 200 OK\r\n\r\n"))


def test_a_peers_request_states_its_length_in_bytes(part: Any) -> None:
    contestants = part("contestants")
    head, _, body = contestants.request(contestants.PEERS["mosec"], "naïve").partition(b"\r\n\r\n")
    assert json.loads(body) == "naïve"
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")


def test_contestants_are_compared_round_by_round_and_judged_by_their_worst(part: Any) -> None:
    peers = part("peers")
    slow, fast = ({"texts_per_second": rate, "cosine": 1.0, "same_bytes": 1.0} for rate in (100.0, 200.0))
    rounds = [{"openbook": slow, "mosec": slow | {"cosine": 0.9}}, {"openbook": fast, "mosec": slow}, {"openbook": fast}]
    table = peers.medians(rounds)
    assert table["openbook"]["texts_per_second"] == 200.0
    assert table["mosec"] == {"texts_per_second": 100.0, "cosine": 0.9, "same_bytes": 1.0, "to_openbook": 0.75}


def test_a_vector_that_is_no_number_is_not_lossless(part: Any) -> None:
    peers = part("peers")
    expected = np.eye(2, dtype=np.float32)
    assert peers.lossless(3 * expected, expected) == pytest.approx(1.0)
    assert peers.lossless(np.array([[1, 1], [0, 1]], np.float32), expected) == pytest.approx(math.sqrt(0.5))
    assert peers.lossless(np.array([[np.nan, 0], [0, 1]], np.float32), expected) == 0.0


def test_an_unknown_peer_is_refused_by_name(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peers = part("peers")
    with pytest.raises(SystemExit):
        peers.named_interpreters(["nobody=/bin/sh"], argparse.ArgumentParser())
    assert "--peer nobody=/bin/sh: NAME=PYTHON, with a NAME of mosec" in capsys.readouterr().err
    assert peers.named_interpreters(["mosec=/bin/sh"], argparse.ArgumentParser()) == {"mosec": "/bin/sh"}
    assert "pytriton is left out" in capsys.readouterr().out


def test_what_a_user_can_mend_is_told_in_a_line_and_what_only_we_can_is_not(part: Any) -> None:
    run_benchmark = part("report").run_benchmark

    def fail(error: Exception) -> Callable[[], None]:
        def main() -> None:
            raise error

        return main

    for error in (FileNotFoundError(2, "No such file", "texts.jsonl"), InvalidData("no usable row")):
        with pytest.raises(SystemExit, match=f": {re.escape(str(error))}$"):
            run_benchmark(fail(error))
    with pytest.raises(KeyError):
        run_benchmark(fail(KeyError("a mistake of ours")))

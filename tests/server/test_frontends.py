"""`openbook serve --frontends 2` as its user runs it: the same answers, and what is lost when one of its processes is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from openbook.client import Client
from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import knowledge_base_pb2_grpc, openbook_pb2_grpc
from openbook.v1 import openbook_pb2 as pb
from openbook_server.config import ServerConfig
from openbook_server.serving import running_server

WAIT = 60.0  # seconds until a test gives up
STREAMS = 16  # over two front ends: that all of them are on one happens once in 32,768 runs
COMMAND = [sys.executable, "-m", "openbook.cli", "serve"]


class Served:
    """A server in processes of its own."""

    def __init__(self, process: subprocess.Popen[str], said: list[str]) -> None:
        self.process, self.said = process, said
        found = re.search(r"serving .* on (127\.0\.0\.1:\d+)", said[-1])
        assert found is not None
        self.address = found.group(1)

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own."""
        return grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def processes(self, kind: str = "_process") -> list[int]:
        """Of the supervisor's children, those that run this module."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if kind in Path(f"/proc/{pid}/cmdline").read_text()]


@contextmanager
def serving(bundle: Path, knowledge_base: Path, folder: Path, *options: str) -> Iterator[Served]:
    """With `folder` for its private files."""
    command = [*COMMAND, str(bundle), str(knowledge_base), "--port", "0", "--device", "cpu", "--threads", "1", "--frontends", "2", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)})
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if " serving " in line:
                break
        yield Served(process, said)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path is short enough for a socket."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def served(tiny_bundle: Path, tiny_knowledge_base: Path, short: Path, unused_tcp_port: int) -> Iterator[Served]:
    with serving(tiny_bundle, tiny_knowledge_base, short, "--metrics-port", str(unused_tcp_port)) as served:
        yield served


async def scrape(port: int) -> dict[str, float]:
    """What Prometheus would see."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    lines = (line.rpartition(" ") for line in page.splitlines() if line.startswith("openbook_"))
    return {name: float(value) for name, _, value in lines}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


def folders(of: Path) -> list[Path]:
    """That supervisors made; onnxruntime makes files of its own."""
    return list(of.glob("openbook-*"))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # its parent was killed too
    except FileNotFoundError:
        return True


async def health(channel: grpc.aio.Channel) -> int:
    check = health_pb2_grpc.HealthStub(channel).Check
    return int((await check(health_pb2.HealthCheckRequest(), timeout=WAIT, wait_for_ready=True)).status)  # once anybody listens


def document(number: int) -> kb.UpsertRequest:
    return kb.UpsertRequest(documents=[kb.Document(id=f"n{number}", text=f"the yak {number} was in the city")])


class Writer:
    """A stream of writes that stays open, on a connection of its own."""

    def __init__(self, served: Served, number: int) -> None:
        self.channel = served.channel()
        self.number = number
        self._stream = knowledge_base_pb2_grpc.KnowledgeBaseStub(self.channel).UpsertStream(timeout=WAIT)

    async def write(self) -> grpc.StatusCode:
        """Write, and wait for the acknowledgement; UNAVAILABLE where the connection is lost."""
        try:
            await self._stream.write(document(self.number))
            reply = await self._stream.read()
            assert reply is not grpc.aio.EOF
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter: the stream has ended already
            code = await self._stream.code()
            # What grpc.aio calls a write that finds the connection gone before the stream has been told.
            lost = code is grpc.StatusCode.INTERNAL and await self._stream.details() == "Internal error from Core"
            return grpc.StatusCode.UNAVAILABLE if lost else code
        return grpc.StatusCode.OK


@pytest.fixture
async def writers(served: Served) -> AsyncIterator[list[Writer]]:
    """Each with one acknowledged write."""
    writers = [Writer(served, number) for number in range(STREAMS)]
    assert [await writer.write() for writer in writers] == [grpc.StatusCode.OK] * STREAMS
    yield writers
    for writer in writers:
        await writer.channel.close()


async def test_it_answers_as_one_process_does(tiny_bundle: Path, tiny_knowledge_base: Path, served: Served) -> None:
    replies = []
    config = ServerConfig(port=0, device="cpu", threads=1)
    async with running_server(tiny_bundle, None, config) as port:
        for address in (f"127.0.0.1:{port}", served.address):
            async with grpc.aio.insecure_channel(address) as channel:
                stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
                reply = await stub.Embed(pb.EmbedRequest(texts=["red", "", "the blue river"]), timeout=WAIT)
                replies.append((reply.vectors, [(error.index, error.reason) for error in reply.errors]))
    assert replies[0] == replies[1]
    with Client(served.address, timeout_seconds=WAIT) as client:
        [result] = await asyncio.to_thread(client.answer, ["who is king of the city ?"])
        assert not isinstance(result, Exception)
        assert result.answers


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_and_health_are_there(served: Served, version: str) -> None:
    async with served.channel() as channel:
        ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        [reply] = [reply async for reply in ask(requests, timeout=WAIT)]
        assert "openbook.v1.OpenBook" in {service.name for service in reply.list_services_response.service}
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_a_killed_front_end_loses_only_its_connections(served: Served, writers: list[Writer], unused_tcp_port: int) -> None:
    victim, other = served.processes("frontend_process")
    os.kill(victim, signal.SIGKILL)
    await until(lambda: gone(victim))
    codes = [await writer.write() for writer in writers]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    for writer in writers:  # each connects again where it must
        assert await health(writer.channel) == health_pb2.HealthCheckResponse.SERVING
    await until(lambda: len(served.processes("frontend_process")) == 2)
    assert other in served.processes("frontend_process")
    async with asyncio.timeout(WAIT):
        while (metrics := await scrape(unused_tcp_port))["openbook_front_ends"] < 2:
            await asyncio.sleep(0.05)
    assert metrics['openbook_process_restarts{process="frontend"}'] == 1
    assert metrics['openbook_process_restarts{process="engine"}'] == 0
    assert metrics["openbook_calls"] == codes.count(grpc.StatusCode.OK)  # streams that are still open


async def test_a_killed_engine_is_unavailable_at_once_loses_nothing_and_answers_again(served: Served, writers: list[Writer]) -> None:
    [engine] = served.processes("engine_process")
    os.kill(engine, signal.SIGSTOP)  # what is written now is not acknowledged
    writing = [asyncio.ensure_future(writer.write()) for writer in writers]
    async with served.channel() as channel:
        stub: openbook_pb2_grpc.OpenBookAsyncStub = openbook_pb2_grpc.OpenBookStub(channel)
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
        asked = stub.Embed(pb.EmbedRequest(texts=["red"]), timeout=WAIT)
        await asyncio.sleep(0.1)  # most are under way then; to those that are not it makes no difference
        os.kill(engine, signal.SIGKILL)
        assert set(await asyncio.gather(*writing)) == {grpc.StatusCode.UNAVAILABLE}
        for call in (asked, stub.Embed(pb.EmbedRequest(texts=["red"]), timeout=WAIT)):
            with pytest.raises(grpc.aio.AioRpcError, match="engine") as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in rpc_status.from_call(raised.value).details)
        assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        async with asyncio.timeout(WAIT):
            while await health(channel) != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.05)
        assert (await stub.Embed(pb.EmbedRequest(texts=["red"]), timeout=WAIT)).dim
        knowledge: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        stored = await knowledge.Get(kb.GetRequest(ids=[f"n{number}" for number in range(STREAMS)]), timeout=WAIT)
        assert [found.id for found in stored.documents] == [f"n{number}" for number in range(STREAMS)]


async def test_a_folder_of_temporary_files_that_is_tidied_up_costs_nothing(served: Served, short: Path) -> None:
    assert folders(short) == []  # where the processes meet has no name
    [engine], [front_end, _] = served.processes("engine_process"), served.processes("frontend_process")
    for pid in (engine, front_end):
        os.kill(pid, signal.SIGKILL)
        await until(lambda pid=pid: gone(pid))
    await until(lambda: len(served.processes()) == 3)
    async with served.channel() as channel:
        async with asyncio.timeout(WAIT):
            while await health(channel) != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.05)


async def test_a_killed_supervisor_leaves_nothing_behind(served: Served, short: Path) -> None:
    pids = served.processes()
    assert len(pids) == 3
    served.process.kill()
    served.process.wait()
    await until(lambda: all(map(gone, pids)))
    assert folders(short) == []


async def test_sigterm_drains_and_leaves_nothing_behind(served: Served, writers: list[Writer], short: Path) -> None:
    pids = served.processes()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.stderr is not None
    assert "draining" in await asyncio.to_thread(served.process.stderr.readline)
    for writer in writers:
        assert await writer.write() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)  # the latter: told to go elsewhere
        await writer.channel.close()
    assert "stopped" in await asyncio.to_thread(served.process.stderr.readline)
    assert await asyncio.to_thread(served.process.wait, WAIT) == 0
    assert all(map(gone, pids))
    assert folders(short) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_stops_at_once_and_leaves_nothing_behind(
    served: Served, writers: list[Writer], short: Path, number: signal.Signals
) -> None:
    pids = served.processes()
    served.process.send_signal(number)
    assert served.process.stderr is not None
    assert "draining" in await asyncio.to_thread(served.process.stderr.readline)
    served.process.send_signal(number)  # while the streams of the writers are open
    assert await asyncio.to_thread(served.process.wait, WAIT) == 128 + number
    assert await asyncio.to_thread(served.process.stderr.read) == ""
    await until(lambda: all(map(gone, pids)))
    assert folders(short) == []


def test_a_start_that_fails_says_so_once_as_one_process_does(
    tiny_bundle: Path, tiny_knowledge_base: Path, tmp_path: Path, short: Path, unused_tcp_port: int
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text(json.dumps({}))

    def failed(*arguments: str) -> str:
        command = [*COMMAND, *arguments, "--frontends", "2"]
        environment = {**os.environ, "TMPDIR": str(short)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=environment)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        return line

    assert str(tmp_path / "bad") in failed(str(tmp_path / "bad"), "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", unused_tcp_port))
        taken.listen()
        assert "choose another --port" in failed(str(tiny_bundle), "--port", str(unused_tcp_port))
        assert "choose another --metrics-port" in failed(str(tiny_bundle), "--port", "0", "--metrics-port", str(unused_tcp_port))
    assert folders(short) == []


@pytest.mark.slow
async def test_acknowledged_writes_survive_kills_of_engine_and_front_ends_at_random(served: Served) -> None:
    rng, stored, killed = random.Random(0), list[int](), 0
    numbers = itertools.count()
    done = asyncio.Event()

    async def write() -> None:
        while not done.is_set():
            number = next(numbers)
            writer = Writer(served, number)
            while not done.is_set() and await writer.write() is grpc.StatusCode.OK:
                stored.append(number)
                writer.number = number = next(numbers)
            await writer.channel.close()
            await asyncio.sleep(0.05)

    writing = [asyncio.ensure_future(write()) for _ in range(4)]
    for _ in range(12):
        before = len(stored)
        await until(lambda before=before: len(stored) > before + 20)  # it answers, so no start is cut off
        kind = "engine_process" if rng.random() < 0.3 else "frontend_process"
        with suppress(ProcessLookupError):
            os.kill(rng.choice(served.processes(kind)), signal.SIGKILL)
            killed += 1
    done.set()
    await asyncio.gather(*writing)
    assert killed
    await until(lambda: len(served.processes()) == 3)
    async with served.channel() as channel:
        async with asyncio.timeout(WAIT):
            while await health(channel) != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.05)
        knowledge: knowledge_base_pb2_grpc.KnowledgeBaseAsyncStub = knowledge_base_pb2_grpc.KnowledgeBaseStub(channel)
        for first in range(0, len(stored), 50):
            ids = [f"n{number}" for number in stored[first : first + 50]]
            found = await knowledge.Get(kb.GetRequest(ids=ids), timeout=WAIT)
            assert [document.id for document in found.documents] == ids

"""The gRPC server by itself, and behind a front end, spoken to by grpcio's own clients: the same to them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from openbook.errors import ServerOverloaded, ServerUnavailable, from_rpc
from openbook_server.call import Call, Metadata
from openbook_server.config import ServerConfig
from openbook_server.listening import Port
from openbook_server.rpc import RpcServer
from openbook_server.shedding import Shedding

if TYPE_CHECKING:
    from conftest import Behind

LIMIT = 4


class Echo:
    """Methods of every kind, on bytes."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.left: float | None = None

    async def echo(self, request: bytes, call: Call) -> bytes:
        self.left = call.time_remaining()
        if request == b"abort":
            await call.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now", (("reason", "test"),))
        if request == b"fail":
            raise ValueError("secret")
        if request == b"hang":
            self.entered.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if request == b"slow":
            self.entered.set()
            await asyncio.sleep(0.3)
        return request

    async def count(self, request: bytes, call: Call) -> AsyncIterator[bytes]:
        try:
            for number in range(int(request)):
                yield b"%d" % number
        finally:
            self.cancelled.set()

    async def each(self, requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()

    async def join(self, requests: AsyncIterator[bytes], call: Call) -> bytes:
        return b" ".join([request async for request in requests])

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        kinds = {"request_deserializer": bytes, "response_serializer": bytes}
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo, **kinds),
            "Count": grpc.unary_stream_rpc_method_handler(self.count, **kinds),
            "Each": grpc.stream_stream_rpc_method_handler(self.each, **kinds),
            "Join": grpc.stream_unary_rpc_method_handler(self.join, **kinds),
            "Parse": grpc.unary_unary_rpc_method_handler(self.echo, request_deserializer=Status.FromString, response_serializer=bytes),
            "ParseEach": grpc.stream_stream_rpc_method_handler(
                self.each, request_deserializer=Status.FromString, response_serializer=bytes
            ),
        }
        return grpc.method_handlers_generic_handler("test.Echo", methods)


@pytest.fixture
async def service() -> Echo:
    return Echo()


@pytest.fixture(params=["itself", "behind a front end"])
async def server(service: Echo, request: pytest.FixtureRequest, behind: Behind) -> AsyncIterator[tuple[RpcServer, int]]:
    """What takes the calls, and its port."""
    options = [("grpc.max_receive_message_length", 1_000)]
    if request.param == "itself":
        server = RpcServer([service.handler()], options=options, max_calls=LIMIT)
        port = server.listen("127.0.0.1:0")
        server.start()
        yield server, port
        await server.stop(0)
        return
    async with behind.engine([service.handler()]), behind.front_end(options, LIMIT) as front_end:
        yield front_end.server, front_end.port


@pytest.fixture
async def channel(server: tuple[RpcServer, int]) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
        yield channel


async def test_calls_of_every_kind(channel: grpc.aio.Channel) -> None:
    assert await channel.unary_unary("/test.Echo/Echo")(b"hello") == b"hello"
    assert [reply async for reply in channel.unary_stream("/test.Echo/Count")(b"500")] == [b"%d" % number for number in range(500)]
    assert [reply async for reply in channel.stream_stream("/test.Echo/Each")(iter([b"a", b"b"]))] == [b"A", b"B"]
    assert await channel.stream_unary("/test.Echo/Join")(iter([b"a", b"b", b"c"])) == b"a b c"


async def test_many_calls_at_once_each_get_their_own_reply(server: tuple[RpcServer, int], channel: grpc.aio.Channel) -> None:
    method, gate = channel.unary_unary("/test.Echo/Echo"), asyncio.Semaphore(LIMIT)

    async def call(number: int) -> bytes:
        async with gate:
            return await method(b"%d" % number, timeout=30)

    assert await asyncio.gather(*(call(number) for number in range(1_000))) == [b"%d" % number for number in range(1_000)]
    await until_idle(server[0])  # the last reply may be read before the server is told that it left


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (b"abort", grpc.StatusCode.FAILED_PRECONDITION, "not now"),
        (b"fail", grpc.StatusCode.INTERNAL, "internal error: ValueError"),
        (b"x" * 2_000, grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    ],
)
async def test_a_failure_is_a_status_without_internals(
    channel: grpc.aio.Channel, request_: bytes, code: grpc.StatusCode, details: str | None
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary("/test.Echo/Echo")(request_)
    assert raised.value.code() is code
    assert details is None or raised.value.details() == details
    assert await channel.unary_unary("/test.Echo/Echo")(b"next") == b"next"


async def test_bytes_that_are_no_message_are_told_to_their_sender_and_nobody_else(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    for call in (channel.unary_unary("/test.Echo/Parse")(b"\xff"), channel.stream_stream("/test.Echo/ParseEach")(iter([b"\xff"]))):
        with pytest.raises(grpc.aio.AioRpcError, match="the bytes are no message that this method takes") as raised:
            await call if isinstance(call, grpc.aio.UnaryUnaryCall) else await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not caplog.records


async def test_trailing_metadata_of_an_abort_arrives(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary("/test.Echo/Echo")(b"abort")
    assert ("reason", "test") in list(raised.value.trailing_metadata())


async def test_an_unknown_method_is_refused(channel: grpc.aio.Channel) -> None:
    for path in ("/test.Echo/Nothing", "/nothing"):
        with pytest.raises(grpc.aio.AioRpcError, match="no such method") as raised:
            await channel.unary_unary(path)(b"")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_handlers_see_the_deadline(service: Echo, channel: grpc.aio.Channel) -> None:
    await channel.unary_unary("/test.Echo/Echo")(b"", timeout=60)
    assert service.left is not None
    assert 0 < service.left < 61  # it travels rounded up, and clocks are set
    await channel.unary_unary("/test.Echo/Echo")(b"")
    assert service.left is None


async def test_a_call_that_is_given_up_is_cancelled(service: Echo, server: tuple[RpcServer, int], channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="Deadline"):
        await channel.unary_unary("/test.Echo/Echo")(b"hang", timeout=0.2)
    await asyncio.wait_for(service.cancelled.wait(), 30)
    service.entered.clear()
    service.cancelled.clear()
    call = channel.unary_unary("/test.Echo/Echo")(b"hang")
    await service.entered.wait()
    call.cancel()
    await asyncio.wait_for(service.cancelled.wait(), 30)
    await until_idle(server[0])


async def test_a_reader_that_hangs_up_ends_the_stream(service: Echo, server: tuple[RpcServer, int], channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream("/test.Echo/Count")(b"1000000000")
    async for _ in call:
        break
    call.cancel()
    await asyncio.wait_for(service.cancelled.wait(), 30)
    await until_idle(server[0])


async def test_more_calls_than_the_limit_are_refused_and_the_others_go_on(service: Echo, channel: grpc.aio.Channel) -> None:
    method = channel.unary_unary("/test.Echo/Echo")
    running = [asyncio.ensure_future(method(b"slow")) for _ in range(LIMIT)]
    await service.entered.wait()
    results = await asyncio.gather(*running, *(method(b"slow") for _ in range(2 * LIMIT)), return_exceptions=True)
    refused = [error for error in results if isinstance(error, grpc.aio.AioRpcError)]
    assert results[:LIMIT] == [b"slow"] * LIMIT
    assert refused
    told = {(type(error), delay) for error, delay in (from_rpc(error, "here", 1.0) for error in refused)}
    assert told == {(ServerOverloaded, 1.0)}  # to clients: they come back


async def test_stopping_lets_calls_finish_within_the_grace(service: Echo, server: tuple[RpcServer, int], channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/test.Echo/Echo")(b"slow")
    await service.entered.wait()
    _, reply = await asyncio.gather(server[0].stop(30), call)
    assert reply == b"slow"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary("/test.Echo/Echo")(b"late", timeout=5)
    assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_stopping_cuts_off_after_the_grace_and_says_why(
    service: Echo, server: tuple[RpcServer, int], channel: grpc.aio.Channel
) -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    hanging = channel.unary_unary("/test.Echo/Echo")(b"hang", timeout=300)
    await service.entered.wait()
    silent = channel.stream_unary("/test.Echo/Echo")(never(), timeout=300)  # its message has not come
    async with asyncio.timeout(30):
        while len(server[0].calls) < 2:
            await asyncio.sleep(0.01)
    await asyncio.wait_for(server[0].stop(0.1), 30)
    await asyncio.wait_for(service.cancelled.wait(), 30)
    for call in (hanging, silent):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        told, delay = from_rpc(raised.value, "here", 300)
        assert isinstance(told, ServerUnavailable)
        assert (str(told), delay) == ("the server is shutting down; try again, or another server", 1.0)
    assert not server[0].calls


async def test_a_call_that_is_cut_off_before_its_handler_began_is_told_why(service: Echo) -> None:
    ended: list[tuple[grpc.StatusCode, str]] = []

    class Ended(Call):
        async def write(self, reply: bytes) -> None: ...

        def requests(self) -> AsyncIterator[bytes]:
            raise AssertionError

        def end(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = (), reply: bytes | None = None) -> None:
            ended.append((code, details))

    details = SimpleNamespace(method="/test.Echo/Echo")
    call = Ended("/test.Echo/Echo", service.handler().service(details), 1e13, set())  # type: ignore[arg-type]
    call.serve(b"hang")
    call.stop()
    assert call.task is not None
    await asyncio.wait([call.task])
    assert not service.entered.is_set()
    assert ended == [(grpc.StatusCode.UNAVAILABLE, "the server is shutting down; try again, or another server")]


async def test_stopping_waits_for_nobody_who_watches_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook_server.rpc._LAST_WORD", 1.0)
    port = Port((), ServerConfig(port=0))
    await port.start()
    await port.set_readiness(ready=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status is health_pb2.HealthCheckResponse.SERVING
        await asyncio.wait_for(port.stop(300), 30)
        assert (await watching.read()).status is health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await watching.read()


async def test_a_port_in_use_is_refused(server: tuple[RpcServer, int]) -> None:
    second = RpcServer([], options=[("grpc.so_reuseport", 0)], max_calls=1)
    with pytest.raises(OSError, match="cannot listen on"):
        second.listen(f"127.0.0.1:{server[1]}")


async def until_idle(server: RpcServer) -> None:
    async with asyncio.timeout(30):
        while server.calls:
            await asyncio.sleep(0.01)


class Flooded:
    """A server, and a client that sends it more than it reads: a call holds its loop until the others are there."""

    def __init__(self) -> None:
        self._sent = threading.Event()
        self.shedding = Shedding()
        self.refused: list[str] = []
        self.server = RpcServer([self._handler()], options=[], max_calls=10_000)
        self.server.refusal = self._refuse
        self.port = self.server.listen("127.0.0.1:0")

    def _handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        async def echo(request: bytes, call: Call) -> bytes:
            assert request != b"block" or self._sent.wait(30)  # the loop waits, not the task
            return request

        kinds = {"request_deserializer": bytes, "response_serializer": bytes}
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(echo, **kinds) for name in ("Echo", "Needed")
        }
        return grpc.method_handlers_generic_handler("test.Echo", methods)

    def _refuse(self, path: str, left: float | None, lag: float) -> grpc.Status | None:
        assert left is not None
        if path.endswith("Needed") or not self.shedding.is_late(left, lag, time.monotonic()):
            return None
        self.refused.append(path)
        return rpc_status.to_status(Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="too late"))

    def flood(self, calls: list[tuple[str, float]]) -> list[grpc.StatusCode]:
        """The codes of calls, each of a method and with seconds that its caller waits; the loop is held for 1.5 s."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            blocking = channel.unary_unary("/test.Echo/Echo").future(b"block", timeout=60)
            sent = [channel.unary_unary(f"/test.Echo/{name}").future(b"", timeout=seconds) for name, seconds in calls]
            time.sleep(1.5)
            self._sent.set()
            assert blocking.code() is grpc.StatusCode.OK
            return [call.code() for call in sent]


async def test_once_calls_come_too_late_to_be_read_those_with_little_time_are_let_go_unread() -> None:
    flooded = Flooded()
    flooded.server.start()
    calls = [("Echo", 1.3)] * 100 + [("Echo", 60.0), ("Needed", 1.3)] * 200
    codes = await asyncio.to_thread(flooded.flood, calls)
    await flooded.server.stop(0)
    assert flooded.refused
    assert all(code is grpc.StatusCode.OK for (_, seconds), code in zip(calls, codes, strict=True) if seconds == 60.0)
    assert grpc.StatusCode.RESOURCE_EXHAUSTED not in {code for (name, _), code in zip(calls, codes, strict=True) if name == "Needed"}


async def test_a_loop_that_is_behind_reads_every_call_while_none_comes_too_late() -> None:
    flooded = Flooded()
    flooded.server.start()
    codes = await asyncio.to_thread(flooded.flood, [("Echo", 30.0)] * 400)
    await flooded.server.stop(0)
    assert set(codes) == {grpc.StatusCode.OK}
    assert not flooded.refused

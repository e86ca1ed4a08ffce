"""Front ends and an engine without their processes: what is bounded, and who hears of what when one of them is lost.

That calls of every kind are the same behind a front end is what test_rpc.py shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status
from openbook.errors import RequestRejected, ServerOverloaded, from_rpc
from openbook_server.call import Call
from openbook_server.errors import Overloaded
from openbook_server.frontends import link
from openbook_server.frontends.records import WINDOW, Connection, Ending, Kind, Opening
from openbook_server.status import grpc_status

if TYPE_CHECKING:
    from conftest import Behind

WAIT = 30.0  # seconds until a test gives up


class Methods:
    """On bytes; those that wait do so until `go`."""

    def __init__(self) -> None:
        self.go, self.entered, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.written = self.read = 0

    async def wait(self, request: bytes, call: Call) -> bytes:
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request * 50

    async def refuse(self, request: bytes, call: Call) -> bytes:
        await call.abort(grpc.StatusCode.INVALID_ARGUMENT, "x" * int(request), (("why", "y" * int(request)),))

    async def write(self, request: bytes, call: Call) -> AsyncIterator[bytes]:
        while True:
            yield bytes(int(request))
            self.written += 1

    async def count(self, requests: AsyncIterator[bytes], call: Call) -> bytes:
        self.entered.set()
        await self.go.wait()
        async for _ in requests:
            self.read += 1
        return b"%d" % self.read

    def handler(self, service: str = "test.Methods") -> grpc.GenericRpcHandler[bytes, bytes]:
        kinds = {"request_deserializer": bytes, "response_serializer": bytes}
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait, **kinds),
            "Refuse": grpc.unary_unary_rpc_method_handler(self.refuse, **kinds),
            "Write": grpc.unary_stream_rpc_method_handler(self.write, **kinds),
            "Count": grpc.stream_unary_rpc_method_handler(self.count, **kinds),
        }
        return grpc.method_handlers_generic_handler(service, methods)


def channel_to(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


async def read_all(call: Any) -> None:
    while await call.read():
        pass


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, float]:
    """(status, reason, seconds to come back) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    info, retry = ErrorInfo(), RetryInfo()
    for detail in rpc_status.from_call(raised.value).details:
        for message in (info, retry):
            detail.Unpack(message)
    return raised.value.code(), info.reason, retry.retry_delay.ToNanoseconds() / 1e9


@pytest.mark.parametrize("message", [None, b"", b"x" * 1_000])
def test_openings_and_endings_arrive_as_they_were_sent(message: bytes | None) -> None:
    opening = Opening("/a.B/Ü", 12.5, 3.5, message, True)
    assert Opening.decoded(b"".join(opening.encoded())) == opening
    for metadata in ([], [("reason", "tést"), ("details-bin", b"\0\xff"), ("empty", "")]):
        ending = Ending(9, "nöt now", metadata, message)
        assert Ending.decoded(b"".join(ending.encoded())) == ending


async def test_a_call_that_is_refused_at_sight_never_reaches_its_handler(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler()]) as relay,
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        asked: list[tuple[str, float | None]] = []
        lags: list[float] = []

        def refuse(path: str, left: float | None, lag: float) -> grpc.Status | None:
            asked.append((path, left))
            lags.append(lag)
            return grpc_status(Overloaded("too many", retry_after_seconds=2.0))

        relay.refusal = refuse
        wait = channel.unary_unary("/test.Methods/Wait")
        assert await refusal(wait(b"x", timeout=WAIT)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 2.0)
        assert await refusal(wait(b"x")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 2.0)
        [(path, left), (_, never)] = asked
        assert path == "/test.Methods/Wait"
        assert left is not None
        assert 0 < left <= WAIT + 1  # the deadline comes over the wire as a time that is left, and is reckoned by another clock
        assert never is None
        assert all(0 <= lag < WAIT for lag in lags)
        assert not methods.entered.is_set()
        assert not relay.calls


async def test_a_lost_engine_fails_its_calls_and_the_next_one_answers(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler()]) as relay,
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        wait, write = channel.unary_unary("/test.Methods/Wait"), channel.unary_stream("/test.Methods/Write")
        waiting, streaming = wait(b"x", timeout=WAIT), write(b"10", timeout=WAIT)
        assert await streaming.read() == bytes(10)
        await methods.entered.wait()
        behind.crash(relay)
        assert await refusal(waiting) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING", 1.0)
        assert await refusal(read_all(streaming)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING", 1.0)
        assert await refusal(wait(b"x", timeout=WAIT)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING", 1.0)
        assert front_end.answering == [True, False]
        methods.go.set()
        async with behind.engine([methods.handler()]) as another:
            while front_end.link.connection is None:
                await asyncio.sleep(0.01)
            assert await wait(b"x", timeout=WAIT) == b"x" * 50
            assert (another.front_ends, another.refused) == (1, 3)
        async with asyncio.timeout(WAIT):
            while front_end.server.calls:  # the reply may be read before the front end is told that it left
                await asyncio.sleep(0.01)


async def test_a_lost_front_end_takes_only_its_calls_with_it(behind: Behind) -> None:
    methods = Methods()
    async with behind.engine([methods.handler()]) as relay, behind.front_end([]) as staying, channel_to(staying.port) as channel:
        other = channel.unary_unary("/test.Methods/Wait")(b"y", timeout=WAIT)
        await methods.entered.wait()
        methods.entered.clear()
        async with behind.front_end([]) as leaving, channel_to(leaving.port) as gone:
            call = gone.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT)
            await methods.entered.wait()
            assert (relay.front_ends, len(relay.calls)) == (2, 2)
            assert leaving.link.connection is not None
            leaving.link.connection.close()
            await asyncio.wait_for(methods.cancelled.wait(), WAIT)
            call.cancel()
        methods.go.set()
        assert await other == b"y" * 50


async def test_the_limit_on_calls_is_one_for_all_front_ends(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler()], max_calls=2),
        behind.front_end([]) as one,
        behind.front_end([]) as two,
        channel_to(one.port) as first,
        channel_to(two.port) as second,
    ):
        running = [channel.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT) for channel in (first, second)]
        while len(one.server.calls) + len(two.server.calls) < 2 or not methods.entered.is_set():
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError, match="2 calls are being served") as raised:
            await second.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT)
        told, delay = from_rpc(raised.value, "here", 1.0)
        assert (type(told), delay) == (ServerOverloaded, 1.0)
        methods.go.set()
        assert await asyncio.gather(*running) == [b"x" * 50] * 2


async def test_an_engine_that_stops_lets_calls_finish_within_the_grace(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler()]) as relay,
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        call = channel.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT)
        await methods.entered.wait()
        stopping = asyncio.ensure_future(relay.stop(WAIT))
        await asyncio.sleep(0)
        assert not stopping.done()
        methods.go.set()
        assert await call == b"x" * 50
        await stopping
        assert not relay.calls


async def test_an_engine_that_stops_waits_for_nobody_who_reflects(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler("grpc.reflection.v1.Methods")]) as relay,
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        call = channel.unary_unary("/grpc.reflection.v1.Methods/Wait")(b"x", timeout=2 * WAIT)
        await methods.entered.wait()
        await asyncio.wait_for(relay.stop(10 * WAIT), WAIT)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await call


async def test_an_engine_that_stops_cuts_off_after_the_grace_and_says_why(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler()]) as relay,
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        call = channel.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT)
        await methods.entered.wait()
        await relay.stop(0.01)
        assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING", 1.0)


async def test_a_front_end_that_stops_does_not_say_that_the_engine_is_started_again(behind: Behind) -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with (
        behind.engine([Methods().handler()]) as relay,
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        silent = channel.stream_unary("/test.Methods/Wait")(never(), timeout=WAIT)  # the engine knows nothing of it
        async with asyncio.timeout(WAIT):
            while not front_end.server.calls:
                await asyncio.sleep(0.01)
        front_end.stopping.set()
        await relay.stop(WAIT)
        for call in (silent, channel.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT)):
            with pytest.raises(grpc.aio.AioRpcError, match="the server is shutting down") as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_that_nobody_reads_is_not_written_on(behind: Behind) -> None:
    methods = Methods()
    async with behind.engine([methods.handler()]), behind.front_end([]) as front_end, channel_to(front_end.port) as channel:
        call = channel.unary_stream("/test.Methods/Write")(b"50000", timeout=WAIT)
        assert len(await call.read()) == 50_000
        before = -1
        while methods.written != before:  # until it stands still
            before = methods.written
            await asyncio.sleep(0.2)
        read = 0
        while methods.written == before:  # it goes on when somebody reads
            assert len(await call.read()) == 50_000
            read += 1
        assert before < 200  # what gRPC itself keeps on both sides, and the window
        assert read <= before
        call.cancel()


async def test_a_stream_that_the_engine_does_not_read_waits_in_the_front_end(behind: Behind) -> None:
    methods = Methods()
    async with behind.engine([methods.handler()]), behind.front_end([]) as front_end, channel_to(front_end.port) as channel:
        sent: list[tuple[int, int]] = []
        assert front_end.link.connection is not None
        send = front_end.link.connection.send

        def noted(kind: Kind, number: int, *content: bytes) -> None:
            sent.append((kind, number))
            send(kind, number, *content)

        front_end.link.connection.send = noted  # type: ignore[method-assign]
        call = channel.stream_unary("/test.Methods/Count")(iter([b"x"] * 100), timeout=WAIT)
        await methods.entered.wait()
        await asyncio.sleep(0.2)
        assert 1 <= len(sent) <= WINDOW
        methods.go.set()
        assert await call == b"100"


async def test_what_the_engine_has_not_read_is_bounded(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = Methods()
    monkeypatch.setattr(link, "MAX_WAITING_BYTES", 10)
    async with behind.engine([methods.handler()]), behind.front_end([]) as front_end, channel_to(front_end.port) as channel:
        monkeypatch.setattr(Connection, "waiting_bytes", property(lambda connection: 11))
        refused = await refusal(channel.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT))
        assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 1.0)


async def test_what_the_engine_has_not_read_is_bounded_for_calls_that_had_begun_before(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, waiting = Methods(), 0
    monkeypatch.setattr(link, "MAX_WAITING_BYTES", 10)
    monkeypatch.setattr(Connection, "waiting_bytes", property(lambda connection: waiting))

    async def come(messages: asyncio.Queue[bytes]) -> AsyncIterator[bytes]:
        while True:
            yield await messages.get()

    async with behind.engine([methods.handler()]) as relay, behind.front_end([]) as front_end, channel_to(front_end.port) as channel:
        messages: asyncio.Queue[bytes] = asyncio.Queue()
        first = channel.stream_unary("/test.Methods/Wait")(come(messages), timeout=WAIT)  # its only message is yet to come
        async with asyncio.timeout(WAIT):
            while not front_end.server.calls:
                await asyncio.sleep(0.01)
        waiting = 11
        messages.put_nowait(b"x")
        assert await refusal(first) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 1.0)
        assert not methods.entered.is_set()
        waiting = 0
        messages = asyncio.Queue()
        later = channel.stream_unary("/test.Methods/Count")(come(messages), timeout=WAIT)
        messages.put_nowait(b"x")
        await asyncio.wait_for(methods.entered.wait(), WAIT)
        waiting = 11
        messages.put_nowait(b"x")
        assert await refusal(later) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 1.0)
        async with asyncio.timeout(WAIT):
            while relay.calls or relay.refused < 2:  # the engine is told that nobody waits for it
                await asyncio.sleep(0.01)


async def test_a_reply_beyond_the_limit_fails_alone(behind: Behind) -> None:
    methods = Methods()
    methods.go.set()
    async with (
        behind.engine([methods.handler()], max_message_bytes=1_000),
        behind.front_end([]) as front_end,
        channel_to(front_end.port) as channel,
    ):
        wait = channel.unary_unary("/test.Methods/Wait")
        with pytest.raises(grpc.aio.AioRpcError, match="1050 bytes exceed the limit of 1000") as raised:
            await wait(b"x" * 21, timeout=WAIT)
        told, _ = from_rpc(raised.value, "here", 1.0)
        assert isinstance(told, RequestRejected)  # asking again would not help
        assert told.reason == "MESSAGE_TOO_LARGE"
        with pytest.raises(grpc.aio.AioRpcError, match="2000 bytes exceed the limit of 1000"):
            await channel.unary_stream("/test.Methods/Write")(b"2000", timeout=WAIT).read()
        assert await wait(b"x" * 20, timeout=WAIT) == b"x" * 1_000


async def test_a_status_beyond_the_limit_fails_alone(behind: Behind) -> None:
    methods = Methods()
    async with (
        behind.engine([methods.handler()], max_message_bytes=1_000),
        behind.front_end([], max_message_bytes=1_000) as front_end,
        channel_to(front_end.port) as channel,
    ):
        other = channel.unary_unary("/test.Methods/Wait")(b"x", timeout=WAIT)
        await methods.entered.wait()
        refuse = channel.unary_unary("/test.Methods/Refuse")
        with pytest.raises(grpc.aio.AioRpcError, match="bytes exceed the limit of 1000; ask for less"):
            await refuse(b"600000", timeout=WAIT)
        with pytest.raises(grpc.aio.AioRpcError, match="xxx") as raised:
            await refuse(b"600", timeout=WAIT)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        methods.go.set()
        assert await other == b"x" * 50
        assert front_end.answering == [True]


async def test_large_messages_go_through_in_parts(behind: Behind) -> None:
    methods = Methods()
    methods.go.set()
    limit = [("grpc.max_receive_message_length", -1)]
    async with (
        behind.engine([methods.handler()], max_message_bytes=20_000_000),
        behind.front_end([], max_message_bytes=20_000_000) as front_end,
        grpc.aio.insecure_channel(f"127.0.0.1:{front_end.port}", options=limit) as channel,
    ):
        wait = channel.unary_unary("/test.Methods/Wait")
        requests = [bytes([number]) * size for number, size in enumerate((1, 300_000, 65_536, 2))]
        replies = await asyncio.gather(*(wait(request, timeout=WAIT) for request in requests))
        assert replies == [request * 50 for request in requests]


@pytest.mark.parametrize("size", [1, 3, 9, 10, 1_000])
def test_records_are_found_wherever_the_stream_is_cut(size: int) -> None:
    heard: list[tuple[int, int, bytes]] = []

    def hear(connection: Connection, kind: int, number: int, content: bytes) -> None:
        heard.append((kind, number, content))

    def cut() -> Iterator[bytes]:
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    records = [(Kind.MESSAGE, 7, b"abc"), (Kind.LAST, 8, b""), (Kind.MESSAGE, 1 << 31, bytes(range(256)))]
    stream = b"".join(
        len(content).to_bytes(4, "little") + number.to_bytes(4, "little") + bytes([kind]) + content for kind, number, content in records
    )
    connection = Connection(hear, lambda _: None, max_message_bytes=1_000)
    for part in cut():
        connection.data_received(part)
    assert heard == records


def test_a_record_beyond_the_limit_is_not_waited_for() -> None:
    connection = Connection(lambda *_: None, lambda _: None, max_message_bytes=1_000)
    with pytest.raises(ValueError, match="exceeds the limit"):
        connection.data_received((1 << 30).to_bytes(4, "little") + bytes(5))

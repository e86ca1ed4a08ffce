"""The metrics port: what it answers, and that whoever connects to it costs the server little."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from socketserver import TCPServer
from typing import Any

import pytest
from openbook_server import scraping
from openbook_server.scraping import ScrapeServer
from prometheus_client import CollectorRegistry, Gauge

WAIT = 60.0  # seconds until a test gives up


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScrapeServer]:
    monkeypatch.setattr(scraping, "AT_ONCE", 2)
    registry = CollectorRegistry()
    Gauge("openbook_test", "A number", registry=registry).set(7)
    with ScrapeServer(registry, "127.0.0.1", 0) as server:
        server.start()
        yield server
        server.shutdown()


def connected(server: ScrapeServer) -> socket.socket:
    return socket.create_connection(server.server_address[:2], timeout=WAIT)  # type: ignore[arg-type]  # of IPv4


def scrape(server: ScrapeServer, accept: str = "") -> bytes:
    with connected(server) as connection:
        connection.sendall(f"GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.mark.parametrize(
    "accept", ["", "application/openmetrics-text; version=x.y", "text/plain; version=one", "text/plain; version=0.0.4"]
)
def test_whatever_a_scrape_accepts_it_gets_its_numbers(server: ScrapeServer, caplog: pytest.LogCaptureFixture, accept: str) -> None:
    page = scrape(server, accept)
    assert page.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"\nopenbook_test 7.0\n" in page
    assert not caplog.records


def test_connections_that_say_nothing_are_few_and_hung_up_on(server: ScrapeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(server)) for _ in range(2)]
        for _ in range(20):
            with connected(server) as beyond:
                assert beyond.recv(1) == b""  # hung up on at once
        assert threading.active_count() <= threads + 2
        for connection in idle:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    monkeypatch.setattr(scraping._Handler, "timeout", 0.01)
    until_answered(server)
    with connected(server) as silent:
        assert silent.recv(1) == b""  # though it might yet say something
    until_answered(server)


def until_answered(server: ScrapeServer) -> None:
    """A connection is over for its caller before its thread has let go of its place."""
    for _ in range(10_000):
        try:
            if b"openbook_test" in scrape(server):
                return
        except ConnectionError:
            pass
    raise AssertionError("it has not answered")


def test_a_connection_that_cannot_be_taken_is_not_tried_again_at_once(server: ScrapeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(scraping.time, "sleep", pauses.append)

    def full(self: TCPServer) -> tuple[socket.socket, Any]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(TCPServer, "get_request", full)
    with pytest.raises(OSError, match="Too many open files"):
        server.get_request()
    assert pauses == [scraping._PAUSE]


def test_a_number_that_cannot_be_had_is_told_to_the_log(server: ScrapeServer, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> float:
        raise RuntimeError("it is away")

    gauge = Gauge("openbook_away", "A number", registry=server.RequestHandlerClass.registry)  # type: ignore[attr-defined]
    gauge.set_function(fails)
    assert scrape(server) == b""
    server.shutdown()
    [record] = caplog.records
    assert record.message == "a scrape of the metrics failed"

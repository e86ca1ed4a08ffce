"""The port that Prometheus scrapes: bounded in threads, descriptors and time, for whoever connects must not cost the server its calls."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.exposition import choose_encoder

log = logging.getLogger(__name__)

AT_ONCE = 16  # connections; whoever comes beyond is hung up on
_SECONDS = 5.0  # that a connection may say nothing, or read nothing
_PAUSE = 0.5  # seconds after a connection that could not be taken, for want of a descriptor say


class _Handler(MetricsHandler):
    """Answers one request."""

    timeout = _SECONDS

    def do_GET(self) -> None:  # noqa: N802
        try:
            choose_encoder(self.headers.get("Accept", ""))
        except (ValueError, TypeError):  # it names a version that is none: the plain format is for everybody
            del self.headers["Accept"]
        super().do_GET()


class ScrapeServer(ThreadingTCPServer):
    """Answers scrapes on http://host:port/metrics, in threads of its own from `start` on."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises OSError: the address cannot be listened on."""
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._room = threading.Semaphore(AT_ONCE)
        super().__init__(address, _Handler.factory(registry))  # type: ignore[arg-type]  # of one family or the other

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # it stays in the kernel's queue, and would be tried again at once
            time.sleep(_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was started
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # which says that the caller is gone
            log.exception("a scrape of the metrics failed")

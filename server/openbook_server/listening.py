"""Where calls come from: a port of this machine that speaks gRPC, with the health service on it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import _async as aio_health
from grpc_health.v1 import health, health_pb2
from openbook.v1 import openbook_pb2 as pb

from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest
from openbook_server.rpc import Otherwise, Refusal, RpcServer

if TYPE_CHECKING:
    from openbook_server.metrics import Metrics

log = logging.getLogger(__name__)

LIVENESS = "liveness"  # health name that is SERVING as long as the process is; "" and READINESS tell readiness
READINESS = pb.DESCRIPTOR.services_by_name["OpenBook"].full_name
REQUESTS_A_ROW = 2  # requests at once, in rows that may wait: beyond it they would only fill memory
_HARD_LIMIT = 4  # times the limits on messages and requests: a longer message gRPC itself refuses, without details, and a call is not read

Handlers = Sequence["grpc.GenericRpcHandler[Any, Any]"]


class Listener(Protocol):
    """Brings calls to handlers, from the moment it exists."""

    @property
    def port(self) -> int: ...

    def report(self, metrics: Metrics) -> None:
        """Have the metrics tell of calls."""

    def refuse(self, refusal: Refusal) -> None:
        """See `RpcServer.refusal`."""

    async def serving(self, name: str, state: str) -> None:
        """Tell the world that requests are answered now: the bundle's name, and what else is worth a line in the log."""

    async def stop(self, grace: float) -> None:
        """Tell the world, and take no more calls; those that run get `grace` seconds, then they are cut off."""


Listen = Callable[[Handlers, ServerConfig], Awaitable[Listener]]


class Port:
    """A `Listener` on the port that the settings name."""

    def __init__(self, handlers: Handlers, config: ServerConfig, *, shared: bool = False, otherwise: Otherwise | None = None) -> None:
        """Open it.

        Args:
            shared: other processes may listen on the port too, and the kernel shares the connections out.
            otherwise: as `RpcServer` takes it.

        Raises:
            InvalidRequest: the address cannot be listened on.
        """
        self._readiness = aio_health.HealthServicer()
        self._config = config
        limit = max_wire_bytes(config)
        self._server = RpcServer(
            [*handlers, _health_handler(self._readiness)],
            options=[
                ("grpc.so_reuseport", int(shared)),  # unasked, two servers on one port would share its callers in silence
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
            ],
            max_calls=max_calls(config),
            otherwise=otherwise,
        )
        try:
            self.port = self._server.listen(config.address(config.port))
        except OSError as error:
            raise cannot_listen(config) from error

    def report(self, metrics: Metrics) -> None:
        metrics.observe_calls(self._server.calls)

    def refuse(self, refusal: Refusal) -> None:
        self._server.refusal = refusal

    async def start(self) -> None:
        """Take calls; health says NOT_SERVING."""
        await self._readiness.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.set_readiness(ready=False)
        self._server.start()

    async def set_readiness(self, *, ready: bool) -> None:
        """What health says."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", READINESS):
            await self._readiness.set(name, status)

    async def serving(self, name: str, state: str) -> None:
        await self.set_readiness(ready=True)
        log_serving(name, self._config.address(self.port), state)

    async def stop(self, grace: float) -> None:
        await self.set_readiness(ready=False)
        await self._server.stop(grace)


async def listen_on_port(handlers: Handlers, config: ServerConfig) -> Listener:
    """A `Listener` of this process's own.

    Raises:
        InvalidRequest: the address cannot be listened on.
    """
    port = Port(handlers, config)
    await port.start()
    return port


def max_calls(config: ServerConfig) -> int:
    """At once."""
    return _HARD_LIMIT * REQUESTS_A_ROW * config.max_queued


def max_wire_bytes(config: ServerConfig) -> int:
    """Of one message as it travels."""
    return config.max_message_bytes * _HARD_LIMIT


def cannot_listen(config: ServerConfig) -> InvalidRequest:
    """What to tell of an address that was refused: the host is of another machine, or else it is the port."""
    if not _is_here(config.host):
        way_out = "127.0.0.1 takes calls of this machine, 0.0.0.0 of the network"
        return InvalidRequest("--host", f"cannot listen on {config.host}, which is no address of this machine; {way_out}")
    return InvalidRequest("--port", f"cannot listen on {config.address(config.port)}; is it in use? choose another --port")


def _is_here(host: str) -> bool:
    """Whether any port can be opened on it."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # it has no address, or is no name
        return False
    return any(_takes_a_port(family, address) for family, _, _, _, address in found)


def _takes_a_port(family: int, address: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind(address)
    except OSError:
        return False
    return True


def log_serving(name: str, address: str, state: str) -> None:
    """The line that scripts wait for."""
    log.info("serving %s on %s: %s", name, address, state)


def _health_handler(readiness: aio_health.HealthServicer) -> grpc.GenericRpcHandler[Any, Any]:
    request, reply = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Check": grpc.unary_unary_rpc_method_handler(readiness.Check, request_deserializer=request, response_serializer=reply),
        "Watch": grpc.unary_stream_rpc_method_handler(readiness.Watch, request_deserializer=request, response_serializer=reply),
    }
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

"""Life of a server process: listen, load, verify, warm up, serve, drain.

The port opens first, health says NOT_SERVING and every method UNAVAILABLE; health says SERVING only after every digest
and golden vector matched, it was measured whether results depend on what shares a batch, and, on a device that prepares itself for
each length, every padding bucket ran once. SIGTERM and SIGINT drain: health turns, new requests are refused with a time to come
back, those in flight finish; before health says SERVING they end the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import _async as aio_reflection
from grpc_reflection.v1alpha import reflection, reflection_pb2

from openbook_server.bundle import Bundle, load_bundle
from openbook_server.config import ServerConfig
from openbook_server.engine import Engine
from openbook_server.errors import InvalidRequest, OpenBookError
from openbook_server.frontend import KNOWLEDGE_SERVICE, SERVICE, Frontend
from openbook_server.generations_service import GenerationsService
from openbook_server.hosting import once_told
from openbook_server.knowledge import KnowledgeBase, open_knowledge_base
from openbook_server.knowledge.opening import bundle_to_serve, place_of
from openbook_server.listening import Listen, listen_on_port
from openbook_server.metrics import Metrics
from openbook_server.pair import LoadedGraphs, Pair, Shared, load_graphs
from openbook_server.priority import give_way, put_loop_first
from openbook_server.runtime import Device, choose_device
from openbook_server.succession import Succession

log = logging.getLogger(__name__)

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Everything that takes time to open."""

    bundle: Bundle
    device: Device
    graphs: LoadedGraphs
    knowledge_base: KnowledgeBase | None


@asynccontextmanager
async def running_server(
    bundle_folder: Path, knowledge_base: str | Path | None, config: ServerConfig, listen: Listen = listen_on_port
) -> AsyncIterator[int]:
    """A server that is ready to answer within the block, on calls that come from where `listen` does; yields its port.

    Raises:
        InvalidRequest: the address cannot be listened on.
        OpenBookError: the bundle, the device or the knowledge base does not open; see errors.py.
    """
    began = time.perf_counter()
    metrics = Metrics()
    frontend = Frontend(config, metrics)
    listener = await listen([*frontend.handlers(), *_reflection_handlers()], config)
    listener.report(metrics)
    listener.refuse(frontend.unread)
    try:
        if config.metrics_port:
            _serve_metrics(metrics, config)
        loaded = await asyncio.to_thread(_load, bundle_folder, knowledge_base, config)
        engine = Engine(
            {},
            max_batch_tokens=config.max_batch_tokens,
            max_queued=config.max_queued,
            sessions=loaded.device.sessions,
            gives_way=loaded.device.computes_here,
            observe=metrics.observe_batch,
        )
        frontend.shedding.crowded = engine.crowded
        # Only this machine may write, unless the operator says otherwise: there is no authentication.
        writable = not config.read_only and (config.writable or config.host in LOOPBACK)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="splitter", initializer=give_way) as splitter,
            ThreadPoolExecutor(1, thread_name_prefix="writer", initializer=give_way) as thread,
        ):
            shared = Shared(config, loaded.device, engine, metrics, thread, splitter, writable)
            first = Pair(loaded.bundle, loaded.graphs, loaded.knowledge_base, shared)
            succession = _succession(first, shared, frontend)

            def live() -> Pair:
                return succession.live if succession is not None else first

            try:
                first.watch()
                if first.knowledge_base is not None:
                    metrics.observe_knowledge(lambda: live().knowledge_base)
                if succession is not None:
                    metrics.observe_comparison(lambda: succession.following.comparison if succession.following is not None else None)
                metrics.observe_engine(engine, lambda: live().embedder)
                frontend.served = first.served
                if succession is not None:
                    await succession.resume()
                    await succession.follow()
                holds = f"{loaded.knowledge_base.counts().passages} passages" if loaded.knowledge_base else "no knowledge base"
                took = time.perf_counter() - began
                device = loaded.device
                runs = f"{device.name} in {device.precision}, {device.sessions} batches at once"
                await listener.serving(loaded.bundle.name, f"{runs}, {holds}; ready after {took:.1f} s")
                yield listener.port
            finally:
                frontend.served, frontend.refusal = None, "the server is shutting down"
                if succession is not None:
                    succession.drain()
                await listener.stop(config.drain_seconds)
                if succession is not None:
                    await succession.close()
                await asyncio.to_thread(engine.close)
                if writable:
                    await asyncio.get_running_loop().run_in_executor(thread, _save_index, live().knowledge_base)
                await live().close()
    finally:
        await listener.stop(0)


async def serve_until_stopped(bundle: Path, knowledge_base: str | Path | None, config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal, or one before it serves, stops at once."""
    put_loop_first()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop_loading)
    async with running_server(bundle, knowledge_base, config):
        once_told(stop.set)
        await stop.wait()
        log.info("draining for up to %g s; a second signal stops at once", config.drain_seconds)
    log.info("stopped")


def stop_loading() -> None:
    """End the process, as a signal does before it serves: the thread that loads, which may take minutes, cannot be called off.

    Nothing is lost: every write is a transaction, and a derived file gets its name when it is whole.
    """
    log.info("stopped while loading")
    os._exit(0)


class _Reflection(aio_reflection.ReflectionServicer):  # type: ignore[misc]  # it has no types
    """As grpcio's, which finds no method: protobuf's own pool looks for other symbols alone."""

    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        with suppress(KeyError):
            fully_qualified_name = self._pool.FindMethodByName(fully_qualified_name).containing_service.full_name
        return super()._file_containing_symbol(request, fully_qualified_name)


def _reflection_handlers() -> Iterator[grpc.GenericRpcHandler[Any, Any]]:
    """As v1alpha, which grpcio brings, and as v1, whose messages are the same on the wire; newer tools ask for that first."""
    names = (SERVICE, KNOWLEDGE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    method = grpc.stream_stream_rpc_method_handler(
        _Reflection(service_names=names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in (reflection.SERVICE_NAME, REFLECTION_V1):
        yield grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})


def _load(bundle_folder: Path, target: str | Path | None, config: ServerConfig) -> _Loaded:
    """Open, verify and warm everything; blocking, so that health answers meanwhile."""
    device = choose_device(config.device, config.precision or None, config.threads, config.sessions)
    bundle = load_bundle(bundle_folder)
    bundle = bundle_to_serve(target, bundle) if target is not None else bundle
    with ThreadPoolExecutor(1, thread_name_prefix="open") as beside:  # each takes about as long as the other
        opening = beside.submit(open_knowledge_base, target, bundle) if target is not None else None
        try:
            graphs = load_graphs(bundle, device)
            knowledge_base = opening.result() if opening else None
            if knowledge_base is not None:
                knowledge_base.serve_with(place_of(bundle))
            return _Loaded(bundle, device, graphs, knowledge_base)
        except BaseException:
            if opening is not None and opening.exception() is None:
                opening.result().close()
            raise


def _succession(first: Pair, shared: Shared, frontend: Frontend) -> Succession | None:
    if first.knowledge_base is None:
        return None
    succession = Succession(first, first.knowledge_base, shared, frontend)
    frontend.generations = GenerationsService(succession, writable=shared.writable)
    return succession


def _serve_metrics(metrics: Metrics, config: ServerConfig) -> None:
    try:
        metrics.serve(config.host, config.metrics_port)
    except OSError as error:
        problem = f"cannot listen on {config.address(config.metrics_port)} ({error.strerror}); choose another --metrics-port"
        raise InvalidRequest("--metrics-port", problem) from error


def _save_index(knowledge_base: KnowledgeBase | None) -> None:
    """Spare the next start the building; a failure costs that start some time and nothing else."""
    try:
        if knowledge_base is not None:
            knowledge_base.snapshot()
    except (OSError, OpenBookError) as error:
        log.warning("%s", error)

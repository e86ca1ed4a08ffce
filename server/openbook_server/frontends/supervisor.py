"""`openbook serve --frontends N` itself: starts the engine and the front ends, and starts again those that end.

Until all of them have answered once, the end of one is the end of the server, with its exit status: what is wrong with a bundle is
told once. Later a process that ends is started again, at once or, if it does not live long, after ever longer. An engine that fails to
start `FAILURES` times in a row is given up, and the server with it, so that whoever runs it hears of it; so is a front end, unless
another one serves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest
from openbook_server.frontends.port import reserved_port
from openbook_server.frontends.relay import BACKLOG
from openbook_server.hosting import once_told
from openbook_server.listening import log_serving

log = logging.getLogger(__name__)

FAILURES = 5  # starts in a row that came to nothing
STEADY_SECONDS = 10.0  # a process that lived so long is started again at once
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before one that did not
_LATE = 5.0  # seconds that a front end may take longer to drain than it was given
_SAVING = 60.0  # and the engine, which then writes its index: gigabytes, where the knowledge base is large
_PACKAGE = __package__


class _Place:
    """A place for a process: the one that is there now, and what it last said."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module
        self.process: Process | None = None
        self.said: dict[str, Any] = {}
        self.restarts = 0

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """Of one server."""

    def __init__(self, bundle: Path, knowledge_base: str | None, config: ServerConfig, listening: socket.socket, at: int) -> None:
        """Args:
        config: with the port that was reserved.
        listening: front ends connect to it, and the engine of the moment accepts them.
        at: descriptor of its file, by which they do.
        """
        self._config, self._listening, self._at = config, listening, at
        self._orders = {
            "config": dataclasses.asdict(config),
            "bundle": str(bundle),
            "knowledge_base": knowledge_base,
            "listening": listening.fileno(),
            "socket": f"/proc/self/fd/{at}",
        }
        self._engine = _Place("the engine", "engine_process")
        self._front_ends = [_Place(f"front end {number + 1}", "frontend_process") for number in range(config.frontends)]
        self._stop = asyncio.Event()
        self._announced = self._ever_served = False
        self._status = 0

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once. Returns the exit status."""
        once_told(self.stop)  # the others end with this process, see `child`
        engine, *front_ends = tasks = [asyncio.create_task(self._keep(place)) for place in (self._engine, *self._front_ends)]
        for task in tasks:
            task.add_done_callback(lambda _: self._stop.set())
        try:
            await self._stop.wait()
            for place in (*self._front_ends, self._engine):  # in this order: they must know why the engine ends
                place.signal(signal.SIGTERM)
            await self._ended({engine: self._engine}, self._config.drain_seconds + _SAVING)
            await self._ended(dict(zip(front_ends, self._front_ends, strict=True)), self._config.drain_seconds + _LATE)
        finally:
            for place in (self._engine, *self._front_ends):
                place.signal(signal.SIGKILL)
        if not self._status:
            log.info("stopped")
        return self._status

    def stop(self) -> None:
        """Have `run` drain and return."""
        log.info("draining for up to %g s; a second signal stops at once", self._config.drain_seconds)
        self._stop.set()

    async def _ended(self, places: dict[asyncio.Task[None], _Place], seconds: float) -> None:
        """Wait for processes that were told to end, and kill those that take longer than they may."""
        _, stuck = await asyncio.wait(places, timeout=seconds)
        for task in stuck:
            log.error("%s did not end within %.0f s and is killed", places[task].name, seconds)
            places[task].signal(signal.SIGKILL)
        await asyncio.gather(*places)

    async def _keep(self, place: _Place) -> None:
        """Have a process in a place, until the server stops."""
        failures = hasty = 0
        while not self._stop.is_set():
            try:
                worked, seconds, status = await self._live(place)
                how = f"exit status {status}" if status >= 0 else f"signal {-status}"
            except OSError as error:  # the system has no room for another process, say
                worked, seconds, status, how = False, 0.0, 0, str(error)
            if self._stop.is_set():
                return
            failures = 0 if worked else failures + 1
            if not self._ever_served or (failures >= FAILURES and self._is_needed(place)):
                if self._ever_served:
                    log.error("%s could not be started %d times in a row (%s); giving up", place.name, failures, how)
                elif status <= 0:  # it has not said why itself
                    log.error("%s ended before the server was ready (%s)", place.name, how)
                self._status = max(status, 1)
                return
            hasty = 0 if seconds > STEADY_SECONDS else hasty + 1
            pause = min(SHORTEST_PAUSE * 2 ** (hasty - 1), LONGEST_PAUSE) if hasty else 0.0
            log.error("%s ended (%s); it is started again%s", place.name, how, f" in {pause:.1f} s" if pause else "")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
            place.restarts += 1
            if place is not self._engine:  # which is told when it starts
                await self._say(self._engine, self._restarts())

    def _is_needed(self, place: _Place) -> bool:
        """Whether nobody is served without it."""
        return place is self._engine or not any(other.said.get("serving") for other in self._front_ends)

    async def _live(self, place: _Place) -> tuple[bool, float, int]:
        """Start a process and hear what it says until it ends; returns whether it came to something, the seconds since it first said
        anything, and its exit status. A front end without an engine opens its port and cannot serve."""
        place.said = {}
        self._announced = self._announced and place is not self._engine
        place.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", f"{_PACKAGE}.{place.module}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[self._listening.fileno() if place is self._engine else self._at],
            process_group=0,  # Ctrl-C is for the supervisor alone
        )
        await self._say(place, {**self._orders, "restarts": self._restarts()})
        if self._stop.is_set():  # while it was being started
            place.signal(signal.SIGTERM)
        assert place.process.stdout is not None  # noqa: S101
        worked, spoke = False, 0.0
        async for line in place.process.stdout:
            place.said = json.loads(line)
            worked, spoke = worked or place.said["serving"], spoke or time.monotonic()
            self._announce()
        place.said = {}
        seconds = time.monotonic() - spoke if spoke else 0.0
        return worked or seconds > STEADY_SECONDS, seconds, await place.process.wait()

    def _announce(self) -> None:
        if self._announced or not self._engine.said or not all(place.said.get("serving") for place in self._front_ends):
            return
        self._announced = self._ever_served = True
        state = f"{self._engine.said['state']}; {len(self._front_ends)} front ends"
        log_serving(self._engine.said["name"], self._config.address(self._config.port), state)

    def _restarts(self) -> dict[str, int]:
        """What the engine reports to whoever measures."""
        return {"engine": self._engine.restarts, "frontend": sum(place.restarts for place in self._front_ends)}

    async def _say(self, place: _Place, what: dict[str, Any]) -> None:
        if place.process is None or place.process.stdin is None or place.process.returncode is not None:
            return
        with suppress(ConnectionError):  # it has just ended: its place hears of it
            place.process.stdin.write(json.dumps(what).encode() + b"\n")
            await place.process.stdin.drain()


async def supervise(bundle: Path, knowledge_base: str | None, config: ServerConfig) -> int:
    """Serve with front ends; returns the exit status.

    Raises:
        InvalidRequest: the address cannot be listened on, or this system cannot share ports.
    """
    if not sys.platform.startswith("linux"):
        raise InvalidRequest("--frontends", f"{config.frontends}: front ends share a port as only Linux does; leave it at 0")
    with ExitStack() as stack:
        config = stack.enter_context(reserved_port(config))
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        at = stack.enter_context(_bound(listening))
        listening.listen(BACKLOG)
        return await Supervisor(bundle, knowledge_base, config, listening, at).run()


@contextmanager
def _bound(listening: socket.socket) -> Iterator[int]:
    """Give a socket a place where nobody else can connect to it; yields a descriptor of that place, by which `/proc/self/fd` does. The file
    itself is gone by then: whoever tidies up a folder of temporary files would take it away from a server that runs for weeks.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="openbook-") as folder:  # that nobody else may look into
            listening.bind(f"{folder}/engine")
            at = os.open(f"{folder}/engine", os.O_PATH)
    except OSError as error:
        problem = f"no socket can be made in a folder there ({error}); name one that can be written, with a shorter path"
        raise InvalidRequest("TMPDIR", problem) from error
    try:
        yield at
    finally:
        os.close(at)

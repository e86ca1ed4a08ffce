"""The supervisor with processes that only pretend: which it starts again, which end the server, and what it tells them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest
from openbook_server.frontends import supervisor
from openbook_server.frontends.port import reserved_port
from openbook_server.rpc import RpcServer

WAIT = 60.0  # seconds until a test gives up

# Appends its name and process to a log, then does what the file of its name says; "serve" until its input ends or SIGTERM comes, which
# "stay" does not hear. "open" only opens its port, and fails.
PROCESS = """
import json, os, signal, sys
from pathlib import Path
folder, name = Path(__file__).parent.parent, Path(__file__).stem
orders = json.loads(sys.stdin.readline())
with open(folder / "log", "a") as log:
    print(name, os.getpid(), *orders["restarts"].values(), file=log)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
what = (folder / name).read_text()
if what == "stay":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what in ("serve", "stay"):
    print(json.dumps({"name": "tiny", "state": "ready", "serving": True}), flush=True)
    for line in sys.stdin:
        with open(folder / "log", "a") as log:
            print("told", line, end="", file=log)
    os._exit(9)
if what == "open":
    print(json.dumps({"serving": False}), flush=True)
    os._exit(6)
sys.exit(int(what))
"""


class Pretended:
    """A supervisor of an engine and two front ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: asyncio.Task[int] | None = None

    def have(self, engine: str, front_end: str) -> None:
        """What the processes that start from now on do."""
        (self.folder / "engine_process").write_text(engine)
        (self.folder / "frontend_process").write_text(front_end)

    def log(self, name: str) -> list[str]:
        file = self.folder / "log"
        return [line for line in file.read_text().splitlines() if line.startswith(name)] if file.exists() else []

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[1]) for line in self.log(name)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pretended]:
    package = tmp_path / "pretended"
    package.mkdir()
    for name in ("engine_process", "frontend_process"):
        (package / f"{name}.py").write_text(PROCESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(supervisor, "_PACKAGE", "pretended")
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.01)
    pretended = Pretended(tmp_path)
    yield pretended
    assert pretended.running is not None
    assert pretended.running.done()
    for pid in pretended.pids("engine") + pretended.pids("frontend"):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def start(pretended: Pretended) -> supervisor.Supervisor:
    listening = socket.socket(socket.AF_UNIX)
    config = ServerConfig(frontends=2, drain_seconds=1.0)
    at = os.open(pretended.folder, os.O_PATH)
    server = supervisor.Supervisor(pretended.folder / "bundle", None, config, listening, at)
    pretended.running = asyncio.create_task(server.run())
    pretended.running.add_done_callback(lambda _: (listening.close(), os.close(at)))
    return server


async def stopped(pretended: Pretended, server: supervisor.Supervisor) -> int:
    server.stop()
    assert pretended.running is not None
    return await asyncio.wait_for(pretended.running, WAIT)


@pytest.mark.parametrize(("engine", "front_end", "status"), [("7", "serve", 7), ("serve", "3", 3), ("0", "serve", 1)])
async def test_a_process_that_cannot_start_ends_the_server_with_its_status(
    pretended: Pretended, engine: str, front_end: str, status: int
) -> None:
    pretended.have(engine, front_end)
    start(pretended)
    assert pretended.running is not None
    assert await asyncio.wait_for(pretended.running, WAIT) == status
    assert len(pretended.log("engine")) <= 1  # it may have been stopped before it wrote
    assert len(pretended.log("frontend")) <= 2


async def test_processes_that_are_killed_are_started_again_and_counted(pretended: Pretended, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pretended.have("serve", "serve")
    server = start(pretended)
    await pretended.until(lambda: "serving tiny on 127.0.0.1:50051: ready; 2 front ends" in caplog.text)
    [engine], [front_end, _] = pretended.pids("engine"), pretended.pids("frontend")
    os.kill(front_end, 9)
    await pretended.until(lambda: len(pretended.pids("frontend")) == 3 and len(pretended.log("told")) == 1)
    assert pretended.log("told") == ['told {"engine": 0, "frontend": 1}']
    os.kill(engine, 9)
    await pretended.until(lambda: caplog.text.count("serving tiny") == 2)
    assert pretended.log("engine")[1].split()[2:] == ["1", "1"]  # restarts of the engine, of front ends
    assert "the engine ended (signal 9)" in caplog.text
    assert await stopped(pretended, server) == 0


async def test_a_front_end_that_does_not_come_back_is_waited_for(pretended: Pretended, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pretended.have("serve", "serve")
    server = start(pretended)
    await pretended.until(lambda: "serving tiny" in caplog.text)
    pretended.have("serve", "5")
    os.kill(pretended.pids("frontend")[0], 9)
    await pretended.until(lambda: len(pretended.pids("frontend")) > 2 + supervisor.FAILURES + 1)
    pretended.have("serve", "serve")
    count = len(pretended.pids("frontend"))
    await pretended.until(lambda: len(pretended.pids("frontend")) > count)
    assert await stopped(pretended, server) == 0


async def test_front_ends_of_which_none_comes_back_are_given_up(pretended: Pretended, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pretended.have("serve", "serve")
    start(pretended)
    await pretended.until(lambda: "serving tiny" in caplog.text)
    pretended.have("serve", "open")
    for pid in pretended.pids("frontend"):
        os.kill(pid, 9)
    assert pretended.running is not None
    assert await asyncio.wait_for(pretended.running, WAIT) == 6
    assert f"could not be started {supervisor.FAILURES} times in a row" in caplog.text


async def test_a_socket_is_reached_by_those_who_hold_its_place_and_has_no_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connecting:
        patch.setattr(tempfile, "tempdir", str(folder))
        with supervisor._bound(listening) as at:
            assert list(folder.iterdir()) == []
            listening.listen()
            connecting.connect(f"/proc/self/fd/{at}")
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as listening:
        patch.setattr(tempfile, "tempdir", str(folder / ("x" * 100)))
        (folder / ("x" * 100)).mkdir()
        with (
            pytest.raises(InvalidRequest, match="TMPDIR: no socket can be made in a folder there .* shorter path"),
            supervisor._bound(listening),
        ):
            pass


async def test_an_engine_that_does_not_come_back_is_given_up(pretended: Pretended, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pretended.have("serve", "serve")
    start(pretended)
    await pretended.until(lambda: "serving tiny" in caplog.text)
    pretended.have("5", "serve")
    os.kill(pretended.pids("engine")[0], 9)
    assert pretended.running is not None
    assert await asyncio.wait_for(pretended.running, WAIT) == 5
    assert len(pretended.pids("engine")) == 1 + supervisor.FAILURES
    assert f"the engine could not be started {supervisor.FAILURES} times in a row" in caplog.text


@pytest.mark.parametrize(("engine", "front_end", "killed"), [("stay", "serve", 1), ("serve", "stay", 2)])
async def test_a_process_that_does_not_end_in_its_time_is_killed(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: str, front_end: str, killed: int
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(supervisor, "_SAVING", 0.0)
    monkeypatch.setattr(supervisor, "_LATE", 0.0)
    pretended.have(engine, front_end)
    server = start(pretended)
    await pretended.until(lambda: "serving tiny" in caplog.text)
    assert await stopped(pretended, server) == 0
    assert caplog.text.count("did not end within 1 s and is killed") == killed


async def test_a_system_that_cannot_start_processes_ends_the_server(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(pretended.folder / "none"))
    start(pretended)
    assert pretended.running is not None
    assert await asyncio.wait_for(pretended.running, WAIT) == 1
    assert "No such file" in caplog.text


async def test_a_reserved_port_is_for_processes_that_share_it_and_for_nobody_else() -> None:
    with reserved_port(ServerConfig(port=0)) as config:
        assert config.port
        with pytest.raises(InvalidRequest, match="choose another --port"), reserved_port(config):
            pass
        with pytest.raises(OSError, match="cannot listen"):
            RpcServer([], options=[("grpc.so_reuseport", 0)], max_calls=1).listen(f"127.0.0.1:{config.port}")
        servers = [RpcServer([], options=[("grpc.so_reuseport", 1)], max_calls=1) for _ in range(2)]
        assert [server.listen(f"127.0.0.1:{config.port}") for server in servers] == [config.port] * 2
        for server in servers:
            server.start()
    with pytest.raises(InvalidRequest, match="choose another --port"), reserved_port(config):
        pass  # they listen, although nothing is reserved any more
    for server in servers:
        await server.stop(0)


@pytest.mark.parametrize("host", ["no host", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with (
        pytest.raises(InvalidRequest, match=f"--host: cannot listen on {host}, which is no address of this"),
        reserved_port(ServerConfig(host=host)),
    ):
        pass

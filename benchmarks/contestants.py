"""The servers that peers.py compares: how each is started, asked and understood. All of them listen on this machine only."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from driver import Server

FOLDER = Path(__file__).parent / "peer_servers"
START_SECONDS = 180.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1
BATCH_ROWS = 32


class DidNotStart(Exception):
    """A peer's server ended, or did not answer in time; says what it wrote last."""


@dataclass(frozen=True, kw_only=True)
class HttpPeer:
    """A server that answers HTTP/1.1."""

    packages: str  # what its interpreter needs, as pip takes it
    command: Callable[[str, str, int], Sequence[str]]  # of its interpreter, the checkpoint's folder, and the port
    path: str
    body: Callable[[str], bytes]  # of one text
    vector: Callable[[bytes, Mapping[str, str]], bytes]  # float32 bytes of the answer's body and headers


def _triton_vector(body: bytes, headers: Mapping[str, str]) -> bytes:
    """The binary output stands behind the JSON part, whose length a header tells (Triton's binary tensor data extension)."""
    return body[int(headers["inference-header-content-length"]) :]


def _triton_body(text: str) -> bytes:
    inputs = [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "vector", "parameters": {"binary_data": True}}]}).encode()


def _infinity(python: str, checkpoint: str, port: int) -> list[str]:
    options = {"--model-id": checkpoint, "--served-model-name": "embedder", "--port": str(port), "--host": "127.0.0.1"}
    options |= {"--engine": "torch", "--device": "cpu", "--dtype": "float32", "--batch-size": str(BATCH_ROWS), "--log-level": "error"}
    flags = [part for option in options.items() for part in option]
    return [python, "-c", "from infinity_emb.cli import cli; cli()", "v2", *flags, "--no-bettertransformer", "--no-model-warmup"]


PEERS = {
    "mosec": HttpPeer(
        packages="mosec sentence-transformers",
        command=lambda python, _, port: [python, str(FOLDER / "mosec_server.py"), "--address", "127.0.0.1", "--port", str(port)],
        path="/inference",
        body=lambda text: json.dumps(text).encode(),
        vector=lambda body, _: body,
    ),
    "infinity": HttpPeer(
        packages="'infinity-emb[server,torch]'",
        command=_infinity,
        path="/embeddings",
        body=lambda text: json.dumps({"model": "embedder", "input": [text], "encoding_format": "base64"}).encode(),
        vector=lambda body, _: base64.b64decode(json.loads(body)["data"][0]["embedding"]),
    ),
    "pytriton": HttpPeer(
        packages="nvidia-pytriton sentence-transformers",  # its interpreter's libpython must be where the loader finds it: the system's is
        command=lambda python, _, port: [python, str(FOLDER / "pytriton_server.py"), str(port)],
        path="/v2/models/embedder/infer",
        body=_triton_body,
        vector=_triton_vector,
    ),
}


def request(peer: HttpPeer, text: str) -> bytes:
    """The whole HTTP/1.1 request for one text, on a connection that is kept."""
    body = peer.body(text)
    head = f"POST {peer.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def reply(reader: asyncio.StreamReader) -> tuple[bytes, dict[str, str]]:
    """Body and headers (lower case) of the next answer on a connection.

    Raises:
        ConnectionError: it is no success, or has no stated length.
    """
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    if "content-length" not in headers:
        raise ConnectionError(f"an answer without a length: {status}")
    body = await reader.readexactly(int(headers["content-length"]))
    if status.split(" ")[1] != "200":
        raise ConnectionError(f"{status}: {body[:200].decode(errors='replace')}")
    return body, headers


@contextmanager
def started_peer(name: str, python: str, checkpoint: str) -> Iterator[Server]:
    """A peer's server that has answered its first text.

    Raises:
        DidNotStart: it did not.
    """
    peer = PEERS[name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "CHECKPOINT": checkpoint, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # its interpreter has all it needs
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        command = peer.command(python, checkpoint, port)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while not _answers(peer, port):
                if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    log.seek(max(0, log.tell() - 1_000))
                    raise DidNotStart(f"{name} did not start: {log.read().decode(errors='replace')}")
                time.sleep(POLL_SECONDS)
            yield Server(f"127.0.0.1:{port}", process.pid, time.perf_counter() - began)
        finally:
            _stop(process)


def _answers(peer: HttpPeer, port: int) -> bool:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{peer.path}", data=peer.body("ready?"), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=START_SECONDS) as response:  # noqa: S310
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """A server and the processes that it began, which share its session's process group."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def tree_cpu_seconds(pid: int) -> float:
    """User and system time that a process and all that descend from it have used so far."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(used.get(member, 0.0) for member in family)

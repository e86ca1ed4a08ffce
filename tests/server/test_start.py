"""What a start does before it serves: what is needed, side by side, and nothing stays open of a start that failed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from openbook_server import pair, serving
from openbook_server.buckets import COARSE, FINE
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.config import ServerConfig
from openbook_server.errors import BundleInvalid, FingerprintMismatch
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.pair import load_graphs
from openbook_server.runtime import Graph, build_device


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize("prepares", [False, True])
def test_every_length_is_run_once_only_where_the_device_prepares_itself_for_each(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, prepares: bool
) -> None:
    run, shapes = Graph.run, []

    def noted(graph: Graph, inputs: dict[str, np.ndarray], *, states: bool = False) -> dict[str, np.ndarray]:
        shapes.append(inputs["input_ids"].shape)
        return run(graph, inputs, states=states)  # type: ignore[arg-type]  # a dict is a mapping

    monkeypatch.setattr(Graph, "run", noted)
    monkeypatch.setattr(pair, "measure_invariance", lambda *_: frozenset())  # runs lengths of its own
    load_graphs(bundle, dataclasses.replace(build_device("cpu", "fp32", 1), prepares_lengths=prepares))
    golden = bundle.golden()
    assert bundle.reader is not None
    checked = sum(len(golden[f"{model}/input_ids"]) for model in ("embedder", "reader"))
    warmed = len(COARSE.padded_lengths(bundle.embedder.max_tokens)) + len(FINE.padded_lengths(bundle.reader.max_tokens))
    rows = sum(rows for rows, _ in shapes)
    assert rows == checked + 1 + (warmed if prepares else 0)  # one whose states are checked as well


def start(bundle: Path, folder: Path) -> None:
    async def begin() -> None:
        async with serving.running_server(bundle, folder, ServerConfig(port=0, device="cpu", threads=1)):
            raise AssertionError("it must not serve")

    asyncio.run(begin())


def test_a_start_whose_graphs_fail_lets_go_of_the_knowledge_base(
    tiny_bundle: Path, bundle: Bundle, tiny_knowledge_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise BundleInvalid("its golden vectors do not match")

    monkeypatch.setattr(serving, "load_graphs", fail)
    with pytest.raises(BundleInvalid, match="golden"):
        start(tiny_bundle, tiny_knowledge_base)
    EmbeddedKnowledgeBase(tiny_knowledge_base, fingerprint=bundle.embedder.fingerprint, dim=bundle.embedder.dim).close()


def test_a_start_whose_knowledge_base_fails_says_so(tiny_bundle: Path, bundle: Bundle, tmp_path: Path) -> None:
    EmbeddedKnowledgeBase(tmp_path / "kb", fingerprint="0" * 64, dim=bundle.embedder.dim, create=True).close()
    with pytest.raises(FingerprintMismatch, match="000000000000"):
        start(tiny_bundle, tmp_path / "kb")


# Loads for ever, and says so.
LOADING = """
import sys, threading
from openbook_server import serving
from openbook_server.frontends import child, engine_process

def load(*_):
    print("loading", file=sys.stderr, flush=True)
    threading.Event().wait()

serving._load = load
"""
SERVE = LOADING + "import sys; from openbook import cli; sys.exit(cli.main(['serve', 'bundle', '--port', '0']))"
ENGINE = LOADING + "sys.exit(child.run(engine_process.main))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_while_it_loads_stops_at_once(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVE], stderr=subprocess.PIPE, text=True) as process:
        check_that_it_stops(process, number)


def test_an_engine_that_is_told_to_stop_while_it_loads_stops_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "engine"))
        listening.listen()
        fd = listening.fileno()
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", ENGINE], stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=[fd]) as process:
            config = dataclasses.asdict(ServerConfig(port=1))
            orders = {"config": config, "bundle": "b", "knowledge_base": None, "listening": fd, "socket": "engine", "restarts": {}}
            assert process.stdin is not None
            process.stdin.write(json.dumps(orders) + "\n")
            process.stdin.flush()
            check_that_it_stops(process, signal.SIGTERM)


# Saves its index for ever when it is told to stop, and says so.
SAVING = """
import sys, threading
from openbook import cli
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase

def save(_):
    print("saving", file=sys.stderr, flush=True)
    threading.Event().wait()

EmbeddedKnowledgeBase.snapshot = save
sys.exit(cli.main(["serve", *sys.argv[1:], "--port", "0", "--device", "cpu", "--threads", "1", "--drain-seconds", "0"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_whatever_the_server_is_at(
    tiny_bundle: Path, tiny_knowledge_base: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", SAVING, str(tiny_bundle), str(tiny_knowledge_base)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if " serving " in line or line == "saving\n":
                    process.send_signal(number)
                if line == "saving\n":
                    break
            assert process.wait(60) == 128 + number
        finally:
            process.kill()


def check_that_it_stops(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line == "loading\n":
                process.send_signal(number)
                break
        assert process.wait(60) == 0, said
        assert process.stderr.read().endswith("stopped while loading\n")
    finally:
        process.kill()

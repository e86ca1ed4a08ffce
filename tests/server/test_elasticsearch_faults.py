"""A cluster of two real nodes loses one by kill -9 in the middle of a load.

OPENBOOK_TEST_ELASTICSEARCH_NODE is a command that starts a node and prints its pid: `COMMAND start setting=value...`, with the
node's name in ES_NODE, its ports in ES_PORT and ES_TRANSPORT_PORT, and `COMMAND clean` deletes what it left. Without it the
test is skipped.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator

import elasticsearch
import numpy as np
import pytest
from openbook_server.errors import KnowledgeBaseUnavailable
from openbook_server.knowledge import Document, Passage, SearchOptions
from openbook_server.knowledge.elastic import connection
from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase

NODE = "OPENBOOK_TEST_ELASTICSEARCH_NODE"
DIM, BATCH = 8, 5


class Node:
    """One node of a cluster of two."""

    def __init__(self, command: str, name: str, port: int, transport_port: int, settings: list[str]) -> None:
        self._command, self._settings, self.port = command, settings, port
        self._environment = os.environ | {"ES_NODE": name, "ES_PORT": str(port), "ES_TRANSPORT_PORT": str(transport_port)}
        self._pid = 0

    def start(self) -> None:
        printed = self._run("start", *self._settings)
        found = re.search(r"pid (\d+)", printed)
        assert found, printed
        self._pid = int(found[1])

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def clean(self) -> None:
        self._run("clean")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self._command, *arguments], env=self._environment, stdout=subprocess.PIPE, text=True, timeout=900)
        assert done.returncode == 0, done.stdout
        return done.stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """A master that holds data, and a node that only holds data."""
    command = os.environ.get(NODE)
    if not command:
        pytest.skip(f"{NODE} is not set to a command that starts an Elasticsearch node")
    first, second, first_transport, second_transport = free_ports(4)
    name = f"fault-{uuid.uuid4().hex[:8]}"
    cluster = [
        f"cluster.name={name}",
        "discovery.type=",
        f"cluster.initial_master_nodes={name}-1",
        f"discovery.seed_hosts=127.0.0.1:{first_transport},127.0.0.1:{second_transport}",
    ]
    pair = (
        Node(command, f"{name}-1", first, first_transport, cluster),
        Node(command, f"{name}-2", second, second_transport, [*cluster, "node.roles=data"]),
    )
    try:
        for node in pair:
            node.start()
        yield pair
    finally:
        for node in pair:
            node.clean()


class Load(threading.Thread):
    """Writes documents, new ones and the same again, until it is told to stop; knows what was acknowledged."""

    def __init__(self, knowledge_base: ElasticsearchKnowledgeBase) -> None:
        super().__init__()
        self._knowledge_base = knowledge_base
        self.acknowledged: dict[str, str] = {}  # document -> digest
        self.refused = 0
        self.stopping = threading.Event()
        self.progress = threading.Semaphore(0)  # a batch each

    def run(self) -> None:
        number = 0
        while not self.stopping.is_set():
            ids = [f"d{(number + at) % 60}" for at in range(BATCH)]
            try:
                write(self._knowledge_base, str(number), ids)
            except KnowledgeBaseUnavailable:
                self.refused += 1
                for id_ in ids:  # they may be stored or not: no promise was made
                    self.acknowledged.pop(id_, None)
            else:
                self.acknowledged |= dict.fromkeys(ids, str(number))
                self.progress.release()
            number += BATCH

    def wait(self, batches: int) -> None:
        for _ in range(batches):
            assert self.progress.acquire(timeout=120), "the load makes no progress"


def write(knowledge_base: ElasticsearchKnowledgeBase, digest: str, ids: list[str]) -> None:
    rows = [Passage(id=f"{id_}#{n}", document_id=id_, text=f"w{digest} of {id_}", start=n) for id_ in ids for n in range(2)]
    vectors = np.random.default_rng(int(digest)).normal(size=(len(rows), DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    knowledge_base.replace_documents([(Document(id=id_, text=""), digest) for id_ in ids], rows, vectors)


def check(knowledge_base: ElasticsearchKnowledgeBase, acknowledged: dict[str, str]) -> None:
    """Whatever was acknowledged is there, whole, and found; nothing that it replaced is."""
    assert knowledge_base.digests(list(acknowledged)) == acknowledged
    stored = knowledge_base.documents(list(acknowledged))
    for id_, digest in acknowledged.items():
        assert [passage.text for passage in stored[id_]] == [f"w{digest} of {id_}"] * 2
    [hits] = knowledge_base.search(["of"], None, SearchOptions(top_k=1_000, mode="lexical"))
    found = {hit.passage.document_id: hit.passage.text for hit in hits}
    assert {id_: found.get(id_) for id_ in acknowledged} == {id_: f"w{digest} of {id_}" for id_, digest in acknowledged.items()}
    assert len(hits) == knowledge_base.counts().passages


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_node_is_lost_in_the_middle_of_a_load(nodes: tuple[Node, Node], kills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nodes
    hosts = f"127.0.0.1:{second.port},127.0.0.1:{first.port}"

    def opened(name: str, options: str) -> ElasticsearchKnowledgeBase:
        return ElasticsearchKnowledgeBase(f"elasticsearch://{hosts}/{name}?{options}", fingerprint="f", dim=DIM, create=True)

    safe = opened("safe", "shards=2&replicas=1")  # goes on without the node
    strict = opened("strict", "shards=2&replicas=1&active_copies=2&timeout=2")  # answers, but acknowledges only what two nodes hold
    single = opened("single", "shards=2&replicas=0&timeout=2")  # half of it is on the node, so it answers nothing without it
    with elasticsearch.Elasticsearch(f"http://127.0.0.1:{first.port}", request_timeout=130) as client:
        for knowledge_base in (strict, single):
            write(knowledge_base, "1", ["a", "b", "c", "d", "e", "f"])
        client.cluster.health(wait_for_status="green", timeout="120s")
        load = Load(safe)
        load.start()
        try:
            for _ in range(kills):
                load.wait(3)
                second.kill()
                load.wait(3)
                assert load.is_alive()
                check(strict, dict.fromkeys("abcdef", "1"))
                with monkeypatch.context() as short:
                    short.setattr(connection, "WRITING_PATIENCE", 3.0)
                    short.setattr(connection, "PATIENCE", 3.0)
                    with pytest.raises(KnowledgeBaseUnavailable):
                        write(strict, "2", ["a"])
                    for ask in (lambda: single.search(["of"], None, SearchOptions(top_k=9, mode="lexical")), single.counts):
                        with pytest.raises(KnowledgeBaseUnavailable):  # never an answer from the half that is left
                            ask()
                second.start()
                assert not client.cluster.health(wait_for_status="green", timeout="120s")["timed_out"]
                load.wait(1)
        finally:
            load.stopping.set()
            load.join(timeout=180)
    assert len(load.acknowledged) >= 3 * BATCH
    check(safe, load.acknowledged)
    check(single, dict.fromkeys("abcdef", "1"))
    write(strict, "3", ["a"])
    check(strict, dict.fromkeys("bcdef", "1") | {"a": "3"})
    for knowledge_base in (safe, strict, single):
        knowledge_base.close()

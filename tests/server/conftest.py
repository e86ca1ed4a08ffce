"""Fixtures of the server's tests: places for knowledge bases, and a knowledge base of three tiny documents.

OPENBOOK_TEST_ELASTICSEARCH (HOST:PORT of a server whose data nobody needs) adds Elasticsearch to the places; without it
that half is skipped.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from openbook_server.bundle import load_bundle
from openbook_server.frontends.link import Link
from openbook_server.frontends.relay import Relay
from openbook_server.ingest.embed import PassageEmbedder
from openbook_server.ingest.indexing import Indexing
from openbook_server.ingest.preparation import Splitting
from openbook_server.ingest.sources import find_sources
from openbook_server.knowledge import KnowledgeBase, open_knowledge_base
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.listening import Handlers
from openbook_server.rpc import RpcServer
from openbook_server.runtime import Graph, build_device
from openbook_server.tokenization import TextEncoder, load_tokenizer

ELASTICSEARCH = "OPENBOOK_TEST_ELASTICSEARCH"
FINGERPRINT = "f" * 64

DOCUMENTS = """\
{"_id": "d0", "title": "red", "text": "the red city by the river was one of three"}
{"_id": "d1", "title": "blue", "text": "the blue king of the green city"}
{"_id": "d2", "text": "one book of the king", "metadata": {"shelf": "two"}}
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a knowledge base can be, and the same for every kind."""

    target: str

    @property
    def in_elasticsearch(self) -> bool:
        return "://" in self.target

    def open(self, *, fingerprint: str = FINGERPRINT, dim: int = 16, create: bool = True, **options: int) -> KnowledgeBase:
        """`options` are the embedded one's; the other knows none of them."""
        if not self.in_elasticsearch:
            return EmbeddedKnowledgeBase(Path(self.target), fingerprint=fingerprint, dim=dim, create=create, **options)
        from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase

        return ElasticsearchKnowledgeBase(self.target, fingerprint=fingerprint, dim=dim, create=create)


@pytest.fixture(scope="session")
def elasticsearch_host() -> str:
    """HOST:PORT of a real server; skips where there is none."""
    host = os.environ.get(ELASTICSEARCH)
    if not host:
        pytest.skip(f"{ELASTICSEARCH} is not set to the HOST:PORT of an Elasticsearch server")
    return host


@pytest.fixture
def alias(elasticsearch_host: str) -> Iterator[str]:
    """Of a knowledge base that is not there yet; whatever is made under names that begin so is deleted."""
    import elasticsearch

    alias = f"openbook-test-{uuid.uuid4().hex[:12]}"
    yield alias
    with elasticsearch.Elasticsearch(f"http://{elasticsearch_host}") as client:
        for index in client.indices.get(index=f"{alias}*").body:
            client.indices.delete(index=index)


@pytest.fixture(params=["embedded", "elasticsearch"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place for a knowledge base, of every kind that there is."""
    if request.param == "embedded":
        return Place(str(tmp_path / "kb"))
    host, alias = request.getfixturevalue("elasticsearch_host"), request.getfixturevalue("alias")
    return Place(f"elasticsearch://{host}/{alias}?shards=2&replicas=0")


@pytest.fixture
def direct_place(place: Place, tmp_path: Path) -> Place:
    """Another one of the same kind."""
    return Place(place.target.replace("?", "-direct?") if place.in_elasticsearch else str(tmp_path / "direct"))


def _index(tiny_bundle: Path, target: str, folder: Path) -> None:
    (folder / "documents.jsonl").write_text(DOCUMENTS)
    bundle = load_bundle(tiny_bundle)
    device = build_device("cpu", "fp32", 1)
    graph = Graph(bundle.graph_path("embedder", "fp32"), device)
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    embed = PassageEmbedder(tokenizer, graph, bundle.embedder)
    knowledge_base = open_knowledge_base(target, bundle, create=True)
    indexing = Indexing(knowledge_base, TextEncoder(tokenizer, bundle.tokenizer_digest), embed, Splitting(20, 4))
    indexing.run(find_sources([str(folder / "documents.jsonl")]), lambda progress: None, lambda: False)
    knowledge_base.close()


@pytest.fixture(scope="session")
def _indexed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knowledge")
    _index(tiny_bundle, str(folder / "kb"), folder)
    return folder / "kb"


@pytest.fixture
def tiny_knowledge_base(_indexed: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test, for one process at a time may open a knowledge base."""
    return Path(shutil.copytree(_indexed, tmp_path / "kb"))


@pytest.fixture
def index_with(place: Place, tmp_path: Path) -> Callable[[Path], str]:
    """Indexes the three documents with a bundle, directly, beside `place`, and returns where they are."""

    def index(bundle: Path) -> str:
        name = load_bundle(bundle).name
        folder = tmp_path / name
        folder.mkdir()
        target = place.target.replace("?", f"-{name}?") if place.in_elasticsearch else str(folder / "kb")
        _index(bundle, target, folder)
        return target

    return index


@pytest.fixture
def tiny_place(place: Place, tiny_bundle: Path, _indexed: Path, tmp_path: Path) -> Place:
    """A place of every kind with the three documents in it."""
    if place.in_elasticsearch:
        _index(tiny_bundle, place.target, tmp_path)
    else:
        shutil.copytree(_indexed, place.target)
    return place


class FrontEnd:
    """One in this process."""

    def __init__(self, path: Path, options: list[tuple[str, int]], max_calls: int, max_message_bytes: int) -> None:
        self.stopping = asyncio.Event()
        self.answering: list[bool] = []  # whether the engine answered, at each change
        self.link = Link(path, self._told, self.stopping, max_message_bytes=max_message_bytes)
        self.server = RpcServer([], options=options, max_calls=max_calls, otherwise=self.link.forward)
        self.port = self.server.listen("127.0.0.1:0")
        self.changed = asyncio.Event()

    async def _told(self, ready: bool) -> None:
        self.answering.append(ready)
        self.changed.set()


class Behind:
    """An engine and front ends without their processes, on a socket that stays when the engine goes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()

    def close(self) -> None:
        self._listening.close()

    @asynccontextmanager
    async def engine(self, handlers: Handlers, *, max_calls: int = 1_000, max_message_bytes: int = 100_000) -> AsyncIterator[Relay]:
        """One after the other, as after a crash."""
        relay = Relay(handlers, max_calls=max_calls, max_message_bytes=max_message_bytes)
        await relay.listen(self._listening.dup())
        relay.tell(ready=True)
        yield relay
        await relay.stop(0)

    def crash(self, relay: Relay) -> None:
        """As far as front ends can tell."""
        assert relay._server is not None
        relay._server.close()
        for connection in relay._front_ends:
            assert connection._transport is not None
            connection._transport.abort()

    @asynccontextmanager
    async def front_end(
        self, options: list[tuple[str, int]], max_calls: int = 1_000, max_message_bytes: int = 100_000
    ) -> AsyncIterator[FrontEnd]:
        """Within, it knows that the engine answers."""
        front_end = FrontEnd(self._path, options, max_calls, max_message_bytes)
        front_end.server.start()
        linked = asyncio.ensure_future(front_end.link.run())
        await front_end.changed.wait()
        yield front_end
        await front_end.server.stop(0)
        linked.cancel()
        await asyncio.gather(linked, return_exceptions=True)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Behind]:
    behind = Behind(tmp_path / "engine")
    yield behind
    behind.close()
